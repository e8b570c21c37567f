"""Settings: read from YAML and from the record of an earlier run, handed to the Trainer, and refused if they cannot be
right."""

import dataclasses
import json
import re

import datasets
import pytest
import torch
import yaml
from distributed import some_rows

import models
from texts import trained_tokenizer
from tokenweight.train import TrainSettings, read_recipe, resolve, train, training_arguments
from tokenweight.train.arguments import PAPER_ARGUMENTS, extension_arguments

SETTINGS = TrainSettings(
    model="some/model",
    data="rows — naïve",
    out="out",
    weighting="sparse:keep=0.1",
    scorer="self",
    size=64,
    stride=48,
    trainer={"learning_rate": 0.0005, "bf16": True, "report_to": ["none"], "max_steps": 3, "run_name": "a: b"},
)


@pytest.mark.parametrize(
    "write",
    [
        lambda settings: yaml.safe_dump(settings),
        lambda settings: yaml.safe_dump(settings, allow_unicode=True),
        lambda settings: json.dumps(settings),
        lambda settings: json.dumps({"settings": settings, "data": {"rows": 3}, "versions": {"torch": "2"}}, indent=2),
    ],
    ids=["yaml", "unicode", "json", "run.json"],
)
def test_settings_come_back_as_they_were_written(write, tmp_path):
    path = tmp_path / "recipe"
    path.write_text(write(dataclasses.asdict(SETTINGS)), encoding="utf-8")
    assert TrainSettings(**read_recipe(path)) == SETTINGS


