"""The map of retrieval heads: for the terminal, as a figure, and on a page."""

import io

import numpy as np
import pytest
from rich.console import Console

from tokenweight.view import head_figure, heads_view
from tokenweight.view.heads import head_map, heads_line

HEADS = {
    "layers": [0, 2],
    "scores": [[0.0, 0.09], [0.3, 0.62, 1.0]],
    "retrieval_heads": [[2, 2, 1.0], [2, 1, 0.62], [2, 0, 0.3]],
    "samples": 4,
}


def test_a_map_has_the_tenths_of_each_score_and_names_the_heads_above_a_tenth():
    (_, first), (number, second) = head_map(HEADS)
    assert number == 2
    assert [(cell.text, cell.level) for cell in (*first, *second)] == [("·", 0), ("·", 1), ("3", 2), ("6", 5), ("9", 8)]
    assert second[1].title == "layer 2, head 1: 0.62"
    assert heads_line(HEADS).startswith("3 of 5 heads (60.0%)")
    assert heads_line(HEADS).endswith("2.2 (1.00), 2.1 (0.62), 2.0 (0.30)")
    assert heads_line({**HEADS, "retrieval_heads": []}).startswith("0 of 5 heads")
    many = [[0, head, 0.5] for head in range(30)]
    assert heads_line({**HEADS, "retrieval_heads": many}).endswith("0.19 (0.50), …")


@pytest.mark.parametrize("colors", [None, "truecolor"])
def test_the_terminal_shows_the_map_with_colors_or_without(colors):
    console = Console(file=io.StringIO(), width=90, color_system=colors, force_terminal=colors is not None)
    console.print(*heads_view("a\x1b model", HEADS))
    shown = console.file.getvalue()
    assert "\x1b model" not in shown
    if colors is None:
        lines = [line.split() for line in shown.splitlines()]
        assert ["0", "·", "·"] in lines
        assert ["2", "3", "6", "9"] in lines


@pytest.mark.parametrize("style", ["paper", "screen"])
def test_the_figure_has_every_score_in_its_place_and_none_where_there_is_no_head(style):
    figure = head_figure(HEADS, style=style)
    axes = figure.axes[0]
    (mesh,) = axes.collections
    np.testing.assert_array_equal(mesh.get_array().filled(np.nan), [[0, 0.09, np.nan], [0.3, 0.62, 1]])
    assert mesh.get_clim() == (0, 1)
    assert [label.get_text() for label in axes.get_yticklabels()] == ["0", "2"]
    assert axes.get_ylim()[0] > axes.get_ylim()[1]  # the first layer is at the top
