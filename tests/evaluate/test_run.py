"""Baselines, repeated runs, what is left after a failure, and what is refused before work starts."""

import math
import re
import shutil

import datasets
import pytest
from evaluations import TOKENS, save, settings, values

import models
from texts import trained_tokenizer
from tokenweight.evaluate import evaluate
from tokenweight.evaluate import run as evaluate_module
from tokenweight.models import DualChunk, load_model, token_nll, with_dual_chunk
from tokenweight.records import read_json, write_json


def test_a_second_run_gives_the_same_record_and_batches_change_nothing(place, tmp_path):
    for name, options in {"one": {}, "two": {}, "small": {"max_tokens": 1}}.items():
        evaluate(settings(place, tmp_path / name, baseline="base", **options))
    one, two, small = (read_json(tmp_path / name / "eval.json") for name in ("one", "two", "small"))
    assert {**one, "environment": None} == {**two, "environment": None}
    for name in ("table.md", "table.csv", "token_weights.npy"):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()
    for mine, other in zip(one["models"], small["models"]):
        assert values(mine) == pytest.approx(values(other), rel=1e-9)  # float64 sums in another order


def test_a_baseline_from_a_folder_is_the_baseline_from_the_model_to_the_last_digit(place, tmp_path):
    whole = evaluate(settings(place, tmp_path / "whole", baseline="base"))
    evaluate(settings(place, tmp_path / "first", model="base"))
    second = evaluate(settings(place, tmp_path / "second", baseline=tmp_path / "first"))
    for name in ("settings", "models", "comparison", "evaluator", "documents"):
        assert second[name] == whole[name]
    assert (tmp_path / "second" / "table.md").read_text() == (tmp_path / "whole" / "table.md").read_text()
    third = evaluate(settings(place, tmp_path / "third", model="judge", baseline=tmp_path / "second"))
    assert [row[0]["model"] for row in third["comparison"]] == [str(place / m) for m in ("base", "trained", "judge")]
    assert third["models"][:2] == whole["models"]


@pytest.mark.slow
def test_a_copy_of_the_evaluator_is_as_much_a_party_as_the_evaluator(place, tmp_path):
    judges = {}
    for name, options in {
        "baseline": {"evaluator": "base"}, "model": {"evaluator": "trained"}, "third": {"evaluator": "judge"},
        "copied": {"evaluator": "copy"},
    }.items():  # fmt: skip
        record = evaluate(settings(place, tmp_path / name, baseline="base", **options))
        rows = [{entry["measure"]: entry for entry in row} for row in record["comparison"]]
        judges[name] = [row["longppl_soft"]["judge"] for row in rows]
        entry = rows[1]["longppl_soft"]
        assert entry["change"] is not None
        assert (entry["low"] is None) == (name != "third")
        assert entry["clear"] <= (name == "third")
    assert judges == {
        "baseline": ["self", "third"], "model": ["third", "self"], "third": ["third", "third"],
        "copied": ["self", "third"],
    }  # fmt: skip
    with pytest.raises(ValueError, match=r"base found the key tokens of .*: expected the same evaluator, or none"):
        evaluate(settings(place, tmp_path / "out", model="copy", baseline=tmp_path / "baseline", evaluator="judge"))
    again = evaluate(settings(place, tmp_path / "again", model="copy", baseline=tmp_path / "third"))
    assert again["evaluator"] == read_json(tmp_path / "third" / "eval.json")["evaluator"]
    found = {entry["measure"]: entry["judge"] for entry in again["comparison"][2]}
    assert (len(again["comparison"]), found["longppl"], found["all"]) == (3, "third", None)


def test_the_attention_of_both_models_is_recorded(place, tmp_path):
    record = evaluate(settings(place, tmp_path / "out", baseline="base", attn_implementation="eager"))
    assert [model["attn_implementation"] for model in record["models"]] == ["eager", "eager"]
    assert record["settings"]["attn_implementation"] == "eager"


