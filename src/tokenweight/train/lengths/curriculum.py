"""Length curriculum: the length of each step of a run, in cycles from short to long sequences."""

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass

_ODDS: dict[str, Callable[[int, int], int]] = {
    "uniform": lambda place, num: 1,
    "linear": lambda place, num: num - place,
    "pow2": lambda place, num: 2 ** (num - 1 - place),
}


@dataclass(frozen=True)
class LengthCurriculum:
    """Draws the length of each step: in every cycle, each length gets its fraction of the steps, and while all have
    steps left, short ones are likelier than their fraction of the cycle.

    Args:
        odds: for lengths in ascending order. "pow2" is …, 4, 2, 1; "linear" …, 3, 2, 1; "uniform" 1 for each. The odds
            of a length are this factor times its steps in the cycle, until these are used up.
        cycles: number of cycles in the run.

    Source: Pouransari et al. 2024, Dataset Decomposition, arXiv 2405.13226; `open_lm.patch` (RandomMix) and
    `scripts/get_dd_params.py` of its code, with pow2 and 8 cycles.

    Example:
        >>> LengthCurriculum.parse("pow2:cycles=4")
        LengthCurriculum(odds='pow2', cycles=4)
        >>> LengthCurriculum("pow2", cycles=2).cycle(0, [0.5, 0.5], steps=12, seed=3)
        [0, 0, 1, 0, 1, 1]
    """

    odds: str = "pow2"
    cycles: int = 8

    def __post_init__(self) -> None:
        if self.odds not in _ODDS:
            raise ValueError(f"curriculum {self.odds}: expected {', '.join(_ODDS)}, as in pow2:cycles=8")
        if self.cycles < 1:
            raise ValueError(f"curriculum {self}: cycles {self.cycles}: expected at least 1")

    @classmethod
    def parse(cls, text: str) -> "LengthCurriculum":
        """Read "pow2" or "pow2:cycles=4".

        Raises:
            ValueError: for other odds, or an unknown setting.
        """
        odds, _, setting = text.partition(":")
        if not setting:
            return cls(odds.strip())
        name, _, value = setting.partition("=")
        if name.strip() != "cycles" or not value.strip().isdecimal():
            raise ValueError(f"curriculum {text}: found {setting!r}: expected cycles, as in pow2:cycles=8")
        return cls(odds.strip(), int(value))

    def __str__(self) -> str:
        return f"{self.odds}:cycles={self.cycles}"

    def cycle(self, number: int, parts: Sequence[float], *, steps: int, seed: int) -> list[int]:
        """The length of each step of a cycle, as its index in `parts`.

        At the end of each cycle, each length has had its fraction of all steps so far, to within two steps.

        Args:
            number: of the cycle, from 0. Cycles beyond the last of the run continue in the same way.
            parts: fraction of all steps for each length in ascending order; they add up to 1.
            steps: of the run.
            seed: of the draws.
        """
        quotas = [
            end - start for start, end in zip(self._until(number, parts, steps), self._until(number + 1, parts, steps))
        ]
        odds = [quota * _ODDS[self.odds](place, len(parts)) for place, quota in enumerate(quotas)]
        draws, found = random.Random(f"{seed} {number}"), []
        while any(quotas):
            (place,) = draws.choices(range(len(odds)), weights=odds)
            found.append(place)
            quotas[place] -= 1
            odds[place] *= quotas[place] > 0
        return found

    def _until(self, number: int, parts: Sequence[float], steps: int) -> list[int]:
        """Steps of each length before a cycle begins."""
        had = [0] * len(parts)
        for cycle in range(1, number + 1):
            end, before = cycle * steps // self.cycles, had
            had = [max(have, int(end * part)) for have, part in zip(before, parts)]
            while missing := end - sum(had):  # to the length that lags most, or from one with too many
                free = [place for place, have in enumerate(had) if missing > 0 or have > before[place]]
                ahead = {place: had[place] - end * parts[place] for place in free}
                place = (min if missing > 0 else max)(free, key=ahead.__getitem__)
                had[place] += 1 if missing > 0 else -1
        return had
