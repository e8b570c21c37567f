"""Training with scores by counts, made while sequences are read: the same as with stored ones."""

import dataclasses
import json
import re
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from runs import packed, torchrun

import models
from tokenweight import CountScorer, ShortContext
from tokenweight.data import load_scores, score_folder
from tokenweight.models import Contrast, unpack_bits
from tokenweight.train import DataCollatorWithScores, config_text, train

PROPER = "mix(uniform, expected(gain), share=0.5)"


@pytest.fixture(scope="module")
def folders(corpus):
    """Packed rows of repeated tokens, and their stored scores."""
    random = np.random.default_rng(0)
    rows = datasets.Dataset.from_dict(
        {"input_ids": [random.integers(3, 12, length).tolist() for length in (24, 16, 40, 30, 10, 40, 40, 36)]}
    )
    packed(rows, (0, 1), (2,), (3, 4), (5,), (6,), (7,)).save_to_disk(str(corpus / "repeated"))
    score_folder(corpus / "repeated", "count:order=2", [ShortContext(10, 7)], corpus / "counted")
    return {"stored": str(corpus / "counted"), "count:order=2": str(corpus / "repeated")}


def fit(settings, scorer, folders, **changes):
    """What a run logged of its steps, and its record."""
    trainer = {
        **settings.trainer,
        "per_device_train_batch_size": 2,
        "save_strategy": "no",
        **changes.pop("trainer", {}),
    }
    out = f"{settings.out}-{scorer.replace(':', '-')}"
    changes = {"data": folders[scorer], "out": out, "scorer": scorer, "size": 10, "trainer": trainer, **changes}
    if scorer != "stored":
        changes["stride"] = 7
    train(dataclasses.replace(settings, **changes))
    lines = [json.loads(line) for line in (Path(out) / "metrics.jsonl").read_text().splitlines()]
    timed = re.compile("train_|tokens_per_second|.*(_runtime|_per_second)$")
    kept = [{name: value for name, value in line.items() if not timed.match(name)} for line in lines]
    return kept, json.loads((Path(out) / "run.json").read_text())


@pytest.mark.parametrize("weighting", ["dense", "sparse:keep=0.4", PROPER])
@pytest.mark.parametrize("workers", [pytest.param(0, marks=pytest.mark.slow), 2])
def test_a_run_without_stored_scores_is_that_with_stored_ones_however_many_workers_read(
    weighting, workers, folders, short_run
):
    trainer = {"dataloader_num_workers": workers}
    stored, _ = fit(short_run, "stored", folders, weighting=weighting)
    counted, record = fit(short_run, "count:order=2", folders, weighting=weighting, trainer=trainer)
    assert counted == stored
    assert record["scores"] == "count:order=2,vocab_size=262144"
    short_losses = "`count:order=2,vocab_size=262144`, frozen, windows of 10 tokens, stride 7"
    card = (Path(record["settings"]["out"]) / "README.md").read_text()
    assert f"| Short losses | {short_losses}{'' if weighting == PROPER else ', contrast scorer'} |" in card
    settings, contrast = record["settings"], "trained" if weighting == PROPER else "scorer"
    assert {name: settings[name] for name in ("scorer", "contrast", "size", "stride")} == {
        "scorer": "count:order=2",
        "contrast": contrast,
        "size": 10,
        "stride": 7,
    }


@pytest.mark.slow
def test_two_processes_score_as_one_does_beforehand(folders, short_run, tmp_path):
    logged = []
    for scorer, stride in (("stored", None), ("count:order=2", 7)):
        out = tmp_path / scorer.partition(":")[0]
        settings = dataclasses.replace(
            short_run, data=folders[scorer], out=str(out), scorer=scorer, size=10, stride=stride
        )
        (tmp_path / "recipe.yaml").write_text(config_text(settings))
        torchrun("-m", "tokenweight", "train", "--config", str(tmp_path / "recipe.yaml"))
        lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
        logged.append([line["loss"] for line in lines if "loss" in line])
    assert logged[0] == logged[1]