def test_a_recipe_may_leave_settings_to_their_defaults(tmp_path):
    (tmp_path / "a.yaml").write_text("model: m\ndata: d  # rows\nout: o\ntrainer:\n  max_steps: 3\n")
    settings = TrainSettings(**read_recipe(tmp_path / "a.yaml"))
    assert settings == TrainSettings("m", "d", "o", trainer={"max_steps": 3})
    assert (settings.weighting, settings.scorer, settings.dtype) == ("dense", "stored", "float32")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("modle: m", "unknown setting 'modle': did you mean 'model'?"),
        ("trainer: {}\nweigthing: dense", "unknown setting 'weigthing': did you mean 'weighting'?"),
        ('{"settings": {"strides": 3}}', "unknown setting 'strides': did you mean 'stride'?"),
        ("12: 3", "unknown setting 12: expected one of model, data, out"),
        ("learning_rate: 1e-5", "unknown setting 'learning_rate': expected one of model, data, out"),
        ("- model", "holds a list: expected settings"),
        ("model", "holds a str: expected settings"),
        ("", "holds a NoneType: expected settings"),
        ("settings: 3", "holds a int: expected settings"),
        ("size: 3\nsize: 4", "found 'size' twice"),
        ("trainer: {max_steps: 3}\ntrainer: {}", "found 'trainer' twice"),
        ("trainer: {seed: 3, seed: 4}", "found 'seed' twice"),
        ("max_step: 3", "max_steps is a field of trainer"),
        ("trainer: [max_steps]", "trainer is ['max_steps']: expected fields of TrainingArguments"),
        ("trainer:", "trainer is None: expected fields of TrainingArguments"),
        ("model: [m", "cannot be read: while parsing a flow sequence"),
        (b"model: caf\xe9", "cannot be read: "),
        (None, "cannot be read: [Errno 2] No such file or directory"),
    ],
)
def test_a_recipe_that_cannot_be_right_is_refused_in_one_line_that_names_it(text, message, tmp_path, unchecked):
    path = tmp_path / "recipe.yaml"
    if text is not None:
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(ValueError, match="config") as refusal:
        read_recipe(path)
    assert str(path) in str(refusal.value)
    assert message in str(refusal.value)
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({"learning_rate": "2e-5", "max_steps": "3"}, {"learning_rate": 2e-5, "max_steps": 3}),
        ({"bf16": "true", "do_train": "False", "max_grad_norm": "0"}, {"bf16": True, "do_train": False}),
        ({"bf16": True, "use_cpu": True, "seed": 7, "warmup_steps": 0.1}, {"bf16": True, "seed": 7}),
        ({"label_names": ["labels", "short_nll"]}, {"label_names": ["labels", "short_nll"]}),
        ({"lr_scheduler_kwargs": '{"min_lr": 0.5}'}, {"lr_scheduler_kwargs": {"min_lr": 0.5}}),
        ({"lr_scheduler_kwargs": {"min_lr": 0.5, "a": True}}, {"lr_scheduler_kwargs": {"min_lr": 0.5, "a": True}}),
        ({"report_to": ["none"], "run_name": "a b: c"}, {"report_to": [], "run_name": "a b: c"}),
        ({"report_to": "[none]", "label_names": "labels"}, {"report_to": [], "label_names": ["labels"]}),
        ({"label_names": "[labels, short_nll]"}, {"label_names": ["labels", "short_nll"]}),
        ({"lr_scheduler_kwargs": "{min_lr: 1e-5, a: no}"}, {"lr_scheduler_kwargs": {"min_lr": 1e-5, "a": False}}),
        ({"lr_scheduler_kwargs": {"a": {"b": "15.3e6", "c": ["2", "x"]}}},
         {"lr_scheduler_kwargs": {"a": {"b": 15.3e6, "c": [2, "x"]}}}),
        ({"save_strategy": False, "eval_strategy": "no"}, {"save_strategy": "no", "eval_strategy": "no"}),
        ({"resume_from_checkpoint": True}, {"resume_from_checkpoint": "true"}),
        ({"resume_from_checkpoint": False}, {"resume_from_checkpoint": None}),
        ({"resume_from_checkpoint": "false"}, {"resume_from_checkpoint": None}),
        ({"run_name": "0123", "hub_revision": "12e45"}, {"run_name": "0123", "hub_revision": "12e45"}),
        ({"run_name": 7, "seed": "7", "tf32": "no"}, {"run_name": "7", "seed": 7, "tf32": False}),
        ({"fsdp": "false", "bf16": 1, "disable_tqdm": "yes"}, {"bf16": True, "disable_tqdm": True}),
        ({"include_num_input_tokens_seen": "true"}, {"include_num_input_tokens_seen": "all"}),
        ({"include_num_input_tokens_seen": "non_padding"}, {"include_num_input_tokens_seen": "non_padding"}),
        ({"max_steps": -1, "num_train_epochs": "0.5"}, {"max_steps": -1, "num_train_epochs": 0.5}),
        ({"optim_args": {"a": "1e-6", "b": 2}}, {"optim_args": "a=1e-06,b=2"}),
        ({"max_steps": "1e3", "save_steps": "1e2", "seed": 7.0}, {"max_steps": 1000, "save_steps": 100, "seed": 7}),
        ({"data_seed": "12345678901234567"}, {"data_seed": 12345678901234567}),
        ({"optim_args": "{a: 1e-6}"}, {"optim_args": "a=1e-06"}),
        ({"optim_args": "a=1e-6,b=2"}, {"optim_args": "a=1e-6,b=2"}),
        ({"debug": "[underflow_overflow]"}, {"debug": ["underflow_overflow"]}),
        ({"optim_target_modules": ["attn", "mlp"]}, {"optim_target_modules": ["attn", "mlp"]}),
        ({}, {"num_train_epochs": 1}),
        ({"learning_rate": None}, {"learning_rate": 5e-5}),  # the default of transformers, not that of the paper
    ],
    ids=str,
)  # fmt: skip
@pytest.mark.filterwarnings("error::FutureWarning")
def test_fields_of_the_trainer_have_the_value_given_as_a_number_a_list_or_a_word(given, expected, tmp_path):
    arguments = training_arguments(given, tmp_path / "out")
    assert {name: getattr(arguments, name) for name in expected} == expected
    kept = {name: value for name, value in PAPER_ARGUMENTS.items() if name not in (*given, "report_to")}
    assert {name: getattr(arguments, name) for name in kept} == kept
    assert arguments.output_dir == str(tmp_path / "out")
    assert arguments.use_cpu is not torch.accelerator.is_available()


@pytest.mark.parametrize("name", ["gradient_checkpointing", "activation_checkpointing"])
@pytest.mark.filterwarnings("error::FutureWarning")
def test_checkpointing_of_activations_is_set_by_its_old_and_by_its_new_name(name, tmp_path):
    arguments = training_arguments({name: "true", f"{name}_kwargs": "{use_reentrant: false}"}, tmp_path / "out")
    assert arguments.gradient_checkpointing is True
    assert arguments.gradient_checkpointing_kwargs == {"use_reentrant": False}


def test_a_recipe_may_begin_with_a_byte_order_mark_and_share_its_parts(tmp_path):
    text = "\ufeffmodel: é\ntrainer: &common {seed: 3}\nextend: {<<: *common, length: 8}\n"
    (tmp_path / "a.yaml").write_text(text, encoding="utf-8")
    expected = {"model": "é", "trainer": {"seed": 3}, "extend": {"seed": 3, "length": 8}}
    assert read_recipe(tmp_path / "a.yaml") == expected


