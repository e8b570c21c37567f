"""Tables and figures of `miniature.py`: recall far away against the loss of plain text, beside uniform weights.

    python benchmarks/evidence/frontier.py runs/extension runs/scratch

writes frontier.md, frontier.svg and frontier.png into the first folder, scratch.md, scratch.svg and scratch.png into
the second; spaced.md into that of the real model.
"""

import json
import math
import statistics
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure

from tokenweight.evaluate.intervals import Sums, paired_difference
from tokenweight.view import write_figure

BINS = ((128, 192), (192, 320), (320, 449))
"""Distances of far answers; a measure is the mean over bins."""
REFERENCE = 0.05
"""Plain loss above that of uniform weights up to which a frontier is measured, in nats."""
T95 = (math.nan, 12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)
"""The 97.5 % quantile of Student's t by degrees of freedom."""
FAMILIES = {
    "uniform, by learning rate": ("uniform", "#333333", "-"),
    "dense": ("dense", "#1f5a92", "-"),
    "expected dense": ("expected-dense", "#1f5a92", "--"),
    "gain": ("gain", "#f59132", "-"),
    "expected gain (KL)": ("expected-gain", "#f59132", "--"),
    "bounded gain": ("bounded", "#8a4a12", "-"),
    "expected bounded gain (TV)": ("expected-bounded", "#8a4a12", "--"),
    "count": ("count", "#69a8de", "-"),
    "expected count (KL)": ("expected-count", "#69a8de", "--"),
}
"""Name -> what the names of its arms begin with, followed by their strengths; and the look of its line."""
SINGLE = ("sparse", "longce", "ppmi", "npmi", "keytokens", "rho1", "eslm", "exact", "random-.5", "oracle-.5")
SINGLE += ("wide-uniform", "wide-dense-.5", "wide-expected-bounded-.5", "yarn-uniform", "original-dense-.5")
"""Arms drawn as single points."""
PAIRS = [(f"expected-{name}", name) for name in ("dense", "gain", "bounded", "count")]
"""What the names of arms of an expected form and of its plain form begin with."""
BESIDE = [
    ("wide-dense-.5", "wide-uniform"),
    ("wide-expected-bounded-.5", "wide-uniform"),
    ("expected-dense-.5", "dense-.5"),
    ("expected-bounded-.5", "dense-.75"),
    ("original-dense-.5", "dense-.5"),
]
"""Arms, each with another arm than `uniform` to compare it with."""
DISTANCES = (4096, 8192, 12288, 16384)
"""Edges of the bins of distance for the digits of the real model."""
KEYS = ("far", "far_right", "far_last_right", "far_only_right", "near", "short", "beyond")
Runs = dict[str, dict[tuple[int, ...], dict[str, Any]]]


def read_runs(folder: Path) -> Runs:
    """The records of all arms by unit, but those of units in which an arm is missing."""
    records = [json.loads(path.read_text()) for path in sorted((folder / "runs").glob("*.json"))]
    found: Runs = {}
    for record in records:
        found.setdefault(record["arm"], {})[tuple(record["unit"])] = record
    names = list(json.loads((folder / "settings.json").read_text())["arms"])
    whole = [unit for unit in found.get("uniform", {}) if all(unit in found.get(name, {}) for name in names)]
    return {name: {unit: found[name][unit] for unit in sorted(whole)} for name in names}


def measures(measured: dict[str, Any], bins: Sequence[tuple[int, int]] = BINS) -> dict[str, float]:
    """The measures of one run: of answers the means over bins of distance, of plain tokens the means."""
    distance, older, loss, right = (np.array(measured[key]) for key in ("distance", "older", "loss", "right"))
    found = {}
    for name, chosen in (("last", older > 0), ("only", older == 0)):
        cells = [chosen & (distance >= low) & (distance < high) for low, high in bins]
        found[f"far_{name}"] = statistics.fmean(float(loss[cell].mean()) for cell in cells if cell.any())
        found[f"far_{name}_right"] = statistics.fmean(float(right[cell].mean()) for cell in cells if cell.any())
    for key in ("far", "far_right"):
        found[key] = statistics.fmean(found[key.replace("far", f"far_{name}")] for name in ("last", "only"))
    found["near"] = float(loss[distance < bins[0][0]].mean())
    return found | plain_losses(measured)


