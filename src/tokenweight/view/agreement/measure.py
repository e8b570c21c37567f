"""Agreement of two scorers: rank correlation, and how much of one's benefit is in the tokens that the other picks.

Each number compares tokens within a sequence, as weights do, and is summed over the sequences, one in memory at a
time. Besides scores, position and surrounding text are kept only for the few tokens that are listed.
"""

import heapq
import itertools
import math
import os
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch

from tokenweight.data import choose_scores, key_tokens, load_rows, read_row, row_tensors, token_pieces, verify
from tokenweight.method import check_finite, document_positions
from tokenweight.models import numbered_from
from tokenweight.view.corpus import name_folders
from tokenweight.view.terminal import in_context

SHARES = (0.05, 0.2)
"""Fractions of the tokens of a sequence that count as a scorer's picks."""
RANKINGS = ("gain", "likely_gain", "divergence")
"""Scores that rank a scorer's tokens: short - long; that times the probability with the long context; the divergence of
its two distributions, which does not depend on the token."""
_BEFORE, _AFTER = 40, 20  # characters of context around a listed token


class Losses(NamedTuple):
    """Losses of a scorer on the counted tokens of a sequence, in nats, float64."""

    long_nll: np.ndarray
    short_nll: np.ndarray
    divergence: np.ndarray | None = None

    @property
    def gain(self) -> np.ndarray:
        """The gain of each token from the long context."""
        return self.short_nll - self.long_nll

    @property
    def likely_gain(self) -> np.ndarray:
        """The gain times the probability of the token with the long context."""
        return np.exp(-self.long_nll) * self.gain


class Picks(NamedTuple):
    """Comparison of the top tokens of two scorers by one ranking. Pairs are (the first's in the picks of the second,
    the second's in those of the first); None if there is nothing to divide, or a scorer has no such ranking."""

    ranking: str
    share: float
    """Fraction of the tokens of each sequence that is picked."""
    overlap: float | None
    """Fraction of the picks of one scorer that the other picks as well."""
    key_tokens: tuple[float | None, float | None]
    """Fraction of the key tokens of LongPPL."""
    benefit: tuple[float | None, float | None]
    """Fraction of the net benefit: the sum of short - long over all counted tokens."""
    own_benefit: tuple[float | None, float | None]
    """Fraction of each scorer's net benefit in its own picks."""


class Differing(NamedTuple):
    """A token about which the scorers differ."""

    row: int
    position: int
    """Position in the row, from 0."""
    before: str
    token: str
    after: str
    long_nll: tuple[float, float]
    """Long losses of the first scorer, and of the second."""
    short_nll: tuple[float, float]


class Agreement(NamedTuple):
    """Agreement of two scorers."""

    names: tuple[str, str]
    sizes: tuple[int | None, int | None]
    """Tokens of the short context of each."""
    sequences: int
    """Number of sequences with counted tokens."""
    tokens: int
    """Number of counted tokens: predicted, and with more tokens before them than either short context holds."""
    key_tokens: tuple[int, int]
    """Numbers of key tokens of LongPPL."""
    mean_gain: tuple[float, float]
    """Mean of short - long over the tokens, in nats."""
    rank_correlation: dict[str, float | None]
    """Spearman correlation of the tokens of a sequence by each ranking, averaged over sequences, weighted by tokens."""
    picks: list[Picks]
    more: list[Differing]
    """The tokens with the largest excess of probable gain by the first scorer."""
    less: list[Differing]
    """The tokens with the largest excess by the second."""
    names_tokens: bool = True
    """Whether a tokenizer was found; otherwise tokens are listed by id."""

    def as_json(self) -> dict[str, Any]:
        """Convert to JSON types."""
        found = {**self._asdict(), "picks": [one._asdict() for one in self.picks]}
        return found | {name: [one._asdict() for one in getattr(self, name)] for name in ("more", "less")}


