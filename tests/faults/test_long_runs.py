"""Training that is killed, runs out of disk or meets numbers that are not finite: what is said, and how it goes on."""

import json
import os
import shutil
import signal
from collections import Counter

import datasets
import pytest
import torch
from faulty import copied, refused, run, small_disk, told
from safetensors.torch import load_file
from transformers import TrainerCallback

from tokenweight.records import read_json
from tokenweight.train import DataCollatorWithScores, TrainSettings, train
from tokenweight.train.checkpoints import MARK, is_whole, last_whole
from tokenweight.train.sequences import name_row

NUM_STEPS = 6
TRAIN = ["train", "--model", "model", "--data", "scored", "--out", "out", "--trainer.learning_rate", "1e-2"]
TRAIN += ["--trainer.max_steps", str(NUM_STEPS), "--trainer.save_steps", "2", "--trainer.warmup_steps", "1"]
TRAIN += ["--trainer.save_total_limit", "1", "--trainer.disable_tqdm", "true", "--trainer.lr_scheduler_type", "cosine"]
RESUME = [*TRAIN, "--trainer.resume_from_checkpoint", "true"]
TIMES = {"tokens_per_second", "train_runtime", "train_samples_per_second", "train_steps_per_second", "train_loss"}


@pytest.fixture(scope="module")
def origin(tmp_path_factory):
    """A model, some rows, and what an undisturbed run leaves."""
    place = copied(tmp_path_factory.mktemp("origin"))
    datasets.load_from_disk(str(place / "rows")).select(range(4)).save_to_disk(str(place / "few"))
    assert run(place, "score", "few", "--model", "model", "--size", "16", "--out", "scored").status == 0
    done = run(place, *TRAIN)
    assert done.status == 0, done.errors
    return place


@pytest.fixture
def place(origin, tmp_path):
    for name in ("model", "scored"):
        shutil.copytree(origin / name, tmp_path / name)
    return tmp_path


def lines(out):
    """What was logged, but for times; the loss of a whole run is of the part after the last interruption."""
    found = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in line.items() if name not in TIMES} for line in found]


def assert_ends_as_undisturbed(out, origin):
    """Same lines, same weights, to the bit; and one complete checkpoint, of the last step."""
    steps = [line for line in lines(out) if "loss" in line]
    assert [line["step"] for line in steps] == list(range(1, NUM_STEPS + 1))
    assert steps == [line for line in lines(origin / "out") if "loss" in line]
    found, expected = (load_file(folder / "model.safetensors") for folder in (out, origin / "out"))
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in found)
    assert [folder.name for folder in out.glob("checkpoint-*")] == [f"checkpoint-{NUM_STEPS}"]
    assert is_whole(out / f"checkpoint-{NUM_STEPS}")


def gone_on(place, **settings):
    """Resume; begin again where nothing was saved. Whoever resumes is warned of what is not whole."""
    out = place / "out"
    if not out.exists() or not any(out.iterdir()):
        return run(place, *TRAIN, **settings)
    last = last_whole(out)
    broken = [folder.name for folder in out.glob("checkpoint-*") if not is_whole(folder)]
    broken = [name for name in broken if last is None or int(name[11:]) > int(last.name[11:])]
    if last is None:
        refused(run(place, *RESUME), "trainer.resume_from_checkpoint true: out ", *broken)
        shutil.rmtree(out)
        return run(place, *TRAIN, **settings)
    done = run(place, *RESUME, **settings)
    warned = "".join(line for line in done.errors.splitlines(keepends=True) if "resuming from" in line)
    assert done.status < 0 or bool(warned) == bool(broken)
    if warned:
        told(warned, f"out/{broken[0]} ", f"out/{last.name}")
    return done


def where(out):
    """How far a killed run was."""
    if not out.exists() or not list(out.glob("checkpoint-*")):
        return "before the first checkpoint"
    if not all(is_whole(folder) for folder in out.glob("checkpoint-*")):
        return "within a checkpoint"
    return "after the last step" if is_whole(out / f"checkpoint-{NUM_STEPS}") else "between checkpoints"


MOMENTS = [
    "append metrics.jsonl",  # before the first checkpoint
    "half model.safetensors",  # within the first
    "half optimizer.pt",
    f"open {MARK}",
    f"written {MARK}",
    f"renamed {MARK}",  # after it
    "half optimizer.pt",  # within the second
    "half checkpoint-2",  # after it, while it makes room
    "append metrics.jsonl",
    "renamed run.json",
    "half model.safetensors",  # within the third
]


@pytest.mark.slow
def test_killed_again_and_again_a_run_ends_as_if_undisturbed(place, origin):
    found = Counter()
    for moment in MOMENTS:
        done = gone_on(place, at=moment)
        assert done.status == -signal.SIGKILL, (moment, done.errors)
        found[where(place / "out")] += 1
    assert gone_on(place).status == 0
    assert_ends_as_undisturbed(place / "out", origin)
    assert set(found) == {"before the first checkpoint", "within a checkpoint", "between checkpoints"}


