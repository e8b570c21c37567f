"""The style of figures, and writing them to files without a display."""

import contextlib
import io
import textwrap
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib.style
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from tokenweight.records import replaced


class FigureStyle(NamedTuple):
    """Size of a figure, and whether it has a title; in a paper, the caption replaces it."""

    width: float
    """Width in inches."""
    font: float
    """Font size in points."""
    dpi: int
    """Dots per inch of the PNG."""
    titled: bool


STYLES = {"paper": FigureStyle(3.3, 8, 300, False), "screen": FigureStyle(7.0, 11, 150, True)}
"""A column of a two-column paper, and a page in a browser."""
# The hues of `show`, orange and blue, are distinguishable with every common color blindness. Neighbors differ in
# lightness and line style, so that they also do in print without color.
BLUE, ORANGE, BLACK, GRAY = "#1f5a92", "#f59132", "#333333", "#b8bec6"
_SERIES = (
    (BLUE, "-"),
    (ORANGE, "--"),
    (BLACK, "-."),
    ("#69a8de", (0, (1, 1))),
    ("#8a4a12", (0, (5, 1, 1, 1, 1, 1))),
    ("#8d959e", (0, (8, 2))),
)


def write_figure(figure: Figure, path: str | Path, *, style: str = "screen") -> None:
    """Write `path`.svg and `path`.png. They are complete or absent, and the same figure gives the same bytes.

    Letters are drawn as shapes, so that the SVG looks the same wherever it is shown.

    Args:
        figure: figure that was drawn with the same `style`.
        path: path without the ending; existing files are replaced.
    """
    for ending, metadata in (("svg", {"Date": None}), ("png", {})):
        file = io.BytesIO()
        with styled(style):
            figure.savefig(file, format=ending, dpi=STYLES[style].dpi, metadata=metadata)
        with replaced(Path(f"{path}.{ending}")) as part:
            part.write_bytes(file.getvalue())


@contextlib.contextmanager
def styled(style: str) -> Iterator[None]:
    """Draw with matplotlib's defaults and the settings here, ignoring the user's matplotlibrc."""
    settings = {
        "font.size": STYLES[style].font,
        "axes.labelsize": "medium",
        "figure.titlesize": "large",
        "legend.fontsize": "medium",
        "legend.frameon": False,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.linewidth": 0.6,
        "axes.grid": True,
        "axes.axisbelow": True,
        "grid.color": "#e3e6ea",
        "grid.linewidth": 0.6,
        "lines.linewidth": 1.3,
        "svg.fonttype": "path",
        "svg.hashsalt": "tokenweight",  # otherwise ids in the file would be random
    }
    with matplotlib.style.context(["default", settings]):
        yield


def new_panels(style: str, heights: Sequence[float]) -> tuple[Figure, list[Axes]]:
    """Create panels below one another that share the horizontal axis; heights are in units of the width."""
    width = STYLES[style].width
    figure = Figure(figsize=(width, width * sum(heights)), layout="constrained")
    grid = figure.subplots(len(heights), sharex=True, squeeze=False, height_ratios=heights)
    return figure, list(grid[:, 0])


def add_head(figure: Figure, axes: Axes, style: str, title: str) -> None:
    """Write the title above all panels, and the legend of `axes`, with as many entries per line as fit."""
    handles, names = axes.get_legend_handles_labels()
    shown = title if STYLES[style].titled else None
    if not names:
        figure.suptitle(shown or "")
        return
    room = STYLES[style].width * 72 / (0.6 * STYLES[style].font)  # characters of a line
    columns = max(1, min(len(names), int(room // (6 + max(map(len, names))))))
    figure.legend(handles, names, loc="outside upper center", ncols=columns, title=shown, title_fontsize="large")


def add_note(figure: Figure, style: str, note: str) -> None:
    """Set a note as the label of the figure, for its caption; where figures have titles, write it below, too."""
    figure.set_label(note)
    if note and STYLES[style].titled:
        letters = int(STYLES[style].width * 72 / (0.5 * STYLES[style].font))
        text = textwrap.fill(note, letters)
        figure.supxlabel(text, x=0.01, ha="left", size="small", color="#63605a")


def line_looks(num: int) -> list[dict[str, Any]]:
    """Colors and dashes for `num` lines; from the seventh on they repeat."""
    return [dict(zip(("color", "linestyle"), _SERIES[i % len(_SERIES)])) for i in range(num)]
