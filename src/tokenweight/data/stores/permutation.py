"""A permutation of very many rows, without a list of them."""

import hashlib
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

_AT_ONCE = 4096
_ROUNDS = 8


class Permutation(Sequence[int]):
    """The numbers below `length`, each once, in an order that a seed decides. Only what is asked for is computed.

    The bits of a number are halved, and each half in turn is changed by a hash of the other, which can be undone: so no
    two numbers become the same. A number beyond `length` is mapped again until it is not.

    Args:
        length: number of numbers.
        seed: numbers that together decide the order, such as a seed and the epoch.

    Source: Black and Rogaway, "Ciphers with Arbitrary Finite Domains", CT-RSA 2002 (cycle walking over a Feistel
        network).

    Example:
        >>> sorted(Permutation(5, [0]))
        [0, 1, 2, 3, 4]
    """

    def __init__(self, length: int, seed: Sequence[int]) -> None:
        self.length = length
        bits = max(length - 1, 1).bit_length()
        self._low = bits // 2
        self._masks = (np.uint64((1 << self._low) - 1), np.uint64((1 << (bits - self._low)) - 1))  # low, high
        text = " ".join(map(str, seed))
        keys = (hashlib.sha256(f"{text}, round {number}".encode()).digest()[:8] for number in range(_ROUNDS))
        self._keys = [np.uint64(int.from_bytes(key)) for key in keys]

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, place: Any) -> Any:
        """The number at a place, or a list of those at a slice of places."""
        if isinstance(place, slice):
            return self._at(np.arange(*place.indices(self.length), dtype=np.uint64)).tolist()
        place = range(self.length)[place]  # an IndexError beyond the end, and places from the end
        return int(self._at(np.array([place], dtype=np.uint64))[0])

    def __iter__(self) -> Iterator[int]:
        for start in range(0, self.length, _AT_ONCE):
            yield from self[start : start + _AT_ONCE]

    def _at(self, places: np.ndarray) -> np.ndarray:
        found = self._sent(places)
        while (beyond := found >= self.length).any():
            found[beyond] = self._sent(found[beyond])
        return found

    def _sent(self, numbers: np.ndarray) -> np.ndarray:
        shift = np.uint64(self._low)
        low, high = numbers & self._masks[0], numbers >> shift
        for number, key in enumerate(self._keys):
            if number % 2:
                low = low ^ (_hashed(high ^ key) & self._masks[0])
            else:
                high = high ^ (_hashed(low ^ key) & self._masks[1])
        return (high << shift) | low


def _hashed(values: np.ndarray) -> np.ndarray:
    """64 bits that depend on all of 64 (the last step of splitmix64; Steele, Lea and Flood 2014)."""
    with np.errstate(over="ignore"):
        values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return values ^ (values >> np.uint64(31))