class Comparison:
    """Compares two scorers, sequence by sequence.

    Tokens tied at the end of the picks each count in part, so that a sequence of n tokens has exactly share * n
    picks, in any order; by chance, picks contain their share of anything.
    """

    def __init__(self) -> None:
        self.tokens = self.sequences = 0
        self._keys, self._benefit = np.zeros(2), np.zeros(2)
        self._correlation = {name: np.zeros(2) for name in RANKINGS}
        self._picked = {(name, share): np.zeros((4, 2)) for name in RANKINGS for share in SHARES}
        self._known = dict.fromkeys(RANKINGS, (True, True))

    def add(self, first: Losses, second: Losses) -> None:
        """Add the counted tokens of a sequence."""
        both, num = (first, second), len(first.long_nll)
        self.tokens += num
        self.sequences += 1
        keys = [_key_tokens(one) for one in both]
        self._keys += [own.sum() for own in keys]
        self._benefit += [one.gain.sum() for one in both]
        for name in RANKINGS:
            values: list[np.ndarray | None] = [getattr(one, name) for one in both]
            has = tuple(one is not None for one in values)
            self._known[name] = self._known[name][0] and has[0], self._known[name][1] and has[1]
            if (found := _spearman(*values)) is not None:
                self._correlation[name] += [num * found, num]
            for share in SHARES:
                picks = [np.zeros(num) if one is None else picked(one, share * num) for one in values]
                self._picked[name, share] += [
                    [np.minimum(*picks).sum(), share * num],
                    [keys[0] @ picks[1], keys[1] @ picks[0]],
                    [first.gain @ picks[1], second.gain @ picks[0]],
                    [first.gain @ picks[0], second.gain @ picks[1]],
                ]

    def result(self, names: tuple[str, str] = ("A", "B"), sizes: Sequence[int | None] = (None, None)) -> Agreement:
        """The agreement over all sequences, without lists of tokens."""
        return Agreement(
            names=names,
            sizes=(sizes[0], sizes[1]),
            sequences=self.sequences,
            tokens=self.tokens,
            key_tokens=(int(self._keys[0]), int(self._keys[1])),
            mean_gain=(float(self._benefit[0] / self.tokens), float(self._benefit[1] / self.tokens)),
            rank_correlation={name: _ratio(*one) for name, one in self._correlation.items() if any(self._known[name])},
            picks=[self._picks(name, share) for name in RANKINGS if any(self._known[name]) for share in SHARES],
            more=[],
            less=[],
        )

    def _picks(self, name: str, share: float) -> Picks:
        known, (common, keys, benefit, own) = self._known[name], self._picked[name, share]

        def shares(of: np.ndarray, all_of: np.ndarray, by: Sequence[int]) -> tuple[float | None, float | None]:
            first, second = (_ratio(of[n], all_of[n]) if known[by[n]] else None for n in (0, 1))
            return first, second

        return Picks(
            ranking=name,
            share=share,
            overlap=_ratio(*common) if all(known) else None,
            key_tokens=shares(keys, self._keys, (1, 0)),
            benefit=shares(benefit, self._benefit, (1, 0)),
            own_benefit=shares(own, self._benefit, (0, 1)),
        )


def picked(values: np.ndarray, num: float) -> np.ndarray:
    """The fraction of each value that is among the `num` largest, where `num` need not be an integer: 1, 0, or, for
    those tied with the smallest of them, an equal part of the rest."""
    smallest = np.partition(values, len(values) - math.ceil(num))[len(values) - math.ceil(num)]
    above, equal = values > smallest, values == smallest
    return above + equal * ((num - above.sum()) / equal.sum())


def compare_scores(
    first: str | os.PathLike[str],
    second: str | os.PathLike[str],
    *,
    sizes: tuple[int | None, int | None] = (None, None),
    top: int = 8,
) -> Agreement:
    """Compare the scores of two folders of the same sequences.

    Args:
        first: folder scored with the long losses.
        second: another, or the same with another size.
        sizes: tokens of the short contexts to compare; by default the only one that each stores.
        top: number of tokens in each of the lists of those that the scorers differ about most.

    Raises:
        ValueError: if a folder stores no long losses, or the folders hold different sequences, naming the first; if no
            token has a short context in both; if a loss is not finite.
    """
    if top < 0:
        raise ValueError(f"top {top}: expected a number of tokens, 0 or more")
    (ours, our_size), (theirs, their_size) = (
        _opened(folder, size) for folder, size in zip((first, second), sizes, strict=True)
    )
    if len(ours) != len(theirs):
        raise ValueError(f"{first} holds {len(ours)} sequences and {second} {len(theirs)}: expected the same ones")
    comparison, least = Comparison(), max(our_size or 0, their_size or 0)
    lists: list[list[tuple[float, int, int, np.ndarray]]] = [[], []]
    for number, pair in enumerate(zip(ours, theirs)):
        with numbered_from(number):
            counts, losses = _counted(number, pair, (str(first), str(second)), least)
        if not counts.any():
            continue
        comparison.add(*losses)
        differ = losses[0].likely_gain - losses[1].likely_gain
        for sign, found in zip((1, -1), lists):
            _keep(found, sign * differ, np.flatnonzero(counts), number, losses, top)
    if not comparison.tokens:
        raise ValueError(f"{first} and {second}: no token has more than {least} tokens before it")
    agreement = comparison.result(_names(first, second), (our_size, their_size))
    tokenizer = _tokenizer((first, second), (our_size, their_size)) if top else None
    more, less = (_listed(sorted(found, reverse=True), ours, tokenizer) for found in lists)
    return agreement._replace(more=more, less=less, names_tokens=tokenizer is not None)


