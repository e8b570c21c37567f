"""What is told of weights while a model trains, against sums over the weights of each batch; and who receives it."""

import json
import math
import os
import re
import sqlite3
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from distributed import WEIGHTINGS, some_rows

import models
from tokenweight import Dense, LongCE, Scorer, ShortContext, Uniform, with_weighted_loss
from tokenweight.method import prediction_mask
from tokenweight.train import DataCollatorWithScores, WeightedTrainer, WeightStatistics, training_arguments

NAMES = ("weight_mean", "weight_std", "effective_tokens", "effective_share", "first_window_share", "unweighted_loss")
SIZE = 8
# Float64 models give float64 weights: some hundred additions, in two orders. Nothing is trained between the two.
SAME = {"rel": 1e-12, "abs": 1e-12}


def packed_rows():
    """Two documents in each row."""
    rows = some_rows((30, 30, 30, 30))
    positions = [[*range(first), *range(30 - first)] for first in (11, 19, 7, 25)]
    return rows.add_column("position_ids", positions)


def expected(steps, size=SIZE):
    """The slow way: from (weight, long loss, position in its document) of each predicted token of each step."""
    tokens = [token for step in steps for token in step]
    weights = [weight for weight, _, _ in tokens]
    mean = math.fsum(weights) / len(weights)
    ratios = [math.fsum(w for w, _, _ in step) ** 2 / math.fsum(w * w for w, _, _ in step) for step in steps]
    return {
        "weight_mean": mean,
        "weight_std": math.sqrt(math.fsum((weight - mean) ** 2 for weight in weights) / len(weights)),
        "effective_tokens": math.fsum(ratios) / len(ratios),
        "effective_share": math.fsum(ratios) / len(tokens),
        "first_window_share": math.fsum(w for w, _, place in tokens if place < size) / math.fsum(weights),
        "unweighted_loss": math.fsum(loss for _, loss, _ in tokens) / len(tokens),
    }


def predicted_tokens(model, batch):
    """Weight, long loss and position of each predicted token of a batch."""
    output, found = model(**batch), []
    positions = batch.get("position_ids")
    for row, mask in enumerate(prediction_mask(batch["labels"], positions).tolist()):
        place = -1
        for column, counts in enumerate(mask):
            place = 0 if positions is not None and positions[row, column] == 0 else place + 1
            if counts:
                found.append((output.weights[row, column].item(), output.long_nll[row, column].item(), place))
    return found


def batches(rows, size):
    return [
        DataCollatorWithScores()([rows[i] for i in range(start, start + size)]) for start in range(0, len(rows), size)
    ]


def told(found):
    return {name: found[name] for name in NAMES}


