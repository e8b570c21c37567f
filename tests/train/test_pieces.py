"""Training by lengths: steps of one length and of equally many tokens, in an order that any number of processes, passes
and interruptions leave as it is."""

import collections
import dataclasses
import json
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from distributed import some_rows
from runs import torchrun
from transformers import TrainerCallback

import models
from texts import TEXT, trained_tokenizer
from tokenweight import token_nll
from tokenweight.data import Document, prepare_rows
from tokenweight.records import read_json
from tokenweight.train import LengthCurriculum, Pieces, TrainSettings, read_recipe, resolve, train
from tokenweight.train.sequences import SOURCE

LENGTHS = (33, 5, 9, 5, 17, 5, 9, 33, 5, 17, 9, 5, 33, 5, 5, 9, 33, 17)


def numbered(lengths):
    rows = {"input_ids": [[row] * length for row, length in enumerate(lengths)]}
    return datasets.Dataset.from_dict(rows).with_format("numpy")


def steps_of(pieces, num):
    """The numbers and the length of the rows of each step."""
    found = []
    for step in range(num):
        items = [pieces[step * pieces.batch + item] for item in range(pieces.batch)]
        rows = [row for item in items for row in item]
        assert len({len(row["input_ids"]) for row in rows}) == len({row[SOURCE] for row in rows}) == 1
        assert len({len(item) for item in items}) == 1
        found.append(([int(row["input_ids"][0]) for row in rows], len(rows[0]["input_ids"])))
    return found


@pytest.mark.parametrize("batch", [1, 2, 3])
def test_steps_have_one_length_and_equally_many_tokens_and_a_pass_over_a_length_has_each_row_once(batch):
    pieces = Pieces(numbered(LENGTHS), LengthCurriculum("pow2", 2), batch=batch, seed=1, epochs=3)
    assert len(pieces) == sum(length - 1 for length in LENGTHS) // (32 * batch) * batch
    steps = steps_of(pieces, 40)
    assert {(length - 1) * len(rows) for rows, length in steps} == {32 * batch}
    read = collections.defaultdict(list)
    for rows, length in steps:
        read[length] += rows
    for length, rows in read.items():
        num = LENGTHS.count(length)
        passes = [rows[start : start + num] for start in range(0, len(rows) - num + 1, num)]
        assert all(sorted(part) == [row for row in range(len(LENGTHS)) if LENGTHS[row] == length] for part in passes)
    tokens = sum(length - 1 for length in LENGTHS)
    for length in read:
        part = LENGTHS.count(length) * (length - 1) / tokens
        assert len(read[length]) * (length - 1) / (40 * 32 * batch) == pytest.approx(part, abs=0.05)


def test_the_order_follows_from_the_seed_whatever_was_asked_for_before():
    given = {"curriculum": LengthCurriculum(), "batch": 2, "max_steps": 12}
    one, same, other = (Pieces(numbered(LENGTHS), seed=seed, **given) for seed in (1, 1, 2))
    same[17], same[3]
    assert steps_of(one, 12) == steps_of(same, 12) != steps_of(other, 12)


@pytest.fixture(scope="module")
def folder(corpus):
    some_rows(LENGTHS).save_to_disk(str(corpus / "pieces"))
    return str(corpus / "pieces")


@pytest.fixture
def by_length(short_run, folder):
    """A run in which every row comes more than twice."""
    trainer = {"max_steps": 12, "warmup_steps": 0, "learning_rate": 1e-2, "save_steps": 4}
    trainer["per_device_train_batch_size"] = 2
    return dataclasses.replace(short_run, data=folder, curriculum="pow2:cycles=3", dtype="float64", trainer=trainer)


def with_trainer(settings, out, **changes):
    return dataclasses.replace(settings, out=str(out), trainer={**settings.trainer, **changes})


def logged(out):
    lines = [json.loads(line) for line in (Path(out) / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k != "tokens_per_second"} for line in lines if "loss" in line]


class Stop(TrainerCallback):
    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == 10:
            raise KeyboardInterrupt


def test_a_resumed_run_ends_as_if_undisturbed_and_says_what_it_was(by_length, tmp_path, capsys):
    trained = train(by_length)
    assert "curriculum pow2:cycles=3; of the tokens, in sequences of 4 " in capsys.readouterr().out
    again = with_trainer(by_length, tmp_path / "again")
    with pytest.raises(KeyboardInterrupt):
        train(again, [Stop()])
    weights = train(with_trainer(again, again.out, resume_from_checkpoint=True)).state_dict()
    for name, weight in trained.state_dict().items():
        assert torch.equal(weight, weights[name]), name
    lines = logged(by_length.out)
    assert logged(again.out) == lines
    for line in lines:
        assert sum(line[f"tokens/{size}"] for size in (4, 8, 16, 32)) == 64
    record = read_json(Path(by_length.out) / "run.json")
    assert record["settings"]["curriculum"] == "pow2:cycles=3"
    assert "pow2:cycles=3" in (Path(by_length.out) / "README.md").read_text()
    assert TrainSettings(**read_recipe(Path(by_length.out) / "run.json")).curriculum == "pow2:cycles=3"


