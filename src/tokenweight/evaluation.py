"""What training did: losses by position."""

from typing import NamedTuple

from jaxtyping import Bool, Float
from torch import Tensor


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
    bins = []
    start, stop = 0, first
    while start < nll.shape[1]:
        chosen = nll[:, start:stop][mask[:, start:stop]]
        if chosen.numel():
            bins.append(PositionBin(start, min(stop, nll.shape[1]), chosen.double().mean().item(), chosen.numel()))
        start, stop = stop, 2 * stop
    return bins