@pytest.mark.parametrize("same", ["path", "rows", "fingerprint", "mixture", "none"])
def test_sequences_that_a_model_was_trained_on_are_no_measure_of_it(same, place, tmp_path, caplog):
    shutil.copytree(place / "trained", tmp_path / "run")
    fingerprint = evaluate_module.open_rows(place / "rows")[1].fingerprint
    data = {"path": str(place / "rows") if same == "path" else "elsewhere", "share": 1.0}
    made = {"rows": str(place / "rows")} if same == "rows" else {"rows_fingerprint": fingerprint}
    record = {"settings": {"data": data["path"]}, "data": made if same in ("rows", "fingerprint") else {}}
    if same == "mixture":
        record = {"settings": {"data": [data, data]}, "data": {}, "mixture": {"a": {"data": {}}, "b": {"data": made}}}
    write_json(tmp_path / "run" / "run.json", record)
    evaluate(settings(place, tmp_path / "out", model=str(tmp_path / "run")))
    assert ("was trained on these sequences" in caplog.text) == (same != "none")


def test_a_copy_of_the_baseline_changes_by_exactly_nothing(place, tmp_path):
    record = evaluate(settings(place, tmp_path / "out", model="copy", baseline="base"))
    entries = record["comparison"][1]
    assert len(entries) == len(record["models"][0]["measures"]) > 10
    for entry in entries:
        none = 1.0 if entry["unit"] == "perplexity" else 0.0
        # One document of three may hold all key tokens: then there is no interval.
        assert entry["change"] == none
        assert {entry["low"], entry["high"]} <= {none, None}
        assert not entry["clear"]
        assert not entry["best"]


def test_a_model_that_fails_leaves_nothing_behind(place, tmp_path):
    model = models.tiny(seed=3)
    model.get_input_embeddings().weight.data[TOKENS[0, 2]] = math.nan
    model.save_pretrained(tmp_path / "model")
    with pytest.raises(ValueError, match="long loss of row 0, position 1 is nan"):
        evaluate(settings(place, tmp_path / "out", model=tmp_path / "model", baseline="base"))
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


@pytest.fixture(scope="module")
def earlier(place):
    """The folder of an evaluation of the baseline."""
    evaluate(settings(place, place / "earlier", model="base"))
    return place / "earlier"


def refusal(place, tmp_path, monkeypatch, **options):
    """The line with which settings are refused, before any model is measured."""
    monkeypatch.setattr(evaluate_module, "load_model", None)
    before = sorted(path.name for path in tmp_path.iterdir())
    with pytest.raises(ValueError, match=r"\w") as error:
        evaluate(settings(place, options.pop("out", tmp_path / "out"), **options))
    assert sorted(path.name for path in tmp_path.iterdir()) == before
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"seed": 1}, "was evaluated with other settings (seed is 0 there, 1 now)"),
        ({"short": 8}, "(short is 7 there, 8 now)"),
        ({"sizes": "6"}, "(sizes is [6, 10] there, [6] now)"),
        ({"dtype": "float32"}, "(dtype is 'auto' there, 'float32' now)"),
        ({"long_stride": 5}, "(long_context is [9, 4] there, [9, 5] now)"),
        ({"num_rows": 5}, "num_rows is None there, 5 now; rows_fingerprint is "),
        ({"data": "packed"}, "rows_fingerprint is "),
        ({"data": "labeled"}, "(rows_fingerprint is "),
        ({"data": "renamed"}, "(documents_fingerprint is "),
        ({"evaluator": "judge"}, "each model itself found the key tokens of "),
    ],
    ids=lambda value: str(value)[:30],
)
def test_an_earlier_evaluation_with_other_settings_is_refused_by_name(
    options, message, place, earlier, tmp_path, monkeypatch
):
    if not (place / "labeled").is_dir():
        save(place / "labeled", document=list("aabbbc"), labels=TOKENS.tolist())
        save(place / "renamed", document=list("aabbcc"))
    found = refusal(place, tmp_path, monkeypatch, baseline=earlier, **options)
    assert message in found
    named = f"evaluator {place / 'judge'}: " if "evaluator" in options else f"baseline {earlier}: "
    assert found.startswith(named)


