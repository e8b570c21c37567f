"""What a recipe will cost: FLOPs, memory and hours, from a config and arithmetic; no weights, no data, no GPU."""

import dataclasses
import math
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from transformers import PreTrainedConfig, TrainingArguments

from tokenweight.data import load_rows, row_lengths
from tokenweight.method import (
    ShortContext,
    Uniform,
    Weighting,
    Window,
    parse_weighting,
    sliding_windows,
)
from tokenweight.models import check_length, extend_context, load_config, rope_depends_on_length
from tokenweight.plan.flops import Forward, Step, count_forward, step_flops, window_flops
from tokenweight.plan.gpus import UNKNOWN, Fixed, Peak, Speed, fixed_bytes, peak
from tokenweight.plan.memory import hold
from tokenweight.train import TrainSettings, extension_arguments, training_arguments

MODES = ("uniform", "frozen", "self-scored")
"""Plain cross-entropy; the recipe's weighting with stored scores; and with the model that is trained as its scorer."""


class StepCost(NamedTuple):
    """What one optimizer step computes under a weighting, on all GPUs."""

    mode: str
    weighting: str
    flops: Step
    square: float
    """Its FLOPs if attention computed every pair of tokens, as `torch.utils.flop_counter` counts."""


class Cost(NamedTuple):
    """A run with rows of one length, in one mode."""

    length: int
    mode: str
    step_flops: float
    """Of one optimizer step on all GPUs."""
    attention: float
    """Its share that is attention."""
    peak: Peak
    """On one GPU."""
    hours: float | None
    """Of all steps; None if no speed is known."""
    scoring_hours: float | None
    """Once, before training, for frozen scores; as many rows as are trained on, or as the data has."""


@dataclasses.dataclass(frozen=True)
class Budget:
    """What `plan` found."""

    model: str
    weighting: str
    length: int
    context: ShortContext
    rows_per_step: int
    """On all GPUs."""
    num_steps: int | None
    """Optimizer steps, if the recipe or the data says."""
    speed: str
    """Where hours come from."""
    steps: list[StepCost]
    run: list[Cost]
    """At `length`, by mode."""
    growth: list[Cost]
    """At the other lengths."""
    notes: list[str]
    """What the numbers leave out, in this recipe."""

    def as_json(self) -> dict[str, Any]:
        """Plain lists and dicts; FLOPs and bytes as numbers."""
        return {field.name: _plain(getattr(self, field.name)) for field in dataclasses.fields(self)}


def plan(
    settings: TrainSettings,
    *,
    length: int | None = None,
    lengths: Sequence[int] = (),
    speed: Speed = UNKNOWN,
    num_gpus: int = 1,
    progress: Callable[..., None] = lambda done, total=None: None,
) -> Budget:
    """What training by a recipe costs, and how that grows with the length of rows.

    Args:
        settings: of the recipe; `model` may be a folder with nothing but config.json.
        length: tokens of a row; by default those of the data, else `extend.length`.
        lengths: further ones, for the growth.
        speed: gives hours.
        num_gpus: that train.
        progress: is told of each length that is done, and of how many.

    Raises:
        ValueError: for settings that `train` would refuse, and where something needed is not known.
    """
    if num_gpus < 1 or min([2 if length is None else length, *lengths]) < 2:
        found = f"--num_gpus {num_gpus}, --length {length}, --lengths {', '.join(map(str, lengths))}"
        raise ValueError(f"{found}: expected at least 1 GPU, and rows of at least 2 tokens")
    recipe = _Recipe.read(settings, num_gpus)
    length = length or recipe.length
    if length is None:
        raise ValueError("--length: neither data nor extend.length says how many tokens a row has: give --length")
    check_length(recipe.config, length, "rows")
    every = list(dict.fromkeys([length, *lengths]))
    recipe.context(min(every))
    flops_per_s = recipe.flops_per_s(speed, num_gpus, length)
    costs = {}
    for number in every:
        costs[number] = recipe.costs(number, flops_per_s)
        progress(1, len(every))
    return Budget(
        settings.model,
        str(recipe.weighting),
        length,
        recipe.context(length),
        recipe.rows_per_step,
        recipe.num_steps,
        str(speed),
        recipe.steps(length),
        costs[length],
        [cost for number in lengths for cost in costs[number]],
        recipe.notes(max(every)),
    )


