"""Runs as one HTML page that opens from disk and loads nothing: tinted texts, charts, tables, settings."""

import base64
import hashlib
import json
import math
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

from tokenweight.evaluate import notes, read_table, short_names
from tokenweight.records import read_json, read_metrics, replaced, run_kind
from tokenweight.view.charts import MINUS, Chart, Number, Point, Series
from tokenweight.view.excerpt import LOOKS, SCHEMES, SETTINGS, START, Excerpt, read_scored
from tokenweight.view.summaries import PositionWeights

MAX_BYTES = 5_000_000
"""Largest size of a page: a browser opens it at once, and it can be sent by mail."""
_MAX_POINTS = 1000  # of a curve: more would share their pixels
_COST = ("train_runtime", "train_samples_per_second", "train_steps_per_second", "num_input_tokens_seen")
_NO_CURVES = ("step", "epoch", "total_flos", "train_loss", *_COST)
_CURVES = {
    "loss": ("Loss by step", "nats, weighted: not to be compared between weightings"),
    "unweighted_loss": ("Loss without weights", "nats"),
    "grad_norm": ("Norm of the gradient", ""),
    "learning_rate": ("Learning rate", ""),
}


def write_report(folders: Sequence[Path], out: Path, excerpt: Excerpt) -> int:
    """Write a page about folders that `score`, `train` or `eval` have written, side by side.

    The page is one file that loads nothing. It is complete or absent; an existing one is replaced.

    Returns:
        Its size in bytes.

    Raises:
        ValueError: if a folder is none of these, an option makes no sense, or the page would exceed `MAX_BYTES`.
    """
    if not folders:
        raise ValueError("name at least one folder that `tokenweight score`, `train` or `eval` has written")
    for name, value in (("rows", excerpt.rows), ("num", excerpt.num)):
        if value < 1:
            raise ValueError(f"{name} {value}: expected at least 1")
    if not out.parent.is_dir():
        raise ValueError(f"out {out}: no such folder")
    kinds = [run_kind(folder) for folder in folders]
    if "scored" not in kinds and excerpt != Excerpt():
        raise ValueError("rows, num, size and model choose from scored folders: found none")
    page = render([_read(folder, kind, excerpt) for folder, kind in zip(folders, kinds)]).encode()
    if len(page) > MAX_BYTES:
        lower = f"rows {excerpt.rows}" if excerpt.rows > 1 else f"num {excerpt.num}"
        hint = f"lower {lower}, or name fewer runs" if "scored" in kinds else "name fewer runs"
        raise ValueError(f"{out} would have {len(page) / 1e6:.1f} MB: expected at most {MAX_BYTES / 1e6:g}; {hint}")
    with replaced(out) as part:
        part.write_bytes(page)
    return len(page)


def render(runs: Sequence[dict[str, Any]]) -> str:
    """Write the page about runs, each of them as `read_scored`, `read_training` or `read_evaluation` gives it."""
    try:
        import jinja2
    except ImportError as error:
        raise ValueError(
            f"a report needs jinja2, which is missing: pip install 'tokenweight[report]' ({error})"
        ) from error
    style, script = _part("tint.css") + _part("report.css"), _part("report.js")
    runs = [{**run, "place": place} for place, run in enumerate(runs)]
    scored, trained, evaluated = (
        [run for run in runs if run["kind"] == kind] for kind in ("scored", "training", "evaluation")
    )
    data = {
        "schemes": [scheme._asdict() for scheme in SCHEMES],
        "looks": LOOKS,
        "runs": [{"place": run["place"], "rows": [row["reader"] for row in run["rows"]]} for run in scored],
    }
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.globals["start"] = START
    return environment.from_string(_part("report.html.j2")).render(
        runs=runs,
        facts=[_facts(run) for run in runs],
        scored=scored,
        schemes=SCHEMES,
        positions=_position_charts(scored) if scored else [],
        histogram=_histogram_chart(scored) if scored else None,
        curves=_curve_charts(trained),
        evaluations=[(run, _evaluation_charts(run)) for run in evaluated],
        style=style,
        script=script,
        style_hash=_hash(style),
        script_hash=_hash(script),
        # Pure ASCII in which no tag can begin, whatever it holds.
        data=json.dumps(data, separators=(",", ":"), allow_nan=False).replace("<", "\\u003c"),
    )


def _part(name: str) -> str:
    return (Path(__file__).parent / "page" / name).read_text(encoding="utf-8")


def _hash(text: str) -> str:
    """The hash by which a content security policy allows this inline script or style, and no other."""
    return f"sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}"


def _read(folder: Path, kind: str, excerpt: Excerpt) -> dict[str, Any]:
    if kind == "scored":
        run = read_scored(folder, excerpt)
    else:
        run = read_training(folder) if kind == "training" else read_evaluation(folder)
    return {"kind": kind, "name": str(folder), **run}


def _facts(run: dict[str, Any]) -> dict[str, list[list[str]]]:
    titles = {"settings": "Settings", "environment": "Made with", "cost": "Cost"}
    return {title: _flat(run[key]) for key, title in titles.items()}


def _flat(values: dict[str, Any], prefix: str = "") -> list[list[str]]:
    """Names and values as text; the names in a nested dictionary follow its own and a dot, and None is left out."""
    pairs: list[list[str]] = []
    for key, value in values.items():
        if isinstance(value, dict):
            pairs += _flat(value, f"{prefix}{key}.")
        elif value is not None and value != []:
            text = (" " if key == "command" else ", ").join(map(str, value)) if isinstance(value, list) else str(value)
            pairs.append([prefix + key, text])
    return pairs


