"""TRL's SFTTrainer with a weighted loss, against the plain Trainer on the same rows; and what would lose weights."""

import re
from pathlib import Path

import datasets
import peft
import pytest
import torch
from distributed import some_rows, with_scores
from runs import SAME_LOSSES, SAME_WEIGHTS, packed
from transformers import AutoConfig, AutoModelForCausalLM, Trainer, TrainingArguments
from trl import SFTConfig, SFTTrainer

import models
from texts import EXCERPT, MARKED, chat_tokenizer, conversation, trained_tokenizer
from tokenweight import Scorer, ShortContext, Uniform, parse_weighting, with_weighted_loss
from tokenweight.data import Document, load_rows, load_scores, prepare_rows, score_folder
from tokenweight.data.chat import conversation_text
from tokenweight.train import DataCollatorWithScores
from tokenweight.train.trl import TokenWeightedSFTConfig, TokenWeightedSFTTrainer

# SFTConfig and SFTTrainer use the older names of transformers by themselves.
pytestmark = pytest.mark.filterwarnings("ignore:.(is_)?gradient_checkpointing. is deprecated:FutureWarning")
PAGE = (Path(__file__).parents[2] / "docs" / "train.md").read_text()
BLOCKS = [part for part in re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL) if "SFTTrainer(" in part]
SETTINGS = {
    "max_steps": 3,
    "learning_rate": 1e-2,
    "per_device_train_batch_size": 2,
    "gradient_accumulation_steps": 2,
    "logging_steps": 1.0,
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


def sft(out, rows, weighting="dense", *, model=None, given=None, **settings):
    """Our trainer of a tiny model, with a weighting and a scorer named in its arguments."""
    arguments = TokenWeightedSFTConfig(str(out), weighting=weighting, **{**SETTINGS, **settings})
    model = models.tiny("gpt2") if model is None else model
    tokenizer = {"processing_class": trained_tokenizer()}
    return TokenWeightedSFTTrainer(model, arguments, train_dataset=rows, **{**tokenizer, **(given or {})})


def plain(out, rows, weighting="dense", *, scored=True, contrast="trained"):
    """The stock Trainer of the same model, bound by hand."""
    model = models.tiny("gpt2")
    scorer = None if scored else Scorer(model, ShortContext(8, 5))
    with_weighted_loss(model, parse_weighting(weighting), scorer, contrast=contrast)
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


SELF = {"scorer": "self", "size": 8, "stride": 5}


@pytest.mark.parametrize(
    ("weighting", "scored", "kwargs"),
    [
        ("sparse", True, {}),
        pytest.param("sparse", True, {"skip_prepare_dataset": False}, marks=pytest.mark.slow),
        pytest.param("sparse", True, None, marks=pytest.mark.slow),
        ("dense", False, None),
        pytest.param("dense", False, {"skip_prepare_dataset": False}, marks=pytest.mark.slow),
        pytest.param("dense", False, {}, marks=pytest.mark.slow),
    ],
)
def test_training_is_that_of_the_plain_trainer(weighting, scored, kwargs, tmp_path):
    rows = some_rows(scored=scored).add_column("document", list("abcdefgh"))
    trainer = sft(tmp_path, rows, weighting, dataset_kwargs=kwargs, **({} if scored else SELF))
    assert_same(trainer, plain(tmp_path, rows, weighting, scored=scored))


@pytest.mark.slow
def test_weights_of_the_scorers_pair_and_of_other_columns_are_those_of_the_plain_trainer(tmp_path):
    rows = with_scores(some_rows())
    for weighting, contrast in (("dense", "scorer"), ("models.ByColumns", "trained")):
        trainer = sft(tmp_path, rows, weighting, contrast=contrast)
        assert_same(trainer, plain(tmp_path, rows, weighting, contrast=contrast))
    with pytest.raises(ValueError, match="found no column long_nll"):
        sft(tmp_path, some_rows(), contrast="scorer")
    with pytest.raises(ValueError, match="found no column ref_nll"):
        sft(tmp_path, some_rows(), "models.ByColumns")


@pytest.mark.slow
@pytest.mark.parametrize("weighting", ["expected(gain)", "dense"])
def test_scores_by_counts_while_sequences_are_read_are_the_stored_ones(weighting, tmp_path):
    rows = packed(some_rows((17, 9, 21, 30, 12), scored=False), [1, 0], [2], [3], [1, 2, 4])
    rows.save_to_disk(str(tmp_path / "rows"))
    score_folder(tmp_path / "rows", "count:order=1", [ShortContext(8, 5)], tmp_path / "scored")
    stored, _ = load_scores(tmp_path / "scored")
    given = {"scorer": "count:order=1", "size": 8, "stride": 5, "contrast": "scorer"}
    assert_same(sft(tmp_path, rows, weighting, **given), plain(tmp_path, stored, weighting, contrast="scorer"))
    del given["contrast"]
    for scored, settings in ((rows, given), (stored, {}), (stored.select(range(len(stored))).map(lambda row: row), {})):
        assert_same(sft(tmp_path, scored, weighting, **settings), plain(tmp_path, stored, weighting, contrast="scorer"))
    if weighting == "dense":
        with pytest.raises(ValueError, match="contrast trained: the data set was scored"):
            sft(tmp_path, stored, weighting, contrast="trained")
    with pytest.raises(ValueError, match="contrast trained: the losses of the scorer count"):
        sft(tmp_path, rows, "dense", **{**given, "contrast": "trained"})


def test_packed_documents_stay_apart_as_in_the_plain_trainer(tmp_path):
    rows = packed(some_rows((17, 9, 21, 30, 12)), [1, 0], [2], [3], [1, 2, 4])
    assert_same(sft(tmp_path, rows, "uniform"), plain(tmp_path, rows, "uniform"))


def test_a_model_given_by_name_trains_with_its_own_tokenizer(place):
    rows, _ = load_scores("scored")
    arguments = TokenWeightedSFTConfig("run", weighting="sparse:keep=0.5", **SETTINGS)
    trainer = TokenWeightedSFTTrainer(model="MODEL", args=arguments, train_dataset=rows)
    trainer.train()
    losses = [line["loss"] for line in trainer.state.log_history if "loss" in line]
    assert len(losses) == 3
    assert trainer.processing_class.get_vocab() == trained_tokenizer().get_vocab()


@pytest.mark.slow
def test_another_model_scores_as_it_did_when_its_scores_were_stored(place):
    """Its weights are never trained, whereas the model that is trained scores otherwise after the first step."""
    some_rows((40,) * 6, scored=False).save_to_disk("even")  # where padding would be, windows lie otherwise
    score_folder("even", "MODEL", [ShortContext(8, 5)], "even-scored")
    runs = {}
    for scorer in ("stored", "MODEL", "self"):
        rows = load_rows("even") if scorer != "stored" else load_scores("even-scored")[0]
        windows = {} if scorer == "stored" else {"size": 8, "stride": 5}
        arguments = TokenWeightedSFTConfig("run", scorer=scorer, **windows, **SETTINGS)
        trainer = TokenWeightedSFTTrainer("MODEL", arguments, rows)
        trainer.train()
        runs[scorer] = [line["loss"] for line in trainer.state.log_history if "loss" in line]
    assert runs["MODEL"] == pytest.approx(runs["stored"], rel=1e-5)  # float32, in other batches
    assert runs["self"][0] == pytest.approx(runs["stored"][0], rel=1e-5)
    assert abs(runs["self"][-1] / runs["stored"][-1] - 1) > 1e-4


@pytest.mark.parametrize("wrapped", [True, False])
@pytest.mark.filterwarnings("ignore:fan_in_fan_out")
def test_an_adapter_is_trained_with_the_weighted_loss_and_the_model_is_not(wrapped, tmp_path):
    rows, model = some_rows(), models.tiny("llama", dtype=torch.float32)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    config = peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"])
    given = {"model": peft.get_peft_model(model, config)} if wrapped else {"model": model}
    trainer = sft(tmp_path, rows, "sparse", **given, given={} if wrapped else {"peft_config": config})
    expected = with_weighted_loss(models.tiny("llama", dtype=torch.float32), parse_weighting("sparse"))
    trainer.train()
    batches = [DataCollatorWithScores()(rows.select(range(8)).to_list())]
    assert trainer.state.log_history[0]["loss"] > 0
    adapter = {name: value for name, value in trainer.model.named_parameters() if "lora_B" in name}
    assert adapter
    assert all(value.abs().max() > 0 for value in adapter.values())
    after = {name.replace(".base_layer", ""): value for name, value in model.state_dict().items()}
    assert all(torch.equal(after[name], value) for name, value in before.items())
    with trainer.model.disable_adapter():
        found = trainer.model.eval()(**batches[0])
    torch.testing.assert_close(found.weights, expected(**batches[0]).weights, rtol=1e-4, atol=1e-5)


def test_each_batch_passes_through_the_model_once(tmp_path):
    model, passes = models.tiny("gpt2"), []
    trainer = sft(tmp_path, some_rows(), "sparse", model=model, gradient_checkpointing=False)
    model.base_model.register_forward_hook(lambda module, arguments, output: passes.append(module.training))
    trainer.train()
    assert passes == [True] * 6  # 3 steps of 2 batches


def test_evaluation_is_that_of_the_plain_trainer(tmp_path):
    rows = some_rows()
    weighted = [kind(tmp_path, rows, "sparse").evaluate(rows)["eval_loss"] for kind in (sft, plain)]
    assert weighted == [sft(tmp_path, some_rows(scored=False), "uniform").evaluate(rows)["eval_loss"]] * 2


def test_a_column_of_scores_that_is_missing_or_would_not_be_used_is_an_error(tmp_path):
    with pytest.raises(ValueError, match="train_dataset: found no column short_nll"):
        sft(tmp_path, some_rows(scored=False), "sparse")
    with pytest.raises(ValueError, match="scorer 'self': the data set has a column short_nll"):
        sft(tmp_path, some_rows(), "sparse", **SELF)
    sft(tmp_path, some_rows(scored=False), "uniform")


@pytest.mark.parametrize("name", ["loss_mask", pytest.param("attention_mask", marks=pytest.mark.slow)])
def test_masks_that_trl_does_not_hear_are_heard(name, tmp_path):
    rows, first = some_rows(scored=False), 4  # of each sequence, tokens that count
    masked = rows.add_column(name, [[1] * first + [0] * (len(row) - first) for row in rows["input_ids"]])
    labels = [row[:first] + [-100] * (len(row) - first) for row in rows["input_ids"]]
    expected = rows.add_column("labels", labels)
    if name == "attention_mask":
        expected = expected.map(lambda row: {column: values[:first] for column, values in row.items()})
    assert_same(sft(tmp_path, masked, "uniform"), sft(tmp_path, expected, "uniform"))


def test_rows_that_trl_packed_are_refused(tmp_path):
    lengths = [[40], [4, 5], [25], [33], [40], [17], [5], [28]]
    trainer = sft(tmp_path, some_rows(scored=False).add_column("seq_lengths", lengths), "uniform")
    with pytest.raises(ValueError, match=r"packed by TRL \(seq_lengths\), which drops scores"):
        trainer.train()


def test_masks_become_labels_unless_preparation_is_skipped(tmp_path):
    rows = some_rows()
    masked = rows.add_column("completion_mask", [[0, 0, *([1] * (len(row) - 2))] for row in rows["input_ids"]])
    trainer = sft(tmp_path, masked, "sparse", completion_only_loss=True)
    assert trainer.train_dataset[0]["labels"][:2] == [-100, -100]
    with pytest.raises(ValueError, match="the rows have completion_mask but no labels, and skip_prepare_dataset"):
        sft(tmp_path, masked, "sparse", dataset_kwargs={"skip_prepare_dataset": True})


TALKS = [
    {**conversation("Call me", "Ishmael, some years ago", "never mind how", "long"), "tools": [{"name": "whale"}]},
    conversation("Having little", "or no money in my purse", system="Be brief"),
]
GIVEN = [{"prompt": talk["messages"][:-1], "completion": talk["messages"][-1:]} for talk in TALKS]
TEXTS = [
    {"prompt": "Call me", "completion": " Ishmael. Some years"},
    {"prompt": "never mind", "completion": " how long"},
]


@pytest.mark.parametrize(
    ("records", "settings"),
    [
        (TALKS, {"assistant_only_loss": True}),
        (GIVEN, {}),
        (GIVEN, {"completion_only_loss": True, "assistant_only_loss": True}),
        (TEXTS, {}),
    ],
)
def test_answers_of_trl_are_those_of_our_chats_and_train_alike(records, settings, tmp_path):
    """Without the space behind a turn, which TRL predicts of a completion in place of its answer alone."""
    tokenizer = chat_tokenizer(MARKED)
    documents = [Document(str(number), conversation_text(record)) for number, record in enumerate(records)]
    prepare_rows(documents, tokenizer, 400, tmp_path / "rows", chat=True)
    ours, weighting = load_rows(tmp_path / "rows"), "dense"
    model = models.tiny("gpt2", vocab_size=320, max_position_embeddings=400)
    given = {"processing_class": tokenizer, "eval_dataset": ours}
    theirs = datasets.Dataset.from_list(records)
    trainer = sft(tmp_path, theirs, weighting, model=model, given=given, **SELF, **settings)
    glue = tokenizer("\n")["input_ids"][0]
    for found, expected in zip(trainer.train_dataset, ours, strict=True):
        assert found["input_ids"] == expected["input_ids"].tolist()
        stops = len(found["labels"]) - (found["labels"][-1] == glue)
        assert found["labels"][:stops] == expected["labels"][:stops].tolist()
    batch = next(iter(trainer.get_train_dataloader()))
    weights = trainer.model.train()(**batch).weights
    assert (weights[batch["labels"] == -100] == 0).all()
    for own, labels in zip(weights, batch["labels"]):
        torch.testing.assert_close(own[labels != -100].mean().item(), 1.0, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("only", [True, False])
def test_prompts_are_trained_exactly_if_trl_is_told_so(only, tmp_path):
    settings = {"model": models.tiny("gpt2", vocab_size=320), "completion_only_loss": only}
    trainer = sft(tmp_path, datasets.Dataset.from_list(TEXTS * 2), "uniform", **settings)
    batch = next(iter(trainer.get_train_dataloader()))
    rows = [trained_tokenizer()(row["prompt"] + row["completion"])["input_ids"] for row in TEXTS]
    context = [len(trained_tokenizer()(row["prompt"])["input_ids"]) if only else 1 for row in TEXTS]
    expected = {len(row) + 1 - first for row, first in zip(rows, context)}
    assert {*(batch["labels"] != -100).sum(dim=1).tolist()} <= expected


def test_a_collator_of_ones_own_is_refused(tmp_path):
    with pytest.raises(ValueError, match="data_collator: expected none"):
        sft(tmp_path, some_rows(), given={"data_collator": lambda rows: rows})


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"packing": True, "max_length": 64}, "max_length 64: expected None"),
        ({"packing": True}, "packing True: expected False"),
        ({"packing": True, "packing_strategy": "wrapped"}, "packing True: expected False"),
        ({"eval_packing": True}, "eval_packing True: expected None"),
        ({"padding_free": True}, "padding_free True: expected False"),
        ({"max_length": 1024}, "max_length 1024: expected None"),
        ({"loss_type": "dft"}, "loss_type 'dft': expected 'nll'"),
        ({"weighting": "dens"}, "unknown weighting 'dens'"),
        ({"scorer": "self"}, "size: expected the tokens of the short context"),
        ({"size": 8}, "size 8, stride None: expected neither"),
    ],
)
def test_settings_that_change_rows_scores_or_loss_are_refused(settings, said, tmp_path):
    with pytest.raises(ValueError, match=said):
        TokenWeightedSFTConfig(str(tmp_path), **{**SETTINGS, **settings})


