"""Changes to a recipe that does not fit a GPU: settings that need less memory and train the same way."""

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import yaml
from transformers import TrainingArguments

from tokenweight.plan.gpus import Peak, autocast_dtype

MOST_GPUS = 64


class Alternative(NamedTuple):
    """Other settings for a recipe, which need less memory on each GPU."""

    names: tuple[str, ...]
    """The changes, in words."""
    trainer: dict[str, Any]
    """Fields of the trainer that change."""
    num_gpus: int

    @property
    def options(self) -> str:
        """The changes as options of the command line."""
        return " ".join(f"--trainer.{name} {_shown(value)}" for name, value in self.trainer.items())


class Advice(NamedTuple):
    """Advice for sequences of one length that do not fit."""

    length: int
    needed: float
    """Bytes on one GPU without changes."""
    change: Alternative | None
    """The first change that fits; None if none does."""
    peak: Peak | None
    """Memory of one GPU with it."""


def alternatives(
    given: dict[str, Any], arguments: TrainingArguments, dtype: torch.dtype, num_gpus: int, *, bfloat16: bool
) -> tuple[list[Alternative], Iterator[Alternative]]:
    """Changes for the same number of GPUs, the mildest first and all together last; then with FSDP over more and more.

    The number of sequences per step is kept if the number of GPUs divides it.

    Args:
        given: fields of the trainer in the recipe.
        arguments: all of them.
        dtype: of the weights.
        num_gpus: of the recipe.
        bfloat16: whether the GPU computes in bfloat16; otherwise float16 is suggested.
    """
    batch, accumulated = arguments.per_device_train_batch_size, arguments.gradient_accumulation_steps
    changes: list[tuple[str, dict[str, Any]]] = []
    if not recomputes(arguments):
        by_fsdp = {"fsdp_config": {**_own(given), "activation_checkpointing": True}}
        changes.append(("activation checkpointing", by_fsdp if arguments.fsdp else {"gradient_checkpointing": True}))
    if autocast_dtype(arguments) is None and dtype == torch.float32:
        changes.append(("bfloat16 products", {"bf16": True}) if bfloat16 else ("float16 products", {"fp16": True}))
    if batch > 1:
        one = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": batch * accumulated}
        changes.append(("one sequence at a time", one))
    first = [Alternative((name,), trainer, num_gpus) for name, trainer in changes]
    for count in range(2, len(changes) + 1):
        together = {field: value for _, trainer in changes[:count] for field, value in trainer.items()}
        first.append(Alternative(tuple(name for name, _ in changes[:count]), together, num_gpus))
    return first, _sharded(given, arguments, first[-1] if first else Alternative((), {}, num_gpus))


def recomputes(arguments: TrainingArguments) -> bool:
    """Whether activations are recomputed, by the Trainer's checkpointing or by FSDP's."""
    by_fsdp = arguments.fsdp and (arguments.fsdp_config or {}).get("activation_checkpointing")
    return bool(arguments.gradient_checkpointing) or str(by_fsdp).lower() == "true"


def _sharded(given: dict[str, Any], arguments: TrainingArguments, all_of_them: Alternative) -> Iterator[Alternative]:
    """FSDP over twice as many GPUs each time, on top of all other changes."""
    sequences = arguments.per_device_train_batch_size * arguments.gradient_accumulation_steps * all_of_them.num_gpus
    trainer = {**all_of_them.trainer, "per_device_train_batch_size": 1, "fsdp": True}
    config = {"version": 2, **_own(given), **trainer.get("fsdp_config", {})}
    if arguments.gradient_checkpointing or trainer.get(
        "gradient_checkpointing"
    ):  # FSDP's own all-gathers weights once less
        trainer["gradient_checkpointing"] = False
        config["activation_checkpointing"] = True
    num_gpus = max(2, all_of_them.num_gpus)
    while num_gpus <= MOST_GPUS:
        if not (arguments.fsdp and num_gpus == all_of_them.num_gpus):
            fields = {**trainer, "gradient_accumulation_steps": max(1, sequences // num_gpus)}
            new = {name: value for name, value in fields.items() if getattr(arguments, name) != value}
            if arguments.fsdp:
                new.pop("fsdp", None)  # already true there, in whatever form
            if config != _own(given):
                new["fsdp_config"] = config
            yield Alternative((*all_of_them.names, f"FSDP over {num_gpus} GPUs"), new, num_gpus)
        num_gpus *= 2


def _own(given: dict[str, Any]) -> dict[str, Any]:
    """The recipe's own `fsdp_config`."""
    found = given.get("fsdp_config") or {}
    found = yaml.safe_load(found) if isinstance(found, str) else found
    return dict(found) if isinstance(found, dict) else {}


def _shown(value: Any) -> str:
    text = yaml.safe_dump(value, default_flow_style=True, width=1000, sort_keys=False).replace("\n...", "").strip()
    return f"'{text}'" if isinstance(value, dict) else text
