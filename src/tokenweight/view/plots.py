"""Figures for papers and screens, drawn from numbers; nothing here reads a file or needs a display."""

import math
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.ticker import LogLocator, MaxNLocator, PercentFormatter

from tokenweight.evaluate import Entry, short_names
from tokenweight.plan import Cost
from tokenweight.view.charts import MINUS
from tokenweight.view.style import BLACK, BLUE, GRAY, ORANGE, STYLES, add_head, add_note, line_looks, new_panels, styled
from tokenweight.view.summaries import Histogram, KindShare, PositionWeights


def difference_figure(histogram: Histogram, *, note: str = "", style: str = "screen") -> Figure:
    """Draw a histogram of token gains from the long context; the outer bars include what lies beyond them.

    Args:
        histogram: result of `difference_histogram`.
        note: what else to say (`add_note`).
        style: one of `STYLES`.
    """
    edges, counts = histogram
    with styled(style):
        figure, (axes,) = new_panels(style, [0.62])
        colors = [ORANGE if start + stop > 0 else BLUE for start, stop in pairwise(edges)]
        axes.bar(edges[:-1], counts, edges[1] - edges[0], align="edge", color=colors)
        axes.set(yscale="log", ylim=(0.5, 2 * max(1, *counts)), xlim=(edges[0], edges[-1]), ylabel="tokens")
        axes.yaxis.set_major_formatter("{x:g}")
        axes.set_xlabel(f"short {MINUS} long loss (nats)")
        signs = {edges[0]: "≤", edges[-1]: "≥"}
        axes.set_xticks([edges[0], edges[0] / 2, 0, edges[-1] / 2, edges[-1]])
        axes.xaxis.set_major_formatter(lambda x, _: f"{signs.get(x, '')}{x:g}".replace("-", MINUS))
        for place, side, text in ((0, "left", "short is better"), (1, "right", "long is better")):
            axes.text(place, 1.02, text, ha=side, transform=axes.transAxes)
        add_head(figure, axes, style, "What the long context gives to the loss of a token")
        add_note(figure, style, note)
    return figure


def position_figure(
    bins: Mapping[str, Sequence[PositionWeights]],
    *,
    window: int | None = None,
    smooth: bool = False,
    note: str = "",
    style: str = "screen",
) -> Figure:
    """Draw the mean weight by position, and below it the mean difference of the losses, which no weighting changes.

    Args:
        bins: results of `by_position`, by the name of the weighting.
        window: tokens of the short context; that many tokens at the start have no longer context, and are shaded.
        smooth: the bins are full windows, of which there are few: their means are points, joined by lines.
        note: what else to say (`add_note`).
        style: one of `STYLES`.
    """
    drawn: dict[str, Any] = {"marker": "o", "markersize": 3} if smooth else {"drawstyle": "steps-mid"}
    with styled(style):
        figure, (upper, lower) = new_panels(style, [0.5, 0.3])
        for (name, own), look in zip(bins.items(), line_looks(len(bins))):
            upper.plot(_middles(own), [part.mean_weight for part in own], label=name, **look, **drawn)
        own = next(iter(bins.values()))
        lower.plot(_middles(own), [part.mean_difference for part in own], color=BLACK, **drawn)
        upper.set(ylabel="mean weight")
        stop = max(part.stop for part in own)
        places = range(0, stop + 1, 2 ** max(0, math.ceil(math.log2(stop / 5))))
        lower.set(
            ylabel=f"|short {MINUS} long|\n(nats)", xlabel=f"position in the document (tokens{_thousands(places)})"
        )
        lower.set(xlim=(0, stop), ylim=(0, None))
        lower.set_xticks(places, map(_tokens, places))
        if window is not None:
            for axes in (upper, lower):
                axes.axvspan(0, window, color=GRAY, alpha=0.35, lw=0)
            upper.text(0, 1.02, "first window", va="bottom", transform=upper.transAxes)
        add_head(figure, upper, style, "Where the weight is")
        add_note(figure, style, note)
    return figure


def kind_figure(shares: Mapping[str, Sequence[KindShare]], *, note: str = "", style: str = "screen") -> Figure:
    """Draw each kind of token's fraction of the tokens, and of the weight.

    Args:
        shares: results of `by_kind` for the same sequences, by the name of the weighting.
        note: what else to say (`add_note`).
        style: one of `STYLES`.
    """
    kinds = [share.kind for share in next(iter(shares.values()))]
    tokens = [share.token_share for share in next(iter(shares.values()))]
    series = [("tokens", tokens, GRAY)]
    colors = [look["color"] for look in line_looks(len(shares))]
    series += [
        (f"weight, {name}", [share.weight_share for share in own], color)
        for (name, own), color in zip(shares.items(), colors)
    ]
    height = 0.8 / len(series)
    with styled(style):
        figure, (axes,) = new_panels(style, [0.15 + 0.03 * len(kinds) * len(series)])
        for number, (name, values, color) in enumerate(series):
            places = [kind + height * (number - (len(series) - 1) / 2) for kind in range(len(kinds))]
            axes.barh(places, values, 0.9 * height, color=color, label=name)
        axes.set_yticks(range(len(kinds)), kinds)
        axes.invert_yaxis()
        axes.tick_params(axis="y", length=0)
        axes.grid(visible=False, axis="y")
        axes.xaxis.set_major_formatter(PercentFormatter(1, decimals=0))
        axes.set_xlabel("share (a token may be of several kinds)")
        add_head(figure, axes, style, "Which kinds of tokens have the weight")
        add_note(figure, style, note)
    return figure


