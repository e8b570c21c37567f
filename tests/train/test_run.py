"""Batches, and that training does not depend on how a step is split, stored, interrupted or described."""

import dataclasses
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import distributed
import pytest
import torch
from distributed import LENGTHS, fit, fit_weighted, some_rows
from runs import SAME_LOSSES, SAME_WEIGHTS, packed
from transformers import (
    DataCollatorForLanguageModeling,
    DataCollatorWithFlattening,
    PreTrainedConfig,
    TrainerCallback,
    default_data_collator,
)

import models
from texts import trained_tokenizer
from tokenweight import Dense, Scorer, ShortContext, Uniform, load_model, parse_weighting, token_nll, with_weighted_loss
from tokenweight.data import score_folder
from tokenweight.models import find_tokenizer, load_config, load_tokenizer
from tokenweight.records import read_json
from tokenweight.train import (
    DataCollatorWithScores,
    TrainSettings,
    WeightedTrainer,
    read_recipe,
    train,
    training_arguments,
)
from tokenweight.train.checkpoints import mark_whole

collate = DataCollatorWithScores()
ROWS = [
    {"input_ids": [5, 6, 7], "short_nll": [0.0, 1.5, 2.5], "document": "a"},
    {"input_ids": [8, 9], "short_nll": [0.0, 3.5], "document": "b"},
]


def assert_same(one, two, **tolerance):
    (losses, weights), (other_losses, other_weights) = one, two
    assert losses == pytest.approx(other_losses, **SAME_LOSSES)
    for name, weight in weights.items():
        torch.testing.assert_close(weight, other_weights[name], **(tolerance or SAME_WEIGHTS))


def test_rows_of_one_length_make_a_batch_without_mask():
    batch = collate([{"input_ids": [5, 6, 7]}, {"input_ids": [8, 9, 4]}])
    assert {name: values.tolist() for name, values in batch.items()} == {
        "input_ids": [[5, 6, 7], [8, 9, 4]],
        "labels": [[-100, 6, 7], [-100, 9, 4]],
    }


def test_shorter_rows_are_padded_and_masked():
    batch = collate(ROWS)
    assert set(batch) == {"input_ids", "labels", "short_nll", "attention_mask"}
    assert batch["input_ids"][0].tolist() == [5, 6, 7]
    assert batch["input_ids"][1, :2].tolist() == [8, 9]
    assert batch["labels"].tolist() == [[-100, 6, 7], [-100, 9, -100]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 1, 0]]
    assert batch["short_nll"].dtype == torch.int32
    short_nll = batch["short_nll"].view(torch.float32)
    assert short_nll.isnan().tolist() == [[False] * 3, [False, False, True]]
    assert short_nll[:, :2].tolist() == [[0.0, 1.5], [0.0, 3.5]]


def test_labels_of_the_rows_are_kept_but_for_what_nothing_predicts():
    rows = [{"input_ids": [5, 6, 7], "labels": [5, -100, 7]}, {"input_ids": [8, 9], "labels": [8, 9]}]
    assert collate(rows)["labels"].tolist() == [[-100, -100, 7], [-100, 9, -100]]
    assert rows[0]["labels"] == [5, -100, 7]


def test_packed_rows_begin_documents_unlabeled_and_are_padded_by_a_document_without_mask():
    rows = [{"input_ids": [5, 6, 7, 8], "position_ids": [0, 1, 0, 1]}, {"input_ids": [9, 4], "position_ids": [0, 1]}]
    batch = collate(rows)
    assert set(batch) == {"input_ids", "labels", "position_ids"}
    assert batch["labels"].tolist() == [[-100, 6, -100, 8], [-100, 4, -100, -100]]
    assert batch["position_ids"].tolist() == [[0, 1, 0, 1], [0, 1, 0, 1]]


def test_rows_that_skip_positions_are_padded_without_a_new_document():
    rows = [{"input_ids": [3] * len(own), "position_ids": own} for own in ([0, 1, 2, 9, 10], [0, 5, 6], [0])]
    padded = [[0, 1, 2, 9, 10], [0, 5, 6, 6, 6], [0, 1, 1, 1, 1]]
    assert collate(rows)["position_ids"].tolist() == padded


