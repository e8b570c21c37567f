"""Context parallelism: sequences split over ranks, gathered where weights need whole sequences."""

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from jaxtyping import Int, Shaped
from torch import Tensor
from torch.distributed import all_gather, all_reduce
from torch.distributed.device_mesh import DeviceMesh
from torch.nn import functional

from tokenweight.method import aligned_with_states, aligned_with_tokens

Item = TypeVar("Item")


@dataclass(frozen=True)
class SequenceShard:
    """The tokens of whole sequences that this rank holds. Made by `sequence_shard`; all ranks call every method alike.

    A rank has the hidden states of its tokens, so a shard is aligned with *states*: column j of a shard belongs to the
    token that state j predicts, wherever that token lies. Whole sequences are aligned with tokens, as everywhere. A
    sequence of 8 tokens over 2 ranks, in torch's order, which balances the work of causal attention:

        rank 0 holds tokens      0  1  6  7        of these, own(values) has the columns     1  2  7  -
        rank 1 holds tokens      2  3  4  5                                                  3  4  5  6

    Nothing predicts token 0, and what state 7 predicts is not in the sequence. So with

        shard.own(weighting(shard.whole(long), shard.whole(short), shard.whole(mask)))

    every rank computes the same weights from the same whole sequences as one process would, and keeps its own.
    """

    mesh: DeviceMesh
    order: Int[Tensor, "batch seq"]
    """The place of each token of a sequence among those of all ranks, one rank after the other."""
    columns: Int[Tensor, "batch share"]
    """The tokens of the sequences that this rank holds."""
    positions: Int[Tensor, "batch seq"]
    """Positions of whole sequences, in their order."""

    def in_order(self, values: Shaped[Tensor, "batch share"]) -> Shaped[Tensor, "batch seq"]:
        """The values of all ranks in the order of the sequence, not shifted: tokens to tokens, or states to states."""
        return _gather(values, self.mesh).gather(1, self.order)

    def whole(self, of_states: Shaped[Tensor, "batch share"]) -> Shaped[Tensor, "batch seq"]:
        """Gather the ranks' values at their states into whole sequences, aligned with tokens; column 0 is 0."""
        return aligned_with_tokens(self.in_order(of_states))

    def own(self, of_tokens: Shaped[Tensor, "batch seq"], fill: int = 0) -> Shaped[Tensor, "batch share"]:
        """This rank's part of whole sequences; `fill` for the last state, which predicts no token of the sequence."""
        return aligned_with_states(of_tokens, fill).gather(1, self.columns)

    def labels(self, shift_labels: Int[Tensor, "batch share"] | None) -> Int[Tensor, "batch seq"]:
        """The labels of whole sequences, from those that this rank's states predict.

        Raises:
            ValueError: without such labels, or if the last state is to predict a token that is not in the sequence.
        """
        if shift_labels is None or shift_labels.shape != self.columns.shape:
            found = None if shift_labels is None else list(shift_labels.shape)
            raise ValueError(f"shift_labels is {found}: expected the shape of this rank's tokens, {_shape(self)}")
        of_states = self.in_order(shift_labels)
        if (of_states[:, -1] != -100).any():
            raise ValueError(
                f"shift_labels end in {of_states[:, -1].max().item()}: expected -100: no short_nll is known for the "
                "token after a sequence"
            )
        return aligned_with_tokens(of_states)

    def rows(self, name: str, of_tokens: Shaped[Tensor, "batch length"]) -> Shaped[Tensor, "batch seq"]:
        """Gather a column that is aligned with tokens, unless it was left whole.

        Raises:
            ValueError: if its shape is neither.
        """
        if of_tokens.shape == self.order.shape:
            return of_tokens
        if of_tokens.shape == self.columns.shape:
            return self.in_order(of_tokens)
        raise ValueError(
            f"{name} has shape {list(of_tokens.shape)}: expected {list(self.order.shape)}, whole sequences, or "
            f"{_shape(self)}, split over {self.mesh.size()} ranks like the tokens"
        )


