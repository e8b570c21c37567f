"""The settings of a training run, and reading them from YAML or from the `run.json` of an earlier run."""

import contextlib
import dataclasses
import difflib
import inspect
import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import yaml

from tokenweight import models

if TYPE_CHECKING:
    from transformers import TrainingArguments


@dataclasses.dataclass(frozen=True)
class TrainSettings:
    """Train a model on rows of tokens with weighted losses.

    Settings are read by `--config FILE` from a recipe (YAML), or from the run.json of an earlier run; options override
    them. A longer context is asked for by `--extend.length N` (docs/context-extension.md). Any field of
    transformers.TrainingArguments is set as `--trainer.NAME VALUE`, or under `trainer:` in the recipe; docs/training.md
    lists those that have another default here than there.
    """

    model: str
    """Folder, hub id or .gguf file of the model to train."""
    data: str
    """Folder of scored rows; with a scorer other than "stored", a folder of rows will do."""
    out: str
    """New folder for checkpoints, the trained model, run.json and metrics.jsonl."""
    weighting: str = "dense"
    """uniform, dense, sparse, longce, ppmi or npmi, with settings as in sparse:keep=0.1; or package.module.function."""
    scorer: str = "stored"
    """Where short losses come from: "stored" (the column short_nll), "self" (the model being trained), or a model."""
    size: int | None = None
    """Tokens of the short context: which of several that are stored; else by default a quarter of a row (the paper)."""
    stride: int | None = None
    """Tokens scored by each window, unless stored; by default three quarters of size (the paper)."""
    extend: dict[str, Any] = dataclasses.field(default_factory=dict)
    """A longer context: length, method and its settings, also as `--extend.length N` (docs/context-extension.md)."""
    dtype: str = "float32"
    """Of the weights. In bfloat16, updates much smaller than a weight are rounded away; prefer --trainer.bf16 true."""
    trainer: dict[str, Any] = dataclasses.field(default_factory=dict)
    """Fields of transformers.TrainingArguments, by their own names."""


def read_recipe(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Read the settings of a recipe (YAML), or of an earlier run (its `run.json`).

    Raises:
        ValueError: if the file cannot be read, or has a key that no setting has, naming it.
    """
    try:
        settings = yaml.safe_load(Path(path).read_text())
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ValueError(f"--config {path} cannot be read: {' '.join(str(error).split())}") from error
    if isinstance(settings, dict) and "settings" in settings:
        settings = settings["settings"]
    if not isinstance(settings, dict):
        raise ValueError(f"--config {path} holds a {type(settings).__name__}: expected settings, as in `model: …`")
    known = [field.name for field in dataclasses.fields(TrainSettings)]
    for key in settings:
        check_known(key, known, f"--config {path}")
    number, fields = ((int, type(None)), "a whole number"), ((dict,), "fields of TrainingArguments")
    arguments = ((dict,), "length, method and its settings")
    expected = {"size": number, "stride": number, "trainer": fields, "extend": arguments}
    for key, value in settings.items():
        kinds, name = expected.get(key, ((str,), "text"))
        if not isinstance(value, kinds) or isinstance(value, bool):
            raise ValueError(f"--config {path}: {key} is {value!r}: expected {name}")
    return settings


def check_known(key: str, known: list[str], where: str) -> None:
    """Raise a ValueError that names a key nobody knows, and what was probably meant."""
    if key not in known:
        close = difflib.get_close_matches(str(key), known, n=1)
        meant = f"did you mean {close[0]!r}?" if close else f"expected one of {', '.join(known)}"
        raise ValueError(f"{where}: unknown setting {key!r}: {meant}")


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


def training_arguments(given: dict[str, Any], out: str | os.PathLike[str]) -> "TrainingArguments":
    """`PAPER_ARGUMENTS` overridden by `given`, whose values may be strings of a command line.

    Raises:
        ValueError: for a field that TrainingArguments does not have, or a value it refuses.
    """
    import torch
    from transformers import HfArgumentParser, TrainingArguments

    class Parser(HfArgumentParser):
        def error(self, message: str) -> NoReturn:
            """One line, where argparse would print every field of TrainingArguments and leave."""
            raise ValueError(f"trainer: {message}")

    known = [field.name for field in dataclasses.fields(TrainingArguments) if field.init]
    for key in given:
        check_known(key, known, "trainer")
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
    (arguments,) = Parser(TrainingArguments).parse_args_into_dataclasses(words)
    if arguments.use_liger_kernel or arguments.label_smoothing_factor:
        raise ValueError(
            "trainer: use_liger_kernel and label_smoothing_factor put another loss in place of the weighted one: "
            "expected neither"
        )
    if arguments.fsdp_config and not arguments.fsdp:
        raise ValueError("trainer: fsdp_config does nothing by itself: expected fsdp true beside it")
    _check_out(Path(out), arguments)
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


def _check_out(out: Path, arguments: "TrainingArguments") -> None:
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
    known = [name for name in inspect.signature(models.extend_context).parameters if name not in ("config", "settings")]
    known += [name for names in models.SETTINGS.values() for name in names]
    for key in given:
        check_known(key, known, "extend")
    if given and "length" not in given:
        raise ValueError(f"extend: found {', '.join(given)}: expected length, the tokens to extend to")
    return {key: _number(value) for key, value in given.items()}


def _number(value: Any) -> Any:
    for kind in (int, float):
        with contextlib.suppress(ValueError, TypeError):
            return kind(value) if isinstance(value, str) else value
    return value