def stopped(done, *named):
    """Whether a run that had begun ended with one line that names these."""
    assert done.status == 2
    told(done.errors, *named)


@pytest.mark.slow
def test_a_full_disk_leaves_the_last_checkpoint_whole_and_with_room_the_run_goes_on(place, origin, tmp_path):
    disk, saved = tmp_path / "disk", Counter()
    with small_disk(disk):
        for name in ("model", "scored"):
            (disk / name).symlink_to(place / name)
        for room in range(60_000, 1_000_000, 80_000):
            (disk / "filler").write_bytes(bytes((1 << 20) - room - 4096))
            done = run(disk, *TRAIN)
            (disk / "filler").unlink()
            if done.status == 0:
                break
            last = last_whole(disk / "out")
            if last is None:
                stopped(done, "cannot write ", " to out/", "MiB free there", "no checkpoint yet")
            else:
                stopped(done, "cannot write ", " to out", f"checkpoint is out/{last.name}\n")
                assert gone_on(disk).status == 0
                assert_ends_as_undisturbed(disk / "out", origin)
            saved[last and last.name] += 1
            shutil.rmtree(disk / "out", ignore_errors=True)
        assert done.status == 0
    assert saved[None] > 0
    assert saved["checkpoint-2"] > 0


def test_a_resumed_run_is_recorded_and_a_file_that_may_not_grow_is_told(place):
    short = [*TRAIN, "--trainer.max_steps", "2"]
    assert run(place, *short).status == 0
    first = read_json(place / "out" / "run.json")
    broken = place / "out" / "checkpoint-4"
    shutil.copytree(place / "out" / "checkpoint-2", broken)
    os.truncate(broken / "optimizer.pt", 100)
    done = run(place, *RESUME, limit=60_000)
    warnings, changed, error = done.errors.splitlines(keepends=True)
    told(warnings, "out/checkpoint-4 ", "resuming from out/checkpoint-2")
    told(changed, "out resumes with different settings", "trainer.max_steps is '2' there, '6' now")
    stopped(done._replace(errors=error), "cannot write ", " to out/checkpoint-4", "is out/checkpoint-2")
    assert not broken.exists()
    record = read_json(place / "out" / "run.json")
    (entry,) = record.pop("resumed")
    assert record == {**first, "settings": record["settings"]}
    assert record["settings"]["trainer"] == {**first["settings"]["trainer"], "max_steps": "6"}
    assert entry["checkpoint"] == "out/checkpoint-2"
    assert entry["settings"]["trainer"]["max_steps"] == "6"
    assert entry["versions"] == first["versions"]
    assert [line["step"] for line in lines(place / "out")] == [1, 2, 2, 3, 4]
    done = run(place, *TRAIN, "--trainer.resume_from_checkpoint", "out/checkpoint-9")
    refused(done, "trainer.resume_from_checkpoint out/checkpoint-9: ", "out/checkpoint-2")


def test_a_run_that_had_ended_makes_no_step_more_and_writes_its_model_again(origin, tmp_path):
    for name in ("model", "scored", "out"):
        shutil.copytree(origin / name, tmp_path / name)
    before = (tmp_path / "out" / "metrics.jsonl").read_text()
    os.truncate(tmp_path / "out" / "model.safetensors", 100)
    assert gone_on(tmp_path).status == 0
    assert_ends_as_undisturbed(tmp_path / "out", origin)
    after = (tmp_path / "out" / "metrics.jsonl").read_text()
    assert list(map(json.loads, after.splitlines())) == list(map(json.loads, before.splitlines()))
    summary = json.loads(after.splitlines()[-1])
    assert summary["train_runtime"] > 0
    assert all(json.loads(line)["tokens_per_second"] > 0 for line in after.splitlines()[:-1])


def test_a_loss_that_is_not_finite_is_told_by_step_row_and_checkpoint(place):
    rows = datasets.load_from_disk(str(place / "scored"))
    explode = ["--trainer.learning_rate", "1e15", "--trainer.save_steps", "1"]
    done = run(place, *TRAIN, *explode, "--trainer.train_sampling_strategy", "sequential")
    named = f"step 3: the long loss of row 2 of the data (document {rows[2]['document']}, offset {rows[2]['offset']})"
    stopped(done, named, " is nan", "is out/checkpoint-2\n")


