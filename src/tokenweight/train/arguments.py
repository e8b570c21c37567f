"""Option groups (data, trainer, extend, lora, distill): checked by name, and read from text by the types of fields."""

import contextlib
import dataclasses
import difflib
import enum
import inspect
import math
import os
import types
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from tokenweight import method, models
from tokenweight.records import token_count
from tokenweight.train.checks import check_values

if TYPE_CHECKING:
    from transformers import TrainingArguments

PAPER_ARGUMENTS = {
    "learning_rate": 2e-5,
    "adam_beta2": 0.95,
    "weight_decay": 0.01,
    "lr_scheduler_type": "constant_with_warmup",
    "warmup_steps": 20,
    "num_train_epochs": 1,
    "per_device_train_batch_size": 1,
    "logging_steps": 1,
    "report_to": "none",
}
"""Defaults of the trainer. The first five: `configs/llama3_32k_dense.json` of the paper's code."""
_RENAMED = {
    "gradient_checkpointing": "activation_checkpointing",
    "gradient_checkpointing_kwargs": "activation_checkpointing_kwargs",
}
"""Fields renamed in transformers 5.23, with their new names; either name is accepted with any version."""


def training_arguments(
    given: dict[str, Any], out: str | os.PathLike[str], *, held_out: bool = False
) -> "TrainingArguments":
    """The TrainingArguments of a run into the folder `out`: `PAPER_ARGUMENTS` overridden by `given`.

    Text is read by the type of its field: command-line options are always text, and YAML reads 1e-5 as text. Fields
    that are None keep the default of transformers.

    Args:
        given: fields of TrainingArguments, by name.
        out: the folder of the run, whose name is the run name for trackers.
        held_out: whether there are held-out sequences, which are then evaluated, by default ten times.

    Raises:
        ValueError: for a field that TrainingArguments does not have, or a value it cannot have.
    """
    import torch
    from transformers import TrainingArguments

    hints, installed = _hints(), _fields()
    for key in given:
        check_known(key, list(installed), "trainer")
    if "output_dir" in given:
        raise ValueError("trainer.output_dir: this is the setting out: name the folder there")
    if "hub_token" in given:
        raise ValueError("trainer.hub_token would be written into run.json: expected the environment variable HF_TOKEN")
    # The Trainer rejects bf16 without an accelerator unless CPU use is explicit; and to replace non-finite losses,
    # which should stop a run, it would synchronize with the device in every batch.
    defaults = {"use_cpu": not torch.accelerator.is_available(), "logging_nan_inf_filter": False, **PAPER_ARGUMENTS}
    # The rows of `Display` replace a progress bar; DDP would look for unused parameters, and a decoder has none.
    defaults |= {"run_name": Path(out).resolve().name, "disable_tqdm": True, "ddp_find_unused_parameters": False}
    defaults |= held_out_arguments(given) if held_out else {}
    named = {installed[name]: value for name, value in {**defaults, **given}.items()}
    values = {name: _typed(name, value, hints[name]) for name, value in named.items() if value is not None}
    for field in dataclasses.fields(TrainingArguments):
        choices = list(field.metadata.get("choices") or ())
        if choices and field.name in values and values[field.name] not in choices:
            raise ValueError(f"trainer.{field.name} {values[field.name]!r}: {_meant(values[field.name], choices)}")
    check_values(values)
    if values.get("resume_from_checkpoint") == "false":
        del values["resume_from_checkpoint"]
    try:
        arguments = TrainingArguments(output_dir=str(out), **values)
    except Exception as error:  # its engines, trackers and checks raise all kinds of errors
        raise ValueError(f"trainer: {' '.join(str(error).split()) or type(error).__name__}") from error
    if values.get("fsdp_config") and not arguments.fsdp:
        raise ValueError("trainer.fsdp_config does nothing by itself: expected trainer.fsdp true beside it")
    return arguments


