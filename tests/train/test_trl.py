"""TRL's SFTTrainer with a weighted loss, against the plain Trainer on the same rows; and what would lose weights."""

import re
from pathlib import Path

import pytest
import torch
from distributed import some_rows
from runs import SAME_LOSSES, SAME_WEIGHTS, packed
from transformers import AutoConfig, AutoModelForCausalLM, Trainer, TrainingArguments
from trl import SFTConfig, SFTTrainer

import models
from texts import EXCERPT, trained_tokenizer
from tokenweight import Dense, Scorer, ShortContext, Sparse, Uniform, with_weighted_loss
from tokenweight.data import score_folder
from tokenweight.train import DataCollatorWithScores
from tokenweight.train.trl import TokenWeightedSFTTrainer

PAGE = (Path(__file__).parents[2] / "docs" / "train.md").read_text()
BLOCKS = [part for part in re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL) if "SFTTrainer(" in part]
SETTINGS = {
    "max_steps": 3,
    "learning_rate": 1e-2,
    "per_device_train_batch_size": 2,
    "gradient_accumulation_steps": 2,
    "logging_steps": 1,
    "save_strategy": "no",
    "report_to": "none",
    "use_cpu": True,
    "disable_tqdm": True,
    "bf16": False,
}


@pytest.fixture(autouse=True)
def quiet(monkeypatch):
    """TRL tells its makers that a trainer was made, unless tests run."""
    monkeypatch.setenv("CI", "1")


def bound(weighting, *, scored=True):
    model = models.tiny("gpt2")
    return with_weighted_loss(model, weighting, None if scored else Scorer(model, ShortContext(8, 5)))


def sft(out, model, rows, *, kind=TokenWeightedSFTTrainer, given=None, **settings):
    arguments = SFTConfig(str(out), **{**SETTINGS, "max_length": None, **settings})
    return kind(model, arguments, train_dataset=rows, processing_class=trained_tokenizer(), **(given or {}))


def plain(out, model, rows):
    arguments = TrainingArguments(str(out), **SETTINGS)
    return Trainer(model, arguments, train_dataset=rows, data_collator=DataCollatorWithScores())


def assert_same(trainer, other):
    """Two trainers go the same way: loss and norm of the gradient of every step, and the weights in the end."""
    for each in (trainer, other):
        each.train()
    logs = [[line for line in each.state.log_history if "loss" in line] for each in (trainer, other)]
    assert len(logs[0]) == 3
    for mine, theirs in zip(*logs):
        assert mine["loss"] == pytest.approx(theirs["loss"], **SAME_LOSSES)
        assert mine["grad_norm"] == pytest.approx(theirs["grad_norm"], rel=1e-9)  # float64 sums in another order
    for name, weight in trainer.model.state_dict().items():
        torch.testing.assert_close(weight, other.model.state_dict()[name], **SAME_WEIGHTS)


@pytest.mark.parametrize("prepared", [True, False])
@pytest.mark.parametrize(("weighting", "scored"), [(Dense(), False), (Sparse(), True)])
def test_training_is_that_of_the_plain_trainer(weighting, scored, prepared, tmp_path):
    rows = some_rows(scored=scored).add_column("document", list("abcdefgh"))
    kwargs = {"skip_prepare_dataset": prepared}
    trainer = sft(tmp_path, bound(weighting, scored=scored), rows, dataset_kwargs=kwargs)
    assert_same(trainer, plain(tmp_path, bound(weighting, scored=scored), rows))


def test_packed_documents_stay_apart_as_in_the_plain_trainer(tmp_path):
    rows = packed(some_rows((17, 9, 21, 30, 12)), [1, 0], [2], [3], [1, 2, 4])
    assert_same(sft(tmp_path, bound(Uniform()), rows), plain(tmp_path, bound(Uniform()), rows))


def test_each_batch_passes_through_the_model_once(tmp_path):
    model, passes = bound(Sparse()), []
    model.base_model.register_forward_hook(lambda module, arguments, output: passes.append(module.training))
    sft(tmp_path, model, some_rows(), gradient_checkpointing=False).train()
    assert passes == [True] * 6  # 3 steps of 2 batches


def test_evaluation_is_that_of_the_plain_trainer(tmp_path):
    rows = some_rows()
    seen = {}
    for kind in (sft, plain):
        trainer = kind(tmp_path, bound(Sparse()), rows)
        trainer.compute_metrics = lambda found, kind=kind: seen.update({kind: found.predictions[0]}) or {}
        seen[kind, "loss"] = trainer.evaluate(rows)["eval_loss"]
    assert seen[sft, "loss"] == seen[plain, "loss"]
    assert seen[sft].shape == (8, 40)
    assert (seen[sft] == seen[plain]).all()  # the weights


def test_a_column_that_is_not_there_is_an_error(tmp_path):
    trainer = sft(tmp_path, bound(Sparse()), some_rows(scored=False))
    with pytest.raises(ValueError, match="no short_nll column reached"):
        trainer.train()


def test_rows_that_trl_packed_are_refused(tmp_path):
    lengths = [[40], [4, 5], [25], [33], [40], [17], [5], [28]]
    trainer = sft(tmp_path, bound(Uniform()), some_rows(scored=False).add_column("seq_lengths", lengths))
    with pytest.raises(ValueError, match=r"packed by TRL \(seq_lengths\), which drops scores"):
        trainer.train()


