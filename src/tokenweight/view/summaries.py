"""Summary statistics: differences of the losses, and distribution of weight over positions and kinds of tokens."""

import math
import unicodedata
from collections.abc import Iterator, Sequence
from itertools import accumulate, groupby, pairwise
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Float64
from torch import Tensor

from tokenweight.data import ScoredRow
from tokenweight.method import ShortContext, check_finite, document_positions
from tokenweight.models import numbered_from

KINDS = ("name", "number", "punctuation", "word start", "word rest", "repeat")
"""The kinds of tokens that `token_kinds` distinguishes."""
_STOPS = frozenset(".!?…:")
_QUOTATION_MARKS = frozenset('"“”„«»\u2018')


class Histogram(NamedTuple):
    """Numbers of tokens with a value in [edges[i], edges[i + 1]); the first and last bins include what lies beyond."""

    edges: list[float]
    counts: list[int]


class PositionWeights(NamedTuple):
    """Statistics of the tokens at positions [first, stop) of their documents."""

    first: int
    stop: int
    num_tokens: int
    mean_weight: float
    mean_difference: float
    """Mean of |short - long|, in nats."""


class KindShare(NamedTuple):
    """Fractions of one kind of token among all predicted tokens."""

    kind: str
    num_tokens: int
    token_share: float
    """Their fraction of the tokens."""
    weight_share: float
    """Their fraction of the sum of all weights; NaN if that is 0."""
    mean_weight: float


def difference_histogram(rows: Sequence[ScoredRow], *, limit: float = 4.0, num_bins: int = 80) -> Histogram:
    """Histogram of the gain from the long context, short - long in nats, of the tokens under the masks.

    Tokens of the first window have the same short and long context, and a difference of 0: narrow the masks to
    exclude them.

    Args:
        rows: scored sequences.
        limit: the bins reach from -limit to limit.
        num_bins: number of bins, all of the same width.

    Raises:
        ValueError: if a loss under a mask is not finite, or a setting makes no sense.
    """
    if not (limit > 0 and num_bins >= 1):
        raise ValueError(f"limit={limit}, num_bins={num_bins}: expected a positive number of nats, and at least 1 bin")
    edges = limit * torch.arange(-num_bins, num_bins + 1, 2, dtype=torch.float64) / num_bins  # 0 is exact
    counts = torch.zeros(num_bins, dtype=torch.long)
    for number, row in enumerate(rows):
        difference = _difference(row, number)[row.mask]
        counts += torch.bincount(torch.bucketize(difference, edges[1:-1], right=True), minlength=num_bins)
    return Histogram(edges.tolist(), counts.tolist())