def held_out_arguments(given: Mapping[str, Any]) -> dict[str, Any]:
    """Defaults of the trainer with held-out sequences: ten evaluations per run, and lower is better."""
    every = {"eval_strategy": "steps", "eval_steps": 0.1}
    every |= {name: given[name] for name in every if given.get(name) is not None}
    found = {**every, "per_device_eval_batch_size": given.get("per_device_train_batch_size", 1)}
    best = str(given.get("load_best_model_at_end", False)).lower() in ("true", "yes", "on", "1")
    if best and "save_strategy" not in given:  # the best model can be loaded only if it was saved
        found |= {"save_strategy": every["eval_strategy"], "save_steps": given.get("save_steps", every["eval_steps"])}
    if best or given.get("metric_for_best_model") is not None:
        found["greater_is_better"] = False  # the Trainer assumes True for names that do not end with "loss"
    return found


def typed_arguments(given: Mapping[str, Any]) -> dict[str, Any]:
    """`PAPER_ARGUMENTS` overridden by `given`, each value converted to a type of its field.

    Raises:
        ValueError: for a value that the field cannot have.
    """
    hints = _hints()
    values = {**PAPER_ARGUMENTS, **given}
    return {name: None if value is None else _typed(name, value, hints[name]) for name, value in values.items()}


def _hints() -> dict[str, Any]:
    """The types of the fields of TrainingArguments, by every accepted name of a field."""
    from transformers import TrainingArguments

    hints = typing.get_type_hints(TrainingArguments)
    return hints | {name: hints[installed] for name, installed in _fields().items()}


def _fields() -> dict[str, str]:
    """The accepted names of the fields of TrainingArguments, each with its name in the installed version."""
    from transformers import TrainingArguments

    fields = [field.name for field in dataclasses.fields(TrainingArguments) if field.init]
    installed = {name: name for name in fields}
    installed |= {old: new if new in fields else old for old, new in _RENAMED.items()}
    return installed | {new: installed[old] for old, new in _RENAMED.items()}


_SHORTER = {
    "lr": "learning_rate",
    "batch_size": "per_device_train_batch_size",
    "epochs": "num_train_epochs",
    "steps": "max_steps",
    "warmup": "warmup_steps",
}
"""Names of fields in other programs."""


def trainer_field(word: str, *, close: bool = True) -> str | None:
    """The field of TrainingArguments that a word refers to, if any; with `close`, also by a similar name."""
    fields = list(_fields())
    found = [_SHORTER.get(word, word)] if _SHORTER.get(word, word) in fields else []
    return next(iter(found or (difflib.get_close_matches(word, fields, n=1, cutoff=0.8) if close else [])), None)


def is_flag(field: str) -> bool:
    """Whether an option `--trainer.FIELD` may be given without a value, and is then true.

    Raises:
        ValueError: for a field that TrainingArguments does not have.
    """
    from transformers import TrainingArguments

    check_known(field, list(_fields()), "trainer")
    name = _fields()[field]
    hint = typing.get_type_hints(TrainingArguments)[name]
    return name == "resume_from_checkpoint" or bool in _kinds(name, hint)


_KINDS = {
    bool: "true or false",
    int: "a whole number",
    float: "a number",
    dict: "a mapping",
    list: "a list",
    str: "text",
}


def _kinds(name: str, hint: Any) -> list[Any]:
    """The accepted types of a field of TrainingArguments."""
    union = typing.get_origin(hint) in (types.UnionType, typing.Union)
    kinds = [typing.get_origin(kind) or kind for kind in (typing.get_args(hint) if union else (hint,))]
    kinds = [bool if kind is typing.Literal or name == "fsdp" else kind for kind in kinds]  # fsdp: no list of options
    # A mapping as text is read here; other text names a file, from which these cannot be made.
    return [kind for kind in kinds if kind is not str] if dict in kinds and name.endswith("_kwargs") else kinds


