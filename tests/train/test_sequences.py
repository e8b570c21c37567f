"""Mixtures of folders: shares of tokens, an order that a seed decides, and runs that go on as if undisturbed."""

import dataclasses
import json
import os
import shutil
import subprocess
import sys
import warnings
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from transformers import TrainerCallback

import models
from tokenweight.data import score_folder
from tokenweight.records import read_json
from tokenweight.train import DataCollatorWithScores, Mixture, TrainSettings, read_recipe, resolve, train
from tokenweight.train.sequences import SOURCE, name_row, open_sequences


def some_folders(*lengths):
    """Rows whose tokens are their number."""
    return [
        datasets.Dataset.from_dict({"input_ids": [[row] * num for row, num in enumerate(part)]}).with_format("numpy")
        for part in lengths
    ]


def drawn(mixture, num):
    """The first rows: the folder, the number of the row and its tokens."""
    rows = [mixture[number] for number in range(num)]
    return [(row[SOURCE], int(row["input_ids"][0]), len(row["input_ids"])) for row in rows]


def test_shares_of_tokens_hold_at_every_point_to_within_a_sequence():
    shares = [0.5, 0.3, 0.2]
    mixture = Mixture(some_folders([7, 3, 12, 5], [9] * 11, [2, 2, 4]), shares, seed=1)
    tokens = np.zeros(3)
    for source, _, length in drawn(mixture, 200):
        tokens[source] += length
        assert np.abs(tokens - tokens.sum() * np.array(shares)).max() < 12 + 9 + 4
    assert np.abs(tokens / tokens.sum() - shares).max() < 0.02


@pytest.mark.parametrize(
    ("lengths", "shares"),
    [
        ([[7, 3, 12, 5] * 9, [9] * 11, [2, 2, 4]], [0.5, 0.3, 0.2]),
        ([[4] * 30, [4] * 5], [0.5, 0.5]),  # all ties
        ([[2, 2, 4], [8] * 3], [0.01, 0.99]),
    ],
)
def test_the_next_sequence_is_that_of_the_folder_which_lags_most(lengths, shares):
    mixture, tokens = Mixture(some_folders(*lengths), shares, seed=1), [0] * len(shares)
    for number in range(3 * len(mixture)):
        lagging = min(range(len(shares)), key=lambda one: tokens[one] / shares[one])
        source, row = mixture.place(number)
        assert source == lagging
        if number < len(mixture):
            assert sum(tokens) < sum(mixture.tokens)
        tokens[source] += lengths[source][row]
        if number == len(mixture) - 1:
            assert sum(tokens) >= sum(mixture.tokens)


def test_no_sequence_of_a_folder_comes_twice_before_all_have_come_and_each_pass_has_an_order_of_its_own():
    mixture = Mixture(some_folders([4] * 12, [4] * 5), [0.6, 0.4], seed=1)
    for source, num in enumerate((12, 5)):
        rows = [row for one, row, _ in drawn(mixture, 100) if one == source]
        passes = [rows[start : start + num] for start in range(0, len(rows) - num + 1, num)]
        assert len(passes) > 3
        assert all(sorted(part) == list(range(num)) for part in passes)
        assert len({tuple(part) for part in passes}) > 2


def test_arrays_that_cannot_be_written_become_batches_without_a_warning(monkeypatch):
    names = ("input_ids", "labels", "position_ids", "short_nll")
    row = {name: np.arange(1, 6, dtype=np.float32 if name == "short_nll" else np.int64) for name in names}
    expected = DataCollatorWithScores()([row])
    for values in row.values():
        values.flags.writeable = False
    torch.set_warn_always(True)  # torch gives this warning once in a process
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            batch = DataCollatorWithScores()([row])
            named = name_row(
                datasets.Dataset.from_dict({"input_ids": [[1, 2, 3, 4, 5]]}), *batch["input_ids"], *batch["labels"], 0
            )
    finally:
        torch.set_warn_always(False)
    assert all(torch.equal(batch[name], expected[name]) for name in expected)
    assert named == "row 0 of the data"
    batch["input_ids"][0, 0] = 7
    assert row["input_ids"][0] == 1


def test_an_epoch_has_as_many_tokens_as_all_folders_and_the_next_goes_on():
    mixture = Mixture(some_folders([4] * 12, [4] * 5), [0.5, 0.5], seed=1)
    assert len(mixture) == 17
    assert mixture.passes(2) == pytest.approx([2 * 17 / 2 / 12, 2 * 17 / 2 / 5])
    first = [row for source, row, _ in drawn(mixture, 24) if source == 0]
    assert len(set(first)) == 12  # the second epoch begins with those that the first has left