def _position_charts(scored: list[dict[str, Any]]) -> list[Chart]:
    """Draw the weight by position, once for each setting of the page."""
    sizes = sorted({run["size"] for run in scored} - {None})
    window = f"Inside the first window ({', '.join(map(str, sizes))} tokens) the short context is all there is: a model"
    chart = Chart(
        "Weight by position",
        "position in the document",
        "mean weight",
        series=[],
        zero=True,
        marks=[(size, "first window ends" if len(sizes) == 1 else str(size)) for size in sizes],
        note=f"{window} that scores itself leaves its tokens without a difference." if sizes else "",
        labels={_middle(part): f"{part.first} to {part.stop - 1}" for run in scored for part in run["positions"][0]},
    )
    return [
        chart._replace(
            series=[
                _series(run, [Point(_middle(part), part.mean_weight) for part in run["positions"][number]])
                for run in scored
            ]
        )
        for number in range(len(SETTINGS))
    ]


def _middle(part: PositionWeights) -> float:
    return (part.first + part.stop) / 2


def _series(run: dict[str, Any], points: list[Point]) -> Series:
    return Series(run["name"], run["place"], points)


def _histogram_chart(scored: list[dict[str, Any]]) -> Chart:
    """Draw how many tokens the long context helps how much."""
    bins = list(pairwise(scored[0]["histogram"].edges))
    series = []
    for run in scored:
        counts = run["histogram"].counts
        shares = [100 * count / max(1, sum(counts)) for count in counts]
        series.append(_series(run, [Point(sum(edges) / 2, share) for edges, share in zip(bins, shares)]))
    note = "Right of 0 the long context helps, left of 0 it misleads. The outermost bars also hold what is beyond them."
    return Chart(
        "Differences of the losses",
        f"short {MINUS} long, nats",
        "share of the tokens, %, logarithmic",
        series,
        note=f"Tokens beyond the first window. {note}" if all(run["size"] for run in scored) else note,
        kind="columns",
        log=True,
        labels={(low + high) / 2: f"{low:g} to {high:g}" for low, high in bins},
    )


def read_training(folder: Path) -> dict[str, Any]:
    """Read a training folder: its curves by step, and what the training cost."""
    run, lines = read_json(folder / "run.json"), read_metrics(folder)
    names = [name for name in dict.fromkeys(key for line in lines for key in line) if name not in _NO_CURVES]
    cost: dict[str, Any] = {"steps": max((line["step"] for line in lines), default=0)}
    return {
        "curves": {name: _thinned([(line["step"], line[name]) for line in lines if name in line]) for name in names},
        "settings": run.get("settings", {}),
        "environment": {key: run[key] for key in ("command", "versions", "device", "commit", "date") if key in run},
        "cost": cost | {key: line[key] for line in lines for key in _COST if key in line},
    }


def _thinned(points: list[tuple[int, Number]]) -> list[Point]:
    """Average neighbors so that at most `_MAX_POINTS` are left; what is not a number is a gap."""
    num = max(1, math.ceil(len(points) / _MAX_POINTS))
    groups = [points[i : i + num] for i in range(0, len(points), num)]
    means = [[sum(column) / len(group) for column in zip(*group)] for group in groups]
    return [Point(x, y if math.isfinite(y) else None) for x, y in means]


def _curve_charts(trained: list[dict[str, Any]]) -> list[Chart]:
    """Draw all numbers that the runs have logged, by step."""
    known = [*_CURVES, *dict.fromkeys(name for run in trained for name in run["curves"] if name not in _CURVES)]
    charts = []
    for name in known:
        title, unit = _CURVES.get(name, (name.replace("_", " ").capitalize(), ""))
        series = [_series(run, run["curves"][name]) for run in trained if name in run["curves"]]
        charts += [Chart(title, "step", unit, series)] if series else []
    return charts


def read_evaluation(folder: Path) -> dict[str, Any]:
    """Read the folder of an evaluation: its table, and what was measured at which positions."""
    record = read_json(folder / "eval.json")
    if missing := {"comparison", "settings", "unit", "models"} - set(record):
        raise ValueError(f"{folder}/eval.json has no {', '.join(sorted(missing))}: expected one of `tokenweight eval`")
    table = read_table(record)
    tokens = sum(sum(measure["num_tokens"]) for measure in record["models"][0]["measures"] if measure["name"] == "all")
    return {
        "models": short_names(table),
        "edges": record["settings"]["edges"],
        "measures": list({entry.measure: entry for row in table for entry in row}.values()),
        "entries": [{entry.measure: entry for entry in row} for row in table],
        "notes": notes(table, unit=record["unit"]),
        "settings": {"models": [row[0].model for row in table], "data": record.get("data"), **record["settings"]},
        "environment": record.get("environment", {}),
        "cost": {"predicted tokens": f"{tokens:,.0f}", "models": len(table)},
    }


def _evaluation_charts(run: dict[str, Any]) -> list[Chart]:
    """Draw the loss by position and, if there are several models, the changes from the first."""
    bins = list(pairwise(run["edges"]))
    losses, changes = [], []
    for place, (name, entries) in enumerate(zip(run["models"], run["entries"])):
        found = [entries[f"position_{first}"] for first, _ in bins]
        losses.append(Series(name, place, [Point(x, entry.value) for x, entry in enumerate(found)]))
        points = [Point(x, entry.change, entry.low, entry.high) for x, entry in enumerate(found)]
        changes.append(Series(name, place, points))
    labels = {float(x): f"{first} to {stop - 1}" for x, (first, stop) in enumerate(bins)}
    chart = Chart("Loss by position", "position in the document", "nats", losses, labels=labels, labeled=True)
    if len(run["models"]) == 1:
        return [chart]
    title, unit = f"Change from {run['models'][0]}", "nats, with 95 % intervals; less is better"
    return [chart, chart._replace(title=title, y=unit, series=changes[1:], kind="dots", zero=True)]
