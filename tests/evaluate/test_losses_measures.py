"""Every measure of rows and probes against slow computations, and how often what is read."""

import math
from collections import defaultdict
from itertools import pairwise

import datasets
import numpy as np
import pytest
import torch
from evaluations import (
    DOCUMENTS,
    LABELS,
    LENGTH,
    LONG,
    OPTIONS,
    POSITIONS,
    SIZES,
    TOKENS,
    settings,
)

from texts import trained_tokenizer
from tokenweight import load_model
from tokenweight.evaluate import EvalSettings, ProbeGrid, evaluate, probe_grid
from tokenweight.evaluate import run as evaluate_module
from tokenweight.evaluate.losses import Rows

LABELS[0, 12:18] = LABELS[3] = -100  # of row 3 no token counts


@torch.no_grad()
def slow_losses(model, data):
    """(row, column, tokens before it in its document, losses by context) of every token that counts.

    Each loss has a forward pass over nothing but its context; those of one length stand in one batch.
    """
    contexts = {"full": None, 6: (6, 3), 10: (10, 5), "long": LONG}
    found, passes = [], defaultdict(list)
    for row in range(len(TOKENS)):
        starts = [0] if data == "rows" else [t for t in range(LENGTH) if POSITIONS[row][t] == 0]
        for start, stop in pairwise([*starts, LENGTH]):
            for t in range(1, stop - start):
                if data == "packed" and LABELS[row, start + t] == -100:
                    continue
                found.append((row, start + t, t, {}))
                for name, context in contexts.items():
                    before = (
                        t
                        if context is None or t < context[0]
                        else context[0] - context[1] + ((t - context[0]) % context[1])
                    )
                    passes[before].append((row, start + t, name, found[-1][-1]))
    for before, wanted in passes.items():
        read = torch.stack([TOKENS[row, column - before : column] for row, column, *_ in wanted])
        nll = -model(read, use_cache=False).logits[:, -1].log_softmax(dim=1)
        for line, (row, column, name, losses) in zip(nll, wanted):
            losses[name] = line[TOKENS[row, column]].item()
    return found


def slow_measures(losses, judges, data):
    """Total and number of tokens of each document, by the names of the measures; the judges have a vote each."""
    sums = defaultdict(lambda: defaultdict(lambda: [0.0, 0.0]))
    for (row, _, t, loss), *judged in zip(losses, *judges):
        document = DOCUMENTS[row] if data == "rows" else row

        def add(name, value, weight=1.0, document=document):
            sums[name][document][0] += weight * value
            sums[name][document][1] += weight

        full = loss["full"]
        gains = [judge["long"] - judge["full"] for *_, judge in judged]
        key = [gain > 2 and judge["full"] < 2 for gain, (*_, judge) in zip(gains, judged)]
        start = 0 if t < 6 else 6 if t < 12 else 12
        for name, counts in {
            "all": True, "short_range": t < 7, "beyond_half": t >= 12, f"position_{start}": True,
            "context_full": t >= 10,
        }.items():  # fmt: skip
            if counts:
                add(name, full)
        for size in SIZES:
            if t >= 10:
                add(f"context_{size}", loss[size])
                add(f"benefit_{size}", loss[size] - full)
        add("longppl", full, sum(key) / len(key))
        add("longppl_soft", full, sum(min(math.exp(gain), 5) for gain in gains) / len(gains))
        add("key_tokens", key[-1])
    units = list(dict.fromkeys(DOCUMENTS)) if data == "rows" else range(len(TOKENS))
    return {name: [found[unit] for unit in units] for name, found in sums.items()}


@pytest.fixture(scope="module")
def losses(place):
    loaded = {name: load_model(place / name) for name in ("base", "trained", "judge")}
    return {(name, data): slow_losses(model, data) for name, model in loaded.items() for data in ("rows", "packed")}


@pytest.mark.parametrize("evaluator", [None, "judge"])
@pytest.mark.parametrize("data", ["rows", "packed"])
def test_every_measure_of_rows_is_that_of_one_forward_pass_for_each_token(data, evaluator, place, losses, tmp_path):
    record = evaluate(settings(place, tmp_path / "out", data=data, baseline="base", evaluator=evaluator))
    for name, model in zip(["base", "trained"], record["models"]):
        judges = [losses[judge, data] for judge in ([evaluator] if evaluator else dict.fromkeys(["base", name]))]
        expected = slow_measures(losses[name, data], judges, data)
        beside = slow_measures(losses["base", data], judges, data)
        assert {measure["name"] for measure in model["measures"]} == set(expected)
        for measure in model["measures"]:
            found = torch.tensor([measure["total"], measure["num_tokens"]], dtype=torch.float64).T
            # Sums of some 100 float64 losses up to 30; what judges find is stored in float32.
            rtol = 2**-23 if measure["name"] == "longppl_soft" or measure["judge"] == "pair" else 1e-11
            wanted = torch.tensor(expected[measure["name"]], dtype=torch.float64)
            torch.testing.assert_close(found, wanted, rtol=rtol, atol=1e-9 if rtol < 1e-9 else 1e-5)
            total, number = wanted.sum(dim=0).tolist()
            value = math.exp(total / number) if measure["unit"] == "perplexity" else total / number
            assert measure["value"] == pytest.approx(value, rel=1e-6)
            assert (measure["baseline_total"] is not None) == (measure["judge"] == "pair")
            if measure["judge"] == "pair":
                assert measure["baseline_total"] == pytest.approx([sum for sum, _ in beside[measure["name"]]], rel=1e-6)
        found = {measure["name"]: measure["judge"] for measure in model["measures"] if measure["judge"]}
        judge = "third" if evaluator else "self" if name == "base" else "pair"
        assert found == {"longppl": judge, "longppl_soft": judge}
    key = slow_measures(losses["base", data], [losses[evaluator or "base", data]], data)["longppl"]
    assert 2 <= sum(number for _, number in key) <= 6  # with these seeds
    assert record["unit"] == ("document" if data == "rows" else "row")
    assert len(record["documents"]) == (3 if data == "rows" else 6)


