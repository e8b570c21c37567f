"""Cost of a recipe: FLOPs, memory and hours, estimated from a config; no weights, no data, no GPU."""

import dataclasses
import math
import tempfile
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from transformers import PreTrainedConfig, TrainingArguments

from tokenweight.data import (
    Contents,
    ContextShare,
    context_shares,
    folder_exists,
    read_contents,
    read_provenance,
)
from tokenweight.method import (
    TOP_K,
    ShortContext,
    Uniform,
    Weighting,
    Window,
    fit_at_once,
    parse_weighting,
    sliding_windows,
)
from tokenweight.models import (
    check_length,
    context_length,
    count_scorer,
    extend_context,
    rope_depends_on_length,
    score_columns,
)
from tokenweight.plan.alternatives import Advice, Alternative, alternatives, recomputes
from tokenweight.plan.disk import Disk, disk_bytes
from tokenweight.plan.flops import Forward, Step, count_forward, step_flops, window_flops
from tokenweight.plan.gpus import Fixed, Peak, autocast_dtype, fixed_bytes, peak
from tokenweight.plan.hardware import UNKNOWN, Hardware
from tokenweight.plan.memory import Held, hold
from tokenweight.plan.shapes import find_config
from tokenweight.train import (
    LengthCurriculum,
    TrainSettings,
    extension_and_adapter,
    shares_of,
    training_arguments,
)

MODES = ("uniform", "precomputed", "self-scored")
"""Plain cross-entropy; the recipe's weighting with stored scores; and with the trained model as its scorer."""


class Cost(NamedTuple):
    """Cost of a run on sequences of one length, in one mode."""

    length: int
    mode: str
    flops: Step
    """FLOPs of one optimizer step on all GPUs."""
    peak: Peak
    """Memory of one GPU."""
    hours: float | None = None
    """All steps and, with precomputed scores, scoring the data once; None if speed or number of steps is unknown."""
    fits: bool | None = None
    """Whether one GPU holds `peak`, with a tenth to spare; None if its memory is not known."""
    step_seconds: float | None = None
    """One optimizer step; None if no speed is known."""
    gpu_hours: float | None = None
    """`hours` times the number of GPUs."""
    dollars: float | None = None
    """Price of all `gpu_hours`; None if no price is known."""
    dollars_per_million_tokens: float | None = None
    """Price per million training tokens, including scoring if scores are precomputed."""


@dataclasses.dataclass(frozen=True)
class Budget:
    """The result of `plan`."""

    model: str
    weighting: str
    mode: str
    """The mode of the recipe, one of `MODES`."""
    length: int
    length_from: str
    """Source of the length, in words."""
    context: ShortContext
    sequences_per_step: int
    """Sequences of a step on all GPUs."""
    num_steps: int | None
    """Optimizer steps, if the recipe or the data determines them."""
    hardware: Hardware
    run: list[Cost]
    """Costs at `length`, by mode."""
    growth: list[Cost]
    """Costs at the other lengths."""
    advice: list[Advice]
    """For each length at which the recipe's mode does not fit the GPU: the first change that does."""
    notes: list[str]
    """Notes on what the numbers leave out for this recipe."""
    disk: Disk
    """Disk space in the recipe's mode."""
    adapter: int | None = None
    """Parameters of the trained adapter; None if all weights are trained."""
    shares: list[ContextShare] = dataclasses.field(default_factory=list)
    """If the data exists: how many tokens of each source have more context than `context.size`."""

    def as_json(self) -> dict[str, Any]:
        """Convert to plain lists and dicts, FLOPs and bytes with their totals."""
        return {field.name: _plain(getattr(self, field.name)) for field in dataclasses.fields(self)}


