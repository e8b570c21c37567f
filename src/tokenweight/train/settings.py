"""The settings of a training run: read from a recipe or from the `run.json` of an earlier run, and resolved."""

import contextlib
import dataclasses
import importlib.util
import math
import os
import site
import sysconfig
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from tokenweight import data, method, models
from tokenweight.records import OptionalTokens
from tokenweight.train.arguments import (
    as_tokens,
    check_known,
    distillation_arguments,
    extension_and_adapter,
    shares_of,
    trainer_field,
    training_arguments,
    typed_arguments,
)
from tokenweight.train.checks import check_run
from tokenweight.train.lengths import LengthCurriculum

if TYPE_CHECKING:
    from transformers import TrainingArguments

    from tokenweight.method import ShortContext, Weighting
    from tokenweight.models import CountScorer


@dataclasses.dataclass(frozen=True)
class TrainSettings:
    """Settings of a training run: those of `tokenweight train` and of its recipes.

    docs/train.md lists the fields of the trainer whose default differs from that of transformers.

    Example:
        >>> from tokenweight.train import TrainSettings, train
        >>> settings = TrainSettings(
        ...     "HuggingFaceTB/SmolLM2-135M", "scored", "run", weighting="sparse:keep=0.2", trainer={"max_steps": 240}
        ... )
        >>> model = train(settings)  # doctest: +SKIP
    """

    model: str
    """Folder, hub id or .gguf file of the model to train; or a config (.json), to train one from scratch
    (docs/train.md)."""
    data: str | list[dict[str, Any]]
    """Folder of scored sequences; if the scorer is not "stored", a folder of sequences without scores. For a mixture,
    each folder with its share of the tokens: A:0.6 B:0.4, in YAML a list of {path, share}."""
    out: str
    """New folder for checkpoints, the trained model, run.json and metrics.jsonl."""
    weighting: str = "dense"
    """A weighting of docs/weightings.md, with settings as in sparse:keep=0.1 or mix(dense, uniform, share=0.5); or
    package.module.function."""
    scorer: str = "stored"
    """Source of the short losses: "stored" (the column short_nll), "self" (the model being trained), "base" (the same
    without the adapter of `lora`), a model, or "count", as in count:order=4, which needs none (docs/data.md)."""
    contrast: str | None = None
    """Source of the long losses that weights compare with the short ones: "trained", the model being trained (the
    paper), or "scorer", the scorer itself; by default trained, unless the scorer is count or stored scores say
    scorer (docs/weightings.md)."""
    size: OptionalTokens = None
    """Tokens of the short context. Selects one of several stored; otherwise a quarter of the sequence (the paper)."""
    stride: OptionalTokens = None
    """Tokens scored by each window, unless stored; by default three quarters of size (the paper)."""
    curriculum: str | None = None
    """Order of the lengths of sequences that `prepare --short decompose` made: pow2, linear or uniform, with cycles as
    in pow2:cycles=8; then a batch counts sequences of the longest (docs/train.md)."""
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
    distill: dict[str, Any] = dataclasses.field(default_factory=dict)
    """Distillation from a teacher, also as `--distill.weight 0.5`: weight, teacher ("stored" or a model), top_k, steps
    (docs/train.md)."""
    lora: dict[str, Any] = dataclasses.field(default_factory=dict)
    """Fields of peft.LoraConfig, also as `--lora.r N`: train an adapter in place of the weights (docs/train.md)."""
    trainer: dict[str, Any] = dataclasses.field(default_factory=dict)
    """Fields of transformers.TrainingArguments, by their own names."""


