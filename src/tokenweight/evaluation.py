"""What training did: losses by position, and losses of the same tokens by context."""

from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from tokenweight.causal import document_positions
from tokenweight.intervals import Sums, row_sums
from tokenweight.scoring import Scorer


class PositionBin(NamedTuple):
    """Mean loss (nats) of the tokens at positions `[start, stop)` of their rows."""

    start: int
    stop: int
    nll: float
    num_tokens: int


def losses_by_position(
    nll: Float[Tensor, "rows seq"], mask: Bool[Tensor, "rows seq"], *, first: int = 256
) -> list[PositionBin]:
    """Mean loss in bins that double: `[0, first)`, `[first, 2 first)`, `[2 first, 4 first)` and so on.

    Args:
        nll: loss of each token, in nats, token-aligned.
        mask: True where a token was predicted and counts; bins without one are left out.
        first: tokens of the first bin.
    """
    edges = position_edges(nll.shape[1], first=first)
    columns = torch.arange(nll.shape[1], device=nll.device).expand(nll.shape)
    bins = zip(pairwise(edges), sums_by_position(nll, mask, columns, edges))
    return [
        PositionBin(start, stop, sums.mean, int(sums.num_tokens.sum()))
        for (start, stop), sums in bins
        if sums.num_tokens.any()
    ]


def position_edges(length: int, *, first: int = 256) -> list[int]:
    """Edges of bins that double: 0, first, 2 first, 4 first and so on, and at last `length`.

    Raises:
        ValueError: if `first` is not at least 1.
    """
    if first < 1:
        raise ValueError(f"first={first}: expected at least 1 token")
    edges = [0]
    while edges[-1] < length:
        edges.append(min(max(first, 2 * edges[-1]), length))
    return edges


def sums_by_position(
    nll: Float[Tensor, "rows seq"],
    mask: Bool[Tensor, "rows seq"],
    positions: Int[Tensor, "rows seq"],
    edges: Sequence[int],
) -> list[Sums]:
    """Losses of the tokens of each row at positions `[edges[0], edges[1])`, `[edges[1], edges[2])` and so on.

    With edges `[0, size]`, the size that of the short context, this is the loss at short range: what training with
    token weights may have cost. Rows shorter than `size` count there whole.

    Args:
        nll: loss of each token, in nats, token-aligned.
        mask: True where a token was predicted and counts (`prediction_mask`).
        positions: of each token in its document (`document_positions`).
        edges: rising; tokens outside them do not count.
    """
    return [row_sums(nll, mask & (start <= positions) & (positions < stop)) for start, stop in pairwise(edges)]


def losses_by_context(
    scorers: Sequence[Scorer],
    tokens: Int[Tensor, "rows seq"],
    long_nll: Float[Tensor, "rows seq"],
    mask: Bool[Tensor, "rows seq"],
    position_ids: Int[Tensor, "rows seq"] | None = None,
    *,
    first_row: int = 0,
) -> list[Sums]:
    """Losses of the same tokens with short contexts and with all of it: what the model gains from a longer context.

    The tokens are those at positions of at least the largest size in their documents, so that every context is as
    short as it says: of a scorer with `ShortContext(size, size // 2)`, they see `size // 2` to `size - 1` tokens.
    Shorter documents have no such token. The gain of more context is `paired_difference` of two entries.

    Args:
        scorers: one for each context, all with one model.
        tokens: rows of one length.
        long_nll: losses with the whole context, by the same model (`token_nll`).
        mask: True where a token was predicted and counts (`prediction_mask`).
        position_ids: where they restart at 0, a document begins.
        first_row: number of the first row, for error messages.

    Returns:
        Sums of each row, for each scorer and then for the whole context.
    """
    longest = max(scorer.context.size for scorer in scorers)
    targets = mask & (document_positions(tokens, position_ids) >= longest)
    short_nll = [
        scorer(tokens, position_ids=position_ids, long_nll=long_nll, first_row=first_row) for scorer in scorers
    ]
    return [row_sums(nll, targets) for nll in (*short_nll, long_nll)]
