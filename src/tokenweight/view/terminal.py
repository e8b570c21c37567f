"""Text tinted by the loss weight of each token, for the terminal. Nothing here prints."""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import accumulate, groupby
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float
from rich import box
from rich.cells import set_cell_size
from rich.color import Color, ColorTriplet, blend_rgb
from rich.console import Console, ConsoleOptions, Group
from rich.measure import Measurement
from rich.style import Style
from rich.table import Table
from rich.text import Text
from torch import Tensor

from tokenweight.method import Weighting

# Orange and blue are distinguishable with every common color blindness. Each ramp runs from a hint of the color to its
# full tint; dark ink has a contrast of at least 6 on all of it, so the tints work on dark and light terminals.
ORANGES = ColorTriplet(255, 240, 222), ColorTriplet(245, 145, 50)
_BLUES = ColorTriplet(232, 242, 252), ColorTriplet(105, 168, 222)
INK = Color.from_rgb(26, 26, 26)
# No text may act on the terminal, break the XML of a picture or be invisible: control characters, line
# separators, bidirectional controls, invisible characters and non-characters are shown as escapes. Tabs and line breaks
# stay, and joiners, which some scripts and emoji need.
_CONTROLS = (range(9), range(11, 32), range(127, 160), range(0x2028, 0x202F), range(0x2066, 0x206A), (0xFFFE, 0xFFFF))
_INVISIBLE = (0xAD, 0x61C, 0x200B, 0x200E, 0x200F, *range(0x2060, 0x2065), 0xFEFF, *range(0xFFF9, 0xFFFC))
ESCAPES = {code: ascii(chr(code))[1:-1] for codes in (*_CONTROLS, _INVISIBLE) for code in codes}
"""For `str.translate`: escapes of characters that could act on a page or a terminal."""
_ONE_LINE = ESCAPES | {ord("\n"): "⏎", ord("\t"): " "}
_BEFORE, _AFTER = 30, 12  # characters of context around a token in the table, where there is room


def tint_level(weight: float) -> int | None:
    """Strength of a token's tint: log2(weight) in quarters, from -8 to 8; None for weight 0.

    Raises:
        ValueError: if the weight is negative or not finite.
    """
    if not 0 <= weight < math.inf:
        raise ValueError(f"a token has weight {weight}: expected a finite number, 0 or more")
    return round(4 * max(-2.0, min(2.0, math.log2(weight)))) if weight else None


def tint(weight: float) -> Style:
    """Style of a token of this weight.

    Above 1 it is orange and bold, from 2 also underlined; below 1 blue. The color deepens with log2(weight), up to
    weights 4 and 1/4, in steps, so that a picture needs few styles. About 1 (0.92 to 1.09) a token is left as it is,
    and 0 (not trained) is dim.

    Raises:
        ValueError: if the weight is negative or not finite.
    """
    level = tint_level(weight)
    if level is None:
        return Style(dim=True)
    if level == 0:
        return Style()
    background = blend_rgb(*(ORANGES if level > 0 else _BLUES), abs(level) / 8)
    bold = True if level > 0 else None
    return Style(color=INK, bgcolor=Color.from_triplet(background), bold=bold, underline=True if weight >= 2 else None)


def passage(pieces: list[str], weights: Float[Tensor, " seq"], *, tinted: bool = True) -> Text:
    """The text, each token tinted by its weight; or, without color, between marks (`legend`).

    The space before a word stays untinted, so that no tint trails at the end of a line. Line breaks are kept; one with
    a weight above 1 is marked ⏎, since it is otherwise invisible.

    Args:
        pieces: texts of the tokens (`token_pieces`).
        weights: one per piece.
        tinted: False for marks.

    Raises:
        ValueError: if a weight is negative or not finite.
    """
    if not tinted:
        return _marked(pieces, weights.tolist())
    runs: list[tuple[Style, str]] = []
    for piece, weight in zip(pieces, weights.tolist(), strict=True):
        style, shown = tint(weight), piece.translate(ESCAPES)
        if style.bold:
            shown = shown.replace("\n", "⏎\n")
        word = (shown.lstrip(" ") or shown) if style.bgcolor else shown
        runs += [(Style(), shown.removesuffix(word)), (style, word)]
    text = Text()
    for style, run in groupby((run for run in runs if run[1]), key=lambda run: run[0]):
        text.append("".join(part for _, part in run), style)
    return text


