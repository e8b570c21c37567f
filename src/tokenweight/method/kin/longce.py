"""LongCE: the ratio of the two probabilities of a token, capped."""

import dataclasses
import math
from typing import ClassVar

from torch import Tensor

from tokenweight.method.weightings import ScoreWeighting, require


@dataclasses.dataclass(frozen=True)
class LongCE(ScoreWeighting):
    """Weight p_long / p_short, capped: w = min(exp(short - long), cap). Not normalized, so the mean weight is not 1.

    Args:
        cap: the largest weight, above 0.

    Source: Fang et al. 2025 (arXiv 2410.23771), `finetune/finetune.py` of PKU-ML/LongPPL (gamma is `cap`, 5 there).
    """

    formula = "w = min(exp(short - long), cap)"
    knob = ("cap", (1.0, 2.0, 5.0, 10.0, 20.0))
    cap: float = 5.0
    pointwise: ClassVar[bool] = True
    selects: ClassVar[bool] = False

    def __post_init__(self) -> None:
        require(self, "cap", 0 < self.cap < math.inf, "a finite number above 0")

    def score(self, long: Tensor, short: Tensor) -> Tensor:
        """The formula of the class; clamped before `exp`, which would overflow above 88 nats."""
        return (short - long).clamp(max=math.log(self.cap)).exp()

    def weights(self, scores: Tensor, mask: Tensor) -> Tensor:
        """The scores themselves."""
        return scores