def test_the_loss_of_a_step_is_the_mean_over_its_tokens_however_passes_divide_it(by_length, corpus, folder, tmp_path):
    still = dataclasses.replace(by_length, weighting="uniform")
    still = with_trainer(still, tmp_path / "one", learning_rate=0.0, max_steps=6, save_strategy="no")
    train(still)
    train(with_trainer(still, tmp_path / "two", per_device_train_batch_size=1, gradient_accumulation_steps=2))
    rows = datasets.load_from_disk(folder).with_format("numpy")
    pieces = Pieces(rows, LengthCurriculum("pow2", 3), batch=2, seed=42, max_steps=6)
    model = models.tiny()
    model.load_state_dict(type(model).from_pretrained(corpus / "model", dtype=torch.float64).state_dict())
    expected = []
    for step in range(6):
        tokens = [row["input_ids"] for item in (0, 1) for row in pieces[2 * step + item]]
        expected.append(token_nll(model, torch.tensor(np.stack(tokens)))[:, 1:].mean().item())
    for name in ("one", "two"):
        assert [line["unweighted_loss"] for line in logged(tmp_path / name)] == pytest.approx(expected, rel=1e-9)
        assert [line["loss"] for line in logged(tmp_path / name)] == pytest.approx(expected, rel=1e-5)


@pytest.mark.slow
def test_two_processes_make_the_steps_of_one(by_length, tmp_path):
    train(with_trainer(by_length, tmp_path / "one"))
    settings = with_trainer(by_length, tmp_path / "two", per_device_train_batch_size=1, use_cpu=True)
    (tmp_path / "run.py").write_text(
        f"from tokenweight.train import TrainSettings, train\ntrain(TrainSettings(**{dataclasses.asdict(settings)!r}))"
    )
    torchrun(tmp_path / "run.py")
    names = ("unweighted_loss", "tokens/", "loss/", "weight_")
    lines = [
        [{k: v for k, v in line.items() if k.startswith(names)} for line in logged(tmp_path / name)]
        for name in ("one", "two")
    ]
    assert len(lines[0]) == 12
    for line, expected in zip(*lines, strict=True):
        assert line == pytest.approx(expected, rel=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "fits"), [("llama", True), ("gpt2", False)])
def test_a_model_of_128_rotary_positions_predicts_128_tokens_of_129(kind, fits, short_run, tmp_path):
    models.tiny(kind, dtype=torch.float32, vocab_size=300).save_pretrained(tmp_path / "model")
    documents = [Document("a", TEXT[:6000])]
    prepare_rows(documents, trained_tokenizer(), 128, tmp_path / "rows", short="decompose", shortest=32)
    run = dataclasses.replace(
        short_run, model=str(tmp_path / "model"), data=str(tmp_path / "rows"), curriculum="pow2", weighting="uniform"
    )
    run = with_trainer(run, tmp_path / "out", max_steps=2, save_strategy="no")
    if fits:
        train(dataclasses.replace(run, eval_data=run.data))
        assert {line["tokens/128"] for line in logged(run.out)} <= {0, 128}
    else:
        with pytest.raises(ValueError, match="rows of 129 tokens: the model has 128 positions"):
            train(run)
    with pytest.raises(ValueError, match="rows of 129 tokens: the model has 128 positions"):
        train(dataclasses.replace(run, curriculum=None, out=str(tmp_path / "plain")))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"curriculum": "long"}, "^curriculum long: expected uniform, linear, pow2"),
        (
            {"data": [{"path": "a", "share": 1}, {"path": "b", "share": 1}]},
            "^curriculum pow2:cycles=3: a mixture of folders has an order of its own: expected one folder",
        ),
        (
            {"trainer": {"train_sampling_strategy": "sequential"}},
            r"^trainer\.train_sampling_strategy sequential: a curriculum has an order of its own",
        ),
    ],
    ids=["name", "mixture", "sampling"],
)
def test_settings_that_a_curriculum_does_not_go_with_are_refused(changes, message, by_length):
    with pytest.raises(ValueError, match=message):
        resolve(dataclasses.replace(by_length, **changes))


def test_rows_of_other_lengths_are_refused_by_number(by_length, corpus):
    with pytest.raises(ValueError, match=r"^curriculum pow2:cycles=3: row 0 has 40 tokens: expected 2\^k \+ 1 in each"):
        train(dataclasses.replace(by_length, data=str(corpus / "scored-long")))