def _opened(folder: str | os.PathLike[str], size: int | None) -> tuple[Any, int | None]:
    """The rows of a scored folder, and the size of their short context."""
    rows = load_rows(folder)
    rows, provenance = choose_scores(rows, folder, size=size, needed={"short_nll", "long_nll"})
    verify(folder)
    return rows, provenance.get("context", {}).get("size", size)


def _counted(
    number: int, pair: tuple[dict[str, Any], dict[str, Any]], folders: tuple[str, str], least: int
) -> tuple[np.ndarray, tuple[Losses, Losses]]:
    """Mask of the counted tokens of a row, and the losses of both scorers on them."""
    found = [row_tensors({name: [values] for name, values in row.items()}, torch.device("cpu")) for row in pair]
    (tokens, positions, mask), (others, other_positions, other_mask) = found
    ours, theirs = document_positions(tokens, positions), document_positions(others, other_positions)
    if not (torch.equal(tokens, others) and torch.equal(ours, theirs) and torch.equal(mask, other_mask)):
        raise ValueError(f"{folders[0]} and {folders[1]} differ in row {number}: expected scores of the same sequences")
    counts = mask & (ours >= least)
    losses = []
    for folder, row in zip(folders, pair):
        columns = {name: torch.as_tensor(np.array(row[name]))[None] for name in Losses._fields if name in row}
        check_finite({f"{name} of {folder}": values for name, values in columns.items()}, counts)
        losses.append(Losses(**{name: values[counts].double().numpy() for name, values in columns.items()}))
    return counts[0].numpy(), (losses[0], losses[1])


def _keep(
    found: list[tuple[float, int, int, np.ndarray]],
    values: np.ndarray,
    places: np.ndarray,
    number: int,
    losses: tuple[Losses, Losses],
    top: int,
) -> None:
    """Keep the `top` largest values above 0 of all rows so far, with their positions and both scorers' losses."""
    for place in np.argsort(-values, kind="stable")[:top].tolist():
        if values[place] <= 0 or (len(found) == top and values[place] <= found[0][0]):
            return
        said = np.array([[one.long_nll[place], one.short_nll[place]] for one in losses])
        (heapq.heappushpop if len(found) == top else heapq.heappush)(
            found, (float(values[place]), -number, -int(places[place]), said)
        )


def _listed(found: Sequence[tuple[float, int, int, np.ndarray]], rows: Any, tokenizer: Any) -> list[Differing]:
    texts: dict[int, tuple[str, list[int]]] = {}
    listed = []
    for _, row, position, said in found:
        number, place = -row, -position
        if number not in texts:
            pieces = token_pieces(np.asarray(rows[number]["input_ids"]).tolist(), tokenizer)
            texts[number] = "".join(pieces), [0, *itertools.accumulate(map(len, pieces))]
        text, edges = texts[number]
        around = in_context(text, edges[place], edges[place + 1], _BEFORE, _AFTER)
        (long, short), (other_long, other_short) = said.tolist()
        listed.append(Differing(number, place, *around, (long, other_long), (short, other_short)))
    return listed


def _tokenizer(folders: Sequence[str | os.PathLike[str]], sizes: Sequence[int | None]) -> Any:
    """The tokenizer of the rows, from the first folder whose tokenizer can be found."""
    for folder, size in zip(folders, sizes):
        try:
            tokenizer = read_row(folder, 0, size=size).tokenizer
        except ValueError:  # it was moved, or is on another machine, which the list notes
            continue
        if tokenizer is not None:
            return tokenizer
    return None


def _names(first: str | os.PathLike[str], second: str | os.PathLike[str]) -> tuple[str, str]:
    name, other = name_folders([first, second])
    return name, other


def _key_tokens(losses: Losses) -> np.ndarray:
    long_nll, short_nll = (torch.from_numpy(values)[None] for values in losses[:2])
    return key_tokens(long_nll, short_nll, torch.ones_like(long_nll, dtype=torch.bool))[0].double().numpy()


def _spearman(first: np.ndarray | None, second: np.ndarray | None) -> float | None:
    """Rank correlation, with shared ranks for ties; None if all values are equal, or a side is missing."""
    if first is None or second is None:
        return None
    ranks = [_ranks(values) for values in (first, second)]
    spread = [(one * one).sum() for one in ranks]
    return float(ranks[0] @ ranks[1] / math.sqrt(spread[0] * spread[1])) if all(spread) else None


def _ranks(values: np.ndarray) -> np.ndarray:
    """Ranks, centered."""
    _, place, counts = np.unique(values, return_inverse=True, return_counts=True)
    return (counts.cumsum() - (counts - 1) / 2)[place] - (len(values) + 1) / 2


def _ratio(part: float, whole: float) -> float | None:
    """Ratio, or None unless the total is positive."""
    return float(part / whole) if whole > 0 else None