@pytest.mark.parametrize("weighting", ["dense", "sparse", "longce"])
@pytest.mark.parametrize("make", [some_rows, packed_rows], ids=["padded", "packed"])
def test_the_statistics_are_those_of_all_predicted_tokens_and_of_each_step(make, weighting):
    model = with_weighted_loss(models.tiny(), WEIGHTINGS[weighting])
    rows = make()
    split = batches(rows, len(rows) // 4)
    steps = [predicted_tokens(model, a) + predicted_tokens(model, b) for a, b in zip(split[::2], split[1::2])]
    statistics = WeightStatistics(model.train(), size=SIZE)
    for number, batch in enumerate(split):
        model(**batch).loss.backward()
        if number % 2:
            statistics.step()
    found = statistics.flush()
    assert told(found) == pytest.approx(expected(steps), **SAME)
    assert found["tokens_per_second"] > 0
    assert len(steps) > 1
    assert found["weight_std"] > 0.05
    assert 0.05 < found["first_window_share"] < 0.9
    assert statistics.flush() == {}


def test_a_step_that_was_not_ended_counts_as_one_and_evaluations_not_at_all():
    model = with_weighted_loss(models.tiny(), Dense())
    one, other = batches(some_rows(), 4)
    statistics = WeightStatistics(model, size=SIZE)
    model(**other)
    assert statistics.flush() == {}
    model.train()
    model(one["input_ids"], one["attention_mask"], labels=one["labels"], short_nll=one["short_nll"])  # by position
    model.eval()(**other)
    assert told(statistics.flush()) == pytest.approx(expected([predicted_tokens(model, one)]), **SAME)
    statistics.remove()
    model.train()(**one)
    assert statistics.flush() == {}


def test_uniform_weights_are_one_and_every_token_counts_in_full():
    model = with_weighted_loss(models.tiny().train(), Uniform())
    statistics = WeightStatistics(model)
    model(**DataCollatorWithScores()(list(some_rows((20, 30)))))
    found = statistics.flush()
    assert (found["weight_mean"], found["weight_std"], found["effective_share"]) == (1, 0, 1)
    assert found["effective_tokens"] == 48
    assert "first_window_share" not in found


def test_where_a_model_scores_itself_the_first_window_weighs_what_the_rest_of_the_formula_gives():
    scored = models.tiny()
    model = with_weighted_loss(scored, Dense(interpolation=0.75), Scorer(scored, ShortContext(SIZE, 5))).train()
    statistics = WeightStatistics(model, size=SIZE)
    model(**DataCollatorWithScores()(list(some_rows((30,), scored=False))))
    # No difference there: each of the 7 predicted tokens weighs the uniform share, 0.75, of a mean weight of 1.
    assert statistics.flush()["first_window_share"] == pytest.approx(7 * 0.75 / 29, rel=1e-12)


def trained(tmp_path, rows=None, *, weighting=None, size=SIZE, **given):
    """The lines that a Trainer logged."""
    settings = {"max_steps": 2, "learning_rate": 1e-2, "lr_scheduler_type": "constant", "save_strategy": "no"}
    settings |= {"train_sampling_strategy": "sequential", "disable_tqdm": True}
    model = with_weighted_loss(models.tiny("gpt2"), weighting or Dense())
    trainer = WeightedTrainer(
        model=model,
        args=training_arguments({**settings, **given}, tmp_path),
        train_dataset=some_rows() if rows is None else rows,
        data_collator=DataCollatorWithScores(),
        size=size,
    )
    trainer.train()
    return [line for line in trainer.state.log_history if "loss" in line]


@pytest.mark.parametrize("kwargs", [{}, {"gradient_checkpointing": True}], ids=["plain", "checkpointed"])
@pytest.mark.parametrize(("rows", "parts"), [(4, 1), (2, 2), (1, 4)])
def test_a_trainer_logs_the_same_however_a_step_is_split(rows, parts, kwargs, tmp_path):
    split = {"per_device_train_batch_size": rows, "gradient_accumulation_steps": parts}
    lines = trained(tmp_path, **split, **kwargs)
    model = with_weighted_loss(models.tiny("gpt2"), Dense())
    tokens = predicted_tokens(model, DataCollatorWithScores()([some_rows()[i] for i in range(4)]))
    assert told(lines[0]) == pytest.approx(expected([tokens]), **SAME)
    assert told(lines[1]) != pytest.approx(told(lines[0]), rel=1e-3)


def test_an_interval_of_several_steps_is_told_as_their_mean(tmp_path):
    one_by_one = trained(tmp_path, max_steps=4, per_device_train_batch_size=2)
    together = trained(tmp_path, max_steps=4, per_device_train_batch_size=2, logging_steps=2)
    assert [line["step"] for line in together] == [2, 4]
    for line, pair in zip(together, (one_by_one[:2], one_by_one[2:])):
        mean = sum(part["effective_tokens"] for part in pair) / 2
        assert line["effective_tokens"] == pytest.approx(mean, rel=1e-12)


def test_bfloat16_autocast_is_told_like_float32(tmp_path):
    plain = trained(tmp_path, max_steps=1)[0]
    # Losses of a few nats whose logits have 8 bits: some hundredths; the weights depend on their differences.
    assert told(trained(tmp_path, max_steps=1, bf16=True)[0]) == pytest.approx(told(plain), rel=0.05)


def test_tensorboard_receives_what_is_logged(tmp_path, monkeypatch):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "board"))
    lines = trained(tmp_path, report_to="tensorboard")
    events = EventAccumulator(str(tmp_path / "board")).Reload()
    for name in NAMES:
        found = [(event.step, event.value) for event in events.Scalars(f"train/{name}")]
        assert found == [(line["step"], pytest.approx(line[name], rel=2**-23)) for line in lines]  # float32 there


