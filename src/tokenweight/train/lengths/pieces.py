"""Sequences of several lengths, in steps of one length and an equal number of tokens."""

import math
from array import array
from typing import Any

import datasets
import numpy as np
from torch.utils.data import Dataset

from tokenweight.data import row_lengths
from tokenweight.train.lengths.curriculum import LengthCurriculum

SOURCE = "tokenweight_source"
"""Column with the part of the data that a sequence comes from: a folder, or a length. No model reads it."""


class Pieces(Dataset):
    """Sequences of 2^k + 1 tokens, as `prepare --short decompose` makes them, in the order of a curriculum.

    An item is a group of sequences of one length with as many predicted tokens in total as the longest sequence: one
    of 8,193 tokens, or 32 of 257. All items of a step have one length. So every step predicts the same number of
    tokens, and all processes, and all passes of a step, read batches of one shape.

    Within a length, no sequence repeats before all have been read once, each time in a new order. Items are endless:
    after the first `len(self)`, which contain nearly all tokens once, those of the next epoch follow.

    Args:
        rows: sequences of 2^k + 1 tokens.
        curriculum: the order of lengths.
        batch: items of a step, over all passes and processes.
        seed: of all orders.
        max_steps: of the run, over which the cycles of the curriculum extend; if -1, these extend over `epochs`.
        epochs: of the run.

    Raises:
        ValueError: if a sequence has another length.
    """

    def __init__(
        self,
        rows: datasets.Dataset,
        curriculum: LengthCurriculum,
        *,
        batch: int,
        seed: int,
        max_steps: int = -1,
        epochs: int | float = 1,
    ) -> None:
        self.rows, self.curriculum, self.batch, self.seed = rows, curriculum, batch, seed
        predicted = row_lengths(rows) - 1
        wrong = np.flatnonzero((predicted < 1) | (predicted & (predicted - 1) != 0))
        if len(wrong):
            raise ValueError(
                f"curriculum {curriculum}: row {wrong[0]} has {predicted[wrong[0]] + 1} tokens: expected 2^k + 1 in "
                "each, as `tokenweight prepare --short decompose` makes them"
            )
        self.sizes = np.unique(predicted).tolist()
        """Predicted tokens of a sequence of each length, in ascending order."""
        self._members = [np.flatnonzero(predicted == size) for size in self.sizes]
        tokens = [size * len(part) for size, part in zip(self.sizes, self._members)]
        self.parts = [number / sum(tokens) for number in tokens]
        """Fraction of all predicted tokens that is in sequences of each length."""
        steps = max(1, sum(tokens) // (batch * self.sizes[-1]))
        self._length = steps * batch
        self.num_steps = max_steps if max_steps > 0 else math.ceil(epochs * steps)
        """Steps of the run."""
        self._lengths = array("b")  # of each step, as an index into `sizes`
        self._earlier = array("q")  # number of earlier steps of that length
        self._num_cycles = 0
        self._orders: dict[tuple[int, int], np.ndarray] = {}  # by length, and pass over it

    def __len__(self) -> int:
        """Number of items in an epoch."""
        return self._length

    def __getitem__(self, number: int) -> list[dict[str, Any]]:
        """The sequences of an item, each with the index of its length in `sizes`."""
        step, item = divmod(number, self.batch)
        while len(self._lengths) <= step:
            self._draw()
        place, earlier = self._lengths[step], self._earlier[step]
        num = self.sizes[-1] // self.sizes[place]
        first = (earlier * self.batch + item) * num
        return [{**self.rows[self._row(place, first + one)], SOURCE: place} for one in range(num)]

    @property
    def names(self) -> list[str]:
        """Names of the lengths, in predicted tokens."""
        return [str(size) for size in self.sizes]

    def _row(self, place: int, number: int) -> int:
        """The row of the n-th sequence of a length, in the order of training."""
        members = self._members[place]
        turn, number = divmod(number, len(members))
        if (place, turn) not in self._orders:
            kept = {key: order for key, order in self._orders.items() if key[0] != place or key[1] == turn - 1}
            order = np.random.default_rng([self.seed, place, turn]).permutation(members)
            self._orders = {**kept, (place, turn): order}
        return int(self._orders[place, turn][number])

    def _draw(self) -> None:
        had = [self._lengths.count(place) for place in range(len(self.sizes))]
        for place in self.curriculum.cycle(self._num_cycles, self.parts, steps=self.num_steps, seed=self.seed):
            self._lengths.append(place)
            self._earlier.append(had[place])
            had[place] += 1
        self._num_cycles += 1
