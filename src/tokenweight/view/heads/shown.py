"""Retrieval heads for the terminal, and as the cells of a page."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from rich.color import Color, blend_rgb
from rich.console import RenderableType
from rich.style import Style
from rich.text import Text

from tokenweight.view.terminal import ESCAPES, INK, ORANGES

_LISTED = 20  # heads that are named


class Cell(NamedTuple):
    """One head on the map."""

    text: str
    """Tenths of its score, rounded down; a dot below 0.1."""
    level: int
    """Strength of its tint, 0 to 8."""
    title: str


def head_map(heads: Mapping[str, Any]) -> list[tuple[int, list[Cell]]]:
    """The cells of each layer, with its number.

    Args:
        heads: record of the heads of a model in an evaluation.
    """
    return [
        (layer, [_cell(layer, head, score) for head, score in enumerate(scores)])
        for layer, scores in zip(heads["layers"], heads["scores"])
    ]


def _cell(layer: int, head: int, score: float) -> Cell:
    tenths = min(9, int(10 * score + 1e-9))
    return Cell(str(tenths) if tenths else "·", round(8 * score), f"layer {layer}, head {head}: {score:.2f}")


def heads_line(heads: Mapping[str, Any]) -> str:
    """Number of retrieval heads, and the best ones."""
    found: Sequence[Sequence[Any]] = heads["retrieval_heads"]
    total = sum(map(len, heads["scores"]))
    line = f"{len(found)} of {total} heads ({len(found) / total:.1%}) have a retrieval score above 0.1"
    listed = ", ".join(f"{layer}.{head} ({score:.2f})" for layer, head, score in found[:_LISTED])
    return line + (f": {listed}" if found else "") + (", …" if len(found) > _LISTED else "")


def heads_view(name: str, heads: Mapping[str, Any]) -> list[RenderableType]:
    """A map, layers down and heads across, with the tenths of each score, and a list of the best heads."""
    rows = head_map(heads)
    width = max(len(str(layer)) for layer, _ in rows)
    drawn = Text(f"{'layer':>{width + 5}}\n", "dim")
    for layer, cells in rows:
        drawn.append(f"{layer:>{width + 5}} ", "dim")
        for cell in cells:
            drawn.append(f" {cell.text}", _look(cell.level))
        drawn.append("\n")
    title = f"{name.translate(ESCAPES)}: retrieval score of each head, in tenths, over {heads['samples']} texts"
    return [Text(title, "bold"), drawn, Text(heads_line(heads))]


def _look(level: int) -> Style:
    if not level:
        return Style(dim=True)
    return Style(color=INK, bgcolor=Color.from_triplet(blend_rgb(*ORANGES, level / 8)))
