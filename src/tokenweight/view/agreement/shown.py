"""The agreement of two scorers as tables for the terminal."""

from collections.abc import Iterator, Sequence
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import RenderableType
from rich.table import Table
from rich.text import Text

from tokenweight.view.agreement.measure import Agreement, Differing, Picks
from tokenweight.view.charts import MINUS
from tokenweight.view.terminal import ESCAPES

HEADS = {
    "gain": f"short {MINUS} long",
    "likely_gain": f"p(long) · (short {MINUS} long)",
    "divergence": "divergence",
}
"""Name of each ranking."""


def agreement_view(agreement: Agreement) -> list[RenderableType]:
    """A table of all numbers, and the tokens about which the scorers differ most."""
    first, second = (name.translate(ESCAPES) for name in agreement.names)
    shown = " and ".join(
        f"{name} ({'short context not noted' if size is None else f'{size:,} tokens'})"
        for name, size in zip((first, second), agreement.sizes)
    )
    title = f"{shown}: {agreement.tokens:,} tokens of {agreement.sequences:,} rows, beyond the first window"
    table = _plain(caption=_note(agreement))
    table.add_column("tokens put first by")
    for name in agreement.rank_correlation:
        table.add_column(HEADS[name], justify="right")
    for label, cells in agreement_lines(agreement):
        table.add_row(Text(label), *cells)
    parts: list[RenderableType] = [Text(title, "bold"), table]
    for tokens, more in ((agreement.more, first), (agreement.less, second)):
        parts += [_list(tokens, f"More by {more}", (first, second))] if tokens else []
    return parts


def agreement_lines(agreement: Agreement) -> Iterator[tuple[str, list[str]]]:
    """Lines of the table: name of a number, and its value for each ranking."""
    (first, second), rankings = (name.translate(ESCAPES) for name in agreement.names), list(agreement.rank_correlation)
    correlations = [agreement.rank_correlation[name] for name in rankings]
    yield "rank correlation", ["-" if value is None else f"{value:+.3f}" for value in correlations]
    for share in dict.fromkeys(one.share for one in agreement.picks):
        own = {one.ranking: one for one in agreement.picks if one.share == share}
        picks = [own[name] for name in rankings]
        yield f"top {100 * share:.0f} %: the same tokens", [_share(one.overlap) for one in picks]
        for place, name, other in ((0, first, second), (1, second, first)):
            keys = [_share(one.key_tokens[place]) for one in picks]
            yield f"  {name} in the top of {other}: key tokens", keys
            yield f"  {name} in the top of {other}: net benefit", [_benefit(one, place) for one in picks]


def _benefit(picks: Picks, place: int) -> str:
    found, own = picks.benefit[place], picks.own_benefit[place]
    return _share(found) + (f" (own {_share(own)})" if found is not None and own is not None else "")


def _share(value: float | None) -> str:
    return "-" if value is None else f"{value:.0%}"


def _note(agreement: Agreement) -> str:
    keys, gains = agreement.key_tokens, agreement.mean_gain
    return (
        f"Key tokens: {keys[0]:,} and {keys[1]:,}; mean gain: {gains[0]:+.4f} and {gains[1]:+.4f} nats. In the top 5 % "
        "of other tokens, drawn by chance, are 5 % of anything; of the net benefit, own: in the scorer's own top."
        + ("" if agreement.names_tokens else " No tokenizer was found: tokens are listed by id.")
    )


def _list(tokens: Sequence[Differing], title: str, names: tuple[str, str]) -> Table:
    table = _plain(title=Text(title, "bold"), title_justify="left")
    for name in ("row", "token"):
        table.add_column(name, justify="right")
    table.add_column("text", overflow="fold")
    for name in names:
        table.add_column(Text(f"{name}\nlong  short"), justify="right")
    for one in tokens:
        text = Text(one.before[-30:]).append(one.token, "bold underline").append(one.after[:12])
        losses = (f"{long:.2f} {short:6.2f}" for long, short in zip(one.long_nll, one.short_nll))
        table.add_row(str(one.row), str(one.position), text, *losses)
    return table


def _plain(**look: Any) -> Table:
    return Table(box=SIMPLE_HEAD, collapse_padding=True, pad_edge=False, caption_justify="left", **look)