def test_several_gpus_in_one_process_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr("transformers.TrainingArguments.n_gpu", property(lambda self: 2))
    with pytest.raises(ValueError, match=r"torchrun --nproc-per-node 2 .*, or CUDA_VISIBLE_DEVICES=0"):
        sft(tmp_path, some_rows((30,) * 4))


def test_engines_are_prepared_and_split_sequences_are_refused(monkeypatch, tmp_path):
    prepared = []
    monkeypatch.setattr("tokenweight.train.trl.prepare_engine", prepared.append)
    trainer = sft(tmp_path, some_rows())
    assert prepared == [trainer]
    monkeypatch.setattr("tokenweight.train.trl.context_mesh", lambda accelerator: object())
    with pytest.raises(ValueError, match=r"parallelism_config: .*expected 1, or tokenweight.train.WeightedTrainer"):
        sft(tmp_path, some_rows())


def test_arguments_of_other_trainers_are_refused(unchecked, tmp_path):
    for arguments in (TrainingArguments(str(tmp_path), **SETTINGS), SFTConfig(str(tmp_path), **SETTINGS)):
        with pytest.raises(ValueError, match=f"args: found a {type(arguments).__name__}: expected a TokenWeighted"):
            TokenWeightedSFTTrainer(models.tiny("gpt2"), arguments, train_dataset=some_rows())


