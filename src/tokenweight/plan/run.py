"""What a recipe will cost: FLOPs, memory and hours, estimated from a config; no weights, no data, no GPU."""

import dataclasses
import math
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from transformers import PreTrainedConfig, TrainingArguments

from tokenweight.data import Contents, read_contents
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
from tokenweight.plan.gpus import UNKNOWN, Fixed, Peak, Speed, autocast_dtype, fixed_bytes, peak
from tokenweight.plan.memory import hold
from tokenweight.train import TrainSettings, extension_arguments, shares_of, training_arguments

MODES = ("uniform", "precomputed", "self-scored")
"""Plain cross-entropy; the recipe's weighting with stored scores; and with the model that is trained as its scorer."""


class Cost(NamedTuple):
    """A run on sequences of one length, in one mode."""

    length: int
    mode: str
    flops: Step
    """FLOPs of one optimizer step on all GPUs."""
    peak: Peak
    """Memory of one GPU."""
    hours: float | None
    """All steps and, with precomputed scores, scoring the data once; None if no speed is known."""


@dataclasses.dataclass(frozen=True)
class Budget:
    """What `plan` found."""

    model: str
    weighting: str
    length: int
    context: ShortContext
    sequences_per_step: int
    """On all GPUs."""
    num_steps: int | None
    """Optimizer steps, if the recipe or the data says."""
    speed: str
    """What hours are computed from."""
    run: list[Cost]
    """At `length`, by mode."""
    growth: list[Cost]
    """At the other lengths."""
    notes: list[str]
    """What the numbers leave out, in this recipe."""

    def as_json(self) -> dict[str, Any]:
        """Plain lists and dicts; FLOPs and bytes as numbers, with their totals."""
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
    """What training by a recipe costs, and how that grows with the length of its sequences.

    Args:
        settings: the recipe; its `model` may be a folder with nothing but config.json.
        length: tokens of a sequence; by default those of the data, else `extend.length`.
        lengths: further lengths, for the growth.
        speed: how fast the GPUs are; gives hours.
        num_gpus: number of GPUs that train.
        progress: called for each length that is done, with the number of all.

    Raises:
        ValueError: for settings that `train` would refuse, and where something needed is not known.
    """
    for name, number, least in [("num_gpus", num_gpus, 1), *(("length", n, 2) for n in (length, *lengths))]:
        if number is not None and number < least:
            raise ValueError(f"{name} {number}: expected at least {least}")
    recipe = _Recipe.read(settings, num_gpus)
    length = length or recipe.length
    if length is None:
        raise ValueError("length: neither data nor extend.length says how many tokens a sequence has: name it")
    check_length(recipe.config, length, "sequences")
    every, costs = {length, *lengths}, {}
    recipe.context(min(every))
    flops_per_s = recipe.flops_per_s(speed, length)
    for number in every:
        costs[number] = recipe.costs(number, flops_per_s)
        progress(1, len(every))
    return Budget(
        model=settings.model,
        weighting=str(recipe.weighting),
        length=length,
        context=recipe.context(length),
        sequences_per_step=recipe.sequences_per_step,
        num_steps=recipe.num_steps,
        speed=str(speed),
        run=costs[length],
        growth=[cost for number in lengths for cost in costs[number]],
        notes=recipe.notes(max(every), recipe.scoring_hours(length, flops_per_s)),
    )


