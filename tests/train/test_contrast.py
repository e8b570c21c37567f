"""Columns of scores on their way from a folder to the weights, and whose long losses weights compare."""

import dataclasses
import json
import math
from pathlib import Path

import pytest
import torch
from distributed import some_rows, with_scores
from runs import packed
from transformers import AutoModelForCausalLM

import models
from tokenweight import Dense, with_weighted_loss
from tokenweight.data import load_scores
from tokenweight.method import SCORES
from tokenweight.models import unpack_bits
from tokenweight.train import DataCollatorWithScores, train

CONTEXTS = [{"size": 8, "stride": 6}, {"size": 16, "stride": 12}]
JUDGE = {"model": "judge", "revision": "a1"}
CASES = [("models.ByColumns", "trained"), ("dense", "scorer"), ("sparse:keep=0.4", "scorer")]


def write(folder, rows, **provenance):
    """A folder of scores of two contexts."""
    rows = rows.rename_columns({name: f"{name}_8" for name in ("short_nll", "divergence") if name in rows.column_names})
    rows = rows.add_column("short_nll_16", [[0.5] * len(tokens) for tokens in rows["input_ids"]])
    folder.mkdir()
    rows.to_parquet(str(folder / "rows.parquet"))
    (folder / "scores.json").write_text(json.dumps({"contexts": CONTEXTS, **provenance}))
    return str(folder)


@pytest.fixture(scope="module")
def scored(corpus):
    """Scores by a language model, and by a scorer whose losses are comparable with themselves only."""
    rows = with_scores(some_rows((40, 24) * 4))
    return {
        "model": write(corpus / "by-model", rows, model="another"),
        "count": write(corpus / "by-count", rows, model="count", contrast="scorer", reference=JUDGE),
        "short": write(corpus / "by-short", rows.remove_columns(["long_nll", "divergence", "ref_nll"])),
    }


def one_step(settings, **changes):
    """The loss of a step over all eight rows, and the record of the run."""
    trainer = {**settings.trainer, "max_steps": 1, "per_device_train_batch_size": 8, "save_strategy": "no"}
    settings = dataclasses.replace(settings, trainer=trainer, size=8, **changes)
    train(settings)
    lines = [json.loads(line) for line in (Path(settings.out) / "metrics.jsonl").read_text().splitlines()]
    return lines[0]["loss"], json.loads((Path(settings.out) / "run.json").read_text())


@pytest.mark.parametrize(("weighting", "contrast"), CASES)
def test_a_run_trains_with_the_columns_of_its_folder(weighting, contrast, scored, short_run, corpus):
    loss, record = one_step(short_run, data=scored["model"], weighting=weighting, contrast=contrast)
    model = with_weighted_loss(AutoModelForCausalLM.from_pretrained(corpus / "model"), weighting, contrast=contrast)
    rows, _ = load_scores(scored["model"], size=8)
    parts, num = 0.0, 0
    for row in rows:
        columns = {name: torch.tensor(row[name])[None] for name in SCORES}
        output = model(
            input_ids=torch.tensor(row["input_ids"])[None], labels=torch.tensor(row["input_ids"])[None], **columns
        )
        parts, num = parts + output.loss.item() * (len(row["input_ids"]) - 1), num + len(row["input_ids"]) - 1
    assert loss == pytest.approx(parts / num, rel=1e-5)
    assert record["settings"]["contrast"] == contrast


def test_scores_that_are_comparable_with_themselves_only_set_the_contrast(scored, short_run, tmp_path):
    loss, record = one_step(short_run, data=scored["count"])
    assert record["settings"]["contrast"] == "scorer"
    expected, _ = one_step(short_run, data=scored["model"], contrast="scorer", out=str(tmp_path / "set"))
    other, record = one_step(short_run, data=scored["model"], out=str(tmp_path / "other"))
    assert loss == expected != other
    assert record["settings"]["contrast"] == "trained"
    with pytest.raises(ValueError, match=r"contrast trained: .*by-count was scored by count"):
        one_step(short_run, data=scored["count"], contrast="trained", out=str(tmp_path / "refused"))
    one_step(short_run, data=scored["count"], contrast="trained", weighting="uniform", out=str(tmp_path / "uniform"))


