"""Held-out sequences, measured while a model is trained: exact losses, the best checkpoint, and an early stop."""

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from torch.nn.functional import cross_entropy
from transformers import EarlyStoppingCallback

from tokenweight import Dense, load_model
from tokenweight.data import load_rows, load_scores
from tokenweight.records import read_json
from tokenweight.train import resolve, train
from tokenweight.train.sequences import HeldOut
from tokenweight.train.statistics import HeldOutLosses


def evaluated(out):
    lines = [json.loads(line) for line in (Path(out) / "metrics.jsonl").read_text().splitlines()]
    names = ("eval_loss", "eval_weighted_loss")
    return {
        line["step"]: {k: v for k, v in line.items() if k.startswith(names)} for line in lines if "eval_loss" in line
    }


def expected(model, folder, *, scored):
    """Token by token: of all, beyond half of the longest, within a quarter of it, and weighted."""
    rows = load_scores(folder)[0] if scored else load_rows(folder)
    longest = max(len(row["input_ids"]) for row in rows)
    sums = {name: [0.0, 0] for name in ("loss", "loss_beyond_half", "loss_short", "weighted_loss")}
    for row in rows:
        tokens = torch.as_tensor(row["input_ids"]).long()
        with torch.no_grad():
            nll = cross_entropy(model(tokens[None]).logits[0, :-1], tokens[1:], reduction="none")
        weights = torch.ones_like(nll)
        if scored:
            long, short = torch.cat([torch.zeros(1), nll])[None], torch.as_tensor(row["short_nll"])[None]
            weights = Dense()(long, short, torch.arange(len(tokens))[None] > 0)[0, 1:]
        for place, (loss, weight) in enumerate(zip(nll.tolist(), weights.tolist(), strict=True), 1):
            for name, counts in (
                ("loss", True),
                ("loss_beyond_half", place >= longest // 2),
                ("loss_short", place < longest // 4),
            ):
                sums[name][0] += loss * counts
                sums[name][1] += counts
            sums["weighted_loss"][0] += weight * loss
            sums["weighted_loss"][1] += 1
    if not scored:
        del sums["weighted_loss"]
    return {f"eval_{name}": total / num for name, (total, num) in sums.items()}


@pytest.mark.parametrize("batch", [1, 5])
@pytest.mark.parametrize("scored", [False, True])
def test_losses_are_those_of_all_tokens_whatever_the_batches(scored, batch, short_run, corpus):
    folder = corpus / ("scored-mixed" if scored else "mixed")
    given = {**short_run.trainer, "per_device_eval_batch_size": batch, "eval_steps": 2}
    trained = train(dataclasses.replace(short_run, eval_data=str(folder), trainer=given))
    found = evaluated(short_run.out)
    assert list(found) == [2, 4]
    # Float32 losses of up to 16 nats, and sums in another order.
    assert found[4] == pytest.approx(expected(trained, folder, scored=scored), rel=1e-5)
    at_two = load_model(Path(short_run.out) / "checkpoint-2")
    assert found[2] == pytest.approx(expected(at_two, folder, scored=scored), rel=1e-5)


@pytest.mark.slow
def test_a_model_that_scores_itself_weighs_held_out_sequences_without_scores(short_run, corpus):
    settings = dataclasses.replace(short_run, data=str(corpus / "long"), scorer="self", eval_data=str(corpus / "mixed"))
    train(settings)
    assert all("eval_weighted_loss" in losses for losses in evaluated(short_run.out).values())


def test_held_out_scores_of_another_context_are_left_out_with_a_word(short_run, corpus, caplog):
    train(dataclasses.replace(short_run, eval_data=str(corpus / "otherwise")))
    assert "its weighted loss is not measured" in caplog.text
    assert all("eval_weighted_loss" not in losses for losses in evaluated(short_run.out).values())


def test_evaluating_changes_nothing_of_the_training(short_run, corpus, tmp_path):
    alone = train(short_run)
    beside = train(dataclasses.replace(short_run, out=str(tmp_path / "beside"), eval_data=str(corpus / "mixed")))
    for name, weight in beside.state_dict().items():
        assert torch.equal(weight, alone.state_dict()[name]), name


@pytest.mark.slow
def test_ten_evaluations_and_the_record_and_card_name_what_is_held_out(short_run, corpus):
    given = {**short_run.trainer, "max_steps": 20, "save_strategy": "no"}
    train(dataclasses.replace(short_run, eval_data=str(corpus / "scored-mixed"), trainer=given))
    found = evaluated(short_run.out)
    assert list(found) == list(range(2, 21, 2))
    record = read_json(Path(short_run.out) / "run.json")
    assert record["held_out"]["path"] == record["settings"]["eval_data"] == str(corpus / "scored-mixed")
    assert record["held_out"]["rows"]["num"] == 12
    card = (Path(short_run.out) / "README.md").read_text()
    assert f"eval_loss_beyond_half {found[20]['eval_loss_beyond_half']:.4f}" in card


MEASURES = ["loss", "eval_loss_beyond_half", "loss_short", "weighted_loss"]


@pytest.mark.parametrize(
    "measure", [MEASURES[0], *(pytest.param(name, marks=pytest.mark.slow) for name in MEASURES[1:])]
)
def test_the_best_checkpoint_is_kept_and_loaded_at_the_end(measure, short_run, corpus):
    given = {"learning_rate": 0.1, "lr_scheduler_type": "constant", "load_best_model_at_end": True, "max_steps": 6}
    given |= {"metric_for_best_model": measure, "save_total_limit": 1, "eval_steps": 1}
    trained = train(dataclasses.replace(short_run, eval_data=str(corpus / "scored-mixed"), trainer=given))
    name = f"eval_{measure.removeprefix('eval_')}"
    found = {step: losses[name] for step, losses in evaluated(short_run.out).items()}
    best = min(found, key=found.get)
    assert best < 6  # or nothing would be seen here
    assert {path.name for path in Path(short_run.out).glob("checkpoint-*")} == {f"checkpoint-{best}", "checkpoint-6"}
    kept = load_model(Path(short_run.out) / f"checkpoint-{best}")
    saved = load_model(short_run.out)
    for key, weight in trained.state_dict().items():
        assert torch.equal(weight, kept.state_dict()[key]), key
        assert torch.equal(weight, saved.state_dict()[key]), key
    again = {**given, "resume_from_checkpoint": True}  # no step is left
    train(dataclasses.replace(short_run, eval_data=str(corpus / "scored-mixed"), trainer=again))
    assert torch.equal(load_model(short_run.out).lm_head.weight, saved.lm_head.weight)


def test_a_run_stops_early(short_run, corpus):
    given = {"learning_rate": 0.1, "lr_scheduler_type": "constant", "load_best_model_at_end": True, "max_steps": 30}
    given |= {"eval_steps": 1, "save_total_limit": 1}
    settings = dataclasses.replace(short_run, eval_data=str(corpus / "mixed"), trainer=given)
    train(settings, [EarlyStoppingCallback(early_stopping_patience=3)])
    found = {step: losses["eval_loss"] for step, losses in evaluated(short_run.out).items()}
    assert max(found) == min(found, key=found.get) + 3 < 30


def test_held_out_sequences_that_do_not_fit_are_refused_before_any_work(short_run, corpus, tmp_path):
    from distributed import some_rows

    import models

    for name, rows in {"lengthy": some_rows((200,)), "foreign": some_rows((20,), scored=False)}.items():
        if name == "foreign":
            rows = rows.map(lambda row: {"input_ids": [models.VOCABULARY] * 20})
        rows.save_to_disk(str(tmp_path / name))
    for name, told in {
        "lengthy": "200 tokens: the model has 128",
        "foreign": "token 61 is not in",
        "gone": "no such",
    }.items():
        with pytest.raises(ValueError, match=told):
            train(dataclasses.replace(short_run, eval_data=str(tmp_path / name)))
    assert not Path(short_run.out).exists()


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ({"eval_strategy": "no"}, r"trainer\.eval_strategy no: eval_data"),
        (
            {"metric_for_best_model": "accuracy"},
            r"trainer\.metric_for_best_model 'accuracy': expected one of loss, loss_",
        ),
        ({"metric_for_best_model": "loss", "greater_is_better": True}, r"trainer\.greater_is_better true"),
        ({"eval_steps": 0}, r"trainer\.eval_steps 0\.0: expected"),
    ],
    ids=str,
)
def test_settings_of_the_evaluation_that_cannot_be_meant_are_refused(given, told, short_run, corpus):
    with pytest.raises(ValueError, match=f"^{told}"):
        resolve(dataclasses.replace(short_run, eval_data=str(corpus / "mixed"), trainer=given))


@pytest.mark.parametrize("measure", [*MEASURES, None])
def test_the_best_is_the_lowest_whatever_it_is_called(measure, short_run, corpus):
    given = {"load_best_model_at_end": True, "metric_for_best_model": measure}
    arguments = resolve(dataclasses.replace(short_run, eval_data=str(corpus / "mixed"), trainer=given)).arguments
    assert arguments.greater_is_better is False
    assert (arguments.save_strategy, arguments.save_steps) == ("steps", 0.1)


def test_what_fills_up_the_last_batch_counts_nothing(corpus):
    rows = HeldOut(load_rows(corpus / "mixed"), 30, 8)
    assert len(rows) == 16
    assert [set(rows[number]["labels"].tolist()) == {-100} for number in range(16)] == [False] * 12 + [True] * 4
    assert (rows.half, rows.short) == (15, 7)


def test_without_a_token_nothing_is_said():
    assert HeldOutLosses(half=4, short=2).losses() == {}
