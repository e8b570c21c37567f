"""Terminal views as HTML, in a notebook or as a standalone page, without external resources or scripts."""

from dataclasses import dataclass
from html import escape
from pathlib import Path

from tokenweight.data import ScoredRow
from tokenweight.method import Weighting, parse_weighting
from tokenweight.records import replaced
from tokenweight.view.excerpt import LOOKS, look, split_piece
from tokenweight.view.shown import Shown, choose_passage
from tokenweight.view.terminal import LOSSES, Listed, cells, in_context, listed

_KEY = {"0, not trained": 0.0, "¼ or less": 0.25, "½": 0.5, "1": 1.0, "2": 2.0, "4 or more": 4.0}
_BEFORE, _AFTER = 30, 20  # characters around a token in the list


@dataclass(frozen=True)
class Html:
    """HTML that a notebook shows in place of the object."""

    title: str
    fragment: str
    """An element that includes its own style."""

    def _repr_html_(self) -> str:
        return self.fragment

    def __repr__(self) -> str:
        return f"<{self.title}>"


def notebook(
    row: ScoredRow,
    weighting: Weighting | str = "dense",
    *,
    start: int | None = None,
    num: int = 1000,
    top: int = 12,
    name: str = "",
) -> Html:
    """Show a scored sequence in a notebook: a passage tinted by weight as in the report, and the `top` tokens.

    Hovering over a token shows its weight and losses. Text is never interpreted as markup.

    Args:
        row: scored sequence, as of `read_row` or `score_text`.
        weighting: weighting that tints it, or its text, as in `parse_weighting`.
        start: number of the first token of the passage; by default the passage has the largest sum of weights.
        num: number of tokens in the passage.
        top: number of tokens in the list below it.
        name: name of the text or folder, for the title.

    Raises:
        ValueError: if `start` is not a token of the sequence, or `num` is less than 1; as `parse_weighting` does.

    Example:
        >>> notebook(read_row("scored", 0), "sparse:keep=0.2")
    """
    weighting = parse_weighting(weighting) if isinstance(weighting, str) else weighting
    return to_html(choose_passage(row, weighting, start=start, num=num, name=name), top=top)


def to_html(shown: Shown, *, top: int = 12) -> Html:
    """Convert a chosen passage to HTML, as `notebook` does."""
    row = shown.row
    tokens = listed(shown.pieces, shown.weights, row.long_nll[0], row.short_nll[0], row.mask[0], top)
    key = " ".join(f'<span class="t {LOOKS[look(weight)]}">{label}</span>' for label, weight in _KEY.items())
    fragment = (
        f'<div class="tokenweight shown"><style>{style("tint.css")}</style>'
        f"<p><strong>{escape(shown.title)}</strong></p>"
        f'<p class="legend">weight {key}</p><p class="quiet">{escape(shown.summary.plain)}</p>'
        f'<div class="passage" dir="auto">{_passage(shown)}</div>{_table(shown.pieces, tokens)}</div>'
    )
    return Html(shown.title, fragment)


def write_html(shown: Html, path: str | Path) -> None:
    """Write a page with the passage. The file is complete or absent; an existing one is replaced."""
    page = (
        '<!doctype html>\n<html lang="en">\n<meta charset="utf-8">\n'
        "<meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; style-src 'unsafe-inline'\">\n"
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(shown.title)}</title>\n<style>body {{ margin: 0 }}</style>\n{shown.fragment}\n</html>\n"
    )
    with replaced(Path(path)) as part:
        part.write_text(page, encoding="utf-8")


def style(name: str) -> str:
    """Read a style sheet of the folder `page`."""
    return (Path(__file__).parent / "page" / name).read_text(encoding="utf-8")


def _passage(shown: Shown) -> str:
    """The tokens of the passage, each in a span with its look and, on hovering, its numbers."""
    row, span = shown.row, shown.span
    columns = (shown.weights, row.long_nll[0], row.short_nll[0], row.mask[0])
    spans = []
    numbered = enumerate(zip(shown.pieces[span], *(column[span].tolist() for column in columns)), span.start)
    for position, (piece, weight, long, short, predicted) in numbered:
        space, text = split_piece(piece)
        losses = f"weight {weight:.3g}, long {long:.2f}, short {short:.2f}" if predicted else "not predicted"
        body = escape(text).replace("\n", "<i>\n</i>")
        spans.append(f'{space}<span class="t {LOOKS[look(weight)]}" title="{position}: {losses}">{body}</span>')
    return "".join(spans)


def _table(pieces: list[str], tokens: list[Listed]) -> str:
    if not tokens:
        return ""
    text, ends = "".join(pieces), [0]
    for piece in pieces:
        ends.append(ends[-1] + len(piece))
    names = ("position", *LOSSES, "token in context")
    head = "".join(f"<th>{name}</th>" for name in names)
    rows = []
    for token in tokens:
        span = ends[token.position], ends[token.position + 1]
        before, own, after = in_context(text, *span, _BEFORE, _AFTER)
        before, own, after = map(escape, (before.rjust(_BEFORE), own, after))
        context = f'{before}<span class="t {LOOKS[look(token.weight)]}">[{own}]</span>{after}'
        numbers = "".join(f"<td>{cell}</td>" for cell in (token.position, *cells(token)))
        rows.append(f"<tr>{numbers}<td>{context}</td></tr>")
    return f"<table><caption>losses in nats</caption><tr>{head}</tr>{''.join(rows)}</table>"
