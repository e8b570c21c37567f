"""Train tiny models in one process; or, where torchrun starts this file, by DDP and FSDP2 in several."""

import json
import os
import sys
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

import torch
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedType
from distributed import WEIGHTINGS, some_rows, with_scores
from torch import Tensor
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from transformers import Trainer, TrainerCallback

import models
from tokenweight import Scorer, ShortContext, with_weighted_loss
from tokenweight.cli import main
from tokenweight.models import Distillation, Teacher
from tokenweight.train import DataCollatorWithScores, prepare_engine, training_arguments

CHECKPOINTING = {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": False}}
CASES: dict[str, dict[str, Any]] = {
    "dense": {"weighting": "dense", "scorer": "stored"},
    "sparse, tied, in parts": {
        "weighting": "sparse",
        "scorer": "stored",
        "kind": "gpt2",
        "gradient_accumulation_steps": 2,
    },
    "longce, checkpointing": {"weighting": "longce", "scorer": "stored", **CHECKPOINTING},
    "dense, self, tied, checkpointing": {"weighting": "dense", "scorer": "self", "kind": "llama-tied", **CHECKPOINTING},
    "sparse, self, in parts": {"weighting": "sparse", "scorer": "self", "gradient_accumulation_steps": 2},
    "longce, self": {"weighting": "longce", "scorer": "self", "kind": "gpt2"},
    "columns": {"weighting": "columns", "scorer": "stored"},
    "uniform": {"weighting": "uniform", "scorer": "stored"},
    "a 64th": {"weighting": "a 64th", "scorer": "stored"},
    "history": {"weighting": "history", "scorer": "stored"},
    "sparse, of the scorer": {"weighting": "sparse", "scorer": "stored", "contrast": "scorer"},
    "dense, taught": {"weighting": "dense", "scorer": "stored", "taught": True},
}
ENGINES: dict[str, dict[str, Any]] = {
    "alone": {},
    "ddp": {},
    "ddp, unused": {"ddp_find_unused_parameters": True},
    "fsdp2": {"fsdp": True},
    "fsdp2, kept whole": {"fsdp": True, "fsdp_config": {"reshard_after_forward": False}},
    "fsdp2, checkpointing": {"fsdp": True, "fsdp_config": {"activation_checkpointing": True}},
    "fsdp2, from rank 0": {"fsdp": True, "fsdp_config": {"cpu_ram_efficient_loading": True}},
}
PLANS = {
    "ddp": list(CASES),
    "ddp, unused": ["dense, self, tied, checkpointing"],
    "fsdp2": list(CASES),
    "fsdp2, kept whole": ["dense, self, tied, checkpointing"],
    "fsdp2, checkpointing": ["longce, self"],
    "fsdp2, from rank 0": ["dense, self, tied, checkpointing"],
}
HSDP = {"ACCELERATE_USE_PARALLELISM_CONFIG": "true"}
HSDP |= {"PARALLELISM_CONFIG_DP_REPLICATE_SIZE": "2", "PARALLELISM_CONFIG_DP_SHARD_SIZE": "2"}
"""What `accelerate launch` sets for four processes that hold two copies of a model, each in two shards."""
ORIGINAL = PartialState.__init__


class Run(NamedTuple):
    """What a run did: by step its losses, norms and gradients; by step and row the weights of tokens; the result."""

    losses: list[float]
    norms: list[float]
    gradients: list[dict[str, Tensor]]
    weights: dict[tuple[int, tuple[int, ...]], Tensor]
    short_nll: dict[tuple[int, tuple[int, ...]], Tensor]
    trained: dict[str, Tensor]
    sharded: bool


class Watch(TrainerCallback):
    """Keeps the gradients of every step, and the weights of the tokens of every row."""

    def __init__(self, model) -> None:
        self.gradients, self.weights, self.short_nll, self.sharded = [], {}, {}, False
        model.register_forward_hook(self.see, with_kwargs=True)

    def see(self, model, arguments, inputs, output) -> None:
        for row, labels in enumerate(inputs["labels"]):
            length = int((labels != -100).nonzero().max()) + 1
            key = len(self.gradients), tuple(inputs["input_ids"][row, :length].tolist())
            self.weights[key] = output.weights[row, :length].clone()
            self.short_nll[key] = output.short_nll[row, :length].clone()

    def on_pre_optimizer_step(self, args, state, control, model, **kwargs) -> None:
        self.sharded = isinstance(model, FSDPModule)
        found = {name: parameter.grad for name, parameter in model.named_parameters()}
        assert all(isinstance(gradient, DTensor) == self.sharded for gradient in found.values())
        self.gradients.append({plain(name): whole(gradient) for name, gradient in found.items()})


def plain(name: str) -> str:
    return name.replace("_checkpoint_wrapped_module.", "").removeprefix("module.")


def whole(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor.clone()


def fit(
    engine: str,
    weighting: str,
    scorer: str,
    kind: str = "llama",
    dtype: torch.dtype = torch.float64,
    contrast: str = "trained",
    taught: bool = False,
    **given: Any,
) -> Run:
    """Three steps of AdamW on rows of different lengths, two rows together in all processes."""
    choose_engine(engine)
    model = models.tiny(kind, dtype=dtype)
    # Two windows at a time, so that a process with longer rows has more passes to run.
    scoring = Scorer(model, ShortContext(8, 5), max_tokens=16) if scorer == "self" else None
    teaching = Distillation(0.5, Teacher(models.tiny(kind, seed=3, dtype=dtype), top_k=5)) if taught else None
    model = with_weighted_loss(model, WEIGHTINGS[weighting], scoring, contrast=contrast, distillation=teaching)
    watch = Watch(model)
    settings = {"max_steps": 3, "learning_rate": 1e-2, "lr_scheduler_type": "constant", "save_strategy": "no"}
    batch = max(1, 2 // int(os.environ.get("WORLD_SIZE", "1")))
    with tempfile.TemporaryDirectory() as out:
        given = {**settings, "disable_tqdm": True, "per_device_train_batch_size": batch, **ENGINES[engine], **given}
        trainer = Trainer(
            model=model,
            args=training_arguments(given, out),
            train_dataset=with_scores(some_rows()) if scorer == "stored" else some_rows(scored=False),
            data_collator=DataCollatorWithScores(),
            callbacks=[watch],
        )
        prepare_engine(trainer)
        trainer.train()
    trained = {plain(name): value for name, value in (trainer.accelerator.get_state_dict(trainer.model) or {}).items()}
    lines = [line for line in trainer.state.log_history if "loss" in line]
    losses, norms = ([line[name] for line in lines] for name in ("loss", "grad_norm"))
    seen = gathered(watch.weights), gathered(watch.short_nll)
    return Run(losses, norms, watch.gradients, *seen, trained, watch.sharded)


def gathered(here: dict) -> dict:
    if not torch.distributed.is_initialized():
        return here
    everywhere: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(everywhere, here)
    return {key: value for part in everywhere for key, value in part.items()}


def choose_engine(name: str) -> None:
    """Forget the engine of the run before. Accelerate leaves FSDP out on CPUs, so it is told that this is another
    device; after that nothing of it asks what device it is."""
    AcceleratorState._reset_state(True)
    os.environ.pop("ACCELERATE_USE_FSDP", None)

    def initialize(self, *args, **kwargs) -> None:
        ORIGINAL(self, *args, **kwargs)
        if name.startswith("fsdp2") and self.distributed_type == DistributedType.MULTI_CPU:
            self._shared_state["distributed_type"] = DistributedType.MULTI_GPU

    PartialState.__init__ = initialize


def command(engine: str, words: list[str]) -> None:
    choose_engine(engine)
    status = main(words)
    if status:
        sys.exit(status)


if __name__ == "__main__":
    found, commands = Path(sys.argv[1]), json.loads(sys.argv[2])
    results: dict[Any, Run]
    if os.environ["WORLD_SIZE"] == "4":
        results = {case: fit("fsdp2", **CASES[case]) for case in ("dense", "sparse, self, in parts")}
    else:
        results = {(engine, case): fit(engine, **CASES[case]) for engine in PLANS for case in PLANS[engine]}
        half = {"weighting": "longce", "scorer": "stored", "dtype": torch.float32, "bf16": True}
        results["fsdp2", "bf16"] = fit("fsdp2", **half)
    for engine, words in commands:
        command(engine, words)
    if torch.distributed.get_rank() == 0:
        plain_results = {key: run._asdict() for key, run in results.items()}  # a `__main__.Run` could not be read
        torch.save((torch.distributed.get_world_size(), plain_results), found)
    torch.distributed.destroy_process_group()