def plain_losses(measured: dict[str, Any]) -> dict[str, float]:
    """The mean losses of plain tokens in the first `size` tokens, beyond, and of all."""
    short, beyond = (np.array(measured[key]).sum(axis=0) for key in ("short", "beyond"))
    found = {"short": short[0] / short[1], "beyond": beyond[0] / beyond[1]}
    return found | {"plain": (short[0] + beyond[0]) / (short[1] + beyond[1])}


def interval(values: Iterable[float]) -> tuple[float, float]:
    """Mean of values, one of each unit, and half the width of its 95 % interval by Student's t."""
    values = list(values)
    if len(values) < 2:
        return statistics.fmean(values), math.nan
    width = T95[min(len(values) - 1, len(T95) - 1)] * statistics.stdev(values) / math.sqrt(len(values))
    return statistics.fmean(values), width


def front(points: Iterable[tuple[float, float]]) -> list[tuple[float, float]]:
    """Of points (price, loss), less of both being better, those that no other dominates, by price."""
    kept: list[tuple[float, float]] = []
    for price, loss in sorted(points):
        if not kept or loss < kept[-1][1]:
            kept.append((price, loss))
    return kept


def at_price(points: Iterable[tuple[float, float]], price: float) -> float:
    """The loss of a frontier at a price: linear between its points, that of its nearest end beyond them."""
    prices, losses = zip(*front(points))
    return float(np.interp(price, prices, losses))


def hypervolume(points: Iterable[tuple[float, float]], price: float, loss: float) -> float:
    """The area that points dominate, up to a price and a loss."""
    total, height = 0.0, loss
    for one, other in front(points):
        if one < price and other < height:
            total += (price - one) * (height - other)
            height = other
    return total


class Extension:
    """The runs of an extension, as measures of every arm in every unit."""

    def __init__(self, folder: Path) -> None:
        self.runs = read_runs(folder)
        self.of = {
            arm: {unit: measures(record["measured"]) for unit, record in own.items()} for arm, own in self.runs.items()
        }
        self.units = list(self.of["uniform"])

    def changes(self, arm: str, key: str, other: str = "uniform") -> list[float]:
        """Difference of a measure between an arm and another, per unit."""
        return [self.of[arm][unit][key] - self.of[other][unit][key] for unit in self.units]

    def family(self, begins: str) -> list[str]:
        """The arms of a family: its name alone, or with a strength."""
        return [arm for arm in self.of if arm.rstrip("0123456789.x").rstrip("-") == begins]

    def points(self, arms: Iterable[str], unit: tuple[int, ...]) -> list[tuple[float, float]]:
        """(plain loss, loss of far answers) of arms in a unit."""
        return [(self.of[arm][unit]["plain"], self.of[arm][unit]["far"]) for arm in arms]

    def gains(self, arm: str) -> list[float]:
        """By how much an arm is below the frontier of uniform weights at its own price, of each unit."""
        found, uniform = [], self.family("uniform")
        for unit in self.units:
            ((price, loss),) = self.points([arm], unit)
            found.append(at_price(self.points(uniform, unit), price) - loss)
        return found

    def volumes(self, arms: Sequence[str]) -> list[float]:
        """What arms dominate, of each unit, together with uniform weights at the same rate."""
        found = []
        for unit in self.units:
            ((price, loss),) = self.points(["uniform"], unit)
            found.append(hypervolume(self.points([*arms, "uniform"], unit), price + REFERENCE, loss))
        return found