def _typed(name: str, value: Any, hint: Any) -> Any:
    """Convert the value of a field of TrainingArguments to a type of the field."""
    kinds = _kinds(name, hint)
    if name == "optim_args" and (isinstance(value, dict) or str(value).startswith("{")):  # a=1,b=2
        given = _as(dict, yaml.safe_load(value) if isinstance(value, str) else value, alone=True)
        return ",".join(f"{key}={item}" for key, item in given.items())
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
    """Convert the value to one of `_KINDS`, or raise a ValueError or TypeError. `alone`: text must be converted."""
    flag = isinstance(value, bool)
    if kind is bool and value in (True, False):  # also 1 and 0
        return bool(value)
    if kind is int and isinstance(value, int | float | str) and not flag:
        if isinstance(value, str) and value.lstrip("+-").isdecimal():
            return int(value)
        if float(value).is_integer():  # also 1e3, which is text in YAML
            return int(float(value)) if not isinstance(value, int) else value
    if kind is float and isinstance(value, int | float | str) and not flag:
        return float(value)
    if kind is dict and isinstance(value, dict):
        return as_numbers(value)
    if kind is list and (isinstance(value, list) or alone):
        return value if isinstance(value, list) else [value]
    if kind is str and isinstance(value, bool | int | float | str):
        return str(value).lower() if flag else str(value)
    raise ValueError(kind)


def shares_of(data: str | list[dict[str, Any]]) -> dict[str, float]:
    """The folders of the data, each with its share of the tokens; the shares add up to 1.

    Raises:
        ValueError: for data without a folder, a folder that is named twice, or a share that is not above 0.
    """
    if isinstance(data, str):
        return {data: 1.0}
    shares: dict[str, float] = {}
    for part in data:
        if not isinstance(part, dict) or part.keys() != {"path", "share"}:
            found = part["path"] if isinstance(part, dict) and part.keys() == {"path"} else part
            raise ValueError(
                f"data {found!r}: has no share of the tokens: expected FOLDER:SHARE, in YAML {{path: …, share: …}}, "
                "for each folder of a mixture"
            )
        path, share = str(part["path"]), as_numbers(part["share"])
        if isinstance(share, bool) or not isinstance(share, int | float) or not 0 < share < math.inf:
            raise ValueError(f"data {path}: share {share!r}: expected a number above 0")
        if path in shares:
            raise ValueError(f"data {path}: named twice: expected each folder once, with its share")
        shares[path] = share
    if not shares:
        raise ValueError("data []: expected at least one folder")
    total = sum(shares.values())
    return {path: share / total for path, share in shares.items()}