def plan(
    settings: TrainSettings,
    *,
    length: int | None = None,
    lengths: Sequence[int] = (),
    hardware: Hardware = UNKNOWN,
    progress: Callable[..., None] = lambda done, total=None: None,
) -> Budget:
    """Estimate what a recipe costs, whether it fits, and how both change with the sequence length.

    Args:
        settings: the recipe; its `model` may be a folder with only a config.json. Models of the shipped recipes need
            no config.
        length: tokens of a sequence; by default those of the data, else `extend.length`, else the model's context.
        lengths: further lengths, for the growth.
        hardware: the GPUs that train; their memory determines what fits, their speed the hours.
        progress: called after each length, with the number of lengths.

    Raises:
        ValueError: for settings that `train` would reject, and if something needed is not known.
    """
    if wrong := [number for number in (length, *lengths) if number is not None and number < 2]:
        raise ValueError(f"length {wrong[0]}: expected at least 2")
    recipe = _Recipe.read(settings, hardware)
    length, length_from = recipe.choose_length(length)
    every, costs, advice = sorted({length, *lengths}), {}, []  # one that is too short raises first
    flops_per_s = recipe.flops_per_s(length)
    for number in every:
        costs[number] = recipe.costs(number, flops_per_s)
        mine = costs[number][MODES.index(recipe.mode)]
        advice += [recipe.advise(number, mine.peak.total)] if mine.fits is False else []
        progress(1, len(every))
    return Budget(
        model=settings.model,
        weighting=str(recipe.weighting),
        mode=recipe.mode,
        length=length,
        length_from=length_from,
        context=recipe.context(length),
        sequences_per_step=recipe.sequences_per_step,
        num_steps=recipe.num_steps,
        hardware=hardware,
        run=costs[length],
        growth=[cost for number in lengths for cost in costs[number]],
        advice=advice,
        notes=recipe.notes(every[-1], length, flops_per_s),
        disk=recipe.disk(length),
        adapter=None if recipe.forward.adapted is None else recipe.forward.adapted.num_trained,
        shares=[share for folder in recipe.folders for share in context_shares(folder, recipe.context(length).size)],
    )