@dataclasses.dataclass(frozen=True)
class _Recipe:
    """A recipe, and what its model computes."""

    settings: TrainSettings
    config: PreTrainedConfig
    weighting: Weighting
    arguments: TrainingArguments
    num_gpus: int
    length: int | None
    num_sequences: int | None
    forward: Forward
    fixed: Fixed

    @classmethod
    def read(cls, settings: TrainSettings, num_gpus: int) -> "_Recipe":
        weighting = parse_weighting(settings.weighting)
        if settings.scorer not in ("stored", "self"):
            raise ValueError(f"scorer {settings.scorer!r}: expected stored or self, as only these can be planned")
        if settings.lora:
            raise ValueError("lora: the cost of an adapter cannot be planned: leave it out to plan that of all weights")
        dtype = getattr(torch, settings.dtype, None)
        if not isinstance(dtype, torch.dtype):
            raise ValueError(f"dtype {settings.dtype!r}: expected float32, bfloat16, float16 or float64")
        with tempfile.TemporaryDirectory() as folder:  # of its own, so that a recipe that has run can be planned again
            arguments = training_arguments(settings.trainer, folder, held_out=settings.eval_data is not None)
        config, length, num_sequences = load_config(settings.model, revision=settings.revision), None, None
        if settings.extend:
            extension = extension_arguments(settings.extend)
            config, length = extend_context(config, **extension), extension["length"]
        folders = shares_of(settings)
        if all(folder and Path(folder).exists() for folder in folders):
            contents = sum(map(read_contents, folders), Contents())
            length, num_sequences = contents.longest, contents.rows
        fixed = fixed_bytes(config, arguments, dtype, num_gpus)
        forward = count_forward(config)
        return cls(settings, config, weighting, arguments, num_gpus, length, num_sequences, forward, fixed)

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
        return math.ceil(math.ceil(self.num_sequences / self.sequences_per_step) * self.arguments.num_train_epochs)

    @property
    def checkpointing(self) -> dict[str, Any] | None:
        """Arguments of activation checkpointing, the Trainer's or FSDP's; None if activations are kept."""
        arguments = self.arguments
        by_fsdp = arguments.fsdp and (arguments.fsdp_config or {}).get("activation_checkpointing")
        if not arguments.gradient_checkpointing and str(by_fsdp).lower() != "true":
            return None
        return dict(arguments.gradient_checkpointing_kwargs or {"use_reentrant": False})

    def context(self, length: int) -> ShortContext:
        return ShortContext.of(length, self.settings.size, self.settings.stride)

    def scored(self, length: int, *, first: bool) -> list[Window]:
        """The windows of a sequence; with the first one where its losses are not known from the long context."""
        context = self.context(length)
        return [Window(0, 1, context.size)] * first + sliding_windows(length, context.size, context.stride)

    def step(self, mode: str, length: int) -> Step:
        """FLOPs of one optimizer step on all GPUs."""
        weighting = Uniform() if mode == "uniform" else self.weighting
        scored = self.scored(length, first=rope_depends_on_length(self.config)) if mode == "self-scored" else []
        checkpointing, num = self.checkpointing is not None, self.sequences_per_step
        return step_flops(self.forward, length, weighting, scored, checkpointing=checkpointing, num_sequences=num)

    def flops_per_s(self, speed: Speed, length: int) -> float | None:
        """What all GPUs compute in a second; None if hours are not asked for."""
        per_token = self.step("uniform", length).total / (length * self.sequences_per_step)
        found = speed.flops_per_s(self.num_gpus, per_token)
        if found is not None and self.num_steps is None:
            raise ValueError("trainer: max_steps is not set, and there is no data to count: hours need one of them")
        return found

    def scoring_hours(self, length: int, flops_per_s: float | None) -> float:
        """Scoring each sequence of the data once, or as many as are trained on; 0 if no hours are asked for."""
        if flops_per_s is None or self.num_steps is None:
            return 0.0
        num = self.num_sequences or self.num_steps * self.sequences_per_step
        return num * window_flops(self.forward, self.scored(length, first=True)) / flops_per_s / 3600

    def costs(self, length: int, flops_per_s: float | None) -> list[Cost]:
        """A run of the recipe on sequences of that length, by mode."""
        sharded, accumulating = bool(self.arguments.fsdp), self.arguments.gradient_accumulation_steps > 1
        dtype, autocast = getattr(torch, self.settings.dtype), autocast_dtype(self.arguments)
        held = hold(
            self.config,
            length,
            # FSDP gathers weights in the dtype of the computation: autocast holds no copies of them.
            dtype=(autocast or dtype) if sharded else dtype,
            autocast=None if sharded else autocast,
            checkpointing=self.checkpointing,
            batch=self.arguments.per_device_train_batch_size,
            context=self.context(length),
            new_gradients=not sharded and not accumulating,
        )
        costs = []
        for mode in MODES:
            step, hours = self.step(mode, length), None
            if flops_per_s is not None and self.num_steps is not None:
                hours = self.num_steps * step.total / flops_per_s / 3600
                hours += self.scoring_hours(length, flops_per_s) if mode == "precomputed" else 0
            costs.append(Cost(length, mode, step, peak(self.fixed, held, scoring=mode == "self-scored"), hours))
        return costs

    def notes(self, longest: int, scoring_hours: float) -> list[str]:
        """What holds for this recipe and is not in the numbers."""
        notes = []
        if scoring_hours:
            notes.append(f"of the hours with precomputed scores, {scoring_hours:,.3g} are for scoring the data once")
        if self.settings.scorer == "stored" and self.weighting.uses_short:
            notes.append("precomputed scores are taken to be those of the trained model; a smaller scorer costs less")
        if any(layer.window is not None and layer.window < longest for layer in self.forward.attention):
            notes.append("sliding windows are counted as in a flash kernel; torch's own (sdpa) computes all pairs")
        if self.arguments.fsdp or self.num_gpus > 1:
            notes.append("memory of several GPUs is not measured, and communication is taken to cost nothing")
        return notes


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return dataclasses.asdict(value)
    if isinstance(value, tuple) and hasattr(value, "_asdict"):
        plain = {name: _plain(item) for name, item in value._asdict().items()}
        return plain | ({"total": value.total} if hasattr(value, "total") else {})
    return [_plain(item) for item in value] if isinstance(value, list) else value
