"""The settings of a training run: read from a recipe or from the `run.json` of an earlier run, and resolved."""

import contextlib
import dataclasses
import difflib
import enum
import importlib.util
import inspect
import math
import os
import site
import sysconfig
import types
import typing
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from tokenweight import method, models
from tokenweight.records import OptionalTokens, token_count
from tokenweight.train.arguments import check_run, check_values, held_out_arguments

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
    data: str | list[dict[str, Any]]
    """Folder of scored sequences; if the scorer is not "stored", a folder of sequences without scores. Of a mixture,
    each folder with its share of the tokens: A:0.6 B:0.4, in YAML a list of {path, share}."""
    out: str
    """New folder for checkpoints, the trained model, run.json and metrics.jsonl."""
    weighting: str = "dense"
    """uniform, dense, sparse, longce, ppmi or npmi, with settings as in sparse:keep=0.1; or package.module.function."""
    scorer: str = "stored"
    """Where short losses come from: "stored" (the column short_nll), "self" (the model being trained), or a model."""
    size: OptionalTokens = None
    """Tokens of the short context. Selects one of several stored; otherwise a quarter of the sequence (the paper)."""
    stride: OptionalTokens = None
    """Tokens scored by each window, unless stored; by default three quarters of size (the paper)."""
    eval_data: str | None = None
    """Folder of held-out sequences, with or without scores, whose loss is measured while training (docs/train.md)."""
    revision: str | None = None
    """Revision of a hub model to train: a branch, a tag or a commit."""
    extend: dict[str, Any] = dataclasses.field(default_factory=dict)
    """Context extension: length, method and its settings, also as `--extend.length N` (docs/models.md)."""
    dtype: str = "float32"
    """Dtype of the weights. In bfloat16, small updates are rounded away; prefer --trainer.bf16 true."""
    attn_implementation: str | None = None
    """Attention kernel: sdpa, flash_attention_2, eager, … (docs/models.md); by default the choice of transformers."""
    lora: dict[str, Any] = dataclasses.field(default_factory=dict)
    """Fields of peft.LoraConfig, also as `--lora.r N`: train an adapter in place of the weights (docs/train.md)."""
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
    lora: dict[str, Any]
    """Fields of LoraConfig, or nothing."""
    shares: dict[str, float]
    """The folders of the data, each with its share of the tokens that are trained on; the shares add up to 1."""

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

    def check_scores(self, stored: bool, folder: str) -> None:
        """Raise a ValueError if a folder has stored scores, `stored`, but the short losses are to come from a model."""
        if stored and self.settings.scorer != "stored":
            raise ValueError(
                f"scorer {self.settings.scorer!r}: {folder} holds stored scores (short_nll), which would "
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
            that they cannot have, here or on this machine.
    """
    arguments = training_arguments(settings.trainer, settings.out, held_out=settings.eval_data is not None)
    check_run(arguments, settings.eval_data)
    extension, lora, shares = extension_arguments(settings.extend), lora_arguments(settings.lora), shares_of(settings)
    if extension and lora:
        raise ValueError(
            "extend: an adapter is saved without the config of its base, so that whoever loads it reads the old "
            f"context: expected a base that is extended already, as load_model({settings.model!r}, extend=…) saves it"
        )
    if len(shares) > 1 and arguments.train_sampling_strategy != "random":
        raise ValueError(
            f"trainer.train_sampling_strategy {arguments.train_sampling_strategy}: a mixture has an order of its own, "
            "in which the shares of its folders hold: leave it out"
        )
    return Run(settings, method.parse_weighting(settings.weighting), arguments, extension, lora, shares)


def as_settings(settings: TrainSettings) -> dict[str, Any]:
    """The settings as `read_recipe` reads them, without what a command adds to them."""
    given = dataclasses.asdict(settings)
    return {field.name: given[field.name] for field in dataclasses.fields(TrainSettings)}


def config_text(settings: TrainSettings) -> str:
    """The settings as YAML that `read_recipe` reads back, with the defaults of ours: the same run, written out.

    Raises:
        ValueError: as `resolve` does.
    """
    run, hints = resolve(settings), _hints()
    given = {**PAPER_ARGUMENTS, **settings.trainer}
    trainer = {name: None if value is None else _typed(name, value, hints[name]) for name, value in given.items()}
    found = {
        **as_settings(settings),
        "weighting": str(run.weighting),
        "extend": run.extension,
        "lora": run.lora,
        "trainer": trainer,
    }
    found = {name: value for name, value in found.items() if value not in (None, {})}
    return yaml.safe_dump(found, sort_keys=False, allow_unicode=True, width=math.inf)


def shares_of(settings: TrainSettings) -> dict[str, float]:
    """The folders of the data, each with its share of the tokens; the shares add up to 1.

    Raises:
        ValueError: for data without a folder, a folder that is named twice, or a share that is not above 0.
    """
    if isinstance(settings.data, str):
        return {settings.data: 1.0}
    shares: dict[str, float] = {}
    for part in settings.data:
        if not isinstance(part, dict) or part.keys() != {"path", "share"}:
            found = part["path"] if isinstance(part, dict) and part.keys() == {"path"} else part
            raise ValueError(
                f"data {found!r}: has no share of the tokens: expected FOLDER:SHARE, in YAML {{path: …, share: …}}, "
                "for each folder of a mixture"
            )
        path, share = str(part["path"]), _numbers(part["share"])
        if isinstance(share, bool) or not isinstance(share, int | float) or not 0 < share < math.inf:
            raise ValueError(f"data {path}: share {share!r}: expected a number above 0")
        if path in shares:
            raise ValueError(f"data {path}: named twice: expected each folder once, with its share")
        shares[path] = share
    if not shares:
        raise ValueError("data []: expected at least one folder")
    total = sum(shares.values())
    return {path: share / total for path, share in shares.items()}


def read_recipe(path: str | os.PathLike[str], *, allow_code: bool = False) -> dict[str, Any]:
    """Read the settings of a recipe (YAML), or of an earlier run (its `run.json`).

    Args:
        path: of the file.
        allow_code: whether its weighting may be code that is not installed. Such code runs as soon as the recipe is
            used, and a file that somebody else wrote is to be read before.

    Raises:
        ValueError: if the file cannot be read, or has a key that no setting has, naming it; for a weighting that is
            code, unless it is allowed or installed.
    """
    try:
        settings = yaml.load(Path(path).read_text(encoding="utf-8-sig"), _Loader)
    except (OSError, UnicodeDecodeError, yaml.YAMLError, RecursionError) as error:
        raise ValueError(f"config {path} cannot be read: {' '.join(str(error).split())}") from error
    if isinstance(settings, dict) and "settings" in settings:
        settings = settings["settings"]
    if not isinstance(settings, dict):
        raise ValueError(f"config {path} holds a {type(settings).__name__}: expected settings, as in `model: …`")
    known = [field.name for field in dataclasses.fields(TrainSettings)]
    for key in settings:
        try:
            check_known(key, known, f"config {path}")
        except ValueError as error:
            field = trainer_field(str(key))
            raise ValueError(f"{error}; {field} is a field of trainer" if field else str(error)) from None
    text = ((str, type(None)), "text")
    expected: dict[str, tuple[tuple[type, ...], str]] = {
        "data": ((str, list), "a folder, or a list of path and share"),
        "trainer": ((dict,), "fields of TrainingArguments"),
        "extend": ((dict,), "length, method and its settings"),
        "lora": ((dict,), "fields of LoraConfig"),
        **{"eval_data": text, "revision": text, "attn_implementation": text},
    }
    for key, value in settings.items():
        if key in ("size", "stride"):
            settings[key] = None if value is None else _tokens(value, f"config {path}: {key} is {value!r}")
            continue
        kinds, name = expected.get(key, ((str,), "text"))
        if not isinstance(value, kinds) or isinstance(value, bool):
            raise ValueError(f"config {path}: {key} is {value!r}: expected {name}")
    if not allow_code and not _is_installed(settings.get("weighting", "dense")):
        raise ValueError(
            f"config {path}: the weighting {settings['weighting']} is code that is not installed: read it, then allow "
            "it by --allow_code, or name it as --weighting"
        )
    return settings


def _tokens(value: Any, what: str) -> int:
    try:
        return token_count(value)
    except ValueError:
        raise ValueError(f"{what}: expected a number of tokens, as in 8192 or 8k") from None


class _Loader(yaml.SafeLoader):
    """Reads YAML; of a key that is there twice, YAML itself would silently take the second."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode) and key.value != "<<"]
        for key in keys:
            if keys.count(key) > 1:
                raise yaml.constructor.ConstructorError(None, None, f"found {key!r} twice", node.start_mark)
        return super().construct_mapping(node, deep)


def _is_installed(weighting: str) -> bool:
    """Whether a weighting is one of ours, or a function of an installed package; nothing is imported to find out.

    The working directory, from which Python imports as well, may hold whatever was downloaded with a recipe.
    """
    name, dot, _ = weighting.partition(":")[0].strip().partition(".")
    if not dot or name == "tokenweight":
        return True
    with contextlib.suppress(ImportError, ValueError):
        spec = importlib.util.find_spec(name)
        if spec is None:
            return True  # nowhere: an error of its own
        found = [*(spec.submodule_search_locations or ()), *filter(None, [spec.origin])]
        installed = [
            Path(sysconfig.get_path(kind)).resolve() for kind in ("purelib", "platlib", "stdlib", "platstdlib")
        ]
        installed += [Path(folder).resolve() for folder in (*site.getsitepackages(), site.getusersitepackages())]
        builtin = spec.origin in ("built-in", "frozen")
        return builtin or all(any(map(Path(place).resolve().is_relative_to, installed)) for place in found)
    return False


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
"""Fields with the name they have had since transformers 5.23; either name is taken, whichever version is installed."""


def training_arguments(
    given: dict[str, Any], out: str | os.PathLike[str], *, held_out: bool = False
) -> "TrainingArguments":
    """`PAPER_ARGUMENTS` overridden by `given`, as the TrainingArguments of a run into the folder `out`.

    A text is read by the type of its field: an option of a command line has no other type, and YAML takes 1e-5 for
    text. Fields that are None keep the default of transformers.

    Args:
        given: fields of TrainingArguments, by name.
        out: the folder of the run, whose name is that of the run for its trackers.
        held_out: whether there are held-out sequences: then they are evaluated, by default ten times.

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
    # The Trainer refuses bf16 without an accelerator, unless told that a CPU is meant; and to replace losses that are
    # not finite, which are to stop a run, it would synchronize with the device in every batch.
    defaults = {"use_cpu": not torch.accelerator.is_available(), "logging_nan_inf_filter": False, **PAPER_ARGUMENTS}
    # The rows of `Display` stand in place of a bar; DDP would look for unused parameters, of which a decoder has none.
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
    except Exception as error:  # its engines, trackers and checks raise what they like
        raise ValueError(f"trainer: {' '.join(str(error).split()) or type(error).__name__}") from error
    if values.get("fsdp_config") and not arguments.fsdp:
        raise ValueError("trainer.fsdp_config does nothing by itself: expected trainer.fsdp true beside it")
    return arguments


def _hints() -> dict[str, Any]:
    """The types of the fields of TrainingArguments, by every name by which a field can be set."""
    from transformers import TrainingArguments

    hints = typing.get_type_hints(TrainingArguments)
    return hints | {name: hints[installed] for name, installed in _fields().items()}


def _fields() -> dict[str, str]:
    """The names by which a field of TrainingArguments can be set, each with its name in the installed version."""
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
"""What other programs call a field."""


def trainer_field(word: str, *, close: bool = True) -> str | None:
    """The field of TrainingArguments that is meant by a word, if one is; with `close`, also one with a similar name."""
    fields = list(_fields())
    found = [_SHORTER.get(word, word)] if _SHORTER.get(word, word) in fields else []
    return next(iter(found or (difflib.get_close_matches(word, fields, n=1, cutoff=0.8) if close else [])), None)


def is_flag(field: str) -> bool:
    """Whether an option `--trainer.FIELD` may stand without a value, and is then true.

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
    """The types that a field of TrainingArguments can have."""
    union = typing.get_origin(hint) in (types.UnionType, typing.Union)
    kinds = [typing.get_origin(kind) or kind for kind in (typing.get_args(hint) if union else (hint,))]
    kinds = [bool if kind is typing.Literal or name == "fsdp" else kind for kind in kinds]  # fsdp: no list of options
    # A mapping as text is read here; other text names a file, of which these cannot be made.
    return [kind for kind in kinds if kind is not str] if dict in kinds and name.endswith("_kwargs") else kinds


def _typed(name: str, value: Any, hint: Any) -> Any:
    """The value of a field of TrainingArguments in a type that the field has."""
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
    """The value as one of `_KINDS`; a ValueError or TypeError if it is none. `alone`: a text cannot stay a text."""
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
    numbers = _numbers(given)
    if isinstance(numbers.get("length"), str):
        numbers["length"] = _tokens(numbers["length"], f"extend.length {numbers['length']}")
    return numbers


def lora_arguments(given: dict[str, Any]) -> dict[str, Any]:
    """Fields of peft.LoraConfig, whose values may be text of a command line; `lora_` before a name may be left out.

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
    names = {**{name: name for name in fields}, **{name.removeprefix("lora_"): name for name in fields}}
    hints, found = typing.get_type_hints(LoraConfig), {}
    for key, value in given.items():
        check_known(key, list(names), "lora")
        name = names[key]
        if isinstance(value, str):
            with contextlib.suppress(yaml.YAMLError):
                value = yaml.safe_load(value)
        value = _numbers(value)
        if not _has_type(value, hints[name]):
            hint = hints[name]
            raise ValueError(f"lora.{key} {value!r}: expected {getattr(hint, '__name__', hint)}")
        found[name] = value
    return {"task_type": "CAUSAL_LM", **found}


def _has_type(value: Any, hint: Any) -> bool:
    """Whether a value that YAML can hold is of a type of an annotation; of an enumeration, a text is."""
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


def check_known(key: str, known: list[str], where: str) -> None:
    """Raise a ValueError that names an unknown key and, where there is one, a known key like it."""
    if key not in known:
        raise ValueError(f"{where}: unknown setting {key!r}: {_meant(str(key), known)}")


def _meant(word: str, known: list[str]) -> str:
    close = difflib.get_close_matches(word, known, n=1)
    return f"did you mean {close[0]!r}?" if close else f"expected one of {', '.join(known)}"