def cell(values: Sequence[float], form: str = "{:+.3f}") -> str:
    """Mean and, of several values, interval; a star where it leaves out 0."""
    mean, width = interval(values)
    if math.isnan(width):
        return form.format(mean)
    star = "\\*" if abs(mean) > width else ""
    return f"{form.format(mean)}{star} ± {form.format(width).lstrip('+')}"


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table."""
    lines = [head, ["---"] * len(head), *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def extension_tables(found: Extension, prices: dict[str, list[float]]) -> str:
    """What docs/evidence.md shows of the extension."""
    base = {key: statistics.fmean(found.of["uniform"][unit][key] for unit in found.units) for key in KEYS}
    shown = ("far", "far_right", "short", "beyond")
    head = ["arm", "far loss", "far accuracy", "short", "beyond", "gain at equal price", "time"]
    rows = [["uniform", *(f"{base[key]:.3f}" for key in shown), "", "1.00"]]
    for arm in found.of:
        if arm != "uniform":
            own = [cell(found.changes(arm, key)) for key in shown]
            rows.append([arm, *own, cell(found.gains(arm)), f"{time_over_uniform(found.runs, arm):.2f}"])
    predicted = [
        [arm, "∞" if math.isinf(one := statistics.fmean(values)) else f"{one:.4f}", cell(found.changes(arm, "beyond"))]
        for arm, values in prices.items()
    ]
    beside = [
        [arm, other, *(cell(found.changes(arm, key, other)) for key in shown)]
        for arm, other in BESIDE
        if arm in found.of
    ]
    return "\n".join(
        [
            f"{made(found.runs)} {len(found.units)} units. Of uniform's far answers {base['far_only_right']:.3f} were "
            f"right where the value was stated once, {base['far_last_right']:.3f} where others were before.\n",
            table(head, rows),
            table(["arm", "beside", *head[1:5]], beside),
            table(["expected form", "area (strengths)", "plain form's", "more", "units"], areas(found)),
            table(["arm", "predicted", "measured"], predicted),
        ]
    )


def made(runs: Runs) -> str:
    """On what, with what, and of which commit and day the first run was made."""
    record = next(iter(runs["uniform"].values()))["environment"]
    names = ("python", "torch", "transformers", "tokenweight")
    versions = ", ".join(f"{name} {record['versions'][name]}" for name in names)
    return f"{record['device']}; {versions}; commit {record['commit']}; {record['date'][:10]}."


def areas(found: Extension) -> list[list[str]]:
    """For each expected form, what it dominates beside its plain form, in nats² / 1000.

    At the strengths that both have; and, where these are not all, at all that each has."""
    rows = []
    for forms in PAIRS:
        ends = [{arm.removeprefix(form) for arm in found.family(form)} for form in forms]
        both = ends[0] & ends[1]
        for own in ([both, both], ends) if {*ends[0]} != {*ends[1]} else [ends]:
            if not all(own):
                continue
            volumes = [found.volumes([f"{form}{end}" for end in chosen]) for form, chosen in zip(forms, own)]
            more = [1000 * (a - b) for a, b in zip(*volumes)]
            shown = [
                f"{1000 * statistics.fmean(one):.2f} ({', '.join(sorted(end.removeprefix('-') for end in chosen))})"
                for one, chosen in zip(volumes, own)
            ]
            rows.append([forms[0], *shown, cell(more, "{:+.2f}"), signs(more)])
    return rows


def time_over_uniform(runs: Runs, arm: str) -> float:
    """The processor time of an arm beside that of uniform weights, the median over units."""
    return statistics.median(runs[arm][unit]["seconds"] / runs["uniform"][unit]["seconds"] for unit in runs[arm])


def signs(values: Sequence[float]) -> str:
    """How many values are above 0."""
    return f"{sum(value > 0 for value in values)} of {len(values)}"


def frontier_figure(found: Extension) -> Figure:
    """Change of the far loss against the change of the plain loss, with intervals; a line for each family."""
    figure = Figure(figsize=(7, 5), layout="constrained")
    axes = figure.subplots()
    for name, (begins, color, line) in FAMILIES.items():
        arms = found.family(begins)
        points = sorted((interval(found.changes(arm, "plain")), interval(found.changes(arm, "far"))) for arm in arms)
        if points:
            x, y = zip(*((price[0], loss[0]) for price, loss in points))
            errors = {"xerr": [price[1] for price, _ in points], "yerr": [loss[1] for _, loss in points]}
            face = color if line == "-" else "white"
            look = {"color": color, "linestyle": line, "marker": "o", "markersize": 4, "markerfacecolor": face}
            axes.errorbar(x, y, label=name, elinewidth=0.4, **errors, **look)
    for arm in SINGLE:
        if arm in found.of:
            x, y = (statistics.fmean(found.changes(arm, key)) for key in ("plain", "far"))
            axes.annotate(arm, (x, y), fontsize=7, xytext=(4, 3), textcoords="offset points")
            axes.plot([x], [y], marker="x", color="#8d959e", linestyle="")
    axes.set_xscale("symlog", linthresh=0.05)
    ticks = [-0.02, 0, 0.02, 0.05, 0.1, 0.2, 0.5, 1]
    axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
    axes.set(xlim=(-0.025, 1.4), ylim=(-0.62, 0.18))
    axes.set_xlabel("plain text: loss above uniform weights (nats; logarithmic beyond 0.05)")
    axes.set_ylabel("far answers: loss above uniform weights (nats)")
    axes.minorticks_off()
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(color="#e3e6ea", linewidth=0.6)
    figure.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=3, frameon=False, fontsize=7)
    return figure


def curve(record: dict[str, Any], accuracy: Callable[[dict[str, Any]], float]) -> list[tuple[int, float]]:
    """(step, accuracy of the answers) of a run from scratch."""
    return [(one["step"], accuracy(one)) for one in record["curve"]]


def recall(measured: dict[str, Any]) -> float:
    """The share of answers that are right."""
    return float(np.mean(measured["right"]))


def steps_to_half(points: Sequence[tuple[int, float]]) -> int | None:
    """The first step that was measured at which half of the answers are right."""
    return next((step for step, right in points if right >= 0.5), None)


def scratch_tables(runs: Runs) -> str:
    """What docs/evidence.md shows of training from scratch; a run that never recalls half counts as one step more."""
    units = list(runs["uniform"])
    halves = {arm: [steps_to_half(curve(own[unit], recall)) for unit in units] for arm, own in runs.items()}
    last = {arm: [record["curve"][-1]["step"] for record in own.values()] for arm, own in runs.items()}
    steps = {arm: [half or end + 1 for half, end in zip(own, last[arm])] for arm, own in halves.items()}
    noise = {arm: [plain_losses(own[unit]["measured"])["plain"] for unit in units] for arm, own in runs.items()}
    rows = []
    for arm, own in runs.items():
        rows.append(
            [
                arm,
                ", ".join("never" if step is None else f"{step:,}" for step in halves[arm]),
                "" if arm == "uniform" else cell(differences(steps, arm, "uniform"), "{:+,.0f}"),
                ", ".join(f"{recall(own[unit]['measured']):.2f}" for unit in units),
                f"{statistics.fmean(noise[arm]):.3f}" if arm == "uniform" else cell(differences(noise, arm, "uniform")),
                f"{time_over_uniform(runs, arm):.2f}",
            ]
        )
    head = ["arm", "steps until half is recalled, by unit", "beside uniform", "recall at the end", "noise", "time"]
    beside = [
        [proper, form, cell(differences(steps, proper, form), "{:+,.0f}"), cell(differences(noise, proper, form))]
        for proper, form in (("expected-count-.5", "count-.5"), ("expected-gain-.5", "dense-.75"))
        if proper in runs and form in runs
    ]
    return f"{made(runs)}\n\n" + table(head, rows) + "\n" + table(["arm", "beside", "steps", "noise"], beside)


def differences(values: Mapping[str, Sequence[float]], arm: str, other: str) -> list[float]:
    """Of each unit, by how much the value of an arm is above that of another."""
    return [a - b for a, b in zip(values[arm], values[other])]


def spaced_tables(runs: Runs) -> str:
    """Table of the real model for docs/evidence.md: values for uniform weights, changes from them for other arms."""
    measures = {f"digits to {high:,}": (low, high) for low, high in pairwise(DISTANCES)}
    of = {arm: spaced_sums(own.values()) for arm, own in runs.items()}
    rows = []
    for arm, own in of.items():
        other = uniform_of(arm, of)
        cells = (f"{sums.mean:.3f}" if arm == other else change(sums, of[other][key]) for key, sums in own.items())
        rows.append([arm, *cells])
    head = ["arm", *(f"{name}, {kind}" for name in measures for kind in ("loss", "right")), "first part", "later parts"]
    return f"{made(runs)} Units: {len(runs['uniform'])}.\n\n" + table(head, rows)


def uniform_of(arm: str, arms: Iterable[str]) -> str:
    """The arm of uniform weights that an arm is compared with: the one whose name begins in the same way."""
    found = (name for name in arms if name.endswith("uniform") and arm.startswith(name.removesuffix("uniform")))
    return max(found, key=len)


def spaced_sums(records: Iterable[dict[str, Any]]) -> dict[str, Sums]:
    """Sums per held-out row over all units: losses and right answers of digits by distance, losses of plain text."""
    measured = [record["measured"] for record in records]
    num = len(measured[0]["short"])
    found = {}
    for low, high in pairwise(DISTANCES):
        for key in ("loss", "right"):
            total = np.zeros((num, 2))
            for one in measured:
                for row, distance, value in zip(one["row"], one["distance"], one[key]):
                    total[row] += (value, 1) if low <= distance < high else (0, 0)
            found[f"{key} to {high}"] = total
    found |= {key: np.sum([one[key] for one in measured], axis=0) for key in ("short", "beyond")}
    return {name: Sums(*torch.as_tensor(values, dtype=torch.float64).T) for name, values in found.items()}


def change(found: Sums, other: Sums) -> str:
    """Difference of two means with its interval; a star if that excludes 0."""
    value, interval, _ = paired_difference(found, other)
    if interval is None:
        return f"{value:+.3f}"
    star = "\\*" if interval[0] * interval[1] > 0 else ""
    return f"{value:+.3f}{star}<br>[{interval[0]:+.3f}, {interval[1]:+.3f}]"


def scratch_figure(runs: Runs) -> Figure:
    """Recall by step, a thin line for each seed."""
    figure = Figure(figsize=(7, 3.6), layout="constrained")
    axes = figure.subplots()
    colors = ("#333333", "#b8bec6", "#1f5a92", "#69a8de", "#8a4a12", "#f59132", "#2e8b57", "#8d959e", "#c03060")
    for (arm, own), color in zip(runs.items(), colors):
        for number, record in enumerate(own.values()):
            axes.plot(*zip(*curve(record, recall)), color=color, linewidth=1, label=arm if number == 0 else None)
    axes.set(xlabel="steps", ylabel="answers that are right", ylim=(0, 1))
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(color="#e3e6ea", linewidth=0.6)
    axes.legend(frameon=False, fontsize=7)
    return figure


def main(folders: Sequence[str]) -> None:
    """Write the tables and figures of folders of runs."""
    for folder in map(Path, folders):
        settings, runs = json.loads((folder / "settings.json").read_text()), read_runs(folder)
        if isinstance(settings["model"], str):
            text, figure, name = spaced_tables(runs), None, "spaced"
        elif settings["pretrain"] is None:
            text, figure, name = scratch_tables(runs), scratch_figure(runs), "scratch"
        else:
            from price import predicted_prices

            found = Extension(folder)
            text, figure = extension_tables(found, predicted_prices(folder, found.units)), frontier_figure(found)
            name = "frontier"
        (folder / f"{name}.md").write_text(text, encoding="utf-8")
        if figure is not None:
            write_figure(figure, folder / name)
        print(text)


if __name__ == "__main__":
    main(sys.argv[1:])