def test_numbers_without_a_point_survive_the_way_through_json_and_yaml(tmp_path):
    (tmp_path / "run.json").write_text(json.dumps({"settings": {"trainer": {"learning_rate": 2e-5, "max_steps": 2}}}))
    arguments = training_arguments(read_recipe(tmp_path / "run.json")["trainer"], tmp_path / "out")
    assert (arguments.learning_rate, arguments.max_steps) == (2e-5, 2)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"learnin_rate": 1}, "trainer: unknown setting 'learnin_rate': did you mean 'learning_rate'?"),
        ({"help": True}, "trainer: unknown setting 'help': expected one of output_dir, "),
        ({"max_steps": "abc"}, "trainer.max_steps 'abc': expected a whole number"),
        ({"max_steps": 2.5}, "trainer.max_steps 2.5: expected a whole number"),
        ({"max_steps": True}, "trainer.max_steps True: expected a whole number"),
        ({"learning_rate": "fast"}, "trainer.learning_rate 'fast': expected a number"),
        ({"learning_rate": [1e-5]}, "trainer.learning_rate [1e-05]: expected a number"),
        ({"bf16": "perhaps"}, "trainer.bf16 'perhaps': expected true or false"),
        ({"bf16": 2}, "trainer.bf16 2: expected true or false"),
        ({"fsdp": "full_shard auto_wrap"}, "trainer.fsdp 'full_shard auto_wrap': expected true or false"),
        ({"lr_scheduler_type": "constnat"}, "trainer.lr_scheduler_type 'constnat': did you mean 'constant'?"),
        ({"save_strategy": True}, "trainer.save_strategy True: expected one of no, steps, epoch, best"),
        ({"logging_steps": 0}, "logging_steps"),
        ({"lr_scheduler_kwargs": "{min_lr"}, "trainer.lr_scheduler_kwargs '{min_lr': expected a mapping"),
        ({"lr_scheduler_kwargs": [1]}, "trainer.lr_scheduler_kwargs [1]: expected a mapping"),
        ({"run_name": {"a": 1}}, "trainer.run_name {'a': 1}: expected text"),
        ({"lr_scheduler_kwargs": "min_lr=1"}, "trainer.lr_scheduler_kwargs 'min_lr=1': expected a mapping"),
        ({"train_sampling_strategy": "radnom"}, "trainer.train_sampling_strategy 'radnom': did you mean 'random'?"),
        ({"hub_token": "hf_x"}, "trainer.hub_token would be written into run.json"),
        ({"output_dir": "elsewhere"}, "trainer.output_dir"),  # settings have `out`
        ({"label_smoothing_factor": 0.1}, "put another loss in place of the weighted one"),
        ({"use_liger_kernel": "true"}, "use_liger_kernel would put another loss in place of the weighted one"),
        (
            {"use_liger_kernel": "true", "liger_kernel_config": {"fused_linear_cross_entropy": False}},
            'expected trainer.liger_kernel_config {"cross_entropy": false, "fused_linear_cross_entropy": false}',
        ),
    ],
)
def test_a_field_that_the_trainer_does_not_have_or_take_is_refused_by_name(given, message, tmp_path, capfd):
    with pytest.raises(ValueError, match=re.escape(message)):
        training_arguments(given, tmp_path / "out")
    assert "".join(capfd.readouterr()) == ""  # argparse would print every field
    assert list(tmp_path.iterdir()) == []


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Models and rows that do not all fit one another."""
    root = tmp_path_factory.mktemp("recipe")
    models.tiny(dtype=torch.float32).save_pretrained(root / "model")
    models.tiny(dtype=torch.float32, vocab_size=300).save_pretrained(root / "with-tokenizer")
    trained_tokenizer().save_pretrained(root / "with-tokenizer")
    rows = {
        "rows": some_rows((40,) * 4, scored=False),
        "scored": some_rows((40,) * 4),
        "ladder": some_rows((40,) * 4).rename_column("short_nll", "short_nll_8"),
        "long": some_rows((150,), scored=False),
        "late-long": some_rows((40,) * 64 + (150,), scored=False),
        "unknown": datasets.Dataset.from_dict({"input_ids": [[5] * 39 + [61]]}),
        "none": some_rows((40,), scored=False).select([]),
        "theirs": some_rows((40,), scored=False),
    }
    rows["ladder"] = rows["ladder"].add_column("short_nll_16", rows["ladder"]["short_nll_8"][:])
    for name, data in rows.items():
        data.save_to_disk(str(root / name))
    (root / "theirs" / "rows.json").write_text('{"tokenizer": "other", "tokenizer_fingerprint": "0123"}')
    (root / "occupied").mkdir()
    (root / "occupied" / "notes").write_text("mine")
    return root


NO_SHORTER = "sequences hold 40 tokens: no token would have a shorter context"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"weighting": "dens"}, "unknown weighting 'dens' (did you mean 'dense'?)"),
        ({"weighting": "dense:keep=1"}, "unknown setting 'keep' of weighting 'dense'"),
        ({"trainer": {"max_step": 2}}, "trainer: unknown setting 'max_step': did you mean 'max_steps'?"),
        ({"out": "occupied"}, "occupied: exists; name a new folder, or set trainer.resume_from_checkpoint"),
        ({"data": "missing"}, "missing: no such folder of rows"),
        ({"data": "rows"}, "rows has no column short_nll: score it with `tokenweight score"),
        ({"scorer": "self"}, "scorer 'self': "),
        ({"scorer": "model"}, "holds stored scores (short_nll), which would not be used"),
        ({"data": "ladder"}, "ladder holds scores with short contexts of 8, 16 tokens: name one of them"),
        ({"data": "ladder", "size": 9}, "ladder holds scores with short contexts of 8, 16 tokens: name one of them"),
        ({"data": "ladder", "scorer": "self"}, "holds stored scores (short_nll), which would not be used"),
        ({"extend": {"lenght": 256}}, "extend: unknown setting 'lenght': did you mean 'length'?"),
        ({"extend": {"method": "yarn"}}, "extend: found method: expected length, the tokens to extend to"),
        ({"extend": {"length": "100"}}, "length 100: the model reads 128 tokens already"),
        ({"extend": {"length": "32q"}}, "extend.length 32q: expected a number of tokens"),
        ({"extend": {"length": 256, "method": "yran"}}, "method 'yran': expected one of base, linear"),
        ({"extend": {"length": 256, "method": "linear", "theta": 3}}, "theta"),
        ({"data": "rows", "scorer": "self", "size": 40}, f"size 40: {NO_SHORTER}"),
        ({"data": "rows", "scorer": "self", "size": 41, "stride": 3}, f"size 41: {NO_SHORTER}"),
        ({"data": "rows", "scorer": "self", "size": 8, "stride": 8}, "stride=8 does not fit size=8"),
        ({"data": "rows", "scorer": "self", "size": 0}, "size"),
        ({"model": "missing"}, "missing' cannot be loaded"),
        ({"dtype": "float77"}, "float77"),
        ({"data": "rows", "scorer": "missing"}, "missing' cannot be loaded"),
        ({"data": "long", "weighting": "uniform"}, "rows of 150 tokens: the model has 128 positions"),
        ({"data": "late-long", "weighting": "uniform"}, "rows of 150 tokens: the model has 128 positions"),
        (
            {"data": "theirs", "scorer": "self", "model": "with-tokenizer"},
            "was made with the tokenizer of other (0123)",
        ),
        ({"data": "none", "scorer": "self"}, "none"),
        ({"data": "unknown", "weighting": "uniform"}, "61"),
        ({"data": "unknown", "scorer": "self"}, "token 61 "),
    ],
    ids=str,
)
def test_settings_that_do_not_fit_are_refused_before_anything_is_written(changes, message, folders, tmp_path):
    settings = {"model": "model", "data": "scored", "trainer": {"max_steps": 1, "disable_tqdm": True}, **changes}
    for name in ("model", "data", "out", "scorer"):
        if settings.get(name, "self") != "self":
            settings[name] = str(folders / settings[name])
    before = sorted(folders.rglob("*"))
    with pytest.raises(ValueError, match=re.escape(message)) as refusal:
        train(TrainSettings(**{"out": str(tmp_path / "out"), **settings}))
    assert "\n" not in str(refusal.value)
    assert list(tmp_path.iterdir()) == []
    assert sorted(folders.rglob("*")) == before


def test_a_run_is_not_written_to_a_url():
    with pytest.raises(ValueError, match=r"^out s3://bucket/run: expected a folder on this machine"):
        resolve(TrainSettings("some/model", "rows", "s3://bucket/run"))


def test_numbers_of_tokens_of_a_recipe_have_units(tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text("size: 8k\nstride: 6_144\nextend: {length: 1M}\n")
    recipe = read_recipe(path)
    assert (recipe["size"], recipe["stride"]) == (8192, 6144)
    assert extension_arguments(recipe["extend"]) == {"length": 1024**2}
    path.write_text("size: 0\n")
    with pytest.raises(ValueError, match="size is 0: expected a number of tokens, as in 8192 or 8k"):
        read_recipe(path)