@dataclasses.dataclass(frozen=True)
class _Recipe:
    """A recipe, read, and what its model computes."""

    settings: TrainSettings
    config: PreTrainedConfig
    weighting: Weighting
    arguments: TrainingArguments
    num_gpus: int
    length: int | None
    num_rows: int | None
    forward: Forward
    fixed: Fixed

    @classmethod
    def read(cls, settings: TrainSettings, num_gpus: int) -> "_Recipe":
        weighting = parse_weighting(settings.weighting)
        if settings.scorer not in ("stored", "self"):
            raise ValueError(f"scorer: {settings.scorer!r} cannot be planned: expected stored or self")
        dtype = getattr(torch, settings.dtype, None)
        if not isinstance(dtype, torch.dtype):
            raise ValueError(f"dtype {settings.dtype!r}: expected float32, bfloat16, float16 or float64")
        with tempfile.TemporaryDirectory() as folder:  # of its own, so that a recipe that has run can be planned again
            arguments = training_arguments(settings.trainer, folder)
        config, length, num_rows = load_config(settings.model), None, None
        if settings.extend:
            extension = extension_arguments(settings.extend)
            config, length = extend_context(config, **extension), extension["length"]
        if settings.data and Path(settings.data).exists():
            rows = load_rows(settings.data)
            length, num_rows = int(row_lengths(rows).max()), len(rows)
        compute = _autocast(arguments) or dtype
        fixed = fixed_bytes(config, arguments, dtype, compute, num_gpus)
        forward = count_forward(config)
        return cls(settings, config, weighting, arguments, num_gpus, length, num_rows, forward, fixed)

    @property
    def rows_per_step(self) -> int:
        arguments = self.arguments
        return arguments.per_device_train_batch_size * arguments.gradient_accumulation_steps * self.num_gpus

    @property
    def num_steps(self) -> int | None:
        if self.arguments.max_steps > 0:
            return self.arguments.max_steps
        if self.num_rows is None:
            return None
        return math.ceil(math.ceil(self.num_rows / self.rows_per_step) * self.arguments.num_train_epochs)

    @property
    def checkpointing(self) -> dict[str, Any] | None:
        """Arguments of the recomputation, be it the Trainer's or FSDP's; None if activations are kept."""
        arguments = self.arguments
        by_fsdp = arguments.fsdp and (arguments.fsdp_config or {}).get("activation_checkpointing")
        if not arguments.gradient_checkpointing and str(by_fsdp).lower() != "true":
            return None
        return dict(arguments.gradient_checkpointing_kwargs or {"use_reentrant": False})

    def context(self, length: int) -> ShortContext:
        size = length // 4 if self.settings.size is None else self.settings.size
        if size >= length:
            raise ValueError(f"size: {size} tokens, but rows hold {length}: no token would have a shorter context")
        return ShortContext(size, ShortContext(size).stride if self.settings.stride is None else self.settings.stride)

    def scored(self, length: int, *, first: bool) -> list[Window]:
        """The windows of a row; with the first one where nothing knows its losses."""
        context = self.context(length)
        return [Window(0, 1, context.size)] * first + sliding_windows(length, context.size, context.stride)

    def step(self, mode: str, weighting: Weighting, length: int, *, square: bool = False) -> Step:
        scored = self.scored(length, first=rope_depends_on_length(self.config)) if mode == "self-scored" else []
        again, num = self.checkpointing is not None, self.rows_per_step
        return step_flops(self.forward, length, weighting, scored, checkpointing=again, num_rows=num, square=square)

    def steps(self, length: int) -> list[StepCost]:
        """The recipe's weighting, and others beside it."""
        others = [parse_weighting(kind) for kind in ("dense", "longce", "sparse")]
        kinds = {_name(one): one for one in [*others, self.weighting] if one.uses_short}
        each = [("uniform", Uniform()), *((mode, one) for mode in MODES[1:] for one in kinds.values())]
        return [
            StepCost(mode, _name(one), self.step(mode, one, length), self.step(mode, one, length, square=True).total)
            for mode, one in each
        ]

    def flops_per_s(self, speed: Speed, num_gpus: int, length: int) -> float | None:
        """What all GPUs compute in a second; None if nobody asks for hours."""
        uniform = self.step("uniform", Uniform(), length).total
        found = speed.flops_per_s(num_gpus, uniform / (length * self.rows_per_step))
        if found is not None and self.num_steps is None:
            raise ValueError("trainer: max_steps is not set, and there is no data to count: hours need one of them")
        return found

    def costs(self, length: int, flops_per_s: float | None) -> list[Cost]:
        """A run of the recipe with rows of that length, by mode."""
        sharded, accumulating = bool(self.arguments.fsdp), self.arguments.gradient_accumulation_steps > 1
        dtype, autocast = getattr(torch, self.settings.dtype), _autocast(self.arguments)
        held = hold(
            self.config,
            length,
            # FSDP gathers weights in the dtype of the computation: no casts of them are held beside.
            dtype=(autocast or dtype) if sharded else dtype,
            autocast=None if sharded else autocast,
            checkpointing=self.checkpointing,
            batch=self.arguments.per_device_train_batch_size,
            context=self.context(length),
            new_gradients=not sharded and not accumulating,
        )
        costs = []
        for mode in MODES:
            step = self.step(mode, Uniform() if mode == "uniform" else self.weighting, length)
            hours, scoring_hours = None, None
            if flops_per_s is not None and self.num_steps is not None:
                hours = self.num_steps * step.total / flops_per_s / 3600
                per_row, _ = window_flops(self.forward, self.scored(length, first=True))
                num_rows = self.num_rows or self.num_steps * self.rows_per_step
                scoring_hours = num_rows * per_row / flops_per_s / 3600 if mode == "frozen" else None
            worst = peak(self.fixed, held, scoring=mode == "self-scored")
            costs.append(Cost(length, mode, step.total, step.attention / step.total, worst, hours, scoring_hours))
        return costs

    def notes(self, longest: int) -> list[str]:
        """What holds for this recipe and is not in the numbers."""
        notes = []
        if self.settings.scorer == "stored" and self.weighting.uses_short:
            notes.append("frozen scores are taken to be those of the trained model; a smaller scorer costs less")
        if any(layer.window is not None and layer.window < longest for layer in self.forward.attention):
            notes.append(
                "sliding windows are counted as a flash kernel has them; torch's own (sdpa) computes all pairs"
            )
        if self.arguments.fsdp or self.num_gpus > 1:
            notes.append(
                "memory and speed with several GPUs are arithmetic from documentation; communication costs nothing"
            )
        return notes


def _name(weighting: Weighting) -> str:
    """Of its kind, without settings."""
    return str(weighting).partition(":")[0]


def _autocast(arguments: TrainingArguments) -> torch.dtype | None:
    return torch.bfloat16 if arguments.bf16 else torch.float16 if arguments.fp16 else None


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return dataclasses.asdict(value)
    if isinstance(value, tuple) and hasattr(value, "_asdict"):
        plain = {name: _plain(item) for name, item in value._asdict().items()}
        return plain | ({"total": value.total} if hasattr(value, "total") else {})
    return [_plain(item) for item in value] if isinstance(value, list) else value