def test_the_order_follows_from_the_seed_alone():
    folders = some_folders([7, 3, 12, 5] * 3, [9] * 11)
    one, same, other = (Mixture(folders, [0.7, 0.3], seed=seed) for seed in (1, 1, 2))
    same.place(40)  # whatever was asked for before
    assert drawn(one, 60) == drawn(same, 60)
    assert drawn(one, 60) != drawn(other, 60)


def test_columns_that_only_another_folder_has_are_filled_in():
    plain, packed = some_folders([3], [4])
    packed = packed.add_column("position_ids", [[0, 1, 0, 1]]).add_column("labels", [[0, -100, 0, 0]])
    mixture = Mixture([plain, packed], [0.5, 0.5], seed=0)
    rows = {
        row.pop(SOURCE): {name: values.tolist() for name, values in row.items()}
        for row in map(mixture.__getitem__, (0, 1))
    }
    assert rows == {
        0: {"input_ids": [0] * 3, "labels": [0] * 3, "position_ids": [0, 1, 2]},
        1: {"input_ids": [0] * 4, "labels": [0, -100, 0, 0], "position_ids": [0, 1, 0, 1]},
    }


@pytest.fixture
def mixed(short_run, corpus):
    """A run of a mixture, more than two epochs long."""
    data = [{"path": str(corpus / "scored-long"), "share": 3}, {"path": str(corpus / "scored-mixed"), "share": 1}]
    trainer = {**short_run.trainer, "per_device_train_batch_size": 2, "max_steps": 26, "save_steps": 8}
    return dataclasses.replace(short_run, data=data, trainer=trainer)


def logged(out):
    lines = [json.loads(line) for line in (Path(out) / "metrics.jsonl").read_text().splitlines()]
    timed = ("tokens_per_second",)
    return [{k: v for k, v in line.items() if k not in timed} for line in lines if "loss" in line]


class Seen(TrainerCallback):
    """Stops a run after some steps."""

    def __init__(self, stop):
        self.stop = stop

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == self.stop:
            raise KeyboardInterrupt


@pytest.mark.slow
@pytest.mark.parametrize("checkpoint", [8, 16, 24])
def test_a_mixture_that_was_resumed_ends_as_if_undisturbed(checkpoint, mixed, tmp_path):
    trained = train(mixed)
    again = dataclasses.replace(mixed, out=str(tmp_path / "again"))
    with pytest.raises(KeyboardInterrupt):
        train(again, [Seen(checkpoint + 1)])
    again = dataclasses.replace(again, trainer={**again.trainer, "resume_from_checkpoint": True})
    for name, weight in train(again).state_dict().items():
        assert torch.equal(weight, trained.state_dict()[name]), name
    assert logged(again.out) == logged(mixed.out)


def test_losses_and_tokens_are_logged_by_source_and_the_record_names_each_folder(mixed, corpus, tmp_path):
    train(mixed)
    lines = logged(mixed.out)
    names = ("scored-long", "scored-mixed")
    assert lines[0]["tokens/scored-long"] == 39
    for line in lines:
        tokens = [line[f"tokens/{name}"] for name in names]
        total = sum(line.get(f"loss/{name}", 0) * number for name, number in zip(names, tokens, strict=True))
        assert total / sum(tokens) == pytest.approx(line["unweighted_loss"], rel=1e-9)
    record = read_json(Path(mixed.out) / "run.json")
    assert [part["share"] for part in record["mixture"].values()] == [0.75, 0.25]
    assert record["mixture"]["scored-mixed"]["data"]["rows"] == str(corpus / "mixed")
    assert record["data"]["context"] == {"size": 10, "stride": 7}
    card = (Path(mixed.out) / "README.md").read_text()
    assert "scored-long" in card
    assert "75" in card
    again = TrainSettings(**{**read_recipe(Path(mixed.out) / "run.json"), "out": str(tmp_path / "again")})
    train(again)
    assert logged(again.out) == lines


def test_one_folder_is_trained_on_in_the_order_it_always_was(short_run, corpus):
    train(short_run)
    (Path(short_run.out) / "README.md").unlink()
    one = dataclasses.replace(short_run, data=[{"path": short_run.data, "share": 1}], out=f"{short_run.out}-one")
    train(one)
    assert logged(one.out) == logged(short_run.out)