def count_tokens_read(monkeypatch):
    """A dictionary from names of models to the tokens of each of their passes, but for those that prove their parts."""
    read = defaultdict(list)

    def load(name, **options):
        model = load_model(name, **options)

        def count(module, arguments, options, output):
            shape = options["input_ids"].shape
            if shape[1] != 8:
                read[str(name).rpartition("/")[2]].append(shape.numel())

        model.base_model.register_forward_hook(count, with_kwargs=True)
        return model

    monkeypatch.setattr(evaluate_module, "load_model", load)
    return read


@pytest.mark.parametrize("evaluator", [None, "judge", "trained"])
def test_a_row_is_read_once_whole_and_once_in_the_windows_of_each_context(place, tmp_path, monkeypatch, evaluator):
    read = count_tokens_read(monkeypatch)
    evaluate(settings(place, tmp_path / "out", baseline="base", evaluator=evaluator))
    # Windows of 6 tokens at 6, 9, … 21; of 10 tokens at 10, 15, 20, the last of which is shorter, but padded; of 9
    # tokens at 9, 13, 17, 21, for those that find key tokens.
    whole, curve, long = 6 * LENGTH, 6 * (6 * 6 + 3 * 10), 6 * 4 * 9
    expected = {"base": whole + curve, "trained": whole + curve}
    judges = [evaluator] if evaluator else ["base", "trained"]
    for judge in judges:
        expected[judge] = expected.get(judge, whole) + long
    assert {name: sum(passes) for name, passes in read.items()} == expected
    assert {name: len(passes) for name, passes in read.items()} == {
        name: 1 + 2 * (name != "judge") + (name in judges) for name in expected
    }
    read.clear()
    evaluate(settings(place, tmp_path / "again", model="copy", baseline=tmp_path / "out"))
    assert {name: sum(passes) for name, passes in read.items()} == {
        "copy": whole + curve + (long if evaluator is None else 0)
    }


@pytest.mark.parametrize("by", [pytest.param("likelihood", marks=pytest.mark.slow), "generation"])
def test_probes_are_summed_by_the_fact_they_ask_for(by, with_tokenizer, tmp_path):
    lengths, depths, families, num = [400, 440], [0.2, 0.9], ["single", "frequent_words"], 3
    haystack = tmp_path / "haystack.txt"
    haystack.write_text("One day passed. Then came another. " * 3)
    if by == "generation":  # which takes longer
        depths, families, num = [0.9], ["single"], 2
    chosen = {"probes": families, "probe_lengths": lengths, "depths": depths}
    chosen = {name: ",".join(map(str, values)) for name, values in chosen.items()} | {"num_probes": num}
    options = {**OPTIONS, **chosen, "sizes": "110", "seed": 4, "haystack": haystack, "probe_by": by}
    record = evaluate(
        EvalSettings(str(with_tokenizer / "trained"), with_tokenizer / "rows", tmp_path / "out", **options)
    )
    found = {measure["name"]: measure for measure in record["models"][0]["measures"]}
    model, text = load_model(with_tokenizer / "trained"), haystack.read_text()
    grid = probe_grid(model, trained_tokenizer(), ProbeGrid(families, lengths, depths, num, 4, text, by))
    for family in families:
        for length in [None, *lengths]:
            records = [r for r in grid if r.family == family and length in (None, r.length)]
            name = f"probe_{family}" + (f"_{length}" if length else "")
            assert found[name]["total"] == [sum(r.accuracies[i] for r in records) for i in range(num)]
            assert found[name]["num_tokens"] == [len(records)] * num
            assert found[name]["value"] == pytest.approx(sum(r.accuracy for r in records) / len(records))
            assert (f"{name}_margin" in found) == (f"{name}_loss" in found) == (by == "likelihood")
            if by == "likelihood":
                assert found[f"{name}_loss"]["total"] == [sum(r.losses[i] for r in records) for i in range(num)]
                assert found[f"{name}_margin"]["total"] == [sum(r.margins[i] for r in records) for i in range(num)]
    assert sum(name.startswith("probe_") for name in found) == (18 if by == "likelihood" else 3)


def batches_of(lengths, max_tokens, **columns):
    data = datasets.Dataset.from_dict({"input_ids": [[3] * length for length in lengths], **columns})
    rows = Rows(data, np.array(lengths), max_tokens)
    return [(batch.start, batch.stop, place.start, place.stop) for batch, place in rows.batches()]


def test_a_batch_has_rows_of_one_length_and_a_row_at_least_and_one_row_if_documents_are_packed():
    lengths = [4, 4, 4, 2, 9, 4]
    expected = [(0, 2, 0, 8), (2, 3, 8, 12), (3, 4, 12, 14), (4, 5, 14, 23), (5, 6, 23, 27)]
    assert batches_of(lengths, 8) == expected
    packed = batches_of(lengths, 8, position_ids=[[*range(length)] for length in lengths])
    assert [(start, stop) for start, stop, *_ in packed] == [(i, i + 1) for i in range(6)]