def test_held_out_sequences_are_scored_as_they_are_read(folders, short_run):
    given = {"trainer": {"eval_steps": 2}}
    found = {scorer: fit(short_run, scorer, folders, eval_data=folders[scorer], **given)[0] for scorer in folders}
    weighted = {
        scorer: [line["eval_weighted_loss"] for line in lines if "eval_weighted_loss" in line]
        for scorer, lines in found.items()
    }
    assert len(weighted["stored"]) == 2
    assert weighted["stored"] == weighted["count:order=2"]


@pytest.mark.parametrize("weighting", ["uniform", "eslm"])
def test_weights_that_need_no_scores_count_nothing(weighting, folders, short_run, monkeypatch):
    monkeypatch.setattr(CountScorer, "__call__", None)
    fit(short_run, "count:order=2", folders, weighting=weighting)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"contrast": "trained"}, "contrast trained: the losses of the scorer count:order=2 cannot be compared"),
        ({"weighting": "mix(rho1, dense)"}, "compares losses with those of a reference model, and those of count"),
        ({"weighting": "expected(dense)"}, "scorer count:order=2 holds the divergence 'kl', but .* needs 'absolute'"),
        ({"scorer": "count:depth=2"}, "scorer count:depth=2: found 'depth=2'"),
        ({"scorer": "count:vocab_size=9"}, r"repeated: token 11 .* count:vocab_size=12"),
        ({"size": 80, "stride": None}, "size 80"),
    ],
)
def test_what_cannot_be_done_is_refused_before_the_first_step(changes, message, folders, short_run):
    settings = dataclasses.replace(
        short_run, data=folders["count:order=2"], **{"scorer": "count:order=2", "size": 10, **changes}
    )
    with pytest.raises(ValueError, match=message):
        train(settings)
    assert not Path(settings.out).exists()


def test_stored_scores_are_not_counted_again(folders, short_run):
    with pytest.raises(ValueError, match=r"scorer 'count': .*counted holds stored scores"):
        train(dataclasses.replace(short_run, data=folders["stored"], scorer="count", size=10))


def test_the_collator_of_any_trainer_gives_what_is_stored(folders):
    rows, _ = load_scores(folders["stored"])
    read = rows.remove_columns(["long_nll", "short_nll", "divergence"])
    batch = DataCollatorWithScores(CountScorer(2), ShortContext(10, 7))(list(read))
    stored = DataCollatorWithScores()(list(rows))
    assert batch.keys() == stored.keys()
    for name, values in stored.items():
        assert torch.equal(unpack_bits(batch[name]).nan_to_num(9), unpack_bits(values).nan_to_num(9)), name


def test_any_function_may_score():
    def halved(tokens, context, *, position_ids=None):
        long = tokens / 8.0
        return Contrast(long, long + (torch.arange(tokens.shape[1]) >= context.size))

    rows = [{"input_ids": [3, 4, 5, 6]}, {"input_ids": [7, 8]}]
    batch = DataCollatorWithScores(halved, ShortContext(2))(rows)
    assert torch.equal(unpack_bits(batch["long_nll"])[0], torch.tensor([3, 4, 5, 6]) / 8)
    assert torch.equal(unpack_bits(batch["short_nll"])[0], torch.tensor([3, 4, 13, 14]) / 8)
    assert unpack_bits(batch["short_nll"])[1, 2:].isnan().all()
    assert "divergence" not in batch


def test_a_collator_with_half_a_scorer_or_with_scores_already_is_refused(folders):
    with pytest.raises(ValueError, match="expected both or none"):
        DataCollatorWithScores(CountScorer())
    rows, _ = load_scores(folders["stored"])
    with pytest.raises(ValueError, match="row 0 of the batch has a column long_nll"):
        DataCollatorWithScores(CountScorer(), ShortContext(10))(list(rows))


def test_an_unknown_token_is_named_by_its_row_of_the_batch():
    rows = [{"input_ids": tokens.tolist()} for tokens in models.some_tokens(3, 12)]
    rows[2]["input_ids"][5] = 99
    with pytest.raises(ValueError, match="token 99 of row 2, position 5"):
        DataCollatorWithScores(CountScorer(vocab_size=61), ShortContext(4))(rows)