@pytest.mark.parametrize(
    ("data", "told"),
    [
        ([{"path": "a", "share": 0.5}, {"path": "b"}], "'b': has no share"),
        ([{"path": "a", "share": 0.5}, {"path": "a", "share": 0.5}], "a: named twice"),
        ([{"path": "a", "share": 0}], "a: share 0: expected a number above 0"),
        ([{"path": "a", "share": "many"}], "a: share 'many': expected a number above 0"),
        ([], r"\[\]: expected at least one folder"),
    ],
    ids=str,
)
def test_shares_that_cannot_be_meant_are_refused(data, told, short_run):
    with pytest.raises(ValueError, match=f"^data {told}"):
        resolve(dataclasses.replace(short_run, data=data))


def test_an_order_beside_that_of_a_mixture_is_refused(mixed):
    given = {**mixed.trainer, "train_sampling_strategy": "sequential"}
    with pytest.raises(ValueError, match=r"^trainer\.train_sampling_strategy sequential: a mixture has an order"):
        resolve(dataclasses.replace(mixed, trainer=given))


def test_folders_that_were_scored_with_different_contexts_are_refused_unless_scores_are_not_read(mixed, corpus):
    data = [mixed.data[0], {"path": str(corpus / "otherwise"), "share": 1}]
    other = dataclasses.replace(mixed, data=data, trainer={**mixed.trainer, "max_steps": 1})
    with pytest.raises(
        ValueError, match=r"^data .*otherwise: scored with size 8, stride 6, but .* with size 10, stride 7"
    ):
        train(other)
    train(dataclasses.replace(other, weighting="uniform"))


def test_folders_with_different_numbers_of_a_teachers_tokens_are_refused(mixed, corpus, tmp_path):
    models.tiny(seed=3, dtype=torch.float32).save_pretrained(tmp_path / "teacher")
    data = []
    for part, top_k in zip(mixed.data, (3, 5)):
        data.append({"path": str(tmp_path / f"taught-{top_k}"), "share": 1})
        score_folder(part["path"], str(tmp_path / "teacher"), None, data[-1]["path"], top_k=top_k)
    run = dataclasses.replace(mixed, data=data, weighting="uniform", distill={"weight": 0.5})
    with pytest.raises(ValueError, match=r"^data .*taught-5: scored with top_k 5 of a teacher, but .*taught-3 with 3"):
        open_sequences(resolve(run))


RUN = """
import sys
from tokenweight.train import TrainSettings, train
model, out, *folders = sys.argv[1:]
data = [{"path": folder, "share": share} for folder, share in zip(folders, (0.6, 0.4))]
trainer = {"max_steps": 8, "warmup_steps": 0, "learning_rate": 1e-2, "save_steps": 4, "use_cpu": True}
trainer |= {"resume_from_checkpoint": "checkpoint-4"} if "resume" in out else {}
train(TrainSettings(model, data, out.replace(",resume", ""), eval_data=folders[1], dtype="float64", trainer=trainer))
"""


@pytest.mark.slow
def test_two_processes_train_a_mixture_and_measure_held_out_losses_as_one_does(corpus, tmp_path):
    folders = [str(corpus / "scored-long"), str(corpus / "scored-mixed")]
    (tmp_path / "run.py").write_text(RUN)
    environ = {**os.environ, "OMP_NUM_THREADS": "1"}

    def on_two(out):
        torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
        command = [*torchrun, str(tmp_path / "run.py"), str(corpus / "model"), out, *folders]
        subprocess.run(command, env=environ, check=True, timeout=300)

    def losses(out):
        lines = [json.loads(line) for line in (Path(out) / "metrics.jsonl").read_text().splitlines()]
        names = ("unweighted_loss", "tokens/", "loss/", "eval_loss", "eval_weighted_loss")
        return [{k: v for k, v in line.items() if k.startswith(names)} for line in lines]

    on_two(str(tmp_path / "two"))
    whole = losses(tmp_path / "two")
    shutil.rmtree(tmp_path / "two" / "checkpoint-8")
    on_two(f"{tmp_path / 'two'},resume")
    assert [line for line in losses(tmp_path / "two") if line] == [line for line in whole if line]
    trainer = {"max_steps": 8, "warmup_steps": 0, "learning_rate": 1e-2, "per_device_train_batch_size": 2}
    data = [{"path": folder, "share": share} for folder, share in zip(folders, (0.6, 0.4), strict=True)]
    alone = TrainSettings(str(corpus / "model"), data, str(tmp_path / "one"), dtype="float64", trainer=trainer)
    train(dataclasses.replace(alone, eval_data=folders[1]))
    # The batches are the same; float32 losses of the Trainer are not looked at, and sums differ in order alone.
    for line, expected in zip(losses(tmp_path / "one"), whole, strict=True):
        assert line == pytest.approx(expected, rel=1e-6)