def test_masks_that_nobody_makes_labels_of_are_refused(tmp_path):
    rows = some_rows()
    masked = rows.add_column("completion_mask", [[1] * len(row) for row in rows["input_ids"]])
    given = masked if "labels" not in masked.column_names else masked.remove_columns("labels")
    with pytest.raises(ValueError, match="the rows have completion_mask but no labels, and skip_prepare_dataset"):
        sft(tmp_path, bound(Sparse()), given, dataset_kwargs={"skip_prepare_dataset": True})


def test_a_collator_of_ones_own_is_refused(tmp_path, unchecked):
    with pytest.raises(ValueError, match="data_collator: expected none"):
        sft(tmp_path, bound(Sparse()), some_rows(), given={"data_collator": lambda rows: rows})


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"packing": True, "max_length": 64}, "max_length is 64: expected None"),
        ({"packing": True}, "packing is True: expected False"),
        ({"packing": True, "packing_strategy": "wrapped"}, "packing is True: expected False"),
        ({"eval_packing": True}, "eval_packing is True: expected None"),
        ({"padding_free": True}, "padding_free is True: expected False"),
        ({"max_length": 1024}, "max_length is 1024: expected None"),
        ({"loss_type": "dft"}, "loss_type is 'dft': expected 'nll'"),
    ],
)
def test_settings_that_change_rows_scores_or_loss_are_refused(settings, said, tmp_path):
    with pytest.raises(ValueError, match=said):
        sft(tmp_path, bound(Sparse()), some_rows(), **settings)


def test_arguments_of_the_plain_trainer_are_refused(unchecked, tmp_path):
    with pytest.raises(ValueError, match="loss_type is 'nothing': expected 'nll'"):
        TokenWeightedSFTTrainer(bound(Sparse()), TrainingArguments(str(tmp_path)), train_dataset=some_rows())


@pytest.mark.parametrize("change", [{"settings": {"label_smoothing_factor": 0.1}}, {"compute_loss_func": len}])
@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_another_loss_is_an_error(change, tmp_path):
    trainer = sft(tmp_path, bound(Sparse()), some_rows(), given=change, **change.pop("settings", {}))
    with pytest.raises(ValueError, match="asked for a loss but got no labels"):
        trainer.train()


@pytest.mark.parametrize("when", ["before", "after"])
def test_the_loss_of_the_stock_trainer_is_refused(when, tmp_path):
    """It would train with weights of 1, whether the model is bound before the trainer is made or after."""
    model = models.tiny("gpt2")
    if when == "before":
        with_weighted_loss(model, Uniform())
    trainer = sft(tmp_path, model, some_rows(scored=False), kind=SFTTrainer)
    with_weighted_loss(model, Uniform())
    with pytest.raises(ValueError, match=r"loss of its own \(fused_lm_head\).*TokenWeightedSFTTrainer"):
        trainer.train()


def test_a_model_without_weighted_loss_is_refused(unchecked, tmp_path):
    for model in (models.tiny("gpt2"), "some/name"):
        with pytest.raises(ValueError, match="without a weighted loss: expected what with_weighted_loss returns"):
            sft(tmp_path, model, some_rows())


def test_a_head_that_was_replaced_is_refused(tmp_path):
    model = bound(Sparse())
    model.set_output_embeddings(torch.nn.Linear(16, models.VOCABULARY, bias=False, dtype=torch.float64))
    with pytest.raises(ValueError, match="the output head was replaced after with_weighted_loss"):
        sft(tmp_path, model, some_rows())


def test_a_loss_of_the_router_is_refused(tmp_path):
    names = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "head_dim")
    config = AutoConfig.for_model("mixtral", num_local_experts=2, **{name: models.COMMON[name] for name in names})
    config.num_key_value_heads = 2
    model = with_weighted_loss(AutoModelForCausalLM.from_config(config), Uniform())
    with pytest.raises(ValueError, match=r"router_aux_loss_coef is 0\.001, a loss that is not added"):
        sft(tmp_path, model, some_rows(scored=False))
    sft(tmp_path, model, some_rows(scored=False), router_aux_loss_coef=0.0)


@pytest.fixture
def place(tmp_path, monkeypatch):
    """The folder that the examples run in: a model with its tokenizer, its scores, and books."""
    monkeypatch.chdir(tmp_path)
    models.tiny("gpt2", dtype=torch.float32, vocab_size=300).save_pretrained("MODEL")
    trained_tokenizer().save_pretrained("MODEL")
    some_rows(scored=False).save_to_disk("rows")
    score_folder("rows", "MODEL", [ShortContext(8, 5)], "scored")
    Path("books").mkdir()
    for number in range(3):
        text = EXCERPT.read_text(encoding="utf-8")[100 * number :][:100]
        Path(f"books/{number}.txt").write_text(text, encoding="utf-8")
    return tmp_path


@pytest.mark.parametrize("block", BLOCKS)
def test_the_examples_train(block, place):
    assert len(BLOCKS) == 2
    small = {"ShortContext(8192, 6144)": "ShortContext(8, 5)", "max_length=None": "max_length=None, use_cpu=True"}
    for there, here in {**small, "max_steps=240": "max_steps=2, logging_steps=1"}.items():
        block = block.replace(there, here)
    found = {}
    exec(block, found)
    assert [line["step"] for line in found["trainer"].state.log_history if "loss" in line] == [1, 2]
    assert (place / "run" / "model.safetensors").is_file()
