"""Scored sequences as the page shows them: passages of text, and the weights of every weighting at every setting."""

from pathlib import Path
from typing import Any, NamedTuple

from jaxtyping import Float
from torch import Tensor

from tokenweight.data import ScoredRow, load_scores, read_rows, token_pieces
from tokenweight.method import WEIGHTINGS, Combination, Dense, ShortContext, Weighting, document_positions
from tokenweight.view.corpus import corpus_gains
from tokenweight.view.summaries import KindShare, by_kind, by_position, difference_histogram, document_spans, row_kinds
from tokenweight.view.terminal import ESCAPES, seen_before, summary, tint_level

LOOKS = ["zero", "", *(f"down l{n}" for n in range(1, 9)), *(f"up l{n}" for n in range(1, 5))]
LOOKS += [f"up l{n} far" for n in range(4, 9)]
"""The CSS classes of a tinted token."""


class Excerpt(NamedTuple):
    """Amount of the scored folders shown on the page, and selection of their scores."""

    rows: int = 1
    """Number of sequences shown from each folder, from the first."""
    num: int = 2048
    """Number of tokens shown from each sequence; the charts are of whole sequences."""
    size: int | None = None
    """Tokens of the short context, where scores of several are stored."""
    model: str | None = None
    """Model that computes the long losses, in place of stored ones."""
    smooth: bool = False
    """Whether weight by position is averaged over the tokens that each window scores."""


class Scheme(NamedTuple):
    """A type of weighting on the page: one choice of the switch, with the stops of its slider."""

    label: str
    formula: str
    setting: str | None
    """Name of the setting that the slider changes, if there is one."""
    stops: list[float]
    start: int
    """Number of the stop that is the default."""
    first: int
    """Number of the first stop in `SETTINGS`."""


def _schemes() -> tuple[list[Scheme], list[Weighting]]:
    schemes: list[Scheme] = []
    settings: list[Weighting] = []
    for kind in WEIGHTINGS:
        if kind.history or not kind.uses <= {"short_nll"} or issubclass(kind, Combination):
            continue  # needs more than the losses of a row, or other weightings
        default, first = kind(), len(settings)
        if kind.knob is None:
            schemes.append(Scheme(kind.__name__, kind.formula, None, [], 0, first))
            settings.append(default)
            continue
        name, stops = kind.knob
        start = stops.index(getattr(default, name))
        schemes.append(Scheme(kind.__name__, kind.formula, name, list(stops), start, first))
        settings += [kind(**{name: stop}) for stop in stops]
    return schemes, settings


SCHEMES, SETTINGS = _schemes()
"""The choices of the switch; and every weighting at every stop of its slider, which the page refers to by index."""
START = SETTINGS.index(Dense())
"""Index of the setting that the page opens with."""


def read_scored(folder: Path, excerpt: Excerpt, name: str = "") -> dict[str, Any]:
    """Read the first sequences of a scored folder, and weight them by every setting of the page; and summarize all, if
    their gains are stored.

    Raises:
        ValueError: if the windows to smooth over are not known.
    """
    data, provenance = load_scores(folder, size=excerpt.size)
    rows = read_rows(folder, 0, excerpt.rows, excerpt.model, size=excerpt.size)
    pieces = [token_pieces(row.tokens[0].tolist(), row.tokenizer) for row in rows]
    weights = [[row.weigh(weighting) for row in rows] for weighting in SETTINGS]
    size = rows[0].size
    windows = windows_of(rows[0], folder) if excerpt.smooth else None
    stores_gains = any(name.startswith("gain_mean_") for name in data.column_names)
    settings = {key: value for key, value in provenance.items() if key not in ("contexts", "environment")}
    if excerpt.model is not None:
        settings["long losses of"] = excerpt.model
    kinds: list[list[KindShare]] = [[] for _ in SETTINGS]
    if rows[0].tokenizer is not None:  # else the pieces are ids, without kinds
        masks = [row_kinds(row, texts) for row, texts in zip(rows, pieces)]
        kinds = [by_kind(rows, own, masks) for own in weights]
    return {
        "size": size,
        "rows": [
            _row(number, row, texts, own, excerpt.num)
            for number, (row, texts, own) in enumerate(zip(rows, pieces, zip(*weights)))
        ],
        "histogram": difference_histogram([_beyond(row, size) for row in rows]),
        "positions": [by_position(rows, own, windows=windows) for own in weights],
        "about_windows": about_windows(rows[0], smooth=excerpt.smooth),
        "gains": corpus_gains(folder, name=name) if stores_gains else [],
        "kinds": kinds,
        "settings": settings,
        "environment": provenance.get("environment", {}),
        "cost": {"rows": len(data), "rows on this page": len(rows)},
    }