@pytest.mark.parametrize("change", [{"settings": {"label_smoothing_factor": 0.1}}, {"compute_loss_func": len}])
@pytest.mark.filterwarnings("ignore:.*is deprecated.*v2:FutureWarning")  # TRL's own word about these
def test_another_loss_is_an_error(change, tmp_path):
    trainer = sft(tmp_path, some_rows(), given=change, **change.pop("settings", {}))
    with pytest.raises(ValueError, match=r"labels are missing.*label_smoothing_factor nor compute_loss_func"):
        trainer.train()


@pytest.mark.parametrize("when", ["before", "after"])
def test_the_loss_of_the_stock_trainer_is_refused(when, tmp_path):
    """It would train with weights of 1, whether the model is bound before the trainer is made or after."""
    model = models.tiny("gpt2")
    if when == "before":
        with_weighted_loss(model, Uniform())
    arguments = SFTConfig(str(tmp_path), **SETTINGS, max_length=None)
    rows = some_rows(scored=False)
    trainer = SFTTrainer(model, arguments, train_dataset=rows, processing_class=trained_tokenizer())
    with_weighted_loss(model, Uniform())
    with pytest.raises(ValueError, match=r"fused_(lm_head|forward).*TokenWeightedSFTTrainer"):
        trainer.train()


