"""What a run shows: what it is, a row of numbers for each line that it logs, and the command that comes next."""

import dataclasses
import json
import re
import shlex
from pathlib import Path

import pytest
import torch
from transformers import TrainerCallback

from tokenweight import cli
from tokenweight.train import TrainSettings, read_recipe, resolve, train
from tokenweight.train.display import _launcher


def lines_of(printed):
    """The lines of the header, by their labels; one that is there twice, joined."""
    found = {}
    for line in printed.split("\n\n")[0].splitlines():
        label, text = line[:11].strip(), line[11:]
        found[label] = "; ".join(filter(None, [found.get(label), text]))
    return found


def test_the_header_says_what_is_trained_on_what_and_how(short_run, capsys):
    trained = train(short_run)
    found = lines_of(capsys.readouterr().out)
    assert list(found) == ["model", "data", "weighting", "scorer", "context", "device", "step", "run", "logs"]
    assert f": {trained.num_parameters():,} parameters, all trained" in found["model"]
    assert found["data"].endswith("scored-long: 9 sequences of 40 tokens, 360 in all")
    assert found["weighting"] == "dense:interpolation=0.75"
    assert found["scorer"].startswith("stored, by ")
    assert found["scorer"].endswith("windows of 10 tokens, stride 7")
    assert "float32" in found["device"]
    assert "sdpa attention" in found["device"]
    assert found["step"] == "1 sequence, 40 tokens (1 a pass)"
    assert found["run"].startswith("4 steps = 0.444 epochs of 9 sequences")
    assert f"{short_run.out}/metrics.jsonl; a row every step, a checkpoint every 2 steps" == found["logs"]


def test_the_header_counts_steps_and_epochs_as_the_trainer_does(short_run, corpus, capsys):
    given = {"num_train_epochs": 2, "gradient_accumulation_steps": 2, "per_device_train_batch_size": 2, "bf16": True}
    settings = dataclasses.replace(
        short_run, data=str(corpus / "scored-mixed"), trainer=given, eval_data=short_run.data
    )
    train(settings)
    printed = capsys.readouterr().out
    found = lines_of(printed)
    assert found["step"] == "4 sequences, about 93 tokens (2 a pass, 2 passes)"
    assert found["run"] == "6 steps = 2 epochs of 12 sequences"
    assert "bfloat16 autocast" in found["device"]
    assert found["held out"].endswith("scored-long: 9 sequences of 40 tokens, 360 in all")
    assert "an evaluation every step" in found["logs"]


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"weighting": "uniform"}, {"scorer": "none: "}),
        ({"extend": {"length": 256}}, {"context": "no sequence is longer than the 128 positions of before"}),
        (
            {"scorer": "self", "data": "long", "size": 8},
            {"scorer": "the model itself, as it is trained, windows of 8 tokens, stride 6"},
        ),
        ({"attn_implementation": "eager"}, {"device": "eager attention"}),
    ],
    ids=str,
)
def test_a_dry_run_shows_the_header_and_leaves_nothing(changes, told, short_run, corpus, tmp_path, capsys):
    changes = {**changes, **({"data": str(corpus / changes["data"])} if "data" in changes else {})}
    given = {**short_run.trainer, "report_to": "tensorboard"}
    train(dataclasses.replace(short_run, trainer=given, **changes), dry_run=True)
    printed = capsys.readouterr().out
    for label, text in told.items():
        assert text in lines_of(printed)[label]
    assert list(tmp_path.iterdir()) == []
    assert "loss" not in printed.split("\n\n")[-1].splitlines()[-1]


def test_a_dry_run_refuses_what_a_run_would(short_run, tmp_path):
    Path(short_run.out).mkdir()
    (Path(short_run.out) / "mine").write_text("mine")
    with pytest.raises(ValueError, match=r"^out .*: exists"):
        train(short_run, dry_run=True)
    with pytest.raises(ValueError, match="optim"):
        train(
            dataclasses.replace(short_run, out=f"{short_run.out}-b", trainer={"optim": "adamw_bnb_8bit"}), dry_run=True
        )


def test_each_line_that_is_logged_is_a_row_of_fixed_width(short_run, corpus, capsys):
    train(dataclasses.replace(short_run, eval_data=str(corpus / "scored-mixed")))
    table = capsys.readouterr().out.split("\n\n")[1].splitlines()
    rows = [line for line in table if "held-out" not in line]
    assert len({len(row) for row in rows}) == 1
    logged = [json.loads(line) for line in (Path(short_run.out) / "metrics.jsonl").read_text().splitlines()]
    logged = [line for line in logged if "loss" in line]
    for row, line in zip(rows[1:], logged, strict=True):
        step, loss, unweighted, rate, share, *_, left = row.split()
        assert (int(step), loss, unweighted) == (line["step"], f"{line['loss']:.4f}", f"{line['unweighted_loss']:.4f}")
        assert (rate, share) == (f"{line['learning_rate']:.2e}", f"{line['effective_share']:.1%}")
        assert re.fullmatch(r"\d+:\d\d:\d\d", left)
    assert sum("held-out loss" in line for line in table) == 4


