"""The settings of a training run: read from a recipe or from the `run.json` of an earlier run, and resolved."""

import contextlib
import dataclasses
import difflib
import enum
import inspect
import os
import types
import typing
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from tokenweight import method, models

if TYPE_CHECKING:
    from transformers import TrainingArguments

    from tokenweight.method import ShortContext, Weighting


@dataclasses.dataclass(frozen=True)
class TrainSettings:
    """What to train, on what, and how: the settings of `tokenweight train` and of its recipes.

    docs/train.md lists the fields of the trainer whose default differs from that of transformers.

    Example:
        >>> from tokenweight.train import TrainSettings, train
        >>> settings = TrainSettings(
        ...     "HuggingFaceTB/SmolLM2-135M", "scored", "run", weighting="sparse:keep=0.2", trainer={"max_steps": 240}
        ... )
        >>> model = train(settings)  # doctest: +SKIP
    """

    model: str
    """Folder, hub id or .gguf file of the model to train."""
    data: str
    """Folder of scored sequences; if the scorer is not "stored", a folder of sequences without scores."""
    out: str
    """New folder for checkpoints, the trained model, run.json and metrics.jsonl."""
    weighting: str = "dense"
    """uniform, dense, sparse, longce, ppmi or npmi, with settings as in sparse:keep=0.1; or package.module.function."""
    scorer: str = "stored"
    """Where short losses come from: "stored" (the column short_nll), "self" (the model being trained), or a model."""
    size: int | None = None
    """Tokens of the short context. Selects one of several stored; otherwise a quarter of the sequence (the paper)."""
    stride: int | None = None
    """Tokens scored by each window, unless stored; by default three quarters of size (the paper)."""
    extend: dict[str, Any] = dataclasses.field(default_factory=dict)
    """Context extension: length, method and its settings, also as `--extend.length N` (docs/models.md)."""
    dtype: str = "float32"
    """Dtype of the weights. In bfloat16, small updates are rounded away; prefer --trainer.bf16 true."""
    trainer: dict[str, Any] = dataclasses.field(default_factory=dict)
    """Fields of transformers.TrainingArguments, by their own names."""


@dataclasses.dataclass(frozen=True)
class Run:
    """Settings whose text is resolved to objects, without a look at any file. `resolve` makes it."""

    settings: TrainSettings
    weighting: "Weighting"
    arguments: "TrainingArguments"
    extension: dict[str, Any]
    """Arguments of `extend_context`, or nothing."""

    @property
    def out(self) -> Path:
        """The folder of the run."""
        return Path(self.settings.out)

    @property
    def reads_scores(self) -> bool:
        """Whether the weights need short losses that are stored with the data."""
        return self.settings.scorer == "stored" and self.weighting.uses_short

    @property
    def scoring_model(self) -> str | None:
        """The name of the model that scores, if it is another than the one that is trained."""
        named = self.settings.scorer not in ("stored", "self") and self.weighting.uses_short
        return self.settings.scorer if named else None

    def check_scores(self, stored: bool) -> None:
        """Raise a ValueError if the data has stored scores, `stored`, but the short losses are to come from a model."""
        if stored and self.settings.scorer != "stored":
            raise ValueError(
                f"scorer {self.settings.scorer!r}: {self.settings.data} holds stored scores (short_nll), which would "
                "be used: set scorer to stored, or data to the sequences before scoring"
            )

    def short_context(self, length: int) -> "ShortContext | None":
        """The windows of a scorer for sequences of `length` tokens; None if scores are stored.

        Raises:
            ValueError: if the short context is not shorter than the sequences.
        """
        if self.settings.scorer == "stored":
            return None
        return method.ShortContext.of(length, self.settings.size, self.settings.stride)


def resolve(settings: TrainSettings) -> Run:
    """Resolve the text of settings to objects, and check what can be checked without a file.

    Raises:
        ValueError: for an unknown weighting, field of TrainingArguments or argument of `extend_context`, and for values
            that they cannot have.
    """
    arguments = training_arguments(settings.trainer, settings.out)
    extension = extension_arguments(settings.extend)
    return Run(settings, method.parse_weighting(settings.weighting), arguments, extension)


