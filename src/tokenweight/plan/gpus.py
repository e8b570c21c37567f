"""Memory per GPU: weights, gradients, optimizer states, and the peak of a step."""

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, Trainer, TrainingArguments

from tokenweight.plan.flops import blank_model
from tokenweight.plan.memory import Held


class Peak(NamedTuple):
    """Bytes on one GPU in the phase of a step with the highest memory."""

    phase: str
    """forward, scoring, loss, backward, reduction or update."""
    weights: float
    gradients: float
    optimizer: float
    activations: float
    """Activations of the decoder and their gradients."""
    loss: float
    scoring: float

    @property
    def total(self) -> float:
        """Their sum."""
        return float(sum(self[1:]))


class Fixed(NamedTuple):
    """Bytes on one GPU that do not depend on the data."""

    weights: float
    optimizer: float
    before: float
    """Gradients that exist throughout a step."""
    after: float
    """Gradients during the update of the weights."""
    passing: float = 0.0
    """In addition to the activations of a backward pass: gradients being reduced to the shards, and the buffer of the
    reduction."""
    last: float = 0.0
    """Like `passing`, at the end, without activations, when parameters outside of blocks are reduced."""


def peak(fixed: Fixed, held: Held, *, scoring: bool) -> Peak:
    """The phase of a step with the highest memory.

    Args:
        scoring: whether the model scores itself.
    """
    weights, optimizer, before, after, passing, last = fixed
    gradients = before + held.gradients + passing
    phases = [
        Peak("forward", weights, before, optimizer, held.forward, 0, 0),
        Peak("loss", weights, before, optimizer, held.kept, held.loss, 0),
        Peak("backward", weights, gradients, optimizer, held.backward - held.gradients, 0, 0),
        Peak("reduction", weights, before + last, optimizer, 0, 0, 0),
        Peak("update", weights, after, optimizer, 0, 0, 0),
    ]
    if scoring:
        phases.append(Peak("scoring", weights, before, optimizer, 0, 0, held.scoring))
    return max(phases, key=lambda phase: phase.total)


def fixed_bytes(
    config: PreTrainedConfig,
    arguments: TrainingArguments,
    dtype: torch.dtype,
    num_gpus: int,
    lora: dict[str, Any] | None = None,
) -> Fixed:
    """Weights, optimizer states and gradients on each GPU under a `transformers.Trainer` with these arguments.

    - One GPU: everything; gradients only from the backward pass on, unless they are accumulated.
    - Several: the same, and the buckets in which DistributedDataParallel sums gradients, as large as these (torch
      documents that as the memory that `gradient_as_bucket_view=True` would save; the Trainer does not set it).
    - FSDP2: a shard of each, and two unsharded parts. All-gathered parameters, in the compute dtype: embeddings, head
      and everything else outside of blocks, and two blocks (one computes, the next is prefetched), or all if
      `reshard_after_forward` is false. And accumulated gradients, which are kept until the last micro-step in the
      dtype of their reduction: float32 under autocast (`train.prepare_engine`), 4 bytes per parameter.
      Without accumulation, gradients exist unsharded in the compute dtype: those of one block, those of head and norm
      throughout the backward pass, and finally those of the embeddings. Each unit of reduction, a block or everything
      outside of blocks, exists once more in the dtype of the reduction.

    Gradients, their buckets and optimizer states are those of trained parameters only, such as an adapter's.

    Args:
        dtype: of the weights.
        lora: arguments of peft.LoraConfig, if an adapter is trained in place of the weights.

    Raises:
        ValueError: for CPU offload, DeepSpeed, or an optimizer whose states cannot be counted.
    """
    if arguments.deepspeed is not None:
        raise ValueError("trainer: deepspeed cannot be planned: expected fsdp, or neither")
    accumulating, autocast = arguments.gradient_accumulation_steps > 1, autocast_dtype(arguments)
    with blank_model(config, dtype, lora) as model:
        kinds = set(getattr(model, "_no_split_modules", None) or ())
        blocks = [module for module in model.modules() if type(module).__name__ in kinds]
        embedding, head = (module.weight for module in (model.get_input_embeddings(), model.get_output_embeddings()))
        whole, trained = _Parameters.of(model, blocks), _Parameters.of(model, blocks, trained=True)
        untied = embedding.numel() if embedding is not head and embedding.requires_grad else 0
        tensors = [(tuple(one.shape), one.dtype) for one in model.parameters() if one.requires_grad]
    states = optimizer_bytes(tensors, arguments)
    if not arguments.fsdp:
        buckets = trained.bytes if num_gpus > 1 else 0.0
        return Fixed(whole.bytes, states, buckets + (trained.bytes if accumulating else 0.0), buckets + trained.bytes)
    dtypes = autocast or dtype, torch.float32 if autocast else dtype
    return _sharded(whole, trained, states, untied, arguments, dtypes, num_gpus)