def test_a_damaged_earlier_evaluation_is_refused(place, earlier, tmp_path, monkeypatch):
    for name, (damage, message) in {
        "removed": (lambda folder: (folder / "token_weights.npy").unlink(), "token_weights.npy is missing or damaged"),
        "changed": (lambda folder: (folder / "token_weights.npy").write_bytes(b"0"), "missing or damaged"),
        "empty": (lambda folder: write_json(folder / "eval.json", {"models": []}), "has no evaluator, settings"),
        "torn": (lambda folder: (folder / "eval.json").write_text("{"), "eval.json cannot be read"),
    }.items():
        shutil.copytree(earlier, tmp_path / name)
        damage(tmp_path / name)
        assert message in refusal(place, tmp_path, monkeypatch, baseline=tmp_path / name)


def test_models_that_cannot_read_the_rows_are_refused(place, tmp_path, monkeypatch):
    models.tiny(max_position_embeddings=23).save_pretrained(tmp_path / "short")
    models.tiny(vocab_size=40).save_pretrained(tmp_path / "small")
    for role in ("model", "baseline", "evaluator"):
        found = refusal(place, tmp_path, monkeypatch, **{role: tmp_path / "short"})
        assert found.startswith(
            f"data: sequences of 24 tokens: {tmp_path / 'short'} has 23 positions; extend its context "
        )
        assert "docs/models.md" in found
        assert "is not in the vocabulary" in refusal(place, tmp_path, monkeypatch, **{role: tmp_path / "small"})
        assert "cannot be loaded" in refusal(place, tmp_path, monkeypatch, **{role: tmp_path / "gone"})


def test_of_pieces_the_last_token_needs_no_position_of_its_own(place, tmp_path, monkeypatch):
    shutil.copytree(place / "rows", tmp_path / "pieces")
    write_json(tmp_path / "pieces" / "rows.json", {"short": "decompose"})
    found = []
    for positions in (23, 24):
        models.tiny(max_position_embeddings=positions).save_pretrained(tmp_path / str(positions))
        asked = settings(place, tmp_path / f"of-{positions}", tmp_path / str(positions), data=tmp_path / "pieces")
        found.append(values(evaluate(asked)["models"][0]))
    assert found[0] == found[1]
    models.tiny("gpt2", max_position_embeddings=23).save_pretrained(tmp_path / "table")
    refused = refusal(place, tmp_path, monkeypatch, model=tmp_path / "table", data=tmp_path / "pieces")
    assert refused.startswith("data: sequences of 24 tokens: ")


def test_models_and_rows_of_different_tokenizers_are_refused(with_tokenizer, tmp_path, monkeypatch):
    other = trained_tokenizer(vocab_size=299)
    models.tiny(vocab_size=300, max_position_embeddings=460).save_pretrained(tmp_path / "other")
    other.save_pretrained(tmp_path / "other")
    found = refusal(with_tokenizer, tmp_path, monkeypatch, sizes="110", baseline=tmp_path / "other")
    assert re.search(r"different tokenizers: .*other \([0-9a-f]{16}\)", found)
    shutil.copytree(with_tokenizer / "rows", tmp_path / "rows")
    write_json(tmp_path / "rows" / "rows.json", {"tokenizer": "mine", "tokenizer_fingerprint": "0" * 16})
    found = refusal(with_tokenizer, tmp_path, monkeypatch, data=tmp_path / "rows")
    assert "rows was made with the tokenizer of mine" in found


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"probe_lengths": "100"},
            "probe_lengths 100: length 100 is too short for probes 'single': they need at least ",
        ),
        ({}, "probe_lengths 110,220,440: length 110 is too short"),  # a quarter of a row
        ({"probe_lengths": "300,461"}, "probe_lengths: probes of 461 tokens: "),
        ({"probe_lengths": "125", "probe_by": "generation"}, "length 125 is too short"),  # enough by likelihood
        ({"probes": "single,needle"}, "probes needle: expected none, or some of single, multi_key"),
        ({"num_probes": 0}, "num_probes 0: expected at least 1"),
    ],
    ids=str,
)
def test_probes_that_do_not_fit_are_refused(options, message, with_tokenizer, tmp_path, monkeypatch):
    assert message in refusal(with_tokenizer, tmp_path, monkeypatch, **{"probes": "single", "sizes": "110", **options})


