"""Figures: what is drawn are the numbers, read back from the axes; what is written is the same in every run."""

import xml.etree.ElementTree as ET

import matplotlib
import pytest
from matplotlib.colors import to_hex

from tokenweight.evaluate import Measure, compare
from tokenweight.plan import Cost, Peak, Step
from tokenweight.view import plots, write_figure
from tokenweight.view.style import BLUE, ORANGE, STYLES
from tokenweight.view.summaries import Histogram, KindShare, PositionWeights

HISTOGRAM = Histogram([-1.5, -0.5, 0.5, 1.5, 2.5], [3, 0, 1, 12345])
BINS = {
    "dense": [
        PositionWeights(0, 64, 63, 0.75, 0.0),
        PositionWeights(64, 128, 64, 1.5, 0.3),
        PositionWeights(192, 250, 9, 0.9, 2),
    ],
    "sparse:keep=0.1": [
        PositionWeights(0, 64, 63, 0, 0.0),
        PositionWeights(64, 128, 64, 2, 0.3),
        PositionWeights(192, 250, 9, 1, 2),
    ],
}
SHARES = {
    "dense": [KindShare("name", 9, 0.1, 0.125, 1.25), KindShare("word start", 80, 0.8, 0.75, 1.1)],
    "longce": [KindShare("name", 9, 0.1, 0.25, 2.5), KindShare("word start", 80, 0.8, 0.5, 0.6)],
}
PIECES = [" the", " answer", "\n", "42", "$", " \u00e9t\u00e9"]
WEIGHTS = {
    "uniform": [1.0] * 6,
    "sparse:keep=0.2": [0.0, 5.0, 0, 0, 0, 0],
    "longce": [0.02, 1.5, 12.25, 0.2, 123.4, 0.095],
}
RUNS = {
    "plain": [{"step": 1, "loss": 3.0}, {"step": 5, "loss": 2.5}],
    "dense": [
        {"step": step, "loss": 3 / step, "unweighted_loss": 4 / step, "effective_share": 0.1 * step}
        for step in range(1, 4)
    ],
}
COSTS = [
    Cost(1024 * k, mode, Step(1e15 * k * factor, *[0.0] * 5), Peak("loss", 2.0**31 * k * factor, *[0.0] * 5), None)
    for k in (2, 1)
    for factor, mode in ((1, "uniform"), (2, "self-scored"))
]
EDGES, SIZES = [0, 256, 512, 1024, 1500], [256, 512]


def table():
    """Of three models on four documents; in the last bin only one document has tokens, so it has no interval."""
    models = []
    for seed, name in enumerate(["a/base", "a/dense", "b/sparse"]):
        measures = []
        for number, key in enumerate([f"position_{edge}" for edge in EDGES[:-1]] + [f"benefit_{n}" for n in SIZES]):
            tokens = [0.0, 0, 7, 0] if key == "position_1024" else [5.0, 6, 7, 8]
            total = [tokens[i] * (3 - number / 9 - seed * (0.1 + i / 40)) for i in range(4)]
            measures.append(Measure(key, "long", "nats", "lower", total, tokens))
        models.append((name, measures))
    return compare(models)


FIGURES = {
    "differences": lambda style: plots.difference_figure(HISTOGRAM, style=style),
    "position": lambda style: plots.position_figure(BINS, window=60, style=style),
    "kinds": lambda style: plots.kind_figure(SHARES, style=style),
    "passage": lambda style: plots.passage_figure(PIECES, WEIGHTS, style=style),
    "steps": lambda style: plots.step_figure(RUNS, style=style),
    "losses": lambda style: plots.loss_figure(table(), EDGES, style=style),
    "one model": lambda style: plots.loss_figure(table()[:1], EDGES, style=style),
    "cost": lambda style: plots.cost_figure(COSTS, style=style),
    "benefit": lambda style: plots.benefit_figure(table(), SIZES, style=style),
}


def lines(axes):
    """Points of the lines that have a name, by that name."""
    return {line.get_label(): (list(line.get_xdata()), list(line.get_ydata())) for line in axes.get_lines()}


def test_bars_are_as_high_as_the_counts_and_tell_which_context_is_better():
    (axes,) = FIGURES["differences"]("paper").axes
    bars = axes.patches
    assert [bar.get_height() for bar in bars] == HISTOGRAM.counts
    assert [(bar.get_x(), bar.get_x() + bar.get_width()) for bar in bars] == [
        (-1.5, -0.5),
        (-0.5, 0.5),
        (0.5, 1.5),
        (1.5, 2.5),
    ]
    assert [to_hex(bar.get_facecolor()) for bar in bars] == [BLUE, BLUE, ORANGE, ORANGE]
    assert [label.get_text() for label in axes.get_xticklabels()][::4] == ["≤\N{MINUS SIGN}1.5", "≥2.5"]
    low, high = axes.get_ylim()
    assert 0 < low < 1
    assert high > 12345