@dataclasses.dataclass(frozen=True)
class Run:
    """Settings whose text is resolved to objects by `resolve`, without reading any file."""

    settings: TrainSettings
    weighting: "Weighting"
    counts: "CountScorer | None"
    """The scorer of sequences as they are read, if it is one without a model."""
    arguments: "TrainingArguments"
    extension: dict[str, Any]
    """Arguments of `extend_context`; empty without extension."""
    lora: dict[str, Any]
    """Fields of LoraConfig; empty without adapter."""
    distill: dict[str, Any]
    """All settings of the distillation; empty without one."""
    shares: dict[str, float]
    """The folders of the data, each with its share of the training tokens; the shares add up to 1."""
    curriculum: LengthCurriculum | None = None

    @property
    def sequences_per_step(self) -> int:
        """Sequences of an optimizer step, over all processes that read different sequences."""
        arguments, parallel = self.arguments, self.arguments.parallelism_config
        copies = math.prod(getattr(parallel, f"{kind}_size", 1) for kind in ("tp", "cp", "sp"))
        return arguments.train_batch_size * arguments.gradient_accumulation_steps * (arguments.world_size // copies)

    @property
    def out(self) -> Path:
        """The folder of the run."""
        return Path(self.settings.out)

    def columns(self, contrast: str | None = None) -> frozenset[str]:
        """The columns of the data that the weights need, with that contrast in place of the one in the settings."""
        found = models.score_columns(self.weighting, contrast or self.settings.contrast or "trained")
        found = found if self.settings.scorer == "stored" else found & {"ref_nll"}
        return found | {*models.TEACHER} if self.distill.get("teacher") == "stored" else found

    @property
    def scored(self) -> bool:
        """Whether weights need the output of a scorer."""
        return models.score_columns(self.weighting, self.settings.contrast or "trained") - {"ref_nll"} != set()

    @property
    def teacher_model(self) -> str | None:
        """The name of the teacher, if its predictions are not stored."""
        teacher = self.distill.get("teacher")
        return None if teacher == "stored" else teacher

    @property
    def scoring_model(self) -> str | None:
        """The name of the scoring model, if it is not the trained one."""
        scorer = self.settings.scorer
        return scorer if scorer not in ("stored", "self", "base") and self.scored and self.counts is None else None

    def short_context(self, length: int) -> "ShortContext | None":
        """The windows of a scorer for sequences of `length` tokens; None if scores are stored.

        Raises:
            ValueError: if the short context is not shorter than the sequences.
        """
        if self.settings.scorer == "stored":
            return None
        return method.ShortContext.of(length, self.settings.size, self.settings.stride)


def counts_of(name: str, weighting: "Weighting", contrast: str | None) -> "CountScorer | None":
    """The scorer of that name, if it scores sequences without a model as they are read, and is needed.

    Raises:
        ValueError: for an unknown setting; if its losses would be compared with those of the trained model, or the
            weighting needs another divergence than its own.
    """
    found = models.count_scorer(name)
    if found is None or not models.score_columns(weighting, contrast or "trained") - {"ref_nll"}:
        return None
    if contrast == "trained" and weighting.uses_short:
        raise ValueError(
            f"contrast trained: the losses of the scorer {name} cannot be compared with those of the model that is "
            "trained: expected scorer"
        )
    compared = "scorer" if contrast == "scorer" or weighting.uses_short else "trained"
    data.check_scores(weighting, found.provenance, f"scorer {name}", compared)
    return dataclasses.replace(found, divergence="divergence" in weighting.uses)


def resolve(settings: TrainSettings) -> Run:
    """Resolve the text of settings to objects, and check what can be checked without reading a file.

    Raises:
        ValueError: for an unknown weighting, field of TrainingArguments or argument of `extend_context`, for values
            that they cannot have, here or on this machine, and for a folder `out` that is not on this machine.
    """
    extension, lora = extension_and_adapter(settings.extend, settings.lora, settings.model)
    shares, distill = shares_of(settings.data), distillation_arguments(settings.distill)
    arguments = training_arguments(settings.trainer, settings.out, held_out=settings.eval_data is not None)
    check_run(arguments, settings.eval_data)
    if settings.scorer == "base" and (not lora or lora.get("bias", "none") != "none"):
        found = f"lora.bias {lora['bias']} trains biases of the base" if lora else "there is no adapter"
        raise ValueError(f"scorer base: {found}: expected lora, whose base stays as it is, or another scorer")
    curriculum = None if settings.curriculum is None else LengthCurriculum.parse(settings.curriculum)
    if curriculum is not None and len(shares) > 1:
        raise ValueError(
            f"curriculum {curriculum}: a mixture of folders has an order of its own: expected one folder, as "
            "`tokenweight prepare` makes of several texts"
        )
    if (len(shares) > 1 or curriculum is not None) and arguments.train_sampling_strategy != "random":
        own = "a mixture" if curriculum is None else "a curriculum"
        raise ValueError(
            f"trainer.train_sampling_strategy {arguments.train_sampling_strategy}: {own} has an order of its own: "
            "leave it out"
        )
    weighting = method.parse_weighting(settings.weighting)
    counts = counts_of(settings.scorer, weighting, settings.contrast)
    if (url := data.remote_url(settings.out)) is not None:
        raise ValueError(f"out {url}: expected a folder on this machine, to copy elsewhere when the run has ended")
    run = Run(settings, weighting, counts, arguments, extension, lora, distill, shares, curriculum)
    run.columns()  # raises for an unknown contrast
    return run


def as_settings(settings: TrainSettings) -> dict[str, Any]:
    """The settings as `read_recipe` reads them, without the additional ones of a command."""
    given = dataclasses.asdict(settings)
    return {field.name: given[field.name] for field in dataclasses.fields(TrainSettings)}


def config_text(settings: TrainSettings) -> str:
    """The settings as YAML for `read_recipe`, with our defaults filled in: the same run, written out.

    Raises:
        ValueError: as `resolve` does.
    """
    run = resolve(settings)
    found = {
        **as_settings(settings),
        "weighting": str(run.weighting),
        "curriculum": None if run.curriculum is None else str(run.curriculum),
        "extend": run.extension,
        "distill": settings.distill,
        "lora": run.lora,
        "trainer": typed_arguments(settings.trainer),
    }
    found = {name: value for name, value in found.items() if value not in (None, {})}
    return yaml.safe_dump(found, sort_keys=False, allow_unicode=True, width=math.inf)


def read_recipe(path: str | os.PathLike[str], *, allow_code: bool = False) -> dict[str, Any]:
    """Read the settings of a recipe (YAML), or of an earlier run (its `run.json`).

    Args:
        path: of the file.
        allow_code: whether its weighting may be code that is not installed. Such code runs as soon as the recipe is
            used, so review files written by others first.

    Raises:
        ValueError: if the file cannot be read, or has an unknown key, naming it; for a weighting that is code, unless
            allowed or installed.
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
        "distill": ((dict,), "weight, teacher, top_k and steps"),
        **dict.fromkeys(("contrast", "curriculum", "eval_data", "revision", "attn_implementation"), text),
    }
    for key, value in settings.items():
        if key in ("size", "stride"):
            settings[key] = None if value is None else as_tokens(value, f"config {path}: {key} is {value!r}")
            continue
        kinds, name = expected.get(key, ((str,), "text"))
        if not isinstance(value, kinds) or isinstance(value, bool):
            raise ValueError(f"config {path}: {key} is {value!r}: expected {name}")
    if not allow_code and not all(map(_is_installed, method.weighting_names(settings.get("weighting", "dense")))):
        raise ValueError(
            f"config {path}: the weighting {settings['weighting']} is code that is not installed: read it, then allow "
            "it by --allow_code, or name it as --weighting"
        )
    return settings


class _Loader(yaml.SafeLoader):
    """Loads YAML and rejects duplicate keys, of which YAML would silently take the second."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode) and key.value != "<<"]
        for key in keys:
            if keys.count(key) > 1:
                raise yaml.constructor.ConstructorError(None, None, f"found {key!r} twice", node.start_mark)
        return super().construct_mapping(node, deep)


def _is_installed(name: str) -> bool:
    """Whether a name is that of a built-in weighting, or of a function of an installed package, without importing it.

    The working directory, from which Python imports too, may contain anything downloaded with a recipe.
    """
    name, dot, _ = name.partition(".")
    if not dot or name == "tokenweight":
        return True
    with contextlib.suppress(ImportError, ValueError):
        spec = importlib.util.find_spec(name)
        if spec is None:
            return True  # not found, which raises a separate error
        found = [*(spec.submodule_search_locations or ()), *filter(None, [spec.origin])]
        installed = [
            Path(sysconfig.get_path(kind)).resolve() for kind in ("purelib", "platlib", "stdlib", "platstdlib")
        ]
        installed += [Path(folder).resolve() for folder in (*site.getsitepackages(), site.getusersitepackages())]
        builtin = spec.origin in ("built-in", "frozen")
        return builtin or all(any(map(Path(place).resolve().is_relative_to, installed)) for place in found)
    return False