def passage_figure(
    pieces: Sequence[str], weights: Mapping[str, Sequence[float]], *, note: str = "", style: str = "screen"
) -> Figure:
    """Draw a passage token by token, with its weight under each weighting: orange above 1, blue below, gray 0.

    Args:
        pieces: text of each token.
        weights: of the same tokens, by the name of the weighting.
        note: what else to say (`add_note`).
        style: one of `STYLES`.
    """
    names, rows = list(weights), list(zip(*weights.values()))
    with styled(style):
        figure, (axes,) = new_panels(style, [0.045 * len(pieces) + 0.3])
        # Log scale: 8 times the mean is as far from white as an eighth of it.
        shades = [[min(1, max(-1, math.log(max(weight, 1e-9)) / math.log(8))) for weight in row] for row in rows]
        colors = LinearSegmentedColormap.from_list("weights", [BLUE, "white", ORANGE])
        axes.pcolormesh(shades, cmap=colors, vmin=-1, vmax=1, edgecolors="white", linewidth=1)
        size = min(0.8 * STYLES[style].font, 120 * STYLES[style].width / (7 * len(names)))
        for line, row in enumerate(rows):
            for column, weight in enumerate(row):
                if weight == 0:
                    axes.add_patch(Rectangle((column, line), 1, 1, facecolor=GRAY, edgecolor="white", linewidth=1))
                light = abs(shades[line][column]) < 0.6 or shades[line][column] > 0 or weight == 0
                text = f"{weight:.1f}" if 0.095 <= weight < 99.95 else f"{weight:.0f}" if weight else ""
                place = (column + 0.5, line + 0.5)
                axes.text(*place, text, ha="center", va="center", size=size, color=BLACK if light else "white")
        axes.set_xticks([column + 0.5 for column in range(len(names))], names, rotation=90)
        axes.set_yticks([line + 0.5 for line in range(len(pieces))], map(_shown, pieces))
        axes.invert_yaxis()
        axes.tick_params(length=0, labeltop=True, labelbottom=False)
        axes.grid(visible=False)
        axes.spines[:].set_visible(False)
        add_head(figure, axes, style, "Weight of each token of one passage")
        add_note(figure, style, note)
    return figure


def step_figure(runs: Mapping[str, Sequence[Mapping[str, Any]]], *, style: str = "screen") -> Figure:
    """Draw the weighted and the unweighted training loss by step, and the effective fraction of tokens.

    Args:
        runs: lines of `metrics.jsonl` by the name of the run, with `step`, `loss`, and, if logged, `unweighted_loss`
            and `effective_share`.
        style: one of `STYLES`.
    """
    has_share = any("effective_share" in line for lines in runs.values() for line in lines)
    with styled(style):
        figure, panels = new_panels(style, [0.55, 0.25][: 1 + has_share])
        for (name, lines), look in zip(runs.items(), line_looks(len(runs))):
            marked: dict[str, Any] = {"marker": "o", "markersize": 2.5} if len(lines) <= 20 else {}
            panels[0].plot(*_column(lines, "loss"), label=name, **look, **marked)
            if any("unweighted_loss" in line for line in lines):
                thin: dict[str, Any] = {"color": look["color"], "linestyle": ":", "linewidth": 0.8}
                panels[0].plot(*_column(lines, "unweighted_loss"), label=f"{name}, unweighted", **thin)
            if any("effective_share" in line for line in lines):
                panels[-1].plot(*_column(lines, "effective_share"), **look, **marked)
        panels[0].set_ylabel("loss (nats)")
        panels[-1].set_xlabel("step")
        panels[-1].xaxis.set_major_locator(MaxNLocator(5, integer=True))
        if has_share:
            panels[1].set(ylabel="effective\ntokens", ylim=(0, None))
            panels[1].yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
        add_head(figure, panels[0], style, "Training loss")
    return figure


def loss_figure(table: Sequence[Sequence[Entry]], edges: Sequence[int], *, style: str = "screen") -> Figure:
    """Draw the loss by position of every model, and its change from the first model with its interval.

    Args:
        table: result of `compare`, with the measures `position_N`.
        edges: edges of their bins; a bin begins at N.
        style: one of `STYLES`.
    """
    names, places = [f"position_{edge}" for edge in edges[:-1]], [i + 0.5 for i in range(len(edges) - 1)]
    with styled(style):
        figure, panels = _compared(style, table, names, places, "loss (nats)", "Loss by position")
        panels[-1].set_xticks(range(len(edges)), map(_tokens, edges))
        panels[-1].set_xlabel(f"position in the document (tokens{_thousands(edges)})")
    return figure