@pytest.mark.parametrize("skipped", [0, 7])
@pytest.mark.parametrize("self_scored", [False, True])
def test_padded_rows_with_positions_have_the_losses_and_weights_of_the_rows_alone(skipped, self_scored):
    model = models.tiny("gpt2")
    weighting = Dense(interpolation=0.5) if self_scored else Uniform()
    with_weighted_loss(model, weighting, Scorer(model, ShortContext(4, 2)) if self_scored else None)
    rows = []
    for seed, length in enumerate((16, 5, 1)):  # windows lie within the padding of the others, and across its border
        places = [t + skipped * (t > 1) for t in range(length)]
        rows.append({"input_ids": models.some_tokens(1, length, seed=seed)[0].tolist(), "position_ids": places})
    together = model(**collate(rows))
    for row, weights, losses in zip(rows, together.weights, together.long_nll, strict=True):
        alone, length = model(**collate([row])), len(row["input_ids"])
        torch.testing.assert_close(weights[:length], alone.weights[0], rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(losses[:length], alone.long_nll[0], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("column", ["short_nll", "labels", "position_ids"])
@pytest.mark.parametrize(("number", "values"), [(1, None), (1, [0]), (0, [0, 0, 0, 0])])
def test_a_column_that_is_missing_or_has_another_length_is_refused(column, number, values):
    rows = [{"input_ids": [5, 6, 7], column: [0, 1, 2]}, {"input_ids": [8, 9], column: [0, 1]}]
    del rows[number][column]
    if values is not None:
        rows[number][column] = values
    found = "no column" if values is None else f"{len(values)} values"
    tokens = len(rows[number]["input_ids"])
    with pytest.raises(ValueError, match=f"row {number} of the batch has {tokens} tokens and {found} {column}"):
        collate(rows)


@pytest.mark.parametrize("column", ["short_nll", "labels", "position_ids"])
def test_a_column_that_only_a_later_row_has_is_refused(column):
    with pytest.raises(ValueError, match=column):
        collate([{"input_ids": [5, 6]}, {"input_ids": [8, 9], column: [0, 1]}])


def plain_collate(rows):
    tokens = torch.tensor([row["input_ids"] for row in rows])
    return {"input_ids": tokens, "labels": tokens.clone()}


def test_uniform_weights_train_like_a_stock_trainer_on_a_stock_model():
    rows, split = some_rows((30,) * 12, scored=False), {"per_device_train_batch_size": 2, "max_steps": 6}
    stock = fit(models.tiny(dtype=torch.float32), rows, plain_collate, optim="sgd", **split)
    ours = fit(with_weighted_loss(models.tiny(dtype=torch.float32), Uniform()), rows, optim="sgd", **split)
    # Float32: 1e-5 is some hundred roundings of the loss; a step moves a weight by 0.01 of a gradient of size 1.
    assert ours[0] == pytest.approx(stock[0], rel=1e-5)
    assert max(ours[0]) - min(ours[0]) > 0.01
    for name, weight in stock[1].items():
        torch.testing.assert_close(ours[1][name], weight, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("weighting", ["dense", "sparse", "longce"])
def test_four_rows_one_by_one_make_the_step_of_a_batch_of_four(weighting):
    together = fit_weighted(weighting, per_device_train_batch_size=4)
    apart = fit_weighted(weighting, per_device_train_batch_size=1, gradient_accumulation_steps=4)
    assert_same(apart, together)
    assert len(set(LENGTHS)) > 4


@pytest.mark.parametrize("weighting", ["uniform", "longce"])
def test_packed_documents_train_as_if_each_had_a_row_of_its_own(weighting):
    rows = some_rows((17, 9, 21))
    bound = [with_weighted_loss(models.tiny("gpt2"), parse_weighting(weighting)) for _ in range(3)]
    alone = fit(bound[0], rows, per_device_train_batch_size=3)
    assert_same(fit(bound[1], packed(rows, [1, 0, 2]), per_device_train_batch_size=1), alone)
    assert_same(fit(bound[2], packed(rows, [1], [2, 0]), per_device_train_batch_size=2), alone)  # one is padded


@pytest.mark.slow
def test_two_processes_make_the_steps_of_one(tmp_path):
    script, found = Path(distributed.__file__), tmp_path / "found.pt"
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    environ = {**os.environ, "OMP_NUM_THREADS": "1"}
    subprocess.run([*torchrun, str(script), str(found), "stored", "self"], env=environ, check=True, timeout=300)
    num_processes, results = torch.load(found)
    assert num_processes == 2
    for scorer, result in results.items():
        assert_same(result, fit_weighted("dense", scorer=scorer, per_device_train_batch_size=2))
    assert results["stored"][0] != results["self"][0]


@pytest.mark.parametrize("scorer", ["stored", "self"])
@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_checkpointing_of_activations_changes_nothing(scorer, kind):
    plain = fit_weighted("dense", scorer=scorer, kind=kind, per_device_train_batch_size=2)
    settings = {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": '{"use_reentrant": false}'}
    assert_same(fit_weighted("dense", scorer=scorer, kind=kind, per_device_train_batch_size=2, **settings), plain)


def fit_collated(collator, lengths):
    model = with_weighted_loss(models.tiny(dtype=torch.float32), Dense())
    rows = some_rows(lengths)
    rows = rows.add_column("labels", rows["input_ids"][:]).add_column("document", ["a"] * len(rows))
    return fit(model, rows, collator, per_device_train_batch_size=2)


@pytest.mark.parametrize("collator", [default_data_collator, "language modeling"])
def test_scores_reach_the_loss_through_collators_that_keep_them(collator):
    if collator == "language modeling":
        tokenizer = trained_tokenizer()
        tokenizer.pad_token = "</s>"
        collator = DataCollatorForLanguageModeling(tokenizer, mlm=False)
    assert_same(fit_collated(collator, (30,) * 6), fit_collated(collate, (30,) * 6), rtol=0, atol=1e-7)


@pytest.mark.parametrize("collator", [DataCollatorWithFlattening(), plain_collate])
def test_scores_lost_on_the_way_to_the_loss_are_an_error(collator):
    with pytest.raises(ValueError, match="needs the short loss of every token, but no short_nll column reached"):
        fit_collated(collator, (30,) * 6)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A model without a tokenizer, rows, and rows that it scored."""
    root = tmp_path_factory.mktemp("training")
    models.tiny(dtype=torch.float32).save_pretrained(root / "model")
    some_rows((40,) * 8, scored=False).save_to_disk(str(root / "rows"))
    score_folder(root / "rows", str(root / "model"), [ShortContext(10, 7)], root / "scored")
    return root


@pytest.fixture
def settings(folders, tmp_path):
    trainer = {"max_steps": 4, "warmup_steps": 1, "learning_rate": 1e-2, "save_steps": 2, "disable_tqdm": True}
    return TrainSettings(str(folders / "model"), str(folders / "scored"), str(tmp_path / "out"), trainer=trainer)


def logged(out):
    lines = [json.loads(line) for line in (Path(out) / "metrics.jsonl").read_text().splitlines()]
    return [{k: line[k] for k in ("step", "loss", "grad_norm", "learning_rate")} for line in lines if "loss" in line]


def test_a_run_can_be_repeated_from_its_record(settings, tmp_path):
    settings = dataclasses.replace(settings, trainer={**settings.trainer, "learning_rate": 2e-5})
    trained = train(settings)
    record = read_json(Path(settings.out) / "run.json")
    resolved = {"weighting": "dense:interpolation=0.75", "contrast": "trained"}
    assert record["settings"] == {**dataclasses.asdict(settings), **resolved}
    assert record["data"]["context"]["size"] == 10
    assert record["versions"]["torch"] == torch.__version__
    assert [line["step"] for line in logged(settings.out)] == [1, 2, 3, 4]
    again = TrainSettings(**{**read_recipe(Path(settings.out) / "run.json"), "out": str(tmp_path / "again")})
    for name, weight in train(again).state_dict().items():
        assert torch.equal(weight, trained.state_dict()[name]), name
    assert logged(again.out) == logged(settings.out)


@pytest.mark.parametrize("weighting", ["dense", "warmup(eslm(keep=0.5), tokens=100)"])
def test_a_resumed_run_ends_as_if_undisturbed(weighting, settings):
    settings = dataclasses.replace(settings, weighting=weighting)
    trained = train(settings)
    first = logged(settings.out)
    again = {**settings.trainer, "resume_from_checkpoint": f"{settings.out}/checkpoint-2"}
    for name, weight in train(dataclasses.replace(settings, trainer=again)).state_dict().items():
        assert torch.equal(weight, trained.state_dict()[name]), name
    assert logged(settings.out) == first


def test_a_run_that_goes_on_needs_the_history_of_its_weighting(settings):
    train(dataclasses.replace(settings, weighting="eslm:keep=0.5"))
    again = {**settings.trainer, "resume_from_checkpoint": "checkpoint-2"}
    other = dataclasses.replace(settings, weighting="eslm:keep=0.25", trainer=again)
    with pytest.raises(ValueError, match=r"step 2: found the history of eslm:keep=0.5: expected that of eslm:keep=0.2"):
        train(other)
    path = Path(settings.out) / "checkpoint-2" / "trainer_state.json"
    without = {**read_json(path), "stateful_callbacks": {}}
    path.write_text(json.dumps(without))
    mark_whole(path.parent)
    with pytest.raises(ValueError, match=r"step 2: found the history of no weighting"):
        train(dataclasses.replace(other, weighting="eslm:keep=0.5"))


def test_a_checkpoint_is_resumed_from_by_its_name_in_the_folder(settings):
    train(settings)
    first = logged(settings.out)
    shutil.rmtree(f"{settings.out}/checkpoint-4")
    train(dataclasses.replace(settings, trainer={**settings.trainer, "resume_from_checkpoint": "checkpoint-2"}))
    assert logged(settings.out) == first
    gone = {**settings.trainer, "resume_from_checkpoint": "checkpoint-9999"}
    with pytest.raises(ValueError, match=r"resume_from_checkpoint .*checkpoint-9999: not a complete .*checkpoint-4$"):
        train(dataclasses.replace(settings, trainer=gone))


@pytest.mark.slow
def test_the_record_of_a_resumed_run_repeats_the_run_that_was_made(settings, tmp_path):
    train(settings)
    longer = {**settings.trainer, "max_steps": 6, "resume_from_checkpoint": "true"}
    trained = train(dataclasses.replace(settings, trainer=longer))
    record = read_json(Path(settings.out) / "run.json")
    assert record["settings"]["trainer"] == {**settings.trainer, "max_steps": 6}
    assert "trainer.max_steps is 4 there, 6 now" in record["resumed"][0]["changed"]
    assert "| Trained | 6 steps" in (Path(settings.out) / "README.md").read_text()
    again = TrainSettings(**{**read_recipe(Path(settings.out) / "run.json"), "out": str(tmp_path / "again")})
    for name, weight in train(again).state_dict().items():
        assert torch.equal(weight, trained.state_dict()[name]), name
    assert logged(again.out) == logged(settings.out)


class Failing(TrainerCallback):
    """Raises after some steps have been made."""

    def __init__(self, step, error):
        self.step, self.error = step, error

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            (Path(args.output_dir) / "runs").mkdir()  # as trackers do
            (Path(args.output_dir) / "runs" / "events").write_text("of a tracker")
            raise self.error


@pytest.mark.parametrize("error", [TypeError("in the first step"), KeyboardInterrupt()], ids=["error", "interrupt"])
@pytest.mark.parametrize("there", [False, True])
def test_what_ends_a_run_before_its_first_step_leaves_nothing_of_it(there, error, settings, tmp_path):
    out = tmp_path / "some" / "where"
    if there:
        out.mkdir(parents=True)
    settings = dataclasses.replace(settings, out=str(out))
    with pytest.raises(type(error)):
        train(settings, [Failing(0, error)])
    assert list(tmp_path.rglob("*")) == ([out.parent, out] if there else [])
    train(settings)
    assert (out / "model.safetensors").exists()


def test_metrics_of_logits_that_are_never_made_are_refused(folders, tmp_path):
    model = with_weighted_loss(models.tiny(dtype=torch.float32), Uniform())
    arguments = training_arguments({"max_steps": 1, "disable_tqdm": True}, tmp_path)
    with pytest.raises(ValueError, match=r"^compute_metrics: needs logits"):
        WeightedTrainer(model, arguments, train_dataset=some_rows(), compute_metrics=len)


def test_what_the_engine_of_the_trainer_raises_is_a_refusal_that_names_it(settings, tmp_path, monkeypatch):
    def broken(self):
        raise KeyError("a\nmode")

    monkeypatch.setattr("transformers.Trainer.create_accelerator_and_postprocess", broken)
    with pytest.raises(ValueError, match=r"^trainer: 'a\\nmode' \(KeyError\)$"):
        train(settings)
    assert not (tmp_path / "out").exists()


def test_what_ends_a_run_later_leaves_what_it_has_made(settings):
    with pytest.raises(RuntimeError):
        train(settings, [Failing(1, RuntimeError("in the second step"))])
    assert (Path(settings.out) / "run.json").exists()
    assert [line["step"] for line in logged(settings.out)] == [1]


def test_a_folder_of_another_that_cannot_be_trained_into_keeps_its_files(settings, tmp_path):
    (tmp_path / "out").write_text("a file")
    with pytest.raises(ValueError, match=r"^out .*: is a file"):
        train(settings)
    with pytest.raises(ValueError, match=r"^out .*/inner: cannot be written to: Not a directory"):
        train(dataclasses.replace(settings, out=f"{settings.out}/inner"))
    assert (tmp_path / "out").read_text() == "a file"


def test_a_model_without_a_trained_parameter_is_refused(settings, monkeypatch, tmp_path):
    def frozen(*args, **kwargs):
        return load_model(*args, **kwargs).requires_grad_(False)

    monkeypatch.setattr("tokenweight.train.run.load_model", frozen)
    with pytest.raises(ValueError, match="model: all of its parameters are frozen"):
        train(settings)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("given", "kept"), [(64, 256), (1000, 1000), (int(1e30), int(1e30))])
def test_the_tokenizer_of_an_extended_model_truncates_at_its_length(given, kept, settings, folders, tmp_path):
    shutil.copytree(folders / "model", tmp_path / "model")
    tokenizer = trained_tokenizer()
    tokenizer.model_max_length = given
    tokenizer.save_pretrained(tmp_path / "model")
    train(dataclasses.replace(settings, model=str(tmp_path / "model"), extend={"length": 256}))
    assert load_tokenizer(settings.out).model_max_length == kept
    assert load_model(settings.out).config.max_position_embeddings == 256


def test_a_revision_reaches_whatever_is_loaded_and_the_record_names_the_commit(settings, monkeypatch):
    asked, named = [], ["base/model", "some/model"]

    def loading(load):
        def loaded(name, *, revision=None, **kwargs):
            asked.append((name, revision))
            found = load(settings.model, **kwargs)
            if isinstance(found, PreTrainedConfig):
                found._commit_hash, found._name_or_path = "a1b2c3", named.pop()
            return found

        return loaded

    for name, load in (("load_config", load_config), ("find_tokenizer", find_tokenizer), ("load_model", load_model)):
        monkeypatch.setattr(f"tokenweight.train.run.{name}", loading(load))
    with pytest.raises(ValueError, match=r"^revision main: .* is no model of the hub"):
        train(dataclasses.replace(settings, revision="main"))
    for kept in ("a1b2c3", "main"):  # the second is loaded from a base model, which has commits of its own
        train(dataclasses.replace(settings, model="some/model", revision="main"))
        assert asked == [("some/model", "main")] * 3
        assert read_json(Path(settings.out) / "run.json")["settings"]["revision"] == kept
        shutil.rmtree(settings.out)
        asked.clear()


@pytest.mark.parametrize(
    ("trainer", "told"),
    [
        ({"warmup_steps": 4}, r"trainer\.warmup_steps 4, .* 4 steps \(max_steps\): .* never reaches 0\.01"),
        ({"warmup_steps": 20, "max_steps": -1}, r"trainer\.warmup_steps 20, .* 8 steps"),
        ({"warmup_steps": 3}, None),
        ({"warmup_steps": 20, "lr_scheduler_type": "constant"}, None),
        ({"lr_scheduler_kwargs": {"min_lr": 1}}, r"trainer\.lr_scheduler_kwargs .*: not used, .* constant_with_warmup"),
        ({"neftune_noise_alpha": 5}, r"trainer\.neftune_noise_alpha 5: weights are made without"),
    ],
    ids=str,
)
def test_settings_that_may_not_do_what_is_meant_are_warned_of_in_one_line(trainer, told, settings, caplog):
    train(dataclasses.replace(settings, trainer={**settings.trainer, **trainer}))
    warnings = [one.getMessage() for one in caplog.records if one.name.startswith("tokenweight")]
    assert len(warnings) == (told is not None)
    assert told is None or re.search(told, warnings[0])


def test_noise_on_embeddings_is_not_warned_of_where_weights_need_no_losses(settings, caplog):
    noise = {**settings.trainer, "neftune_noise_alpha": 5}
    train(dataclasses.replace(settings, weighting="uniform", trainer=noise))
    assert "neftune" not in caplog.text


def test_a_checkpoint_without_the_state_of_its_training_is_not_gone_on_from(settings):
    train(dataclasses.replace(settings, trainer={**settings.trainer, "save_only_model": True}))
    again = {**settings.trainer, "resume_from_checkpoint": "true"}
    with pytest.raises(ValueError, match=r"checkpoint-\d holds a model without the state of its training \(save_only_"):
        train(dataclasses.replace(settings, trainer=again))


def test_the_checkpoint_of_one_run_does_not_go_on_in_the_folder_of_another(settings, tmp_path):
    train(settings)
    shutil.copytree(settings.out, tmp_path / "other")
    again = {**settings.trainer, "resume_from_checkpoint": str(tmp_path / "other" / "checkpoint-2")}
    with pytest.raises(ValueError, match=r"out .*: exists; name a new folder"):
        train(dataclasses.replace(settings, trainer=again))


def test_a_scorer_is_refused_as_it_would_be_by_score(settings, folders, tmp_path):
    fresh = dataclasses.replace(
        settings, data=str(folders / "rows"), scorer=str(folders / "small"), out=str(tmp_path / "x")
    )
    models.tiny(dtype=torch.float32, max_position_embeddings=8).save_pretrained(folders / "small")
    with pytest.raises(ValueError, match=r"size: windows of 10 tokens: the model has 8 positions"):
        train(fresh)
    models.tiny(dtype=torch.float32, vocab_size=30).save_pretrained(folders / "small")
    with pytest.raises(ValueError, match="is not in the vocabulary of the model, which has 30 tokens"):
        train(fresh)
    for name, tokenizer in ((settings.model, trained_tokenizer()), (fresh.scorer, trained_tokenizer(vocab_size=299))):
        tokenizer.save_pretrained(name)
    with pytest.raises(ValueError, match=r"was made with the tokenizer of .*, but .*small has another"):
        train(fresh)


def test_a_frozen_scorer_is_stored_scores_and_a_model_that_scores_itself_is_for_one_step(settings, folders, tmp_path):
    train(settings)
    runs = {}
    for scorer in ("self", settings.model):
        fresh = {"data": str(folders / "rows"), "scorer": scorer, "out": str(tmp_path / scorer.replace("/", "_"))}
        train(dataclasses.replace(settings, **fresh))
        runs[scorer] = [line["loss"] for line in logged(fresh["out"])]
        context = read_json(Path(fresh["out"]) / "run.json")["settings"]
        assert (context["size"], context["stride"]) == (10, 7)  # a quarter of a row, and three quarters of that
    stored = [line["loss"] for line in logged(settings.out)]
    # Windows of one row in a batch, or of all rows, or not read again: roundings of float32.
    assert runs[settings.model] == pytest.approx(stored, rel=1e-5)
    assert runs["self"][:1] == pytest.approx(stored[:1], rel=1e-5)
    assert abs(runs["self"][-1] / stored[-1] - 1) > 1e-4  # by then the model that scores is another


@pytest.mark.slow
def test_checkpoints_and_the_trained_model_load_where_tokenweight_is_not_installed(settings, tmp_path):
    trained, tokens = train(settings), models.some_tokens(2, 30)
    script = """
import sys, torch
sys.modules["tokenweight"] = None
from transformers import AutoModelForCausalLM
tokens = torch.load(sys.argv[1])
with torch.no_grad():
    torch.save([AutoModelForCausalLM.from_pretrained(name)(tokens).logits for name in sys.argv[3:]], sys.argv[2])
"""
    torch.save(tokens, tmp_path / "tokens.pt")
    loaded = [f"{settings.out}/checkpoint-2", f"{settings.out}/checkpoint-4", settings.out]
    command = [sys.executable, "-c", script, str(tmp_path / "tokens.pt"), str(tmp_path / "logits.pt"), *loaded]
    subprocess.run(command, check=True, timeout=120)
    before_the_end, at_the_end, final = torch.load(tmp_path / "logits.pt")
    with torch.no_grad():
        # Another process may split the work among threads otherwise: some roundings of logits up to 16.
        torch.testing.assert_close(final, trained.eval()(tokens).logits, rtol=0, atol=1e-5)
    assert torch.equal(final, at_the_end)
    assert (before_the_end - final).abs().max() > 0.01


@pytest.mark.parametrize("weighting", ["uniform", "dense", "longce"])
def test_bfloat16_autocast_trains_with_a_loss_summed_in_float32(weighting):
    model, rows, weighting = models.tiny(dtype=torch.float32), some_rows((40,)), parse_weighting(weighting)
    tokens, short_nll = (torch.tensor(rows[name][:]) for name in ("input_ids", "short_nll"))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        long_nll = token_nll(model, tokens)
    exact = token_nll(model, tokens)
    mask = torch.arange(40)[None] > 0
    losses, weights = fit(with_weighted_loss(model, weighting), rows, bf16=True)
    expected = (weighting(long_nll, short_nll, mask).double() * long_nll).sum() / 39
    # Some 40 additions in float32; a sum in bfloat16 would be off by up to 2**-9 = 2e-3.
    assert losses[0] == pytest.approx(expected.item(), rel=40 * 2**-24)
    assert not torch.equal(long_nll, exact)
    assert {weight.dtype for weight in weights.values()} == {torch.float32}
    trained = models.tiny(dtype=torch.float32)
    trained.load_state_dict(weights)
    assert token_nll(trained, tokens).mean() < exact.mean() - 0.1


@pytest.mark.parametrize("bf16", [False, True])
def test_a_trained_model_is_read_like_the_one_that_was_saved(bf16, settings):
    trained = train(dataclasses.replace(settings, trainer={**settings.trainer, "bf16": bf16}))
    tokens = models.some_tokens(2, 30)
    assert torch.equal(token_nll(trained, tokens), token_nll(load_model(settings.out), tokens))


def test_a_trainer_that_divides_gradients_twice_is_refused(tmp_path, monkeypatch):
    class Dividing(WeightedTrainer):
        def create_accelerator_and_postprocess(self):
            super().create_accelerator_and_postprocess()
            monkeypatch.setitem(self.accelerator.gradient_state.plugin_kwargs, "num_steps", 4)  # all Trainers share it

    models.tiny(dtype=torch.float32).save_pretrained(tmp_path / "model")
    some_rows().save_to_disk(str(tmp_path / "rows"))
    monkeypatch.setattr("tokenweight.train.run.WeightedTrainer", Dividing)
    settings = TrainSettings(str(tmp_path / "model"), str(tmp_path / "rows"), str(tmp_path / "out"), "uniform")
    with pytest.raises(ValueError, match="divides gradients by the 4 accumulation steps a second time"):
        train(settings)
    assert not (tmp_path / "out").exists()


def test_the_attention_of_both_models_is_the_one_that_was_asked_for_and_recorded(settings, folders):
    fresh = {"data": str(folders / "rows"), "scorer": settings.model, "attn_implementation": "eager"}
    trained = train(dataclasses.replace(settings, **fresh))
    assert trained.config._attn_implementation == "eager"
    record = read_json(Path(settings.out) / "run.json")
    assert [record[name]["attn_implementation"] for name in ("model", "scorer")] == ["eager", "eager"]
    assert record["attn_implementation"] == record["settings"]["attn_implementation"] == "eager"
    with pytest.raises(ValueError, match="sdpaa"):
        train(dataclasses.replace(settings, out=f"{settings.out}-b", attn_implementation="sdpaa"))