def _sharded(
    whole: "_Parameters",
    trained: "_Parameters",
    states: float,
    untied: int,
    arguments: TrainingArguments,
    dtypes: tuple[torch.dtype, torch.dtype],
    num_gpus: int,
) -> Fixed:
    """`fixed_bytes` with FSDP2.

    Args:
        states: bytes of the optimizer.
        untied: trained parameters of embeddings that are not the head.
        dtypes: of computation, and of gradient reduction.
    """
    settings: Any = arguments.fsdp_config
    if settings.get("cpu_offload"):
        raise ValueError("trainer: fsdp with offload cannot be planned: expected weights that stay on the GPUs")
    resharded = settings.get("reshard_after_forward", True) in (True, "full_shard")
    computed, reduced = (dtype.itemsize for dtype in dtypes)
    gathered = whole.rest + 2 * whole.block if resharded else whole.all
    waiting, made = (trained.all * reduced, 0) if arguments.gradient_accumulation_steps > 1 else (0, computed)
    own = trained.bytes / num_gpus
    passing = trained.block * (made + reduced) + (trained.rest - untied) * made
    last = trained.rest * (made + reduced)
    weights = whole.bytes / num_gpus + gathered * computed
    return Fixed(weights, states / num_gpus, own + waiting, own + waiting, float(passing), float(last))


class _Parameters(NamedTuple):
    """Numbers of parameters: all, in the largest block, outside of blocks; and the bytes of all."""

    all: int
    block: int
    rest: int
    bytes: float

    @classmethod
    def of(cls, model: nn.Module, blocks: list[nn.Module], *, trained: bool = False) -> "_Parameters":
        def those(module: nn.Module) -> list[Tensor]:
            return [parameter for parameter in module.parameters() if parameter.requires_grad or not trained]

        sizes = [sum(parameter.numel() for parameter in those(block)) for block in blocks]
        num = sum(parameter.numel() for parameter in those(model))
        return cls(num, max(sizes, default=0), num - sum(sizes), float(sum(one.nbytes for one in those(model))))


def autocast_dtype(arguments: TrainingArguments) -> torch.dtype | None:
    """The compute dtype of the decoder, if it is not that of the weights."""
    return torch.bfloat16 if arguments.bf16 else torch.float16 if arguments.fp16 else None


def optimizer_bytes(tensors: list[tuple[tuple[int, ...], torch.dtype]], arguments: TrainingArguments) -> float:
    """Bytes of the states of an optimizer, counted after one update on the meta device.

    Args:
        tensors: shape and dtype of each trained parameter.

    Raises:
        ValueError: for an optimizer that cannot make such an update.
    """
    kind_name = getattr(arguments.optim, "value", arguments.optim)
    try:
        kind, settings = Trainer.get_optimizer_cls_and_kwargs(arguments)
        settings.pop("fused", None)  # has the same states, but no kernel on the meta device
        parameters = [nn.Parameter(torch.empty(shape, dtype=dtype, device="meta")) for shape, dtype in tensors]
        for parameter in parameters:
            parameter.grad = torch.empty_like(parameter)
        optimizer = kind(parameters, **settings)
        optimizer.step()
    except (RuntimeError, NotImplementedError, ValueError, TypeError, ImportError) as error:
        reason = " ".join(str(error).split())[:200]
        raise ValueError(f"trainer: the states of optim {kind_name} cannot be counted: {reason}") from error
    states = [value for state in optimizer.state.values() for value in state.values()]
    return float(sum(value.nbytes for value in states if isinstance(value, torch.Tensor) and value.is_meta))