@pytest.mark.parametrize("weighting", ["rho1", "eslm"])
def test_a_weighting_that_reads_no_short_loss_weighs_by_the_model_that_is_trained(
    weighting, scored, short_run, tmp_path
):
    expected, _ = one_step(short_run, data=scored["model"], weighting=weighting)
    loss, record = one_step(short_run, data=scored["count"], weighting=weighting, out=str(tmp_path / "count"))
    card = (tmp_path / "count" / "README.md").read_text()
    assert "| Short losses |" not in card
    assert ("| Reference | `judge`, frozen, revision a1 |" in card) == (weighting == "rho1")
    assert record.get("reference") == (JUDGE if weighting == "rho1" else None)
    assert (loss, record["settings"]["contrast"]) == (expected, "trained")


@pytest.mark.parametrize("weighting", ["rho1", "mix(rho1, dense)"])
def test_a_reference_is_not_compared_with_losses_that_are_comparable_with_themselves_only(weighting, scored, short_run):
    with pytest.raises(
        ValueError, match=r"weighting .*: compares losses with those of a reference model, and .* count"
    ):
        one_step(short_run, data=scored["count"], weighting=weighting, contrast="scorer")


def test_held_out_scores_that_the_model_cannot_be_compared_with_make_no_weighted_loss(scored, short_run, caplog):
    held_out = {**short_run.trainer, "eval_steps": 1}
    settings = dataclasses.replace(short_run, trainer=held_out, data=scored["model"], eval_data=scored["count"])
    one_step(settings)
    lines = (Path(short_run.out) / "metrics.jsonl").read_text()
    assert "eval_loss" in lines
    assert "eval_weighted_loss" not in lines
    assert "eval_data: contrast trained" in caplog.text


@pytest.mark.parametrize(
    ("weighting", "contrast", "missing"),
    [("dense", "scorer", "long_nll"), ("models.ByColumns", "trained", "ref_nll")],
)
def test_a_folder_without_a_column_that_weights_are_made_of_is_refused_by_name(
    weighting, contrast, missing, scored, short_run
):
    with pytest.raises(ValueError, match=f"by-short has no column {missing}: score it with `tokenweight score"):
        one_step(short_run, data=scored["short"], weighting=weighting, contrast=contrast)
    assert not Path(short_run.out).exists()


def test_a_mixture_needs_only_the_columns_that_are_used(scored, short_run):
    data = [{"path": scored["model"], "share": 1}, {"path": scored["short"], "share": 1}]
    loss, record = one_step(short_run, data=data)
    assert math.isfinite(loss)
    assert len(record["mixture"]) == 2


def test_an_unknown_contrast_is_refused(short_run):
    with pytest.raises(ValueError, match="contrast 'long': expected one of trained, scorer"):
        one_step(short_run, contrast="long")


@pytest.mark.parametrize("in_packs", [False, True])
def test_the_collator_carries_every_column_in_float32_and_pads_it_with_nan(in_packs):
    rows = with_scores(some_rows())
    rows = packed(rows, (0, 1), (2, 3, 4), (5,)) if in_packs else rows
    batch = DataCollatorWithScores()(list(rows))
    for name in SCORES:
        values = unpack_bits(batch[name])
        for number, row in enumerate(rows):
            assert torch.equal(values[number, : len(row[name])], torch.tensor(row[name]))
            assert values[number, len(row[name]) :].isnan().all()
    model = with_weighted_loss(models.tiny(), models.ByColumns())
    weights = model(**batch).weights
    columns = {name: unpack_bits(batch[name]) for name in ("ref_nll", "divergence")}
    mask = batch["labels"] != -100
    alone = with_weighted_loss(models.tiny(), Dense(), contrast="scorer")(**batch)
    expected = Dense()(*(unpack_bits(batch[name]) for name in ("long_nll", "short_nll")), mask)
    assert torch.equal(alone.weights, expected.double())
    assert (weights - columns["divergence"])[mask].min() >= 0
    with pytest.raises(ValueError, match="no column ref_nll"):
        DataCollatorWithScores()([rows[0], {name: values for name, values in rows[1].items() if name != "ref_nll"}])
