"""Weightings that keep the tokens of largest loss: in a row, or in a batch on all ranks."""

import dataclasses
import math
from typing import ClassVar, Literal

import torch
from torch import Tensor

from tokenweight.method.weightings import Weighting, keep_top, require

BINS = 512
"""Bins of a histogram of losses or their differences: even in asinh(nats / 0.01), thus fine near 0, up to 44 nats."""


@dataclasses.dataclass(frozen=True)
class Rho1(Weighting):
    """Train only the tokens of largest excess loss over a reference model, long - ref, all with the same weight.

    Over a row, the max(1, floor(keep * T)) largest of its T tokens are kept and the mean weight is 1. Over a batch, on
    all ranks, those above the quantile 1 - keep weigh 1 / keep, and its mean weight is 1, to the width of a bin.

    Args:
        keep: share of tokens kept, above 0 and up to 1; 1 is plain cross-entropy.
        over: "row" or "batch".

    Source: Lin et al. 2024 (arXiv 2404.07965), which selects within the batch: 0.6 for 1.1B, 0.7 for 7B parameters.
    Each accumulated batch counts by itself.
    """

    formula = "w = 1 / keep for the top share `keep` by long - ref, else 0"
    keep: float = 0.6
    over: Literal["row", "batch"] = "row"
    uses: ClassVar[frozenset[str]] = frozenset({"ref_nll"})
    remembers: ClassVar[bool] = False

    def __post_init__(self) -> None:
        require(self, "keep", 0 < self.keep <= 1, "a share above 0, up to 1")
        require(self, "over", self.over in ("row", "batch"), "row or batch")
        vars(self)["history"] = BINS if self.over == "batch" else 0

    def weigh(
        self, long: Tensor, short: Tensor, mask: Tensor, *, ref_nll: Tensor, history: Tensor | None = None
    ) -> Tensor:
        """The formula of the class."""
        excess = long - ref_nll
        return keep_top(excess, mask, self.keep, seed=0) if history is None else _above(excess, self.keep, history)

    def observe(self, long: Tensor, short: Tensor, mask: Tensor, *, ref_nll: Tensor) -> Tensor:
        """A histogram of the differences."""
        return _histogram(long - ref_nll, mask)


@dataclasses.dataclass(frozen=True)
class ESLM(Weighting):
    """Train only the tokens of largest loss: those above the quantile 1 - keep of the batch, on all ranks.

    They weigh 1 / keep, so that the mean weight is 1, to the width of a bin; the loss estimates the conditional value
    at risk.

    Args:
        keep: share of tokens kept, above 0 and up to 1; 1 is plain cross-entropy.

    Source: arXiv 2505.19893, read second-hand (alpha there is 1 - `keep`, about 0.1 from memory; the default is ours).
    Each accumulated batch counts by itself. Its entropy variant is not implemented.
    """

    formula = "w = 1 / keep for the top share `keep` by long, in the batch; else 0"
    keep: float = 0.9
    uses: ClassVar[frozenset[str]] = frozenset()
    history: ClassVar[int] = BINS
    remembers: ClassVar[bool] = False

    def __post_init__(self) -> None:
        require(self, "keep", 0 < self.keep <= 1, "a share above 0, up to 1")

    def weigh(self, long: Tensor, short: Tensor, mask: Tensor, *, history: Tensor) -> Tensor:
        """The formula of the class."""
        return _above(long, self.keep, history)

    def observe(self, long: Tensor, short: Tensor, mask: Tensor) -> Tensor:
        """A histogram of the losses."""
        return _histogram(long, mask)


def _places(values: Tensor) -> Tensor:
    """Places of values in the histogram: the bin before the point, how far into it after the point."""
    half = BINS / 2
    return (half + (values.double() / 0.01).asinh() * (half / math.asinh(4400))).clamp(0, BINS - 1e-6)


def _histogram(values: Tensor, mask: Tensor) -> Tensor:
    """Number of values under the mask in each bin."""
    places = _places(values).where(mask, BINS).flatten().sort().values
    edges = torch.arange(BINS + 1, device=values.device, dtype=torch.float64)
    return torch.searchsorted(places, edges).diff().double()


def _above(values: Tensor, keep: float, histogram: Tensor) -> Tensor:
    """1 / keep for values above the quantile 1 - keep of a histogram, interpolated within its bin; else 0."""
    below = histogram.cumsum(dim=0)
    wanted = (1 - keep) * below[-1:]
    number = torch.searchsorted(below, wanted, right=True).clamp(max=BINS - 1)
    within = (wanted - (below - histogram)[number]) / histogram[number].clamp(min=1)
    threshold = torch.where(wanted > 0, number + within, 0.0)
    return (_places(values) >= threshold).to(values.dtype) / keep