def read_recipe(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Read the settings of a recipe (YAML), or of an earlier run (its `run.json`).

    Raises:
        ValueError: if the file cannot be read, or has a key that no setting has, naming it.
    """
    try:
        settings = yaml.safe_load(Path(path).read_text())
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ValueError(f"config {path} cannot be read: {' '.join(str(error).split())}") from error
    if isinstance(settings, dict) and "settings" in settings:
        settings = settings["settings"]
    if not isinstance(settings, dict):
        raise ValueError(f"config {path} holds a {type(settings).__name__}: expected settings, as in `model: …`")
    known = [field.name for field in dataclasses.fields(TrainSettings)]
    for key in settings:
        check_known(key, known, f"config {path}")
    number, fields = ((int, type(None)), "a whole number"), ((dict,), "fields of TrainingArguments")
    arguments = ((dict,), "length, method and its settings")
    expected = {"size": number, "stride": number, "trainer": fields, "extend": arguments}
    for key, value in settings.items():
        kinds, name = expected.get(key, ((str,), "text"))
        if not isinstance(value, kinds) or isinstance(value, bool):
            raise ValueError(f"config {path}: {key} is {value!r}: expected {name}")
    return settings


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
"""Defaults of the trainer. The first five: `configs/llama3_32k_dense.json` of the paper's code."""
_RENAMED = {
    "gradient_checkpointing": "activation_checkpointing",
    "gradient_checkpointing_kwargs": "activation_checkpointing_kwargs",
}
"""Fields with the name they have had since transformers 5.23; either name is taken, whichever version is installed."""


def training_arguments(given: dict[str, Any], out: str | os.PathLike[str]) -> "TrainingArguments":
    """`PAPER_ARGUMENTS` overridden by `given`, as the TrainingArguments of a run into the folder `out`.

    A text is read by the type of its field: an option of a command line has no other type, and YAML takes 1e-5 for
    text. Fields that are None keep the default of transformers.

    Raises:
        ValueError: for a field that TrainingArguments does not have, or a value it cannot have.
    """
    import torch
    from transformers import TrainingArguments

    kinds = typing.get_type_hints(TrainingArguments)
    fields = [field.name for field in dataclasses.fields(TrainingArguments) if field.init]
    installed = {name: name for name in fields}
    installed |= {old: new if new in fields else old for old, new in _RENAMED.items()}
    installed |= {new: installed[old] for old, new in _RENAMED.items()}
    for key in given:
        check_known(key, list(installed), "trainer")
    if "output_dir" in given:
        raise ValueError("trainer.output_dir: this is the setting out: name the folder there")
    if "hub_token" in given:
        raise ValueError("trainer.hub_token would be written into run.json: expected the environment variable HF_TOKEN")
    # The Trainer refuses bf16 without an accelerator, unless told that a CPU is meant; and to replace losses that are
    # not finite, which are to stop a run, it would synchronize with the device in every batch.
    defaults = {"use_cpu": not torch.accelerator.is_available(), "logging_nan_inf_filter": False, **PAPER_ARGUMENTS}
    named = {installed[name]: value for name, value in {**defaults, **given}.items()}
    values = {name: _typed(name, value, kinds[name]) for name, value in named.items() if value is not None}
    if values.get("resume_from_checkpoint") == "false":
        del values["resume_from_checkpoint"]
    try:
        arguments = TrainingArguments(output_dir=str(out), **values)
    except (ValueError, TypeError) as error:
        raise ValueError(f"trainer: {' '.join(str(error).split())}") from error
    if arguments.use_liger_kernel or arguments.label_smoothing_factor:
        raise ValueError(
            "trainer: use_liger_kernel and label_smoothing_factor put another loss in place of the weighted one: "
            "expected neither"
        )
    if values.get("fsdp_config") and not arguments.fsdp:
        raise ValueError("trainer.fsdp_config does nothing by itself: expected trainer.fsdp true beside it")
    return arguments


_KINDS = {
    bool: "true or false",
    int: "a whole number",
    float: "a number",
    dict: "a mapping",
    list: "a list",
    str: "text",
}


def _typed(name: str, value: Any, hint: Any) -> Any:
    """The value of a field of TrainingArguments in a type that the field has."""
    union = typing.get_origin(hint) in (types.UnionType, typing.Union)
    kinds = [typing.get_origin(kind) or kind for kind in (typing.get_args(hint) if union else (hint,))]
    kinds = [bool if kind is typing.Literal or name == "fsdp" else kind for kind in kinds]  # fsdp: no list of options
    choices = next((kind for kind in kinds if isinstance(kind, type) and issubclass(kind, enum.Enum)), None)
    if choices is not None:
        names = [choice.value for choice in choices]
        found = "no" if value is False else getattr(value, "value", value)  # YAML reads `no` as false
        if found not in names:
            raise ValueError(f"trainer.{name} {value!r}: {_meant(str(value), names)}")
        return found
    nested = isinstance(value, str) and value[:1] in ("{", "[") and (dict in kinds or list in kinds)
    found = value
    if isinstance(value, str) and (nested or bool in kinds or str not in kinds):
        with contextlib.suppress(yaml.YAMLError):
            found = yaml.safe_load(value)
    for kind in _KINDS:
        if kind in kinds and not (nested and kind is str):
            with contextlib.suppress(ValueError, TypeError):
                return _as(kind, found, alone=str not in kinds)
    if any(isinstance(kind, type) and kind not in _KINDS and isinstance(found, kind) for kind in kinds):
        return found
    expected = " or ".join(_KINDS[kind] for kind in _KINDS if kind in kinds) or str(hint)
    raise ValueError(f"trainer.{name} {value!r}: expected {expected}")


def _as(kind: Any, value: Any, *, alone: bool) -> Any:
    """The value as one of `_KINDS`; a ValueError or TypeError if it is none. `alone`: a text cannot stay a text."""
    flag = isinstance(value, bool)
    if kind is bool and value in (True, False):  # also 1 and 0
        return bool(value)
    if kind is int and isinstance(value, int | str) and not flag:
        return int(value)
    if kind is float and isinstance(value, int | float | str) and not flag:
        return float(value)
    if kind is dict and isinstance(value, dict):
        return _numbers(value)
    if kind is list and (isinstance(value, list) or alone):
        return value if isinstance(value, list) else [value]
    if kind is str and isinstance(value, bool | int | float | str):
        return str(value).lower() if flag else str(value)
    raise ValueError(kind)


def _numbers(value: Any) -> Any:
    """A mapping or list whose text is a number wherever it can be read as one: 1e-5 and 15.3e6 are text in YAML."""
    if isinstance(value, dict):
        return {key: _numbers(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_numbers(item) for item in value]
    for kind in (int, float):
        with contextlib.suppress(ValueError):
            return kind(value) if isinstance(value, str) else value
    return value


def extension_arguments(given: dict[str, Any]) -> dict[str, Any]:
    """Arguments of `extend_context`, whose numbers may be text: of a command line, or of YAML, as 15.3e6 is.

    Raises:
        ValueError: for an argument that it does not have, or without a length.
    """
    known = [name for name in inspect.signature(models.extend_context).parameters if name not in ("config", "settings")]
    known += [name for names in models.SETTINGS.values() for name in names]
    for key in given:
        check_known(key, known, "extend")
    if given and "length" not in given:
        raise ValueError(f"extend: found {', '.join(given)}: expected length, the tokens to extend to")
    return _numbers(given)


def check_known(key: str, known: list[str], where: str) -> None:
    """Raise a ValueError that names an unknown key and, where there is one, a known key like it."""
    if key not in known:
        raise ValueError(f"{where}: unknown setting {key!r}: {_meant(str(key), known)}")


def _meant(word: str, known: list[str]) -> str:
    close = difflib.get_close_matches(word, known, n=1)
    return f"did you mean {close[0]!r}?" if close else f"expected one of {', '.join(known)}"
