"""The map of retrieval heads as a figure."""

from collections.abc import Mapping
from typing import Any

import numpy as np
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure

from tokenweight.view.heads.shown import heads_line
from tokenweight.view.style import BLUE, ORANGE, add_head, add_note, new_panels, styled


def head_figure(heads: Mapping[str, Any], *, style: str = "screen") -> Figure:
    """Draw the retrieval score of every head, layers down and heads across.

    Args:
        heads: record of the heads of a model in an evaluation.
        style: one of `STYLES`.
    """
    layers, scores = heads["layers"], heads["scores"]
    drawn = np.full((len(layers), max(map(len, scores))), np.nan)  # layers may have different numbers of heads
    for place, own in enumerate(scores):
        drawn[place, : len(own)] = own
    with styled(style):
        figure, (axes,) = new_panels(style, [0.2 + 0.025 * len(layers)])
        colors = LinearSegmentedColormap.from_list("scores", ["white", ORANGE, BLUE])
        mesh = axes.pcolormesh(drawn, cmap=colors, vmin=0, vmax=1, edgecolors="#e3e6ea", linewidth=0.3)
        bar = figure.colorbar(mesh, ax=axes, label="retrieval score")
        bar.outline.set_visible(False)
        axes.invert_yaxis()
        axes.grid(visible=False)
        axes.set(xlabel="head", ylabel="layer")
        for axis, names in ((axes.yaxis, layers), (axes.xaxis, range(drawn.shape[1]))):
            step = -(-len(names) // 16)
            axis.set_ticks([place + 0.5 for place in range(0, len(names), step)], list(map(str, names[::step])))
        add_head(figure, axes, style, "Which heads copy the fact that is asked for")
        add_note(figure, style, heads_line(heads))
    return figure