def extension_and_adapter(
    extend: dict[str, Any], lora: dict[str, Any], model: str
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Arguments of `extend_context` and of peft.LoraConfig, read and checked; empty where there are none.

    Raises:
        ValueError: for one that does not exist or cannot have that value, or for both together, naming the model.
    """
    extension, adapter = extension_arguments(extend), lora_arguments(lora)
    if extension and adapter:
        raise ValueError(
            "extend: an adapter is saved without the config of its base, so that whoever loads it reads the old "
            f"context: expected a base that is extended already, as load_model({model!r}, extend=…) saves it"
        )
    return extension, adapter


def extension_arguments(given: dict[str, Any]) -> dict[str, Any]:
    """Arguments of `extend_context`, whose numbers may be text, from a command line or from YAML, as in 15.3e6.

    Raises:
        ValueError: for an argument that it does not have, or without a length.
    """
    known = [name for name in inspect.signature(models.extend_context).parameters if name not in ("config", "settings")]
    known += [name for names in models.SETTINGS.values() for name in names]
    for key in given:
        check_known(key, known, "extend")
    if given and "length" not in given:
        raise ValueError(f"extend: found {', '.join(given)}: expected length, the tokens to extend to")
    numbers = as_numbers(given)
    if isinstance(numbers.get("length"), str):
        numbers["length"] = as_tokens(numbers["length"], f"extend.length {numbers['length']}")
    return numbers


def lora_arguments(given: dict[str, Any]) -> dict[str, Any]:
    """Fields of peft.LoraConfig, whose values may be command-line text; the prefix `lora_` of a name is optional.

    Raises:
        ValueError: without PEFT, for a field that LoraConfig does not have, or a value of another type.
    """
    if not given:
        return {}
    try:
        from peft import LoraConfig
    except ImportError as error:
        raise ValueError(f"lora: PEFT is missing ({error}): pip install 'tokenweight[lora]'") from error
    fields = [field.name for field in dataclasses.fields(LoraConfig) if field.init]
    names = {**{name.removeprefix("lora_"): name for name in fields}, **{name: name for name in fields}}
    hints, found = typing.get_type_hints(LoraConfig), {}
    for key, value in given.items():
        check_known(key, list(names), "lora")
        name = names[key]
        if isinstance(value, str):
            with contextlib.suppress(yaml.YAMLError):
                value = yaml.safe_load(value)
        value = as_numbers(value)
        if not _has_type(value, hints[name]):
            hint = hints[name]
            raise ValueError(f"lora.{key} {value!r}: expected {getattr(hint, '__name__', hint)}")
        found[name] = value
    return {"task_type": "CAUSAL_LM", **found}


def distillation_arguments(given: dict[str, Any]) -> dict[str, Any]:
    """Settings of a distillation with their defaults, whose values may be command-line text; empty if none are given.

    Returns:
        weight, of the divergence from the teacher in the loss; teacher, "stored" or the name of a model; top_k, the
        tokens of each prediction of such a model; steps, after which only the weighted loss remains, or None.

    Raises:
        ValueError: for an unknown setting, or an invalid value.
    """
    if not given:
        return {}
    found = {"weight": None, "teacher": "stored", "top_k": None, "steps": None}
    for key, value in given.items():
        check_known(key, list(found), "distill")
        found[key] = value if key == "teacher" else as_numbers(value)
    weight, teacher, top_k, steps = found.values()
    if isinstance(weight, bool) or not isinstance(weight, int | float) or not 0 < weight <= 1:
        raise ValueError(f"distill.weight {weight!r}: expected a number above 0 and at most 1")
    for name, number in (("top_k", top_k), ("steps", steps)):
        if number is not None and (type(number) is not int or number < 1):
            raise ValueError(f"distill.{name} {number!r}: expected a whole number of at least 1")
    if not isinstance(teacher, str) or not teacher:
        raise ValueError(f'distill.teacher {teacher!r}: expected "stored" or the name of a model')
    if teacher == "stored" and top_k is not None:
        raise ValueError(
            f"distill.top_k {top_k}: that of a stored teacher is that of `tokenweight score`: leave it out"
        )
    return {**found, "top_k": method.TOP_K if top_k is None else top_k}


def _has_type(value: Any, hint: Any) -> bool:
    """Whether a YAML value matches a type annotation; text matches an enumeration."""
    origin = typing.get_origin(hint)
    if origin in (types.UnionType, typing.Union):
        return any(_has_type(value, one) for one in typing.get_args(hint))
    if origin is typing.Literal:
        return value in typing.get_args(hint)
    kind = origin or hint
    if not isinstance(kind, type):
        return True
    number = int | float if kind is float else kind
    return (isinstance(value, number) and (kind is bool or not isinstance(value, bool))) or (
        issubclass(kind, enum.Enum) and isinstance(value, str)
    )


def as_numbers(value: Any) -> Any:
    """Convert text in a mapping or list to numbers where possible: 1e-5 and 15.3e6 are text in YAML."""
    if isinstance(value, dict):
        return {key: as_numbers(item) for key, item in value.items()}
    if isinstance(value, list):
        return [as_numbers(item) for item in value]
    for kind in (int, float):
        with contextlib.suppress(ValueError):
            return kind(value) if isinstance(value, str) else value
    return value


def check_known(key: str, known: list[str], where: str) -> None:
    """Raise a ValueError that names an unknown key and, where there is one, a known key like it."""
    if key not in known:
        raise ValueError(f"{where}: unknown setting {key!r}: {_meant(str(key), known)}")


def _meant(word: str, known: list[str]) -> str:
    close = difflib.get_close_matches(word, known, n=1)
    return f"did you mean {close[0]!r}?" if close else f"expected one of {', '.join(known)}"


def as_tokens(value: Any, what: str) -> int:
    """Read a number of tokens as people type it; a ValueError begins with `what`."""
    try:
        return token_count(value)
    except ValueError:
        raise ValueError(f"{what}: expected a number of tokens, as in 8192 or 8k") from None
