"""Checks of TrainingArguments: invalid values, and settings that are incompatible with a weighted loss."""

import math
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import TrainingArguments

_ONE_OR_MORE = (lambda value: value >= 1, "at least 1")
_FINITE = (lambda value: 0 <= value < math.inf, "a number of at least 0")
_POSITIVE = (lambda value: 0 < value < math.inf, "a number above 0")
_SHARE = (lambda value: 0 <= value < 1, "at least 0 and less than 1")
_EXPECTED: dict[str, tuple[Callable[[Any], bool], str]] = {
    "max_steps": (lambda value: value == -1 or value >= 1, "at least 1, or -1 to train for num_train_epochs"),
    "num_train_epochs": _POSITIVE,
    "per_device_train_batch_size": _ONE_OR_MORE,
    "per_device_eval_batch_size": _ONE_OR_MORE,
    "gradient_accumulation_steps": _ONE_OR_MORE,
    "learning_rate": _FINITE,
    "warmup_steps": _FINITE,
    "weight_decay": _FINITE,
    "max_grad_norm": (lambda value: value >= 0, "at least 0, where 0 clips nothing"),
    "adam_beta1": _SHARE,
    "adam_beta2": _SHARE,
    "adam_epsilon": _FINITE,
    "neftune_noise_alpha": _FINITE,
    "seed": (lambda value: 0 <= value < 2**32, "0 to 2**32 - 1"),
    "dataloader_num_workers": (lambda value: value >= 0, "at least 0"),
    "average_tokens_across_devices": (lambda value: value, "true: the loss is divided by the tokens of all processes"),
}
_STEPS = ("logging", "save", "eval")
_HELD_OUT: dict[str, tuple[Any, ...]] = {
    "eval_strategy": ("steps", "epoch"),
    "eval_on_start": (True,),
    "load_best_model_at_end": (True,),
    "save_strategy": ("best",),
}
_LIGER_LOSSES = ("cross_entropy", "fused_linear_cross_entropy")
"""Parts of a `liger_kernel_config` that replace a model's loss; the second is usually on."""


def check_values(values: Mapping[str, Any]) -> None:
    """Reject values that TrainingArguments would accept, but that cannot be intended.

    Raises:
        ValueError: naming the field, its value and what is expected.
    """
    for name, (fits, expected) in _EXPECTED.items():
        if name in values and not fits(values[name]):
            raise ValueError(f"trainer.{name} {values[name]}: expected {expected}")
    for name in _STEPS:
        steps, strategy = values.get(f"{name}_steps", 1), values.get(f"{name}_strategy", "steps")
        if strategy == "steps" and not (0 < steps < 1 or (steps < math.inf and steps == int(steps) >= 1)):
            raise ValueError(
                f"trainer.{name}_steps {steps}: expected a whole number of steps, or the share of all that is above 0 "
                "and less than 1"
            )
    for name in ("deepspeed", "fsdp_config", "accelerator_config"):
        file = values.get(name)
        if isinstance(file, str) and file.endswith(".json") and not Path(file).is_file():
            raise ValueError(f"trainer.{name} {file}: no such file")
    if values.get("label_smoothing_factor"):
        raise ValueError(
            "trainer.label_smoothing_factor would put another loss in place of the weighted one: expected it unset"
        )
    config = values.get("liger_kernel_config") or {}
    if values.get("use_liger_kernel") and any(config.get(name) is not False for name in _LIGER_LOSSES):
        expected = ", ".join(f'"{name}": false' for name in _LIGER_LOSSES)
        raise ValueError(
            "trainer.use_liger_kernel would put another loss in place of the weighted one: expected "
            f"trainer.liger_kernel_config {{{expected}}}, which keeps its other kernels"
        )


MEASURES = ("loss", "loss_beyond_half", "loss_short", "weighted_loss")
"""Metrics logged for held-out sequences, each prefixed by `eval_` (`tokenweight.train.statistics.HeldOutLosses`)."""


def check_run(arguments: "TrainingArguments", eval_data: str | None = None) -> None:
    """Reject what cannot run here, before any work: missing trackers, several GPUs in one process.

    Args:
        arguments: of the run.
        eval_data: the folder of held-out sequences, if there are any.

    Raises:
        ValueError: naming the field.
    """
    check_processes(arguments)
    started = os.environ.get("WORLD_SIZE", "1")
    if started != "1" and arguments.world_size == 1:  # each process would be a separate run, into the same folder
        raise ValueError(
            f"WORLD_SIZE is {started}, but the processes do not know each other (no LOCAL_RANK): start them by torchrun"
        )
    for name, held_out in _HELD_OUT.items():
        found = getattr(getattr(arguments, name), "value", getattr(arguments, name))
        if eval_data is None and found in held_out:
            raise ValueError(f"trainer.{name} {found}: needs held-out sequences: expected their folder as eval_data")
    if eval_data is not None:
        _check_held_out(arguments, eval_data)
    for name in arguments.report_to:
        _check_tracker(name)


def _check_held_out(arguments: "TrainingArguments", eval_data: str) -> None:
    if getattr(arguments.eval_strategy, "value", arguments.eval_strategy) == "no":
        raise ValueError(f"trainer.eval_strategy no: eval_data {eval_data} would not be read: leave out one of them")
    metric = arguments.metric_for_best_model
    if metric is not None and metric.removeprefix("eval_") not in MEASURES:
        raise ValueError(f"trainer.metric_for_best_model {metric!r}: expected one of {', '.join(MEASURES)}")
    if metric is not None and arguments.greater_is_better:
        raise ValueError(f"trainer.greater_is_better true: {metric} is a loss: expected it unset, or false")


def _check_tracker(name: str) -> None:
    from transformers.integrations import integration_utils as integrations

    known = sorted(integrations.INTEGRATION_TO_CALLBACK)
    if name not in known:
        raise ValueError(f"trainer.report_to {name!r}: expected none, all, or a list of {', '.join(known)}")
    found = set(integrations.get_available_reporting_integrations())
    found |= {"azure_ml"} if integrations.is_azureml_available() else set()
    found |= {"flyte"} if integrations.is_flytekit_available() else set()
    if name not in found:
        raise ValueError(
            f"trainer.report_to {name!r}: its package is not installed: pip install {name}, or leave it out"
        )


def check_processes(arguments: "TrainingArguments") -> None:
    """Reject several GPUs in one process, and a loss denominator per process.

    Raises:
        ValueError: naming the field, or how to start a process for each GPU.
    """
    check_one_gpu(arguments)
    if arguments.world_size > 1:
        check_values({"average_tokens_across_devices": arguments.average_tokens_across_devices})


def check_one_gpu(arguments: "TrainingArguments") -> None:
    """Reject several GPUs in one process: the Trainer would use nn.DataParallel, which breaks a bound model.

    Raises:
        ValueError: explaining how to start a process for each GPU.
    """
    if arguments.n_gpu > 1:
        raise ValueError(
            f"trainer: {arguments.n_gpu} GPUs in one process: expected one, as under `torchrun --nproc-per-node "
            f"{arguments.n_gpu} -m tokenweight train …`, or CUDA_VISIBLE_DEVICES=0"
        )