def by_position(
    rows: Sequence[ScoredRow],
    weights: Sequence[Float[Tensor, "1 _"]],
    *,
    num_bins: int = 32,
    windows: ShortContext | None = None,
) -> list[PositionWeights]:
    """Mean weight and mean |short - long| of the tokens, by their position in their document.

    Args:
        rows: scored sequences.
        weights: weights of their tokens.
        num_bins: largest number of bins, all of the same width. Bins without a predicted token are left out.
        windows: the short context of the scores, to use one bin for the tokens that each window scores, from the first
            window on. Within a window the context grows from `size - stride` tokens, so that differences form a
            sawtooth by position, over which these bins average.

    Raises:
        ValueError: if a loss under a mask is not finite, or `num_bins` is not at least 1.
    """
    if num_bins < 1:
        raise ValueError(f"num_bins={num_bins}: expected at least 1")
    length = max((row.tokens.shape[1] for row in rows), default=0)
    width = max(1, -(-length // num_bins))
    edges = [*range(0, length, width), length]
    if windows is not None:
        edges = [0, *range(windows.size, length, windows.stride), length]
    inner = torch.tensor(edges[1:-1])
    sums = torch.zeros(3, len(edges) - 1, dtype=torch.float64)
    for number, (row, own) in enumerate(zip(rows, weights, strict=True)):
        values = torch.stack([torch.ones_like(own).double(), own.double(), _difference(row, number).abs()])
        places = document_positions(row.tokens, row.position_ids)
        sums.index_add_(1, torch.bucketize(places[row.mask], inner, right=True), values[:, row.mask])
    return [
        PositionWeights(first, stop, int(num), weight / num, difference / num)
        for (first, stop), (num, weight, difference) in zip(pairwise(edges), sums.T.tolist())
        if num
    ]


def by_kind(
    rows: Sequence[ScoredRow], weights: Sequence[Float[Tensor, "1 _"]], kinds: Sequence[Bool[Tensor, "kinds _"]]
) -> list[KindShare]:
    """Measure how weight is distributed over kinds of tokens.

    A token may be of several kinds or none, so the fractions do not add up to 1. Kinds without predicted tokens are
    left out.

    Args:
        rows: scored sequences.
        weights: weights of their tokens.
        kinds: kinds of their tokens (`row_kinds`).
    """
    sums = torch.zeros(1 + len(KINDS), 2, dtype=torch.float64)  # of all tokens, and of each kind
    for row, own, marks in zip(rows, weights, kinds, strict=True):
        counted = torch.stack([row.mask[0], own[0].masked_fill(~row.mask[0], 0)]).double()
        sums[0] += counted.sum(dim=1)
        sums[1:] += marks.double() @ counted.T
    (num_all, weight_all), *found = sums.tolist()
    return [
        KindShare(kind, int(num), num / num_all, weight / weight_all if weight_all else math.nan, weight / num)
        for kind, (num, weight) in zip(KINDS, found)
        if num
    ]


def row_kinds(row: ScoredRow, pieces: list[str]) -> Bool[Tensor, "kinds seq"]:
    """Find the kinds of the tokens, in the order of `KINDS`, treating each packed document as a separate text.

    Args:
        row: a scored sequence, packed or not.
        pieces: the text of each of its tokens (`token_pieces`).
    """
    found = [list(token_kinds(pieces[start:stop]).values()) for start, stop in document_spans(row)]
    return torch.cat([torch.tensor(kinds) for kinds in found], dim=1)


def document_spans(row: ScoredRow) -> list[tuple[int, int]]:
    """Start and end of each document of a sequence."""
    begins = (document_positions(row.tokens, row.position_ids)[0] == 0).nonzero()[:, 0].tolist()
    return list(pairwise([*begins, row.tokens.shape[1]]))


def token_kinds(pieces: list[str]) -> dict[str, list[bool]]:
    """Classify tokens by rules of thumb on the words of the text, without any grammar.

    A word is a run of letters, digits and marks, possibly with apostrophes inside; its properties hold for each token
    that contains part of it. A token may be of several kinds, or of none.

    ============  ====================================================================================================
    name          a word with a capital letter and one more letter, which does not begin a sentence
    number        a word that begins with a digit
    punctuation   a token of punctuation or symbols, and spaces
    word start    a token with the first character of a word
    word rest     any other token of a word
    repeat        a word of 3 letters or more that occurred earlier in the text, ignoring case: also "the" and "and"
    ============  ====================================================================================================

    A sentence begins with the text, after an empty line, a quotation mark, or a stop (. ! ? … :) and a space; a stop
    after a single letter ends none ("J. Smith"). So the name in "Mr. Smith" is missed, and titles and German nouns are
    taken for names. Scripts without capital letters have no names, and in those without spaces (Chinese, Japanese,
    Thai) a word is a phrase.

    Args:
        pieces: the text of each token of one document. If a character spans several tokens, all but the last are empty,
            and have the kinds of the last.
    """
    text = "".join(pieces)
    shown = {kind: bytearray(len(text)) for kind in ("name", "number", "word start", "repeat", "word", "mark")}
    for place, character in enumerate(text):
        shown["mark"][place] = unicodedata.category(character)[0] in "PS"
    seen: set[str] = set()
    end, before = 0, ""
    for start, stop in _words(text):
        word = text[start:stop]
        known = word.casefold() in seen and sum(map(str.isalpha, word)) >= 3
        named = _is_capitalized(word) and not _begins_sentence(before, text[end:start])
        for kind, holds in (("word", True), ("name", named), ("number", word[0].isdigit()), ("repeat", known)):
            if holds:
                shown[kind][start:stop] = b"\1" * (stop - start)
        shown["word start"][start] = True
        seen.add(word.casefold())
        end, before = stop, word
    spans = _spans(pieces)
    tokens = {kind: [any(marks[start:stop]) for start, stop in spans] for kind, marks in shown.items()}
    in_word, mark, starts = tokens.pop("word"), tokens.pop("mark"), tokens["word start"]
    tokens["punctuation"] = [holds and not word for holds, word in zip(mark, in_word)]
    tokens["word rest"] = [word and not start for word, start in zip(in_word, starts)]
    return {kind: tokens[kind] for kind in KINDS}


def _words(text: str) -> Iterator[tuple[int, int]]:
    """Start and end of the words: runs of letters, digits and marks, including apostrophes between two of them."""
    inside = [unicodedata.category(character)[0] in "LNM" for character in text]
    for place in range(1, len(text) - 1):
        if text[place] in "'\u2019" and inside[place - 1] and inside[place + 1]:
            inside[place] = True
    for is_word, run in groupby(range(len(text)), inside.__getitem__):
        if is_word:
            start, *rest = run
            yield start, start + len(rest) + 1


def _is_capitalized(word: str) -> bool:
    """Whether a word is capitalized, judged by its parts: Ahab's and O'Brien are, the English I and I'm are not."""
    return any(len(part) > 1 and part[0].isupper() for part in word.replace("\u2019", "'").split("'"))


def _begins_sentence(before: str, between: str) -> bool:
    """Whether a word begins a sentence, given the word `before` it, if any, and the text `between` the two."""
    if not before or not _QUOTATION_MARKS.isdisjoint(between) or between.count("\n") > 1:
        return True
    is_initial = len(before) == 1 and before.isalpha() and between[0] == "."
    return not _STOPS.isdisjoint(between) and any(map(str.isspace, between)) and not is_initial


def _spans(pieces: list[str]) -> list[tuple[int, int]]:
    """Start and end of the text of each token; an empty one has those of the next, whose character it begins."""
    ends = list(accumulate(map(len, pieces)))
    spans = [(end - len(piece), end) for end, piece in zip(ends, pieces)]
    for place in reversed(range(len(pieces) - 1)):
        if not pieces[place]:
            spans[place] = spans[place + 1]
    return spans


def _difference(row: ScoredRow, number: int) -> Float64[Tensor, "1 seq"]:
    with numbered_from(number):
        check_finite({"the long loss": row.long_nll, "the short loss": row.short_nll}, row.mask)
    return row.short_nll.double() - row.long_nll.double()