def test_a_score_that_is_not_finite_is_told_by_its_row(place):
    rows = datasets.load_from_disk(str(place / "scored"))
    scores = rows["short_nll_16"][:]
    scores[3][17] = float("nan")
    rows.remove_columns("short_nll_16").add_column("short_nll", scores).save_to_disk(str(place / "broken"))
    by_two = ["--trainer.per_device_train_batch_size", "2", "--trainer.train_sampling_strategy", "sequential"]
    done = run(place, *TRAIN, "--data", "broken", "--trainer.save_steps", "5", *by_two)
    done = done._replace(errors=done.errors.splitlines(keepends=True)[-1])  # who scored these is not known
    stopped(done, "step 2: short_nll of row 3 of", f"offset {rows[3]['offset']}), position 17 is nan", "no checkpoint")


def test_a_row_is_found_in_a_padded_batch_and_by_its_document_where_it_is_packed():
    columns = {"input_ids": [[5, 6, 7], [5, 6], [5, 6, 0], [5, 6, 8, 9]]}
    rows = datasets.Dataset.from_dict(columns)
    batch = DataCollatorWithScores()(list(rows))
    found = [name_row(rows, *pair, 1) for pair in zip(batch["input_ids"], batch["labels"])]
    assert found == [f"row {number} of the data" for number in range(4)]
    columns = {"input_ids": [[1, 2, 3, 4], [5, 6, 7, 8]], "position_ids": [[0, 1, 2, 3], [0, 1, 0, 1]]}
    columns |= {"documents": [["a"], ["b", "c"]], "offsets": [[0], [7, 0]]}
    rows = datasets.Dataset.from_dict(columns)
    tokens = torch.tensor(columns["input_ids"])
    assert name_row(rows, tokens[1], tokens[1], 1) == "row 1 of the data (document b, offset 7)"
    assert name_row(rows, tokens[1], tokens[1], 2) == "row 1 of the data (document c, offset 0)"


class Poison(TrainerCallback):
    """At some step, gradients of the head are NaN."""

    def __init__(self, step):
        self.step = step

    def on_step_begin(self, args, state, control, model=None, **kwargs):
        if state.global_step + 1 == self.step:
            model.get_output_embeddings().weight.register_hook(lambda gradient: gradient * torch.nan)


def test_a_loss_that_is_not_finite_is_told_a_step_later_by_its_own_step_and_row(place):
    given = {"max_steps": 6, "save_strategy": "no", "logging_steps": 100, "disable_tqdm": True}
    given |= {"train_sampling_strategy": "sequential", "per_device_train_batch_size": 1}
    settings = TrainSettings(str(place / "model"), str(place / "scored"), str(place / "out"), trainer=given)
    ended = Ended()
    with pytest.raises(ValueError, match=r"^step 3: the long loss of row 2 of the data .* is nan"):
        train(settings, callbacks=[Poison(2), ended])
    assert ended.steps == [1, 2, 3, 4]
    assert not (place / "out" / "model.safetensors").exists()


class Ended(TrainerCallback):
    """Which optimizer steps came to an end."""

    def __init__(self):
        self.steps = []

    def on_optimizer_step(self, args, state, control, **kwargs):
        self.steps.append(state.global_step + 1)


@pytest.mark.parametrize(
    ("step", "logging_steps", "named"),
    [(3, 1, "gradient norm"), (4, 100, "weight"), (5, 100, "weight")],
    ids=["log", "save", "end"],
)
def test_gradients_that_are_not_finite_stop_a_run_before_anything_is_saved(step, logging_steps, named, place):
    given = {"max_steps": 5, "save_steps": 2, "logging_steps": logging_steps, "disable_tqdm": True}
    settings = TrainSettings(str(place / "model"), str(place / "scored"), str(place / "out"), trainer=given)
    with pytest.raises(ValueError, match=f"^step {step}: ") as caught:
        train(settings, callbacks=[Poison(step)])
    last = place / "out" / f"checkpoint-{2 if step < 5 else 4}"
    assert named in str(caught.value)
    assert str(caught.value).endswith(f"is {last}")
    assert last_whole(place / "out") == last
    assert [folder.name for folder in (place / "out").glob("checkpoint-*")].count(f"checkpoint-{step}") == 0
    assert not (place / "out" / "model.safetensors").exists()


@pytest.mark.slow
def test_a_run_goes_on_from_an_earlier_checkpoint_and_forgets_what_came_after_it(place, origin):
    keep = [*TRAIN, "--trainer.save_total_limit", "3"]
    assert run(place, *keep).status == 0
    out = place / "out"
    done = run(place, *keep, "--trainer.resume_from_checkpoint", "out/checkpoint-2", at="append metrics.jsonl")
    assert done.status == -signal.SIGKILL
    assert last_whole(out) == out / "checkpoint-2"
    assert run(place, *RESUME).status == 0
    assert_ends_as_undisturbed(out, origin)


def test_false_does_not_resume(place):
    (place / "out").mkdir()
    (place / "out" / "notes").write_text("")
    done = run(place, *TRAIN, "--trainer.resume_from_checkpoint", "false")
    assert done.status == 2
    assert "--out out: exists; name a new folder" in done.errors