def benefit_figure(table: Sequence[Sequence[Entry]], sizes: Sequence[int], *, style: str = "screen") -> Figure:
    """Draw what each model gains from the full context over a short one, and how that changed.

    Args:
        table: result of `compare`, with the measures `benefit_N`.
        sizes: tokens N of the short contexts.
        style: one of `STYLES`.
    """
    names, places = [f"benefit_{size}" for size in sizes], list(map(float, range(len(sizes))))
    with styled(style):
        title = "What the whole context gives, compared with a short one"
        figure, panels = _compared(style, table, names, places, "benefit (nats)", title)
        panels[-1].set_xticks(range(len(sizes)), map(_tokens, sizes))
        panels[-1].set(xlabel=f"short context (tokens{_thousands(sizes)})", xlim=(-0.5, len(sizes) - 0.5))
    return figure


def cost_figure(costs: Sequence[Cost], *, style: str = "screen") -> Figure:
    """Draw the FLOPs of an optimizer step and the memory of one GPU by sequence length, with a line for each mode.

    Args:
        costs: the run and the growth of a `Budget`.
        style: one of `STYLES`.
    """
    modes = list(dict.fromkeys(cost.mode for cost in costs))
    with styled(style):
        figure, panels = new_panels(style, [0.42, 0.42])
        for mode, look in zip(modes, line_looks(len(modes))):
            own = sorted((cost for cost in costs if cost.mode == mode), key=lambda cost: cost.length)
            lengths = [cost.length for cost in own]
            panels[0].plot(lengths, [cost.flops.total for cost in own], label=mode, **look)
            panels[1].plot(lengths, [cost.peak.total / 2**30 for cost in own], **look)
        lengths = sorted({cost.length for cost in costs})
        for axes, name in zip(panels, ("FLOPs of a step", "GiB per GPU")):
            axes.set(xscale="log", yscale="log", ylabel=name)
        panels[1].yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        panels[1].yaxis.set_major_formatter("{x:g}")
        panels[1].set(xlabel=f"length of a row (tokens{_thousands(lengths)})")
        panels[1].set_xticks(lengths, [_tokens(number) for number in lengths])
        panels[1].minorticks_off()
        add_head(figure, panels[0], style, "What a longer context costs")
    return figure


def _compared(
    style: str, table: Sequence[Sequence[Entry]], names: Sequence[str], places: Sequence[float], unit: str, title: str
) -> tuple[Figure, list[Axes]]:
    """Draw a panel of values and, if there are several models, one of changes from the first."""
    labels = short_names(table)
    figure, panels = new_panels(style, [0.5, 0.35] if len(table) > 1 else [0.62])
    for number, (row, label, look) in enumerate(zip(table, labels, line_looks(len(table)))):
        entries = {entry.measure: entry for entry in row}
        found = [entries[name] for name in names]
        panels[0].plot(places, _values(found, "value"), marker="o", markersize=3, label=label, **look)
        if number:
            shift = 0.16 * (number - len(table) / 2)  # side by side, so that every interval is visible
            shifted = [place + shift for place in places]
            color = look["color"]
            panels[1].vlines(shifted, _values(found, "low"), _values(found, "high"), color=color, linewidth=1.3)
            panels[1].plot(shifted, _values(found, "change"), marker="o", markersize=3.5, linestyle="", color=color)
    panels[0].set_ylabel(unit)
    if len(table) > 1:
        panels[1].axhline(0, color=BLACK, linewidth=0.6)
        has_interval = any(entry.low is not None for row in table for entry in row if entry.measure in names)
        panels[1].set_ylabel("change, with\n95 % interval" if has_interval else "change,\nno interval")
    add_head(figure, panels[0], style, title)
    return figure, panels


def _middles(bins: Sequence[PositionWeights]) -> list[float]:
    return [(part.first + part.stop) / 2 for part in bins]


def _column(lines: Sequence[Mapping[str, Any]], key: str) -> tuple[list[int], list[float]]:
    """Steps and values of a column, where present."""
    found = [(int(line["step"]), float(line[key])) for line in lines if key in line]
    return [step for step, _ in found], [value for _, value in found]


def _values(entries: Sequence[Entry], field: str) -> list[float]:
    values = [getattr(entry, field) for entry in entries]
    return [math.nan if value is None else value for value in values]


def _tokens(number: int) -> str:
    return f"{number // 1024}k" if number and number % 1024 == 0 else str(number)


def _shown(piece: str) -> str:
    """The text of a token on an axis, with visible spaces, and dollar signs that start no formula."""
    text = "".join("·" if char == " " else char if char.isprintable() else "↵" for char in piece[:16])
    return text.replace("$", r"\$")


def _thousands(numbers: Sequence[int]) -> str:
    return "; 1k is 1024" if any(_tokens(number).endswith("k") for number in numbers) else ""
