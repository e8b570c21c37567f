"""Disk space of a run: sequences, their scores, checkpoints and the trained model."""

import math
from typing import Any, NamedTuple

import torch
from transformers import PreTrainedConfig, TrainingArguments

from tokenweight.plan.flops import blank_model
from tokenweight.plan.gpus import optimizer_bytes

_VALUE = 4
"""Bytes of a token id, and of a score."""


class Disk(NamedTuple):
    """Bytes on disk; None where the number of tokens or checkpoints is not known."""

    sequences: float | None
    """Output of `prepare`: token ids."""
    scored: float | None
    """Output of `score`: token ids again, and scores; 0 if none are stored."""
    checkpoint: float
    """One checkpoint: the trained parameters, and optimizer states."""
    num_checkpoints: int | None
    """Largest number of checkpoints, while the next one is written."""
    model: float
    """The trained model, or adapter."""

    @property
    def total(self) -> float | None:
        """Their sum."""
        if self.sequences is None or self.scored is None or self.num_checkpoints is None:
            return None
        return self.sequences + self.scored + self.num_checkpoints * self.checkpoint + self.model


def disk_bytes(
    config: PreTrainedConfig,
    arguments: TrainingArguments,
    dtype: torch.dtype,
    lora: dict[str, Any] | None,
    *,
    num_tokens: int | None,
    num_columns: int,
    num_steps: int | None,
) -> Disk:
    """Disk space of what `prepare`, `score` and a `transformers.Trainer` with these arguments write.

    Args:
        dtype: of the weights.
        lora: arguments of peft.LoraConfig, if an adapter is trained in place of the weights.
        num_tokens: of the data.
        num_columns: of scores that are stored.
        num_steps: optimizer steps of the run.
    """
    with blank_model(config, dtype, lora) as model:
        trained = [one for one in model.parameters() if one.requires_grad]
        weights = float(sum(one.nbytes for one in (trained if lora else model.parameters())))
        tensors = [(tuple(one.shape), one.dtype) for one in trained]
    states = 0.0 if arguments.save_only_model else optimizer_bytes(tensors, arguments)
    sequences = None if num_tokens is None else float(_VALUE * num_tokens)
    scored = 0.0 if not num_columns else None if sequences is None else sequences * (1 + num_columns)
    return Disk(sequences, scored, weights + states, _num_checkpoints(arguments, num_steps), weights)


def _num_checkpoints(arguments: TrainingArguments, num_steps: int | None) -> int | None:
    """Largest number of checkpoints at a time: one more than `save_total_limit`, since the oldest is removed last, and
    the best."""
    strategy = getattr(arguments.save_strategy, "value", arguments.save_strategy)
    made: int | None = None
    if strategy == "no":
        return 0
    if strategy == "epoch":
        made = None if arguments.max_steps > 0 else math.ceil(arguments.num_train_epochs)
    elif strategy == "steps" and num_steps is not None:
        every = arguments.save_steps if arguments.save_steps >= 1 else math.ceil(num_steps * arguments.save_steps)
        made = math.ceil(num_steps / every)
    limit, best = arguments.save_total_limit, arguments.metric_for_best_model is not None
    kept = None if limit is None or limit < 1 else limit + 1 + best
    known = [number for number in (made, kept) if number is not None]
    return min(known, default=None)