def test_lines_by_position_are_means_in_the_middle_of_their_bins():
    upper, lower = FIGURES["position"]("paper").axes
    middles = [32, 96, 221]
    assert lines(upper) == {"dense": (middles, [0.75, 1.5, 0.9]), "sparse:keep=0.1": (middles, [0, 2, 1])}
    assert list(lines(lower).values()) == [(middles, [0, 0.3, 2])]
    for axes in (upper, lower):
        (shaded,) = axes.patches
        assert (shaded.get_x(), shaded.get_width()) == (0, 60)
    assert not plots.position_figure(BINS).axes[0].patches


def test_bars_of_kinds_are_as_long_as_the_shares():
    (axes,) = FIGURES["kinds"]("paper").axes
    assert [label.get_text() for label in axes.get_yticklabels()] == ["name", "word start"]
    found = {bars.get_label(): [bar.get_width() for bar in bars] for bars in axes.containers}
    assert found == {"tokens": [0.1, 0.8], "weight, dense": [0.125, 0.75], "weight, longce": [0.25, 0.5]}
    middles = [bar.get_y() + bar.get_height() / 2 for bars in axes.containers for bar in bars]
    assert [round(middle) for middle in middles] == [0, 1] * 3
    assert len(set(middles)) == 6


def test_each_token_of_a_passage_has_its_weights_in_numbers_and_in_colors():
    (axes,) = plots.passage_figure(PIECES, WEIGHTS).axes
    assert [label.get_text() for label in axes.get_yticklabels()] == [
        "·the",
        "·answer",
        "↵",
        "42",
        r"\$",
        "·\u00e9t\u00e9",
    ]
    assert [label.get_text() for label in axes.get_xticklabels()] == list(WEIGHTS)
    written = {(text.get_position()[0], text.get_position()[1]): text.get_text() for text in axes.texts}
    assert [written[2.5, line + 0.5] for line in range(6)] == ["0", "1.5", "12.2", "0.2", "123", "0.1"]
    assert [written[1.5, line + 0.5] for line in range(6)] == ["", "5.0", "", "", "", ""]
    assert len(axes.patches) == 5
    mesh = axes.collections[0]
    uniform, kept, most = (mesh.cmap(mesh.norm(mesh.get_array().reshape(6, 3)[1, column])) for column in (0, 1, 2))
    assert uniform == pytest.approx((1, 1, 1, 1), abs=0.01)
    assert kept[2] < most[2] < 1  # the more above 1, the less blue is in it


def test_losses_by_step_are_those_that_were_logged_and_shares_have_a_panel_of_their_own():
    upper, lower = FIGURES["steps"]("paper").axes
    own = RUNS["dense"]
    assert lines(upper) == {
        "plain": ([1, 5], [3, 2.5]),
        "dense": ([1, 2, 3], [line["loss"] for line in own]),
        "dense, unweighted": ([1, 2, 3], [line["unweighted_loss"] for line in own]),
    }
    (shares,) = lines(lower).values()
    assert shares == ([1, 2, 3], [line["effective_share"] for line in own])
    assert len(plots.step_figure({"plain": RUNS["plain"]}).axes) == 1


@pytest.mark.parametrize(
    ("figure", "numbers", "name"), [("losses", EDGES[:-1], "position"), ("benefit", SIZES, "benefit")]
)
def test_models_are_drawn_with_the_changes_and_intervals_of_their_comparison(figure, numbers, name):
    upper, lower = FIGURES[figure]("paper").axes
    entries = [[{e.measure: e for e in row}[f"{name}_{number}"] for number in numbers] for row in table()]
    assert [values for _, values in lines(upper).values()] == [[entry.value for entry in row] for row in entries]
    assert list(lines(upper)) == ["base", "dense", "sparse"]
    changes = [list(line.get_ydata()) for line in lower.get_lines() if line.get_marker() == "o"]
    assert changes == [[entry.change for entry in row] for row in entries[1:]]
    for drawn, row in zip(lower.collections, entries[1:], strict=True):
        limits = [segment[:, 1].tolist() for segment in drawn.get_segments() if len(segment)]
        assert limits == [[entry.low, entry.high] for entry in row if entry.low is not None]
        assert limits
    assert (name == "position") == any(entry.low is None for entry in entries[1])


def test_without_an_interval_the_axis_promises_none():
    alone = [[entry._replace(low=None, high=None) for entry in row] for row in table()]
    assert [plots.loss_figure(rows, EDGES).axes[1].get_ylabel() for rows in (table(), alone)] == [
        "change, with\n95 % interval",
        "change,\nno interval",
    ]


