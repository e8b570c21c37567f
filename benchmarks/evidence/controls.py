"""Weightings that are controls: they say what weights do that know nothing."""

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
