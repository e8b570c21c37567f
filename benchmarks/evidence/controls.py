"""Weightings that are controls: they show what weights do that know nothing, or lack a part."""

from dataclasses import dataclass

import torch
from torch import Tensor

from tokenweight import Dense


@dataclass(frozen=True)
class Shuffled(Dense):
    """The weights of `Dense`, each row's in an order that torch's generator draws: as uneven, at random tokens."""

    formula = "those of dense, in a random order"

    def weights(self, scores: Tensor, mask: Tensor) -> Tensor:
        """The weights of the class: of a row, among the tokens of the mask."""
        weights = super().weights(scores, mask)
        for row, chosen in zip(weights, mask):
            places = chosen.nonzero()[:, 0]
            row[places] = row[places[torch.randperm(len(places))]]
        return weights


@dataclass(frozen=True)
class Filled(Dense):
    """Dense, but tokens without a shorter context, whose score is 0, have the mean weight 1."""

    formula = "those of dense; 1 where the score is 0"

    def weights(self, scores: Tensor, mask: Tensor) -> Tensor:
        """The weights of the class."""
        return super().weights(scores, mask).where(scores > 0, 1.0)


@dataclass(frozen=True)
class OfShort(Dense):
    """Weights in proportion to the short loss alone; where that is a token's mean loss, they forget the context."""

    formula = "w = interpolation + (1 - interpolation) · short / mean(short)"

    def score(self, long: Tensor, short: Tensor) -> Tensor:
        """The short loss."""
        return short