def test_the_trainer_of_the_document_logs_what_ours_does(tmp_path):
    page = (Path(__file__).parents[2] / "docs" / "train.md").read_text(encoding="utf-8")
    (block,) = [part for part in re.findall(r"```python\n(.*?)```", page, re.DOTALL) if "WeightStatistics(" in part]
    settings = {"max_steps": 2, "learning_rate": 1e-2, "lr_scheduler_type": "constant", "save_strategy": "no"}
    arguments = training_arguments({**settings, "train_sampling_strategy": "sequential"}, tmp_path / "theirs")
    model = with_weighted_loss(models.tiny("gpt2"), Dense())
    names = {"model": model, "arguments": arguments, "rows": some_rows(), "collate": DataCollatorWithScores()}
    exec(compile(block.replace("size=256", f"size={SIZE}"), "docs/train.md", "exec"), names)
    names["trainer"].train()
    found = [told(line) for line in names["trainer"].state.log_history if "loss" in line]
    assert found == [told(line) for line in trained(tmp_path / "ours")]


@pytest.mark.slow
def test_trackio_receives_what_is_logged(tmp_path):
    script = f"""
import sys
sys.path[:] = {sys.path!r}
sys.path.insert(0, {str(Path(__file__).parent)!r})
from test_statistics import *
print("lines", json.dumps(trained(Path({str(tmp_path / "out")!r}), report_to="trackio", project="told")))
"""
    environ = {**os.environ, "TRACKIO_DIR": str(tmp_path / "trackio"), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", script], env=environ, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    (said,) = [line for line in done.stdout.splitlines() if line.startswith("lines ")]
    with sqlite3.connect(next((tmp_path / "trackio").glob("told*.db"))) as database:
        received = [json.loads(text) for (text,) in database.execute("SELECT metrics FROM metrics ORDER BY id")]
    lines = json.loads(said.removeprefix("lines "))
    received = [metrics for metrics in received if "train/loss" in metrics]
    assert len(received) == len(lines) == 2
    for line, metrics in zip(lines, received):
        assert {name: metrics[f"train/{name}"] for name in NAMES} == told(line)


SPLIT = {"max_steps": 4, "gradient_accumulation_steps": 2, "logging_steps": 2}


@pytest.mark.slow
def test_two_processes_log_what_one_does(tmp_path):
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    environ = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    subprocess.run([*torchrun, __file__, str(tmp_path)], env=environ, check=True, timeout=300)
    num_processes, lines = json.loads((tmp_path / "found.json").read_text())
    assert num_processes == 2
    alone = trained(tmp_path / "alone", weighting=LongCE(), per_device_train_batch_size=2, **SPLIT)
    for line, one in zip(lines, alone):
        # Weights of the model differ by 1e-9 after a step of AdamW (tests/test_training.py), losses about as much.
        assert told(line) == pytest.approx(told(one), rel=1e-7)
    assert told(lines[0]) != pytest.approx(told(lines[1]), rel=1e-3)


if __name__ == "__main__":
    lines = trained(Path(sys.argv[1]) / "run", weighting=LongCE(), per_device_train_batch_size=1, **SPLIT)
    if torch.distributed.get_rank() == 0:
        found = [torch.distributed.get_world_size(), lines]
        (Path(sys.argv[1]) / "found.json").write_text(json.dumps(found))
    torch.distributed.destroy_process_group()