def _marked(pieces: list[str], weights: list[float]) -> Text:
    text = Text()
    for marks, group in groupby(zip(pieces, weights), key=lambda pair: _marks(pair[1])):
        run = "".join(piece for piece, _ in group).translate(ESCAPES)
        words = run.strip(" \n")
        before, _, after = run.partition(words) if words else (run, "", "")
        text.append(before + (words and words.join(marks)) + after)
    return text


def _marks(weight: float) -> tuple[str, str]:
    """The marks around tokens of this weight, without color."""
    style = tint(weight)
    if style.dim:
        return "((", "))"
    if style.bold:
        return ("[[", "]]") if style.underline else ("[", "]")
    return ("(", ")") if style.bgcolor else ("", "")


def legend(*, tinted: bool = True) -> Text:
    """The key of the tints, or of the marks, in one line."""
    if not tinted:
        names = {"0, not trained": 0.0, "below 1": 0.5, "above 1": 1.5, "2 or more": 2.0}
        return Text("weight  " + " ".join(name.join(_marks(weight)) for name, weight in names.items()))
    samples = {"¼ or less": 0.25, "½": 0.5, "1": 1.0, "2": 2.0, "4 or more": 4.0}
    text = Text("weight  ").append("0, not trained", tint(0.0))
    for label, weight in samples.items():
        style = tint(weight)
        margin = Style(bgcolor=style.bgcolor)
        text.append(" ").append(" ", margin).append(label, style).append(" ", margin)
    return text


def summary(weighting: Weighting, weights: Float[Tensor, " seq"], mask: Bool[Tensor, " seq"]) -> Text:
    """Summarize the weights of a sequence in one line.

    The effective number of tokens is (sum w)^2 / sum w^2: all of them with equal weights, n with n equal weights and
    zeros elsewhere.

    Args:
        weighting: weighting that gave the weights.
        weights: one per token.
        mask: True where a token is predicted; the others are not counted.
    """
    predicted = weights[mask].double()
    num, squares = len(predicted), predicted.square().sum().item()
    if not num:
        return Text(f"{weighting} · no token of this sequence is predicted")
    total, num_zero = predicted.sum().item(), int((predicted == 0).sum())
    effective = total**2 / squares if squares else 0.0
    return Text(
        f"{weighting} · mean weight {total / num:.2f} · {num_zero / num:.1%} weigh 0 · "
        f"effective tokens {effective:,.1f} of {num:,} ({effective / num:.1%})"
    )


class Listed(NamedTuple):
    """One of the tokens with the largest weights."""

    position: int
    weight: float
    long: float
    """Its losses with the long and the short context, in nats."""
    short: float
    before: int | None
    """The nearest earlier position with the same piece (`seen_before`)."""


def listed(
    pieces: list[str],
    weights: Float[Tensor, " seq"],
    long_nll: Float[Tensor, " seq"],
    short_nll: Float[Tensor, " seq"],
    mask: Bool[Tensor, " seq"],
    num: int,
) -> list[Listed]:
    """The tokens with the largest weights, as `top_tokens` lists them."""
    weight, long, short = weights.tolist(), long_nll.tolist(), short_nll.tolist()
    places = torch.nonzero(mask & (weights != 0)).flatten().tolist()
    places.sort(key=lambda place: (-weight[place], -abs(long[place] - short[place]), place))
    seen = seen_before(pieces)
    return [Listed(place, weight[place], long[place], short[place], seen[place]) for place in places[:num]]