def windows_of(row: ScoredRow, folder: Path) -> ShortContext:
    """The short context of a row's scores, over whose windows a curve by position is smoothed."""
    if row.size is None or row.stride is None:
        raise ValueError(f"smooth: {folder} does not say which windows it was scored with")
    return ShortContext(row.size, row.stride)


def about_windows(row: ScoredRow, *, smooth: bool) -> str:
    """Note on features of a curve by position that come from the windows of the scores, not from the text."""
    if row.size is None or row.stride is None:
        return ""
    if smooth:
        return f"Means over the {row.stride:,} tokens that each window scores, after the first window."
    return (
        f"Within a window, the context of the scored tokens grows from {row.size - row.stride:,} to {row.size - 1:,}, "
        f"which gives differences and weights a saw-tooth of {row.stride:,} tokens that is not in the text: --smooth "
        "averages over windows, and a smaller stride lessens it."
    )


def _beyond(row: ScoredRow, size: int | None) -> ScoredRow:
    """Mask the first window of each document, where the short context is the long one."""
    if size is None:
        return row
    return row._replace(mask=row.mask & (document_positions(row.tokens, row.position_ids) >= size))


def _row(
    number: int, row: ScoredRow, pieces: list[str], weights: tuple[Float[Tensor, "1 _"], ...], num: int
) -> dict[str, Any]:
    """Find the passage in which the losses differ most, and describe its tokens by every setting of the page."""
    length = len(pieces)
    difference = (row.short_nll - row.long_nll).abs().where(row.mask, 0)[0]
    start = int(difference.unfold(0, min(num, length), 1).sum(dim=1).argmax())
    shown = slice(start, start + num)
    ago: list[int | None] = []
    for first, stop in document_spans(row):
        places = seen_before(pieces[first:stop])
        ago += [None if place is None else t - place for t, place in enumerate(places)]
    looks = [[look(weight) for weight in own[0, shown].tolist()] for own in weights]
    return {
        "number": number,
        "summaries": [summary(weigh, own[0], row.mask[0]).plain for weigh, own in zip(SETTINGS, weights)],
        "tokens": [(*split_piece(piece), LOOKS[own]) for piece, own in zip(pieces[shown], looks[START])],
        "reader": {
            "start": start,
            "length": length,
            "selected": int(difference[shown].argmax()),
            "ago": ago[shown],
            "long": _losses(row.long_nll, row.mask, shown),
            "short": _losses(row.short_nll, row.mask, shown),
            "looks": ["".join(chr(ord("a") + number) for number in own) for own in looks],
            "weights": [[_rounded(weight, "%.3g") for weight in own[0, shown].tolist()] for own in weights],
        },
    }


def look(weight: float) -> int:
    """Index in `LOOKS` of the look of a token of this weight."""
    level = tint_level(weight)
    if level is None:
        return LOOKS.index("zero")
    if level == 0:
        return LOOKS.index("")
    return LOOKS.index(f"{'up' if level > 0 else 'down'} l{abs(level)}{' far' * (weight >= 2)}")


def split_piece(piece: str) -> tuple[str, str]:
    """Split into the spaces before a word, which stay untinted, and the rest, with invisible characters escaped."""
    rest = piece.lstrip(" ") or piece
    return piece.removesuffix(rest), rest.translate(ESCAPES)


def _losses(nll: Float[Tensor, "1 seq"], mask: Tensor, shown: slice) -> list[float | int | None]:
    """Losses to four decimals; None where no token is predicted."""
    pairs = zip(nll[0, shown].tolist(), mask[0, shown].tolist())
    return [_rounded(loss, "%.4f") if counts else None for loss, counts in pairs]


def _rounded(number: float, form: str) -> float | int:
    """Round a number for JSON; a whole one becomes an int, which is written without a decimal point."""
    rounded = float(form % number)
    return int(rounded) if rounded.is_integer() else rounded
