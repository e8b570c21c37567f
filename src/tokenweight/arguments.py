"""Arguments of `transformers.TrainingArguments` and `extend_context`, from a recipe or a command line."""

import contextlib
import dataclasses
import inspect
import json
import os
from pathlib import Path
from typing import Any, NoReturn

import torch
from transformers import HfArgumentParser, TrainingArguments

from tokenweight.recipe import refuse_unknown
from tokenweight.rope import SETTINGS, extend_context

PAPER_ARGUMENTS = {
    "learning_rate": 2e-5,
    "adam_beta2": 0.95,
    "weight_decay": 0.01,
    "lr_scheduler_type": "constant_with_warmup",
    "warmup_steps": 20,
    "per_device_train_batch_size": 1,
    "logging_steps": 1,
    "report_to": "none",
}
"""Used where a recipe says nothing. The first five: `configs/llama3_32k_dense.json` of the paper's code."""


def training_arguments(given: dict[str, Any], out: str | os.PathLike[str]) -> TrainingArguments:
    """`PAPER_ARGUMENTS` overridden by `given`, whose values may be strings of a command line.

    Raises:
        ValueError: for a field that TrainingArguments does not have, or a value it refuses.
    """
    known = [field.name for field in dataclasses.fields(TrainingArguments) if field.init]
    for key in given:
        refuse_unknown(key, known, "trainer")
    if "output_dir" in given:
        raise ValueError("trainer: output_dir is the setting out of the recipe: name it there")
    if "hub_token" in given:
        raise ValueError(
            "trainer: hub_token would be written into run.json: set the environment variable HF_TOKEN instead"
        )
    words: list[str] = []
    # Without an accelerator the Trainer refuses bf16, unless told that the CPU is meant.
    defaults = {**PAPER_ARGUMENTS, "use_cpu": not torch.accelerator.is_available()}
    for key, value in {**defaults, **given, "output_dir": str(out)}.items():
        if key == "fsdp" and str(value).lower() in ("true", "false"):
            words += ["--fsdp"] * (
                str(value).lower() == "true"
            )  # with a value it would be a deprecated list of options
        elif value is not None:
            words += [f"--{key}", *(_word(key, item) for item in (value if isinstance(value, list) else [value]))]
    (arguments,) = _Parser(TrainingArguments).parse_args_into_dataclasses(words)
    if arguments.use_liger_kernel or arguments.label_smoothing_factor:
        raise ValueError(
            "trainer: use_liger_kernel and label_smoothing_factor put another loss in place of the weighted one: "
            "expected neither"
        )
    if arguments.fsdp_config and not arguments.fsdp:
        raise ValueError("trainer: fsdp_config does nothing by itself: expected fsdp true beside it")
    _refuse_overwriting(Path(out), arguments)
    return arguments


def _word(key: str, value: Any) -> str:
    """A value as a word of a command line, on which mappings are JSON."""
    if isinstance(value, dict):
        return json.dumps(value)
    if isinstance(value, str) and value.startswith("{"):
        try:
            json.loads(value)
        except ValueError as error:
            raise ValueError(f"trainer: {key}={value} is not JSON: {error}") from None
    return str(value).lower() if isinstance(value, bool) else str(value)


class _Parser(HfArgumentParser):
    def error(self, message: str) -> NoReturn:
        """One line, where argparse would print every field of TrainingArguments and leave."""
        raise ValueError(f"trainer: {message}")


def _refuse_overwriting(out: Path, arguments: TrainingArguments) -> None:
    checkpoint = arguments.resume_from_checkpoint
    own = checkpoint is not None and (
        checkpoint.lower() == "true" or Path(checkpoint).resolve().parent == out.resolve()
    )
    if out.exists() and any(out.iterdir()) and not own and arguments.process_index == 0:
        raise ValueError(f"out: {out} exists; name a new folder, or set trainer.resume_from_checkpoint to go on")


def extension_arguments(given: dict[str, Any]) -> dict[str, Any]:
    """Arguments of `extend_context`, whose numbers may be strings of a command line, or of YAML, as 15.3e6 is.

    Raises:
        ValueError: for an argument that it does not have, or without a length.
    """
    known = [name for name in inspect.signature(extend_context).parameters if name not in ("config", "settings")]
    known += [name for names in SETTINGS.values() for name in names]
    for key in given:
        refuse_unknown(key, known, "extend")
    if given and "length" not in given:
        raise ValueError(f"extend: found {', '.join(given)}: expected length, the tokens to extend to")
    return {key: _number(value) for key, value in given.items()}


def _number(value: Any) -> Any:
    for kind in (int, float):
        with contextlib.suppress(ValueError, TypeError):
            return kind(value) if isinstance(value, str) else value
    return value