def top_tokens(
    pieces: list[str],
    weights: Float[Tensor, " seq"],
    long_nll: Float[Tensor, " seq"],
    short_nll: Float[Tensor, " seq"],
    mask: Bool[Tensor, " seq"],
    *,
    num: int = 12,
    tinted: bool = True,
) -> Table:
    """List the tokens with the largest weights, and where in the sequence each of them was seen before.

    Ties are broken by larger |long - short|, then by earlier position. Tokens of weight 0 are left out. The last
    columns are the nearest earlier position with the same piece, for pieces of at least two letters or digits, and its
    distance in tokens; the text there is shown below the token.

    Args:
        pieces: texts of the tokens (`token_pieces`).
        weights: one per piece.
        long_nll: loss of each token with the long context, in nats.
        short_nll: loss with the short context, in nats.
        mask: True where a token is predicted; nothing else is listed, and no loss outside is read.
        num: largest number of tokens in the table.
        tinted: False for the marks of `passage` around each token, or |…| if its weight has none.
    """
    starts, text = [0, *accumulate(map(len, pieces))], "".join(pieces)
    table = Table(box=box.SIMPLE_HEAD, collapse_padding=True, caption="losses in nats", caption_justify="left")
    table.add_column("position", justify="right", no_wrap=True)
    table.add_column("token in context\nand where it was before")
    for header in LOSSES:
        table.add_column(header.replace(" ", "\n", 1), justify="right", no_wrap=True)
    for token in listed(pieces, weights, long_nll, short_nll, mask, num):
        marks = ("", "") if tinted else next(filter(any, (_marks(token.weight), ("|", "|"))))
        look = tint(token.weight) + Style(bold=True)
        shown = [_InContext(text, starts[token.position], starts[token.position + 1], look, marks)]
        if token.before is not None:
            marks = ("", "") if tinted else ("|", "|")
            earlier = starts[token.before], starts[token.before + 1]
            shown.append(_InContext(text, *earlier, Style(), marks, around=Style(dim=True)))
        table.add_row(str(token.position), Group(*shown), *cells(token))
    return table


LOSSES = ("long", "short", "short - long", "weight", "seen before", "tokens ago")
"""Names of the `cells`."""


def cells(token: Listed) -> list[str]:
    """The numbers of a token in the list."""
    seen = ["-", "-"] if token.before is None else [str(token.before), str(token.position - token.before)]
    return [
        f"{token.long:.2f}",
        f"{token.short:.2f}",
        f"{token.short - token.long:+.2f}",
        f"{token.weight:.2f}",
        *seen,
    ]


def in_context(text: str, start: int, stop: int, before: int, after: int) -> tuple[str, str, str]:
    """text[start:stop] without the space before it, with that many characters of context, on one line."""
    token = text[start:stop].lstrip(" ") or text[start:stop]
    left = text[: stop - len(token)][-before:] if before else ""
    shown = token.translate(_ONE_LINE) or "…"  # part of a character, which the next tokens complete
    return left.translate(_ONE_LINE), shown, text[stop : stop + after].translate(_ONE_LINE)


@dataclass(frozen=True)
class _InContext:
    """text[start:stop] in context, cut to one line of the available width.

    It begins in the same column in every row of a table.
    """

    text: str
    start: int
    stop: int
    style: Style
    marks: tuple[str, str]
    around: Style | str = ""

    def __rich_measure__(self, console: Console, options: ConsoleOptions) -> Measurement:
        return Measurement(16, _BEFORE + self.stop - self.start + _AFTER)

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterator[Text]:
        room = min(_BEFORE, options.max_width // 2) - len(self.marks[0])
        before, token, after = in_context(self.text, self.start, self.stop, room, _AFTER)
        before = set_cell_size(before[::-1], room)[::-1]
        line = Text(before, self.around).append(token.join(self.marks), self.style).append(after)
        line.truncate(options.max_width)
        yield line


def seen_before(pieces: list[str]) -> list[int | None]:
    """The nearest earlier position of each piece, ignoring spaces; None for punctuation and single letters."""
    last: dict[str, int] = {}
    places: list[int | None] = []
    for place, piece in enumerate(map(str.strip, pieces)):
        places.append(last.get(piece))
        if sum(map(str.isalnum, piece)) >= 2:
            last[piece] = place
    return places
