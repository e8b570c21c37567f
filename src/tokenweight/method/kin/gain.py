"""Weightings by other scores of the gain from long context, and by key tokens."""

import dataclasses
import math

from torch import Tensor

from tokenweight.method.weightings import Dense, ScoreWeighting, normalize, require


@dataclasses.dataclass(frozen=True)
class Gain(Dense):
    """Dense, by positive differences only: tokens that the long context predicts better, by how many nats.

    Its expectation over the long distribution, `Expected(Gain())`, is the divergence KL(p_long || p_short).

    Args:
        interpolation: as in `Dense`.

    Source: ours; `Dense` and `PPMI` of Helm et al. 2025 combined.
    """

    formula = "w = interpolation + (1 - interpolation) · s / mean(s), s = max(short - long, 0)"
    knob = ("interpolation", (0.0, 0.75))

    def score(self, long: Tensor, short: Tensor) -> Tensor:
        """The difference with its sign; weights take negative ones for 0."""
        return short - long


@dataclasses.dataclass(frozen=True)
class BoundedGain(Dense):
    """Dense, by the share of a token's probability that the short context misses: between 0 and 1.

    Its expectation over the long distribution is the total variation between the two.

    Args:
        interpolation: as in `Dense`.

    Source: ours.
    """

    formula = "w = interpolation + (1 - interpolation) · s / mean(s), s = max(1 - p_short / p_long, 0)"
    knob = ("interpolation", (0.0, 0.75))

    def score(self, long: Tensor, short: Tensor) -> Tensor:
        """The score that the weight is proportional to."""
        return -(long - short).clamp(max=0).expm1()


@dataclasses.dataclass(frozen=True)
class LongFilter(Dense):
    """Dense, by the gain in nats times the probability of the token: what stays hard with the long context weighs less.

    Args:
        interpolation: as in `Dense`.

    Source: Deng et al. 2025 (arXiv 2510.25804), Eq. 5 and 7, where the mean of s over a document decides whether it is
    kept. As a weight, with the positive part and the mixture of `Dense`, it is ours.
    """

    formula = "w = interpolation + (1 - interpolation) · s / mean(s), s = max(exp(-long) · (short - long), 0)"
    knob = ("interpolation", (0.0, 0.75))

    def score(self, long: Tensor, short: Tensor) -> Tensor:
        """The score that the weight is proportional to, where it is above 0."""
        return (-long).exp() * (short - long)


@dataclasses.dataclass(frozen=True)
class KeyTokens(ScoreWeighting):
    """Train only key tokens, all with the same weight: those that the long context helps a lot and makes likely.

    The mean weight of a row is 1. In a row without key tokens every token weighs 1.

    Args:
        alpha: gain in nats, short - long, above which a token is key.
        beta: log-probability with the long context above which it is.

    Source: Fang et al. 2025 (arXiv 2410.23771), the indicator of LongPPL, with its alpha and beta; using it as a
    weight is ours.
    """

    formula = "w = 1 / share of such tokens if short - long > alpha and -long > beta, else 0"
    alpha: float = 2.0
    beta: float = -2.0

    def __post_init__(self) -> None:
        for name in ("alpha", "beta"):
            require(self, name, math.isfinite(getattr(self, name)), "a finite number")

    def score(self, long: Tensor, short: Tensor) -> Tensor:
        """1 for key tokens, else 0."""
        return ((short - long > self.alpha) & (-long > self.beta)).to(long.dtype)

    def weights(self, scores: Tensor, mask: Tensor) -> Tensor:
        """The formula of the class."""
        return normalize(scores, mask)