def test_positions_have_ticks_at_powers_of_two_and_the_name_of_the_window_is_above_the_panel():
    bins = {"dense": [PositionWeights(64 * i, 64 * (i + 1), 64, 1.0, 1.0) for i in range(32)]}
    upper, lower = plots.position_figure(bins, window=512, style="paper").axes
    assert [label.get_text() for label in lower.get_xticklabels()] == ["0", "512", "1k", "1536", "2k"]
    (words,) = upper.texts
    assert words.get_position()[1] > 1
    assert words.get_transform() == upper.transAxes


def test_costs_are_lines_of_each_mode_over_the_lengths():
    figure = FIGURES["cost"]("screen")
    for axes, scale in zip(figure.axes, (1e15, 2.0)):
        assert [line.get_xdata().tolist() for line in axes.lines] == [[1024, 2048]] * 2
        assert [line.get_ydata().tolist() for line in axes.lines] == [[scale, 2 * scale], [2 * scale, 4 * scale]]
    assert [line.get_label() for line in figure.axes[0].lines] == ["uniform", "self-scored"]
    assert [label.get_text() for label in figure.axes[1].get_xticklabels()] == ["1k", "2k"]


def test_models_are_named_by_their_last_folder_unless_that_is_the_same():
    twice = [[entry._replace(model=f"{row[0].model}/final") for entry in row] for row in table()]
    (upper, _) = plots.loss_figure(twice, EDGES).axes
    assert list(lines(upper)) == ["a/base/final", "a/dense/final", "b/sparse/final"]
    upper.figure.draw_without_rendering()
    (_, lower) = FIGURES["losses"]("paper").axes
    assert [label.get_text() for label in lower.get_xticklabels()] == ["0", "256", "512", "1k", "1500"]
    assert lower.get_xlabel().endswith("(tokens; 1k is 1024)")


@pytest.mark.parametrize(("name", "style"), [("position", "paper"), ("steps", "screen")])
def test_every_figure_is_written_twice_with_the_same_bytes_whatever_the_user_has_set(name, style, tmp_path):
    write_figure(FIGURES[name](style), tmp_path / "one", style=style)
    with matplotlib.rc_context({"font.size": 31, "svg.fonttype": "none", "axes.facecolor": "red"}):
        write_figure(FIGURES[name](style), tmp_path / "two", style=style)
    for ending in ("svg", "png"):
        assert (tmp_path / f"one.{ending}").read_bytes() == (tmp_path / f"two.{ending}").read_bytes()
    assert (tmp_path / "one.png").read_bytes().startswith(b"\x89PNG\r\n")
    svg = ET.fromstring((tmp_path / "one.svg").read_text(encoding="utf-8"))
    kinds = {element.tag.rpartition("}")[2] for element in svg.iter()}
    assert "path" in kinds
    assert not {"text", "image", "date"} & kinds  # letters are shapes, and nothing tells when it was drawn
    assert float(svg.get("width").removesuffix("pt")) == pytest.approx(72 * STYLES[style].width)
    assert {file.name for file in tmp_path.iterdir()} == {"one.svg", "one.png", "two.svg", "two.png"}


@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("name", FIGURES)
def test_nothing_is_cut_off_and_no_words_cover_each_other(name, style):
    figure = FIGURES[name](style)
    figure.draw_without_rendering()
    inside = figure.bbox.padded(1)  # half a pixel of rounding on each side
    texts = [text for axes in figure.axes for text in [*axes.texts, axes.xaxis.label, axes.yaxis.label]]
    for axis in (axis for axes in figure.axes for axis in (axes.xaxis, axes.yaxis)):
        low, high = sorted(axis.get_view_interval())
        texts += [tick.label1 for tick in axis.get_major_ticks() if low <= tick.get_loc() <= high]
    texts += [text for legend in figure.legends for text in [legend.get_title(), *legend.get_texts()]]
    texts += [figure._suptitle] if figure._suptitle else []
    boxes = [text.get_window_extent() for text in texts if text.get_visible() and text.get_text()]
    boxes = [box for box in boxes if box.width]
    assert all(inside.x0 <= box.x0 and box.x1 <= inside.x1 for box in boxes)
    assert all(inside.y0 <= box.y0 and box.y1 <= inside.y1 for box in boxes)
    # Boxes have room above and below the letters: one that touches another by less than that does not cover it.
    shrunk = [box.padded(0, -0.15 * min(box.height, box.width)) for box in boxes]
    covered = [(a, b) for i, a in enumerate(shrunk) for b in shrunk[:i] if a.overlaps(b)]
    assert not covered
    assert (STYLES[style].titled) == any(
        text.get_text() for text in [*(legend.get_title() for legend in figure.legends), figure._suptitle] if text
    )