def sequence_shard(position_ids: Int[Tensor, "batch share"] | None, mesh: DeviceMesh) -> SequenceShard:
    """Find out which tokens of whole sequences this rank holds, in whatever order a trainer distributes them.

    Args:
        position_ids: those of this rank's tokens: any numbers that rise along each sequence.
        mesh: the ranks over which sequences are split, of one dimension; they read the same sequences.

    Raises:
        ValueError: if positions repeat, as in packed documents, or ranks hold different numbers of tokens.
    """
    if position_ids is None:
        raise ValueError(
            "position_ids are missing: expected them, to know which tokens of the sequences this rank holds"
        )
    share = position_ids.shape[1]
    lengths = _gather(torch.full_like(position_ids[:1, :1], share), mesh)[0]
    if (lengths != share).any():
        raise ValueError(
            f"sequences of {lengths.sum().item()} tokens do not split evenly over {mesh.size()} ranks of a context: "
            f"expected a multiple of {2 * mesh.size()}"
        )
    positions = _gather(position_ids, mesh)
    order = positions.argsort(dim=1)
    positions = positions.gather(1, order)
    repeated = positions.diff(dim=1) == 0
    if repeated.any():
        raise ValueError(
            f"position_ids of row {repeated.nonzero()[0, 0].item()} repeat: packed documents would see each other in "
            "torch's ring attention, which is causal and takes no mask, where ranks split a sequence: expected one "
            "document per sequence"
        )
    first = mesh.get_local_rank() * share
    return SequenceShard(mesh, order, order.argsort(dim=1)[:, first : first + share], positions)


def context_mesh(accelerator: Any) -> DeviceMesh | None:
    """The ranks over which an `accelerate.Accelerator` splits sequences; None where it does not.

    Source: accelerate 1.15, `Accelerator._prepare_cp`.
    """
    config = getattr(accelerator, "parallelism_config", None)
    return accelerator.torch_device_mesh["cp"] if config is not None and config.cp_enabled else None


def dealt(items: Sequence[Item], mesh: DeviceMesh) -> Sequence[Item]:
    """The items that this rank works on. If items are sorted by size, all ranks get about the same work."""
    return items[mesh.get_local_rank() :: mesh.size()]


def merged(values: Shaped[Tensor, "*shape"], mesh: DeviceMesh) -> Shaped[Tensor, "*shape"]:
    """Merge the values of all ranks, to the bit: each was found by one of them, and is 0 or False at the others."""
    total = values.to(torch.uint8) if values.dtype == torch.bool else values.clone()
    _sum(total, mesh)
    return total.to(values.dtype)


@contextlib.contextmanager
def attention_within_rank() -> Iterator[None]:
    """Restrict attention to this process, even where torch's `context_parallel` has replaced it with a ring over all
    ranks: for passes over tokens that only this process reads.

    Source: torch 2.13, `_distribute_function` of `torch.distributed.tensor.experimental._context_parallel`, which
    replaces this attribute of `torch.nn.functional`; transformers 5 looks it up at each call.
    """
    ring = functional.scaled_dot_product_attention
    functional.scaled_dot_product_attention = torch._C._nn.scaled_dot_product_attention
    try:
        yield
    finally:
        functional.scaled_dot_product_attention = ring


def _sum(values: Tensor, mesh: DeviceMesh) -> None:
    all_reduce(values, group=mesh.get_group())


def _gather(values: Shaped[Tensor, "batch share"], mesh: DeviceMesh) -> Shaped[Tensor, "batch seq"]:
    parts = [torch.empty_like(values, memory_format=torch.contiguous_format) for _ in range(mesh.size())]
    all_gather(parts, values.detach().contiguous(), group=mesh.get_group())
    return torch.cat(parts, dim=1)


def _shape(share: SequenceShard) -> list[int]:
    return list(share.columns.shape)
