"""Sparse weightings by one sign of the difference: pointwise mutual information."""

import dataclasses
import math

from torch import Tensor

from tokenweight.method.weightings import Sparse, require


@dataclasses.dataclass(frozen=True)
class PPMI(Sparse):
    """Sparse, by positive pointwise mutual information: tokens that the LONG context predicts better.

    The score is max(log(p_long / p_short) - log(shift), 0). Where fewer tokens than `keep` asks for have a positive
    one, tokens of score 0 fill the rest in the order of `seed`.

    Args:
        keep: as in `Sparse`, and so is `seed`.
        shift: ratio p_long / p_short above which a score is positive; above 0.

    Source: Helm et al. 2025, README of the reference code (`[minus, shift s, max]`).
    """

    formula = "w = 1 / keep for the top share `keep` by max(short - long - log(shift), 0), else 0"
    shift: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self, "shift", 0 < self.shift < math.inf, "a finite number above 0")

    def score(self, long: Tensor, short: Tensor) -> Tensor:
        """The score whose largest values are kept."""
        return (short - long - math.log(self.shift)).clamp(min=0)


@dataclasses.dataclass(frozen=True)
class NPMI(PPMI):
    """Sparse, by *negative* pointwise mutual information: tokens that the SHORT context predicts better.

    `PPMI` with the roles of the two losses exchanged. The N does not stand for "normalized".

    Source: Helm et al. 2025, README of the reference code (`[shift s, max]`).
    """

    formula = "w = 1 / keep for the top share `keep` by max(long - short - log(shift), 0), else 0"

    def score(self, long: Tensor, short: Tensor) -> Tensor:
        """The score whose largest values are kept."""
        return super().score(short, long)
