"""EXACT: more weight at positions that are rare among the targets of the training data."""

import dataclasses
import math
from typing import ClassVar

import torch
from torch import Tensor

from tokenweight.method.weightings import Weighting, require

BUCKETS = 32
"""Buckets of positions: 0 to 7, 8 to 15, 16 to 31, and so on, each twice the last; the last one is open-ended."""


@dataclasses.dataclass(frozen=True)
class EXACT(Weighting):
    """More weight for tokens with a long context, and the more the rarer their distance is in the data.

        w = 1 + alpha * r_b / sum(q * r) in the tail, else 1;   r_b = q_b ** -gamma,   q_b the share of bucket b

    Buckets of positions double: the tail is those that begin at `threshold` or later. Targets are counted over all
    training so far, these rows included. The mean weight is 1 before the tail and 1 + alpha within.

    Args:
        alpha: mean weight that the tail gains, 0 or more.
        gamma: 0 weighs all of the tail alike; 1 gives each of its buckets the same sum.
        threshold: tokens of context where the tail begins.

    Source: arXiv 2605.10544, read second-hand (its code is not public): alpha 0.15, gamma 0.5, thresholds 1024, 2048
    and 4096 for windows of 4k, 8k and 16k. Counting during training, rather than once, is ours.
    """

    formula = "w = 1 + alpha · q^-gamma / mean(q^-gamma) from position `threshold` on, q = share of its bucket; else 1"
    alpha: float = 0.15
    gamma: float = 0.5
    threshold: int = 1024
    uses: ClassVar[frozenset[str]] = frozenset({"positions"})
    pointwise: ClassVar[bool] = True
    of_losses: ClassVar[bool] = False
    history: ClassVar[int] = BUCKETS

    def __post_init__(self) -> None:
        require(self, "alpha", 0 <= self.alpha < math.inf, "a finite number, 0 or more")
        require(self, "gamma", 0 <= self.gamma < math.inf, "a finite number, 0 or more")
        require(self, "threshold", self.threshold >= 0, "a number of tokens, 0 or more")

    def weigh(self, long: Tensor, short: Tensor, mask: Tensor, *, positions: Tensor, history: Tensor) -> Tensor:
        """The formula of the class; an empty bucket is treated as if it held one target."""
        begins = torch.cat([history.new_zeros(1), _edges(history.device).double()])
        tail = begins >= self.threshold
        counts = history.where(tail, 0)
        shares = counts.clamp(min=1) / counts.sum().clamp(min=1)
        rarity = shares**-self.gamma
        mean = (shares * rarity).where(counts > 0, 0).sum()
        gained = self.alpha * torch.where(mean > 0, rarity / mean, 1.0)
        return (1 + gained.where(tail, 0))[_buckets(positions)].to(long.dtype)

    def observe(self, long: Tensor, short: Tensor, mask: Tensor, *, positions: Tensor) -> Tensor:
        """The number of targets in each bucket."""
        numbers = torch.arange(BUCKETS, device=mask.device)[:, None]
        return ((_buckets(positions).flatten() == numbers) & mask.flatten()).sum(dim=1).double()


def _edges(device: torch.device) -> Tensor:
    """Starts of the buckets after the first, created on the device without a synchronization."""
    return 8 << torch.arange(BUCKETS - 1, device=device)


def _buckets(positions: Tensor) -> Tensor:
    return torch.bucketize(positions.contiguous(), _edges(positions.device), right=True)
