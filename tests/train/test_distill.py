"""Distillation in runs: settings, stored and live teachers, its last step, and the same in TRL's trainer."""

import dataclasses
from pathlib import Path

import pytest
import torch
from transformers import TrainerCallback

import models
from tokenweight.data import load_scores, score_folder
from tokenweight.models import load_model, weights_fingerprint
from tokenweight.train import resolve, train
from tokenweight.train.trl import TokenWeightedSFTConfig, TokenWeightedSFTTrainer


@pytest.fixture
def taught(corpus, tmp_path):
    """A teacher, and the scored rows with its columns."""
    models.tiny(seed=3, dtype=torch.float32).save_pretrained(tmp_path / "teacher")
    score_folder(corpus / "scored-long", str(tmp_path / "teacher"), None, tmp_path / "taught", top_k=5)
    return tmp_path


def losses(run, **changes):
    """The logged losses of a run with other settings."""
    out = f"{run.out}-{len(changes)}-{abs(hash(str(changes)))}"
    trainer = {**run.trainer, "logging_steps": 1, "save_strategy": "no"}
    lines = []

    class Lines(TrainerCallback):
        def on_log(self, args, state, control, logs=None, **kwargs):
            lines.extend([logs["loss"]] if "loss" in logs else [])

    train(dataclasses.replace(run, out=out, trainer=trainer, **changes), [Lines()])
    return lines


def test_a_stored_teacher_teaches_as_the_live_one_until_its_last_step(short_run, taught):
    stored = dataclasses.replace(short_run, data=str(taught / "taught"))
    of_stored = losses(stored, distill={"weight": "0.5"})
    of_live = losses(short_run, distill={"weight": 0.5, "teacher": str(taught / "teacher"), "top_k": 5})
    assert of_stored == pytest.approx(of_live, rel=1e-4)
    teacher = (
        f"`{taught}/teacher`, frozen, fingerprint of its weights {weights_fingerprint(load_model(taught / 'teacher'))}"
    )
    cards = [path.read_text() for path in Path(short_run.out).parent.glob("*/README.md")]
    assert len(cards) == sum(f"| {teacher}, its 5 likeliest tokens, weight 0.5 |" in card for card in cards) == 2
    alone = losses(stored)
    assert of_stored[0] != pytest.approx(alone[0], rel=1e-3)
    ended = losses(stored, distill={"weight": 0.5, "steps": 2})
    assert ended[:2] == pytest.approx(of_stored[:2], rel=1e-6)
    assert abs(ended[2] - of_stored[2]) > 1e-3


@pytest.mark.parametrize(
    ("distill", "message"),
    [
        ({"steps": 3}, "distill.weight None: expected a number above 0"),
        ({"weight": 2}, "distill.weight 2: expected a number above 0 and at most 1"),
        ({"weight": 0.5, "top_k": 3}, "distill.top_k 3: that of a stored teacher"),
        ({"weight": 0.5, "steps": 0}, "distill.steps 0: expected a whole number"),
        ({"weight": 0.5, "wieght": 1}, "distill.*wieght"),
        ({"weight": 0.5, "teacher": 3}, "distill.teacher 3"),
    ],
)
def test_settings_that_make_no_sense_are_refused(distill, message, short_run):
    with pytest.raises(ValueError, match=message):
        resolve(dataclasses.replace(short_run, distill=distill))


def test_data_without_a_stored_teacher_are_refused(short_run):
    with pytest.raises(
        ValueError, match=r"has no column teacher_ids: score it with `tokenweight score .* --as teacher`"
    ):
        train(dataclasses.replace(short_run, distill={"weight": 0.5}))


@pytest.mark.filterwarnings("ignore:.(is_)?gradient_checkpointing. is deprecated:FutureWarning")
def test_the_trainer_of_trl_hears_the_same_teacher(taught, corpus, monkeypatch, tmp_path):
    from texts import trained_tokenizer

    monkeypatch.setenv("CI", "1")
    rows, found = load_scores(taught / "taught")[0], {}
    settings = {"max_steps": 2, "logging_steps": 1.0, "save_strategy": "no", "report_to": "none", "use_cpu": True}
    settings |= {"bf16": False, "disable_tqdm": True, "learning_rate": 1e-2}
    trained_tokenizer().save_pretrained(taught / "teacher")
    live = str(taught / "teacher")
    for teacher, more in (("stored", {}), (live, {"distill_top_k": 5}), ("stored", {"distill_steps": 1})):
        teaching = {"distill_weight": 0.5, "distill_teacher": teacher, **more}
        arguments = TokenWeightedSFTConfig(str(tmp_path / "run"), **settings, **teaching)
        data = rows if teacher == "stored" else rows.remove_columns(["teacher_ids", "teacher_logprobs"])
        model = models.tiny(dtype=torch.float32)
        trainer = TokenWeightedSFTTrainer(model, arguments, data, processing_class=trained_tokenizer())
        trainer.train()
        found[teacher, *more] = [line["loss"] for line in trainer.state.log_history if "loss" in line]
    first, second, ended = found.values()
    assert first == pytest.approx(second, rel=1e-4)
    assert ended[0] == first[0]
    assert abs(ended[1] - first[1]) > 1e-3
    bare, arguments = (
        load_scores(corpus / "scored-long")[0],
        TokenWeightedSFTConfig(str(tmp_path / "run"), **settings, distill_weight=0.5),
    )
    with pytest.raises(ValueError, match="found no column teacher_ids: expected a data set of `tokenweight score --as"):
        TokenWeightedSFTTrainer(models.tiny(), arguments, bare, processing_class=trained_tokenizer())
    with pytest.raises(ValueError, match=r"distill\.weight 7"):
        TokenWeightedSFTConfig(str(tmp_path / "run"), **settings, distill_weight=7.0)
    with pytest.raises(ValueError, match=r"distill\.weight None"):
        TokenWeightedSFTConfig(str(tmp_path / "run"), **settings, distill_steps=3)
