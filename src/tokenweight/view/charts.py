"""The charts of the page as SVG: lines, columns, and points with intervals."""

import math
from collections.abc import Mapping, Sequence
from typing import Literal, NamedTuple
from xml.etree.ElementTree import Element, SubElement, tostring

MINUS = "\N{MINUS SIGN}"
Number = int | float
_WIDTH, _HEIGHT, _LEFT, _RIGHT, _TOP, _BOTTOM = 440, 230, 50, 14, 14, 40


class Point(NamedTuple):
    """A value and, if it has one, its interval; None where there is no number."""

    x: Number
    y: Number | None
    low: Number | None = None
    high: Number | None = None


class Series(NamedTuple):
    """The points of one run or model."""

    name: str
    place: int
    """Number of the run on the page, which gives its color."""
    points: Sequence[Point]


class Chart(NamedTuple):
    """A chart, with its numbers as a table."""

    title: str
    x: str
    y: str
    series: Sequence[Series]
    note: str = ""
    kind: Literal["line", "columns", "dots"] = "line"
    log: bool = False
    """Whether the vertical axis is logarithmic; values of 0 are then left out of the drawing."""
    zero: bool = False
    """Whether the vertical axis includes 0."""
    marks: Sequence[tuple[Number, str]] = ()
    """Vertical lines: their positions and labels."""
    labels: Mapping[Number, str] = {}
    """Names of x values in the table, such as the bins around them."""
    labeled: bool = False
    """Whether the horizontal axis shows these names, too."""
    whole: bool = False
    """Whether x values are integers, such as steps, so that the axis shows no others."""

    def rows(self) -> list[list[str]]:
        """The rows of the table: the label of each x, and the values of all series there."""
        found = [{point.x: point for point in series.points} for series in self.series]
        return [
            [self.labels.get(x, short(x)), *(_cell(points.get(x)) for points in found)]
            for x in sorted(set().union(*found))
        ]

    def svg(self) -> str:
        """The drawing as an SVG element, with all text escaped."""
        names = ", ".join(series.name for series in self.series)
        label = f"{self.title}: {self.y} by {self.x}, {names}. The table below has the numbers."
        svg = Element("svg", {"viewBox": f"0 0 {_WIDTH} {_HEIGHT}", "role": "img", "aria-label": label})
        shown = [series._replace(points=list(filter(self._is_shown, series.points))) for series in self.series]
        if any(series.points for series in shown):
            to_x, to_y = _scales(self, [point for series in shown for point in series.points])
            self._draw_axes(svg, to_x, to_y)
            for series in shown:
                self._draw_series(svg, series, to_x, to_y)
        else:
            _text(svg, _WIDTH / 2, _HEIGHT / 2, "no token to show", "middle")
        return tostring(svg, encoding="unicode")

    def _is_shown(self, point: Point) -> bool:
        return point.y is not None and math.isfinite(point.y) and (point.y > 0 or not self.log)

    def _draw_axes(self, svg: Element, to_x: "_Scale", to_y: "_Scale") -> None:
        values = ticks(to_y.low, to_y.high, 4)
        for y in [10**power for power in values if power == int(power)] if self.log else values:
            _line(svg, "axis" if y == 0 else "grid", _LEFT, to_y(y), _WIDTH - _RIGHT, to_y(y))
            _text(svg, _LEFT - 6, to_y(y) + 4, short(y), "end")
        labels = self.labels if self.labeled else {x: short(x) for x in ticks(to_x.low, to_x.high, 6, whole=self.whole)}
        for x in list(labels)[:: math.ceil(len(labels) / 7)]:
            _text(svg, to_x(x), _HEIGHT - _BOTTOM + 16, labels[x], "middle")
        _text(svg, (_LEFT + _WIDTH - _RIGHT) / 2, _HEIGHT - 6, self.x, "middle")
        for x, label in self.marks:
            if to_x.low <= x <= to_x.high:
                _line(svg, "mark", to_x(x), _TOP, to_x(x), _HEIGHT - _BOTTOM)
                _text(svg, to_x(x) + 4, _TOP - 2, label, "start")

    def _draw_series(self, svg: Element, series: Series, to_x: "_Scale", to_y: "_Scale") -> None:
        color, places = f"s{series.place % 6}", [(to_x(point.x), to_y(point.y)) for point in series.points]
        if self.kind == "columns":
            width = round(abs(to_x(self._spacing()) - to_x(0)), 1)
            for x, y in places:
                box = {"x": x - width / 2, "y": y, "width": width - 0.5, "height": _HEIGHT - _BOTTOM - y}
                SubElement(svg, "rect", {"class": f"column {color}", **{key: f"{size:g}" for key, size in box.items()}})
            return
        if self.kind == "line":
            path = "".join(f"{'L' if number else 'M'}{x:g} {y:g}" for number, (x, y) in enumerate(places))
            SubElement(svg, "path", {"class": f"line {color}", "d": path})
        for (x, y), point in zip(places, series.points):
            if point.low is not None and point.high is not None:
                _line(svg, f"line {color}", x, to_y(point.low), x, to_y(point.high))
            if self.kind == "dots" or len(places) <= 16:
                SubElement(svg, "circle", {"class": f"dot {color}", "cx": f"{x:g}", "cy": f"{y:g}", "r": "3"})

    def _spacing(self) -> Number:
        """The distance between neighboring points, which is equal for all."""
        first, second, *_ = self.series[0].points
        return second.x - first.x


