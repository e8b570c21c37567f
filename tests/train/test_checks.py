"""Values of the trainer that nobody can mean, and what cannot run on this machine, are refused by the field's name."""

import math

import pytest
from transformers import TrainingArguments
from transformers.integrations import integration_utils

from tokenweight.train import TrainSettings, resolve, training_arguments
from tokenweight.train.checks import check_processes, check_run


@pytest.mark.parametrize(
    ("field", "values"),
    [
        ("max_steps", [-3, -2, 0, "-3"]),
        ("num_train_epochs", [0, -1, math.nan, math.inf]),
        ("per_device_train_batch_size", [0, -1]),
        ("gradient_accumulation_steps", [0, -1]),
        ("learning_rate", [-1e-3, math.nan, math.inf, "nan"]),
        ("warmup_steps", [-1, math.nan, math.inf]),
        ("weight_decay", [-0.1, math.nan]),
        ("max_grad_norm", [-1, math.nan]),
        ("adam_beta1", [-0.1, 1, 9]),
        ("adam_beta2", [1.0, math.nan]),
        ("adam_epsilon", [-1e-8]),
        ("neftune_noise_alpha", [-5]),
        ("logging_steps", [0, -1, 2.5, math.nan, math.inf]),
        ("save_steps", [0, -500, 1.5]),
        ("seed", [-1, 2**32]),
        ("dataloader_num_workers", [-1]),
        ("average_tokens_across_devices", [False, "false"]),
    ],
)
def test_values_that_nobody_can_mean_are_refused(field, values, tmp_path):
    for value in values:
        with pytest.raises(ValueError, match=rf"^trainer\.{field} \S+: expected "):
            training_arguments({field: value}, tmp_path / "out")


@pytest.mark.parametrize(
    "given",
    [
        {"max_steps": -1},
        {"learning_rate": 0},
        {"weight_decay": 0, "warmup_steps": 0, "max_grad_norm": math.inf},
        {"logging_steps": 0.1, "save_steps": 0.5},
        {"logging_steps": 1e3},
        {"logging_strategy": "epoch", "logging_steps": 0, "save_strategy": "no", "save_steps": 0},
        {"average_tokens_across_devices": True, "seed": 2**32 - 1, "num_train_epochs": 0.1},
    ],
    ids=str,
)
def test_values_at_the_border_are_taken(given, tmp_path):
    arguments = training_arguments(given, tmp_path / "out")
    assert {name: getattr(arguments, name) for name in given} == given


def resolved(out, **trainer):
    return resolve(TrainSettings("m", "d", str(out), "uniform", trainer=trainer))


@pytest.mark.parametrize(
    "trainer",
    [
        {"eval_strategy": "steps", "eval_steps": 2},
        {"eval_strategy": "epoch"},
        {"eval_on_start": True},
        {"save_strategy": "best", "metric_for_best_model": "loss"},
    ],
    ids=str,
)
def test_what_needs_held_out_sequences_is_refused_by_name(trainer, tmp_path):
    with pytest.raises(ValueError, match=rf"trainer\.{next(iter(trainer))} \w+: needs held-out sequences"):
        resolved(tmp_path, **trainer)


def test_a_tracker_that_is_missing_is_refused_before_any_work(tmp_path, monkeypatch):
    present = ["tensorboard", "trackio"]
    monkeypatch.setattr(integration_utils, "get_available_reporting_integrations", lambda: present)
    monkeypatch.setattr(integration_utils, "is_azureml_available", lambda: True)
    assert resolved(tmp_path, report_to=present).arguments.report_to == present
    assert resolved(tmp_path, report_to="azure_ml").arguments.report_to == ["azure_ml"]
    for trackers in ("wandb", ["tensorboard", "wandb"], "[tensorboard, wandb]"):
        with pytest.raises(ValueError, match=r"^trainer\.report_to 'wandb': its package is not installed"):
            resolved(tmp_path, report_to=trackers)
    with pytest.raises(
        ValueError, match=r"^trainer\.report_to 'tensorbord': expected none, all, or a list of azure_ml"
    ):
        resolved(tmp_path, report_to="tensorbord")
    assert training_arguments({"report_to": "wandb"}, tmp_path).report_to == ["wandb"]  # a plan is made elsewhere


def test_several_gpus_in_one_process_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr("transformers.TrainingArguments.n_gpu", property(lambda self: 2))
    with pytest.raises(ValueError, match=r"torchrun --nproc-per-node 2 .* or CUDA_VISIBLE_DEVICES=0"):
        resolved(tmp_path)
    assert training_arguments({}, tmp_path).n_gpu == 2  # a plan is made of it


def test_processes_that_do_not_know_each_other_are_refused(tmp_path, monkeypatch):
    arguments = training_arguments({}, tmp_path)
    check_run(arguments)
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match=r"WORLD_SIZE is 2, but .*torchrun"):
        check_run(arguments)


def test_a_denominator_of_each_process_is_refused_where_there_are_several(tmp_path, monkeypatch):
    arguments = TrainingArguments(str(tmp_path), use_cpu=True, average_tokens_across_devices=False)
    check_processes(arguments)
    monkeypatch.setattr("transformers.TrainingArguments.world_size", property(lambda self: 2))
    with pytest.raises(ValueError, match=r"trainer\.average_tokens_across_devices False: expected true"):
        check_processes(arguments)
