"""Context parallelism: rows whose tokens are spread over ranks, put together where weights need whole rows."""

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Int, Shaped
from torch import Tensor
from torch.distributed import all_gather
from torch.distributed.device_mesh import DeviceMesh

from tokenweight.method import aligned_with_states, aligned_with_tokens


@dataclass(frozen=True)
class RowShare:
    """Which tokens of whole rows this rank holds. Made by `share_of_rows`; every method must run on all ranks alike.

    A rank has the states of its tokens, so a share is aligned with *states*: column j of a share speaks of the token
    that state j predicts, wherever that token lies. Whole rows are aligned with tokens, as everywhere. A row of 8
    tokens over 2 ranks, in the order of torch, which balances the work of causal attention:

        rank 0 holds tokens      0  1  6  7        of these, own(rows) has the columns     1  2  7  -
        rank 1 holds tokens      2  3  4  5                                                3  4  5  6

    Nothing predicts token 0, and what state 7 predicts is not in the row. So with

        share.own(weighting(share.whole(long), share.whole(short), share.whole(mask)))

    every rank computes the same weights from the same whole rows as one process would, and keeps its own.
    """

    mesh: DeviceMesh
    order: Int[Tensor, "batch seq"]
    """Where each token of a row is among those of all ranks, one rank after the other."""
    columns: Int[Tensor, "batch share"]
    """Which tokens of the rows this rank holds."""

    def in_order(self, values: Shaped[Tensor, "batch share"]) -> Shaped[Tensor, "batch seq"]:
        """The values of all ranks in the order of the rows, not shifted: tokens to tokens, or states to states."""
        return _gather(values, self.mesh).gather(1, self.order)

    def whole(self, of_states: Shaped[Tensor, "batch share"]) -> Shaped[Tensor, "batch seq"]:
        """Whole rows, aligned with tokens, of what the ranks have at their states; column 0 is 0."""
        return aligned_with_tokens(self.in_order(of_states))

    def own(self, of_tokens: Shaped[Tensor, "batch seq"], fill: int = 0) -> Shaped[Tensor, "batch share"]:
        """This rank's share of whole rows; `fill` for the last state of a row, which predicts no token of it."""
        return aligned_with_states(of_tokens, fill).gather(1, self.columns)

    def labels(self, shift_labels: Int[Tensor, "batch share"] | None) -> Int[Tensor, "batch seq"]:
        """The labels of whole rows, from the labels of what this rank's states predict.

        Raises:
            ValueError: without such labels, or if the last state of a row is to predict a token that is not in the row.
        """
        if shift_labels is None or shift_labels.shape != self.columns.shape:
            found = None if shift_labels is None else list(shift_labels.shape)
            raise ValueError(f"shift_labels is {found}: expected the shape of this rank's tokens, {_shape(self)}")
        of_states = self.in_order(shift_labels)
        if (of_states[:, -1] != -100).any():
            raise ValueError(
                f"shift_labels end in {of_states[:, -1].max().item()}: expected -100, since no short_nll is known for "
                "the token after a row"
            )
        return aligned_with_tokens(of_states)

    def rows(self, name: str, of_tokens: Shaped[Tensor, "batch length"]) -> Shaped[Tensor, "batch seq"]:
        """Whole rows of a column aligned with tokens, which may have been left whole or split like the tokens.

        Raises:
            ValueError: if its shape is neither.
        """
        if of_tokens.shape == self.order.shape:
            return of_tokens
        if of_tokens.shape == self.columns.shape:
            return self.in_order(of_tokens)
        raise ValueError(
            f"{name} has shape {list(of_tokens.shape)}: expected {list(self.order.shape)}, whole rows, or "
            f"{_shape(self)}, split over {self.mesh.size()} ranks like the tokens"
        )


def share_of_rows(position_ids: Int[Tensor, "batch share"] | None, mesh: DeviceMesh) -> RowShare:
    """Find out which tokens of whole rows this rank holds, whatever the order in which a trainer deals them out.

    Args:
        position_ids: of this rank's tokens: any numbers that rise along each row.
        mesh: the ranks over which rows are split, of one dimension; they read the same rows.

    Raises:
        ValueError: if positions repeat, as in packed documents, or ranks hold different numbers of tokens.
    """
    if position_ids is None:
        raise ValueError("position_ids are missing: expected them, to know which tokens of the rows this rank holds")
    share = position_ids.shape[1]
    lengths = _gather(torch.full_like(position_ids[:1, :1], share), mesh)[0]
    if (lengths != share).any():
        raise ValueError(
            f"rows of {lengths.sum().item()} tokens do not split evenly over {mesh.size()} ranks of a context: "
            f"expected a multiple of {2 * mesh.size()}"
        )
    positions = _gather(position_ids, mesh)
    order = positions.argsort(dim=1)
    repeated = positions.gather(1, order).diff(dim=1) == 0
    if repeated.any():
        raise ValueError(
            f"position_ids of row {repeated.nonzero()[0, 0].item()} repeat: documents packed into a row would see each "
            "other where the row is split over ranks. Expected one document a row"
        )
    first = mesh.get_local_rank() * share
    return RowShare(mesh, order, order.argsort(dim=1)[:, first : first + share])


def context_mesh(accelerator: Any) -> DeviceMesh | None:
    """The ranks over which an `accelerate.Accelerator` splits rows; None where it does not.

    Source: accelerate 1.15, `Accelerator._prepare_cp`.
    """
    config = getattr(accelerator, "parallelism_config", None)
    return accelerator.torch_device_mesh["cp"] if config is not None and config.cp_enabled else None


def _gather(values: Shaped[Tensor, "batch share"], mesh: DeviceMesh) -> Shaped[Tensor, "batch seq"]:
    parts = [torch.empty_like(values, memory_format=torch.contiguous_format) for _ in range(mesh.size())]
    all_gather(parts, values.detach().contiguous(), group=mesh.get_group())
    return torch.cat(parts, dim=1)


def _shape(share: RowShare) -> list[int]:
    return list(share.columns.shape)
