"""Charts of the page: what is drawn, read back from the SVG, against the numbers."""

import re
import xml.etree.ElementTree as ET

import pytest

from tokenweight.view.charts import MINUS, Chart, Point, Series, short, ticks

DASH, XS = "\N{EN DASH}", [0, 10, 20, 40]


def drawn(**settings):
    values = [3.0, 1.0, 0.5, 2.0]
    series = [Series("a", 0, [Point(x, y) for x, y in zip(XS, values)])]
    return ET.fromstring(Chart("Title", **{"x": "step", "y": "nats", "series": series, **settings}).svg())


def places(svg):
    """The corners of every line that is drawn."""
    paths = [path.get("d") for path in svg.findall("path")]
    return [[tuple(map(float, pair.split())) for pair in re.split("[ML]", path)[1:]] for path in paths]


def grid(svg):
    """(height, value) of the labels of the vertical axis."""
    return [(float(text.get("y")) - 4, float(text.text)) for text in svg.findall("text[@text-anchor='end']")]


@pytest.mark.parametrize("zero", [False, True])
def test_a_line_goes_through_its_points_as_the_grid_says(zero):
    svg = drawn(zero=zero)
    ((*corners,),) = places(svg)
    assert [(x - corners[0][0]) / (corners[-1][0] - corners[0][0]) for x, _ in corners] == pytest.approx(
        [x / 40 for x in XS], abs=1e-3
    )
    (y1, v1), *_, (y2, v2) = grid(svg)
    slope = (v2 - v1) / (y2 - y1)
    assert [v1 + slope * (y - y1) for _, y in corners] == pytest.approx([3.0, 1.0, 0.5, 2.0], abs=0.02)
    assert (0 in [value for _, value in grid(svg)]) == zero


def test_columns_stand_on_the_floor_and_a_logarithmic_axis_leaves_out_what_is_0():
    points = [Point(x, y) for x, y in ((-1, 0.01), (0, 1.0), (1, 0.0), (2, 100.0))]
    svg = drawn(series=[Series("a", 2, points)], kind="columns", log=True)
    bars = [{key: float(bar.get(key)) for key in ("x", "y", "width", "height")} for bar in svg.findall("rect")]
    assert len(bars) == 3
    assert len({round(bar["y"] + bar["height"], 1) for bar in bars}) == 1
    middles = [bar["x"] + bar["width"] / 2 for bar in bars]
    assert (middles[2] - middles[1]) / (middles[1] - middles[0]) == pytest.approx(2, abs=0.05)
    assert (bars[0]["y"] - bars[1]["y"]) == pytest.approx(bars[1]["y"] - bars[2]["y"], abs=0.3)  # equal ratios
    assert [value for _, value in grid(svg)] == [0.01, 1, 100]


def test_intervals_are_drawn_where_there_are_some_and_the_table_has_them():
    points = [Point(0, 1.0, 0.5, 1.5), Point(1, 2.0), Point(2, None)]
    chart = Chart("T", "x", "y", [Series("a", 0, points)], kind="dots", labels={0: "0 to 4", 1: "5 to 9"}, labeled=True)
    svg = ET.fromstring(chart.svg())
    (interval,) = [line for line in svg.findall("line") if "line" in line.get("class")]
    dots = svg.findall("circle")
    assert len(dots) == 2
    assert float(interval.get("y1")) > float(dots[0].get("cy")) > float(interval.get("y2"))
    assert chart.rows() == [["0 to 4", "1 [0.5, 1.5]"], ["5 to 9", "2"], ["2", DASH]]


def test_series_with_different_points_share_a_table():
    series = [Series("a", 0, [Point(1, 5.0), Point(2, 6.0)]), Series("b", 1, [Point(2, 7.0)])]
    chart = Chart("T", "step", "y", series)
    assert chart.rows() == [["1", "5", DASH], ["2", "6", "7"]]
    assert len(places(ET.fromstring(chart.svg()))) == 2


def test_a_constant_is_flat_although_it_differs_by_rounding():
    svg = drawn(series=[Series("a", 0, [Point(1, 1.0), Point(2, 1 - 6e-9)])])
    labels = [value for _, value in grid(svg)]
    assert len(set(labels)) == len(labels) > 0
    assert len({y for _, y in places(svg)[0]}) == 1


@pytest.mark.parametrize("points", [[], [Point(0, None)], [Point(0, float("nan"))]])
def test_without_a_number_there_is_a_word_instead(points):
    assert [text.text for text in drawn(series=[Series("a", 0, points)])] == ["no token to show"]


def test_no_name_is_read_as_markup():
    svg = drawn(series=[Series("<b>&amp;", 0, [Point(0, 1.0)])], marks=[(0, "</text><script>")], x='"<i>')
    assert {element.tag for element in svg.iter()} <= {"svg", "line", "text", "path", "circle"}
    assert "</text><script>" in [text.text for text in svg.findall("text")]
    assert '"<i>' in svg.get("aria-label")


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [(0, 10, [0, 2.5, 5, 7.5, 10]), (0.5, 3.2, [1, 2, 3]), (-4, 4, [-4, -2, 0, 2, 4]), (0, 1e-6, None), (7, 7, [7])],
)
def test_ticks_are_round_numbers_inside(low, high, expected):
    found = ticks(low, high, 4)
    assert all(low - 1e-9 <= tick <= high + 1e-9 for tick in found)
    assert expected is None or found == expected


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [(1, 2, [1, 2]), (1, 4, [1, 2, 3, 4]), (0, 10, [0, 5, 10]), (3, 3, [3]), (0, 100, [0, 25, 50, 75, 100])],
)
def test_ticks_of_steps_are_whole(low, high, expected):
    assert ticks(low, high, 4, whole=True) == expected
    svg = drawn(series=[Series("a", 0, [Point(low, 1.0), Point(high, 2.0)])], whole=True)
    shown = [text.text for text in svg.findall("text[@text-anchor='middle']")][:-1]  # the last is the name of the axis
    assert all("." not in text for text in shown)


def test_the_words_beside_a_mark_are_above_every_line():
    svg = drawn(marks=[(5, "first window ends")], zero=True)
    (words,) = [text for text in svg.findall("text") if text.text == "first window ends"]
    assert float(words.get("y")) < min(y for line in places(svg) for _, y in line)


def test_numbers_are_short():
    numbers = [None, 0, -0.0, 0.123456, 12.3456, 999.96, 1234.5, 9_999_999.0, 2e-6]
    assert list(map(short, numbers)) == [DASH, "0", "0", "0.1235", "12.35", "1000", "1,234", "9,999,999", "2e-06"]
    assert MINUS == "\u2212"