@dataclasses.dataclass(frozen=True)
class _Recipe:
    """A recipe, and the compute of its model."""

    settings: TrainSettings
    config: PreTrainedConfig
    kept: bool
    """Whether the config is a shape stored in this package, since none was found."""
    lora: dict[str, Any]
    """Arguments of peft.LoraConfig; empty if all weights are trained."""
    weighting: Weighting
    arguments: TrainingArguments
    hardware: Hardware
    length: tuple[int | None, str]
    """Tokens of a sequence, and the source of that number."""
    num_sequences: int | None
    folders: list[str]
    """Folders of the data, if it exists."""
    own_contrast: bool
    """Whether the data holds scores that are comparable only with each other."""
    counted: bool
    """Whether the data was scored by counts, which takes no GPU."""
    forward: Forward
    fixed: Fixed
    held: dict[tuple[Any, ...], Held]
    """Cached results of `hold`, by what they depend on."""

    @classmethod
    def read(cls, settings: TrainSettings, hardware: Hardware) -> "_Recipe":
        weighting = parse_weighting(settings.weighting)
        if settings.scorer not in ("stored", "self", "base") and count_scorer(settings.scorer) is None:
            raise ValueError(
                f"scorer {settings.scorer!r}: expected stored, self, base or count: only these can be planned"
            )
        if settings.distill.get("teacher", "stored") != "stored":
            raise ValueError(
                f"distill.teacher {settings.distill['teacher']!r}: expected stored: no other can be planned"
            )
        dtype = getattr(torch, settings.dtype, None)
        if not isinstance(dtype, torch.dtype):
            raise ValueError(f"dtype {settings.dtype!r}: expected float32, bfloat16, float16 or float64")
        arguments, num_sequences = _arguments(settings), None
        if settings.curriculum is not None:
            LengthCurriculum.parse(settings.curriculum)  # raises
        config, kept = find_config(settings.model, settings.revision)
        length = (context_length(config), "the model's context length")
        extension, lora = extension_and_adapter(settings.extend, settings.lora, settings.model)
        if extension:
            config, length = extend_context(config, **extension), (extension["length"], "extend.length")
        mixed = shares_of(settings.data)
        folders = list(mixed) if all(folder and folder_exists(folder) for folder in mixed) else []
        made = list(map(read_provenance, folders))
        if folders:
            longest, num_sequences = _epoch(mixed, pieces=settings.curriculum is not None)
            length = (longest, "data")
        own_contrast = any(one.get("contrast") == "scorer" for one in made)
        counted = bool(made) and all(count_scorer(str(one.get("model"))) is not None for one in made)
        data = length, num_sequences, folders, own_contrast, counted
        fixed = fixed_bytes(config, arguments, dtype, hardware.num_gpus, lora)
        forward = count_forward(config, lora)
        return cls(settings, config, kept, lora, weighting, arguments, hardware, *data, forward, fixed, {})

    def choose_length(self, given: int | None) -> tuple[int, str]:
        """Tokens of a sequence, and the source of that number; a ValueError if it is unknown or too large."""
        length, source = (given, "length") if given else self.length
        if length is None:
            raise ValueError("length: neither data, extend.length nor the model says how long a sequence is: name it")
        check_length(self.config, length, "sequences")
        return length, source

    @property
    def num_gpus(self) -> int:
        return self.hardware.num_gpus

    @property
    def mode(self) -> str:
        """The mode of the recipe, one of `MODES`."""
        if isinstance(self.weighting, Uniform):
            return "uniform"
        return "self-scored" if self.settings.scorer in ("self", "base") and self.scored_columns else "precomputed"

    @property
    def contrast(self) -> str:
        """The source of the long losses in the weights."""
        if self.settings.contrast is not None or not self.weighting.uses_short:
            return self.settings.contrast or "trained"
        stored = self.settings.scorer == "stored"
        own = self.own_contrast if stored else count_scorer(self.settings.scorer) is not None
        return "scorer" if own else "trained"

    @property
    def scored_columns(self) -> frozenset[str]:
        """Columns computed by a scorer; empty if the weighting reads none of them."""
        return score_columns(self.weighting, self.contrast)

    @property
    def scored_before(self) -> bool:
        """Whether a model reads windows before training, which the precomputed mode counts."""
        return self.settings.scorer == "stored" and bool(self.scored_columns - {"ref_nll"}) and not self.counted

    @property
    def sequences_per_step(self) -> int:
        arguments = self.arguments
        return arguments.per_device_train_batch_size * arguments.gradient_accumulation_steps * self.num_gpus

    @property
    def num_steps(self) -> int | None:
        if self.arguments.max_steps > 0:
            return self.arguments.max_steps
        if self.num_sequences is None:
            return None
        steps = self.num_sequences / self.sequences_per_step
        steps = math.ceil(steps) if self.settings.curriculum is None else max(1, math.floor(steps))
        return math.ceil(steps * self.arguments.num_train_epochs)

    @property
    def checkpointing(self) -> dict[str, Any] | None:
        """Arguments of activation checkpointing, the Trainer's or FSDP's; None if activations are kept."""
        arguments = self.arguments
        if not recomputes(arguments):
            return None
        return dict(arguments.gradient_checkpointing_kwargs or {"use_reentrant": False})

    def context(self, length: int) -> ShortContext:
        return ShortContext.of(length, self.settings.size, self.settings.stride)

    def scored(self, length: int, *, first: bool) -> list[Window]:
        """The windows of a sequence, including the first if the long context does not yield its losses."""
        context = self.context(length)
        return [Window(0, 1, context.size)] * first + sliding_windows(length, context.size, context.stride)

    def step(self, mode: str, length: int) -> Step:
        """FLOPs of one optimizer step on all GPUs."""
        weighting = Uniform() if mode == "uniform" else self.weighting
        scored = self.scored(length, first=rope_depends_on_length(self.config)) if mode == "self-scored" else []
        checkpointing, num = self.checkpointing is not None, self.sequences_per_step
        num_rows = self.arguments.per_device_train_batch_size * length
        at_once = fit_at_once(num_rows, self.config.get_text_config().vocab_size)
        counted: dict[str, Any] = {"checkpointing": checkpointing, "at_once": at_once, "num_sequences": num}
        return step_flops(self.forward, length, weighting, scored, contrast=self.contrast, **counted)

    def flops_per_s(self, length: int) -> float | None:
        """FLOP/s of all GPUs; None if no speed is known."""
        return self.hardware.flops_per_s(self.step("uniform", length).total / (length * self.sequences_per_step))

    def scoring_flops(self, length: int) -> float:
        """FLOPs of scoring in advance, per step: each sequence of the data once, or as many as are trained on."""
        num: float = self.sequences_per_step
        if self.num_sequences is not None and self.num_steps is not None:
            num = self.num_sequences / self.num_steps
        return num * window_flops(self.forward, self.scored(length, first=True))

    def hold(self, length: int) -> Held:
        """Memory of a forward and backward pass on one GPU, counted once per length."""
        sharded, accumulating = bool(self.arguments.fsdp), self.arguments.gradient_accumulation_steps > 1
        dtype, autocast = getattr(torch, self.settings.dtype), autocast_dtype(self.arguments)
        asked = {
            # FSDP all-gathers weights in the compute dtype: autocast holds no copies of them.
            "lora": self.lora,
            "dtype": (autocast or dtype) if sharded else dtype,
            "autocast": None if sharded else autocast,
            "checkpointing": self.checkpointing,
            "batch": self.arguments.per_device_train_batch_size,
            "context": self.context(length),
            "new_gradients": not sharded and not accumulating,
        }
        key = (length, *map(str, asked.values()))
        if key not in self.held:
            self.held[key] = hold(self.config, length, **asked)
        return self.held[key]

    def peak(self, length: int, mode: str) -> Peak:
        return peak(self.fixed, self.hold(length), scoring=mode == "self-scored")

    def disk(self, length: int) -> Disk:
        """Disk space in the recipe's mode, for sequences of that length: those of the data, or of all steps."""
        num, dtype = self.num_sequences, getattr(torch, self.settings.dtype)
        if num is None and self.num_steps is not None:
            num = self.num_steps * self.sequences_per_step
        num_columns = len(self.scored_columns) if self.settings.scorer == "stored" else 0
        if self.settings.distill:  # ids and log-probabilities of a stored teacher
            noted = (read_provenance(folder).get("teacher", {}).get("top_k", TOP_K) for folder in self.folders)
            num_columns += 2 * max(noted, default=TOP_K)
        numbers: dict[str, Any] = {
            "num_tokens": None if num is None else num * length,
            "num_columns": num_columns,
            "num_steps": self.num_steps,
        }
        return disk_bytes(self.config, self.arguments, dtype, self.lora, **numbers)

    def costs(self, length: int, flops_per_s: float | None) -> list[Cost]:
        """Costs of the recipe on sequences of that length, by mode."""
        costs = []
        for mode in MODES:
            step, held = self.step(mode, length), self.peak(length, mode)
            cost = Cost(length, mode, step, held, fits=self.hardware.fits(held.total))
            if flops_per_s is not None:
                before = self.scoring_flops(length) if mode == "precomputed" and self.scored_before else 0.0
                cost = self.priced(cost, step.total / flops_per_s, before / flops_per_s)
            costs.append(cost)
        return costs

    def priced(self, cost: Cost, seconds: float, before: float) -> Cost:
        """Add time and price to a cost, from the seconds of a step and of scoring for it in advance."""
        gpu_hours, price = (seconds + before) * self.num_gpus / 3600, self.hardware.price
        cost = cost._replace(step_seconds=seconds)
        if price is not None:
            million = 1e6 / (self.sequences_per_step * cost.length)
            cost = cost._replace(dollars_per_million_tokens=gpu_hours * price * million)
        if self.num_steps is None:
            return cost
        total = self.num_steps * gpu_hours
        return cost._replace(
            hours=total / self.num_gpus, gpu_hours=total, dollars=None if price is None else total * price
        )

    def advise(self, length: int, needed: float) -> Advice:
        """Find the first change with which sequences of that length fit."""
        dtype, given = getattr(torch, self.settings.dtype), self.settings.trainer
        here, sharded = alternatives(given, self.arguments, dtype, self.num_gpus, bfloat16=self.hardware.has_bfloat16)
        # The last one needs least: if it does not fit, no other does.
        tried = here if here and self._peak_with(here[-1], length)[0] else []
        for change in (*tried, *sharded):
            fits, held = self._peak_with(change, length)
            if fits:
                return Advice(length, needed, change, held)
        return Advice(length, needed, None, None)

    def _peak_with(self, change: Alternative, length: int) -> tuple[bool, Peak]:
        settings = dataclasses.replace(self.settings, trainer={**self.settings.trainer, **change.trainer})
        arguments = _arguments(settings)
        hardware = dataclasses.replace(self.hardware, num_gpus=change.num_gpus)
        fixed = fixed_bytes(self.config, arguments, getattr(torch, settings.dtype), change.num_gpus, self.lora)
        changed = dataclasses.replace(self, settings=settings, arguments=arguments, hardware=hardware, fixed=fixed)
        held = changed.peak(length, self.mode)
        return bool(hardware.fits(held.total)), held

    def notes(self, longest: int, length: int, flops_per_s: float | None) -> list[str]:
        """Notes on what the numbers leave out for this recipe."""
        notes = []
        if self.kept:
            notes.append(f"{self.settings.model}: no config was found, and the shape of this model is known")
        if flops_per_s is not None and self.num_steps is not None and self.scored_before:
            hours = self.num_steps * self.scoring_flops(length) / flops_per_s / 3600
            notes.append(f"of the hours with precomputed scores, {hours:,.3g} are for scoring the data once")
        if flops_per_s is not None and self.num_steps is None:
            notes.append("no hours of the whole run: neither trainer.max_steps nor data says how many steps it has")
        computed = autocast_dtype(self.arguments) or getattr(torch, self.settings.dtype)
        if self.hardware.peak_flops is not None and self.hardware.tokens_per_s is None:
            if computed.itemsize > 2:
                notes.append(
                    "the peak is that of 16-bit products, and this recipe computes in float32: it takes several "
                    "times as long; set trainer.bf16"
                )
            elif computed == torch.bfloat16 and not self.hardware.has_bfloat16:
                notes.append(f"{self.hardware.name} has no bfloat16: set trainer.fp16 in place of trainer.bf16")
        if self.settings.curriculum is not None:
            notes.append(
                "all steps are counted as those of the longest sequences; attention to shorter ones costs less"
            )
        if self.scored_before:
            notes.append("precomputed scores are taken to be those of the trained model; a smaller scorer costs less")
        if any(layer.window is not None and layer.window < longest for layer in self.forward.attention):
            notes.append("sliding windows are counted as in a flash kernel; torch's own (sdpa) computes all pairs")
        if self.arguments.fsdp or self.num_gpus > 1:
            notes.append("memory of several GPUs is not measured, and communication is taken to cost nothing")
        return notes


def _epoch(shares: dict[str, float], *, pieces: bool) -> tuple[int | None, int]:
    """Tokens of the longest sequence, and sequences of an epoch: for a mixture, as many as have the tokens of all
    folders; for pieces, whose last token is only predicted, as many of the longest as have the tokens of all."""
    held = {folder: read_contents(folder) for folder in shares}
    total = sum(held.values(), Contents())
    if pieces and total.longest is not None and total.longest > 1:
        return total.longest - 1, (total.tokens - total.rows) // (total.longest - 1)
    num = sum(share * total.tokens * held[folder].rows / held[folder].tokens for folder, share in shares.items())
    return total.longest, round(num)


def _arguments(settings: TrainSettings) -> TrainingArguments:
    with tempfile.TemporaryDirectory() as folder:  # a new one, so that a recipe that has run can be planned again
        return training_arguments(settings.trainer, folder, held_out=settings.eval_data is not None)


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return dataclasses.asdict(value)
    if isinstance(value, tuple) and hasattr(value, "_asdict"):
        plain = {name: _plain(item) for name, item in value._asdict().items()}
        return plain | ({"total": value.total} if hasattr(value, "total") else {})
    return [_plain(item) for item in value] if isinstance(value, list) else value