def test_a_model_that_is_bound_already_is_refused(tmp_path):
    """Its weighting would be replaced by that of the arguments."""
    with pytest.raises(ValueError, match="model: has a weighted loss already"):
        sft(tmp_path, some_rows(), model=with_weighted_loss(models.tiny("gpt2"), Uniform()))


def test_a_loss_of_the_router_is_refused(tmp_path):
    names = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "head_dim")
    config = AutoConfig.for_model("mixtral", num_local_experts=2, **{name: models.COMMON[name] for name in names})
    config.num_key_value_heads = 2
    rows = some_rows(scored=False)
    with pytest.raises(ValueError, match=r"router_aux_loss_coef 0\.001: the loss of the router is not added"):
        sft(tmp_path, rows, "uniform", model=AutoModelForCausalLM.from_config(config))
    sft(tmp_path, rows, "uniform", model=AutoModelForCausalLM.from_config(config), router_aux_loss_coef=0.0)


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
    small = "max_steps=2, logging_steps=1.0, use_cpu=True, bf16=False"
    for there, here in {"size=8192": "size=8, stride=5", "max_steps=240": small}.items():
        block = block.replace(there, here)
    found = {}
    exec(block, found)
    assert [line["step"] for line in found["trainer"].state.log_history if "loss" in line] == [1, 2]
    assert (place / "run" / "model.safetensors").is_file()