class _Scale(NamedTuple):
    """A map from values, low to high, to coordinates in the drawing."""

    low: Number
    high: Number
    start: Number
    stop: Number
    log: bool = False

    def __call__(self, value: Number | None) -> float:
        assert value is not None
        share = ((math.log10(value) if self.log else value) - self.low) / (self.high - self.low or 1)
        return round(self.start + share * (self.stop - self.start), 1)


def _scales(chart: Chart, points: Sequence[Point]) -> tuple[_Scale, _Scale]:
    room = chart._spacing() / 2 if chart.kind == "columns" else 0.5 if chart.labeled else 0
    xs = [point.x for series in chart.series for point in series.points]
    ys = [value for point in points for value in point[1:] if value is not None] + [0.0] * chart.zero
    ys = [math.log10(y) for y in ys] if chart.log else ys
    low, high = min(ys), max(ys)
    # The values of a constant, such as a mean weight of 1, differ only by rounding: draw it flat.
    differs = high - low > 1e-6 * max(abs(low), abs(high))
    margin = 0.08 * ((high - low) if differs else abs(high) or 1)
    low -= 0 if chart.zero and low == 0 else margin
    to_x = _Scale(min(xs) - room, max(xs) + room, _LEFT, _WIDTH - _RIGHT)
    top = _TOP + 4 * bool(chart.marks)  # below the label of a mark
    return to_x, _Scale(low, high + margin, _HEIGHT - _BOTTOM, top, chart.log)


def ticks(low: Number, high: Number, num: int, *, whole: bool = False) -> list[Number]:
    """About `num` round numbers from `low` to `high`; with `whole`, integers."""
    least = (high - low) / num or 1
    power = 10 ** math.floor(math.log10(least))
    steps = [factor * power for factor in (1, 2, 2.5, 5, 10) if factor * power >= 0.999 * least]
    step = next((step for step in steps if step == int(step)), 1) if whole else steps[0]
    numbers = range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1)
    return [float(f"{number * step:.12g}") for number in numbers]


def short(number: Number | None) -> str:
    """A number in four digits, or as an integer from a thousand to ten million; a dash for None."""
    if number is None:
        return "\N{EN DASH}"
    return f"{number:,.0f}" if 1000 <= abs(number) < 1e7 else f"{number or 0:.4g}"


def _cell(point: Point | None) -> str:
    if point is None or point.low is None or point.high is None:
        return short(point and point.y)
    return f"{short(point.y)} [{short(point.low)}, {short(point.high)}]"


def _line(svg: Element, look: str, x1: Number, y1: Number, x2: Number, y2: Number) -> None:
    ends = {"x1": x1, "y1": y1, "x2": x2, "y2": y2}
    SubElement(svg, "line", {"class": look, **{key: f"{place:g}" for key, place in ends.items()}})


def _text(svg: Element, x: Number, y: Number, text: str, anchor: str) -> None:
    SubElement(svg, "text", {"x": f"{x:g}", "y": f"{y:g}", "text-anchor": anchor}).text = text