def test_probes_need_a_tokenizer(place, tmp_path, monkeypatch):
    assert "has no tokenizer: expected a tokenizer, or none" in refusal(place, tmp_path, monkeypatch, probes="single")


def test_rows_and_folders_that_are_no_use_are_refused(place, tmp_path, monkeypatch):
    assert "num_rows 0: expected at least 1" in refusal(place, tmp_path, monkeypatch, num_rows=0)
    (tmp_path / "bytes").write_bytes(b"\xff")
    (tmp_path / "blank").write_text("\n")
    for name, message in {"lost": "cannot be read", "bytes": "cannot be read", "blank": "expected"}.items():
        found = refusal(place, tmp_path, monkeypatch, haystack=tmp_path / name)
        assert found.startswith(f"haystack {tmp_path / name}: {message} ")
    assert "no such folder of rows" in refusal(place, tmp_path, monkeypatch, data="gone")
    assert "rows: exists already; name a new folder" in refusal(place, tmp_path, monkeypatch, out=place / "rows")
    datasets.Dataset.from_dict({"input_ids": [[3] * 24, []]}).save_to_disk(str(tmp_path / "hole"))
    assert "hole: row 1 is empty" in refusal(place, tmp_path, monkeypatch, data=tmp_path / "hole")
    datasets.Dataset.from_dict({"input_ids": []}).save_to_disk(str(tmp_path / "none"))
    assert "none" in refusal(place, tmp_path, monkeypatch, data=tmp_path / "none")


def test_a_model_is_compared_with_itself_under_another_attention_beyond_its_length(place, tmp_path):
    short = {"max_position_embeddings": 16, "initializer_range": 0.9}
    models.tiny(seed=0, **short).save_pretrained(tmp_path / "short")
    extended = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 2.0, "original_max_position_embeddings": 16}
    longer = {**short, "max_position_embeddings": 32, "rope_parameters": extended}
    models.tiny(seed=0, **longer).save_pretrained(tmp_path / "yarn")
    with pytest.raises(ValueError, match="16 positions"):
        evaluate(settings(place, tmp_path / "out", model=tmp_path / "short"))
    evaluate(settings(place, tmp_path / "before", model=tmp_path / "yarn"))
    record = evaluate(
        settings(
            place, tmp_path / "after", tmp_path / "short", baseline=tmp_path / "before", attention="dual-chunk:chunk=9"
        )
    )
    model, settings_ = load_model(tmp_path / "short"), DualChunk(chunk=9)
    expected = token_nll(with_dual_chunk(model, settings_), TOKENS)[:, 1:].mean().item()
    assert [one["attention"] for one in record["models"]] == [None, "dual-chunk:chunk=9,local=2"]
    assert values(record["models"][1])["all"] == pytest.approx(expected)
    assert "dual-chunk:chunk=9,local=2" in (tmp_path / "after" / "table.md").read_text()


@pytest.mark.parametrize("attention", ["dual-chunk:chunk=999", "flash"])
def test_an_attention_that_makes_no_sense_is_refused_before_work_starts(attention, place, tmp_path, monkeypatch):
    assert "attention" in refusal(place, tmp_path, monkeypatch, attention=attention)