def test_the_bar_of_the_trainer_is_shown_if_it_is_asked_for(short_run, capsys):
    train(dataclasses.replace(short_run, trainer={**short_run.trainer, "disable_tqdm": False}))
    streams = capsys.readouterr()
    assert "effective  tokens/s" not in streams.out
    assert "4/4" in streams.err


def command_after(printed, label):
    (line,) = [line for line in printed.splitlines() if line.startswith(label)]
    return shlex.split(line.removeprefix(label).partition(": ")[2])


def test_the_end_names_the_command_that_compares_with_the_model_before(short_run, corpus, capsys):
    train(dataclasses.replace(short_run, eval_data=str(corpus / "mixed")))
    found = cli.parse(command_after(capsys.readouterr().out, "next")[1:])
    assert (found.model, found.baseline, str(found.data)) == (short_run.out, short_run.model, str(corpus / "mixed"))
    assert str(found.out) == f"{short_run.out}-eval"


class Stopping(TrainerCallback):
    def __init__(self, step, error=KeyboardInterrupt):
        self.step, self.error = step, error

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            raise self.error


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError("disk")])
def test_after_a_stop_the_command_that_is_shown_resumes_the_run(error, short_run, tmp_path, capsys):
    whole = train(dataclasses.replace(short_run, out=str(tmp_path / "whole")))
    capsys.readouterr()
    with pytest.raises(BaseException, match=r"disk|^$"):
        train(short_run, [Stopping(3, error)])
    printed = capsys.readouterr().out
    assert "stopped after 3 steps of 4" in printed
    words = command_after(printed, "to resume from checkpoint-2")
    assert words[:2] == ["tokenweight", "train"]
    cli.parse(words[1:]).run()
    resumed = (Path(short_run.out) / "model.safetensors").read_bytes()
    assert resumed == (tmp_path / "whole" / "model.safetensors").read_bytes()
    assert whole is not None


def test_after_a_stop_without_a_checkpoint_the_command_starts_again(short_run, capsys):
    with pytest.raises(KeyboardInterrupt):
        train(short_run, [Stopping(1)])
    printed = capsys.readouterr().out
    assert "no checkpoint is complete" in printed
    command = cli.parse(command_after(printed, "no checkpoint is complete")[1:])
    assert command.out == f"{short_run.out}-2"
    assert dict(command.trainer) == short_run.trainer


def test_what_ends_a_run_before_its_first_step_shows_no_way_to_resume_it(short_run, capsys):
    with pytest.raises(KeyboardInterrupt):
        train(short_run, [Stopping(0)])
    assert "stopped" not in capsys.readouterr().out


def test_several_processes_are_started_by_torchrun(short_run, monkeypatch):
    arguments = resolve(short_run).arguments
    assert _launcher(arguments) == ["tokenweight"]
    monkeypatch.setattr("transformers.TrainingArguments.world_size", property(lambda self: 16))
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "8")
    assert _launcher(arguments) == shlex.split("torchrun --nnodes 2 --nproc-per-node 8 -m tokenweight")
    monkeypatch.delenv("LOCAL_WORLD_SIZE")
    assert _launcher(arguments) == shlex.split("torchrun --nproc-per-node 16 -m tokenweight")


def test_the_printed_config_reads_back_to_the_same_run(short_run, corpus, tmp_path, capsys, unchecked):
    data = [f"{corpus / 'scored-long'}:0.75", f"{corpus / 'scored-mixed'}:1e-1"]
    words = ["train", "--model", short_run.model, "--data", *data, "--weighting", "sparse", "--out", short_run.out]
    words += ["--trainer.max_steps", "3", "--trainer.learning_rate", "1e-3", "--trainer.report_to", "[none]"]
    assert cli.main([*words, "--print_config"]) == 0
    (tmp_path / "printed.yaml").write_text(capsys.readouterr().out)
    assert not Path(short_run.out).exists()
    settings = TrainSettings(**read_recipe(tmp_path / "printed.yaml"))
    assert resolve(settings).shares == resolve(cli.parse(words)).shares
    train(settings)
    assert cli.main(["train", "--config", str(tmp_path / "printed.yaml"), "--out", str(tmp_path / "again")]) == 0
    assert cli.main([*words[:-8], "--out", str(tmp_path / "given"), *words[-6:]]) == 0
    saved = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("out", "again", "given")]
    assert saved[0] == saved[1] == saved[2]


def test_a_dry_run_of_the_command_line_ends_with_status_0(short_run, tmp_path, capsys, unchecked):
    words = ["train", "--model", short_run.model, "--data", short_run.data, "--out", short_run.out, "--dry_run"]
    assert cli.main(words) == 0
    assert "parameters, all trained" in capsys.readouterr().out
    assert list(tmp_path.iterdir()) == []
    assert torch.is_grad_enabled()
