"""HTML report of runs, one self-contained page that opens from disk: tinted texts, charts, tables, settings."""

import base64
import hashlib
import json
import math
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

from tokenweight.evaluate import Entry, notes, read_table, short_names
from tokenweight.records import read_json, read_metrics, replaced, run_kind
from tokenweight.view.charts import MINUS, Chart, Number, Point, Series
from tokenweight.view.corpus import CORPUS_NOTE, MIN_BARS, bin_labels, corpus_lines, document_name, name_folders
from tokenweight.view.excerpt import LOOKS, SCHEMES, SETTINGS, START, Excerpt, read_scored
from tokenweight.view.heads import head_map, heads_line
from tokenweight.view.summaries import PositionWeights

MAX_BYTES = 5_000_000
"""Largest size of a page, which a browser opens at once, and which can be sent by mail."""
_MAX_POINTS = 1000  # of a curve: more would share pixels
_COST = ("train_runtime", "train_samples_per_second", "train_steps_per_second", "num_input_tokens_seen")
_NO_CURVES = ("step", "epoch", "total_flos", "train_loss", *_COST)
_UNITS = {"train_runtime": "train runtime (s)"}
_CHANGES = {"beyond_half": "beyond half of a sequence", "short_range": "at short range"}
"""Metrics of an evaluation whose changes are shown at the top of the page."""
_CURVES = {
    "loss": ("Loss by step", "nats, weighted: not to be compared between weightings"),
    "unweighted_loss": ("Loss without weights", "nats"),
    "grad_norm": ("Norm of the gradient", ""),
    "learning_rate": ("Learning rate", ""),
}


def write_report(folders: Sequence[Path], out: Path, excerpt: Excerpt) -> int:
    """Write a page about folders that `score`, `train` or `eval` have written, side by side.

    The page is one self-contained file. It is complete or absent; an existing one is replaced.

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
    folders = list({folder.absolute(): folder for folder in folders}.values())
    kinds = [run_kind(folder) for folder in folders]
    if "scored" not in kinds and excerpt != Excerpt():
        raise ValueError("rows, num, size, model and smooth are about scored folders: found none")
    named = zip(folders, kinds, name_folders(folders))
    page = render([_read(folder, kind, excerpt, name) for folder, kind, name in named]).encode()
    if len(page) > MAX_BYTES:
        lower = f"rows {excerpt.rows}" if excerpt.rows > 1 else f"num {excerpt.num}"
        hint = f"lower {lower}, or name fewer runs" if "scored" in kinds else "name fewer runs"
        raise ValueError(f"{out} would have {len(page) / 1e6:.1f} MB: expected at most {MAX_BYTES / 1e6:g}; {hint}")
    with replaced(out) as part:
        part.write_bytes(page)
    return len(page)


def render(runs: Sequence[dict[str, Any]]) -> str:
    """Render the page about runs, each as returned by `read_scored`, `read_training` or `read_evaluation`."""
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
    environment.globals.update(
        start=START, corpus_note=CORPUS_NOTE, corpus_lines=corpus_lines, document_name=document_name
    )
    return environment.from_string(_part("report.html.j2")).render(
        runs=runs,
        facts=[_facts(run) for run in runs],
        headlines=list(map(_headline, runs)),
        gains=[gain for run in scored for gain in run["gains"]],
        corpus=_corpus_charts(scored),
        counts=_counts(scored),
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
        # Pure ASCII in which no tag can begin, whatever the data.
        data=json.dumps(data, separators=(",", ":"), allow_nan=False).replace("<", "\\u003c"),
    )


def _part(name: str) -> str:
    return (Path(__file__).parent / "page" / name).read_text(encoding="utf-8")


def _hash(text: str) -> str:
    """The hash by which a content security policy allows only this inline script or style."""
    return f"sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}"


def _read(folder: Path, kind: str, excerpt: Excerpt, name: str) -> dict[str, Any]:
    if kind == "scored":
        run = read_scored(folder, excerpt, name)
    else:
        run = read_training(folder) if kind == "training" else read_evaluation(folder)
    return {"kind": kind, "name": name, **run, "settings": {"folder": folder, **run["settings"]}}


def _headline(run: dict[str, Any]) -> list[str]:
    """Headline results of a run, in one or a few lines."""
    if run["kind"] == "scored":
        return [
            f"mean gain {gain.mean_gain:+.4f} nats beyond {gain.size:,} tokens, {gain.key_token_ratio:.2%} key tokens, "
            f"in {gain.sequences:,} sequences"
            for gain in run["gains"]
            if gain.sequences
        ]
    if run["kind"] == "training":
        name = "unweighted_loss" if "unweighted_loss" in run["curves"] else "loss"
        values = [point.y for point in run["curves"].get(name, []) if point.y is not None]
        ends = [f"{name.replace('_', ' ')} {values[0]:.4f} → {values[-1]:.4f}"] if values else []
        return [", ".join([f"{run['cost']['steps']:,} steps", *ends])]
    lines = []
    for name, entries in zip(run["models"][1:], run["entries"][1:]):
        found = [f"{_change(entries[measure])} {words}" for measure, words in _CHANGES.items() if measure in entries]
        lines += [f"{name} against {run['models'][0]}, nats: {'; '.join(found)}"] if found else []
    return lines


def _change(entry: Entry) -> str:
    if entry.change is None:
        return "no token"
    interval = "no interval" if entry.low is None or entry.high is None else f"{entry.low:+.4f}, {entry.high:+.4f}"
    return f"{entry.change:+.4f} [{interval}]"


def _facts(run: dict[str, Any]) -> dict[str, list[list[str]]]:
    titles = {"settings": "Settings", "environment": "Made with", "cost": "Cost"}
    return {title: _flat(run[key]) for key, title in titles.items()}


def _flat(values: dict[str, Any], prefix: str = "") -> list[list[str]]:
    """Names and values as text; nested names are joined by dots, and None is left out."""
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
    notes = [f"{_counts(scored)}.", *dict.fromkeys(run["about_windows"] for run in scored)]
    window = f"Inside the first window ({', '.join(map(str, sizes))} tokens) the short context is all there is: a model"
    chart = Chart(
        "Weight by position",
        "position in the document",
        "mean weight",
        series=[],
        zero=True,
        marks=[(size, "first window ends" if len(sizes) == 1 else str(size)) for size in sizes],
        note=" ".join(
            [*notes, f"{window} that scores itself leaves its tokens without a difference." if sizes else ""]
        ),
        whole=True,
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


def _counts(scored: list[dict[str, Any]]) -> str:
    """Describe how many of the sequences the page shows."""
    shown = [f"{run['cost']['rows on this page']:,} of {run['cost']['rows']:,}" for run in scored]
    if len(shown) > 1:
        shown = [f"{run['name']}: {count}" for run, count in zip(scored, shown)]
    return f"{', '.join(shown)} sequences"


def _corpus_charts(scored: list[dict[str, Any]]) -> list[Chart]:
    """Draw histograms of the gains of each folder's sequences, for the short context of the page."""
    charts = []
    for run in scored:
        for gain in run["gains"]:
            if gain.size == run["size"] and gain.sequences >= MIN_BARS:
                places = [sum(edges) / 2 for edges in pairwise(gain.histogram.edges)]
                points = list(map(Point, places, gain.histogram.counts))
                title, note = (
                    f"Mean gain of the sequences, {run['name']}",
                    f"{gain.sequences:,} of {gain.all_sequences:,}",
                )
                note += f" sequences, beyond {gain.size:,} tokens. The outermost bars also hold what is beyond them."
                labels = dict(zip(places, bin_labels(gain.histogram)))
                x, y = f"mean of short {MINUS} long, nats", "sequences"
                charts.append(Chart(title, x, y, [_series(run, points)], note, "columns", zero=True, labels=labels))
    return charts


def _middle(part: PositionWeights) -> float:
    return (part.first + part.stop) / 2


def _series(run: dict[str, Any], points: list[Point]) -> Series:
    return Series(run["name"], run["place"], points)


def _histogram_chart(scored: list[dict[str, Any]]) -> Chart:
    """Draw a histogram of token gains from the long context."""
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
        note=f"{_counts(scored)}{', tokens beyond the first window' * all(run['size'] for run in scored)}. {note}",
        kind="columns",
        log=True,
        labels={(low + high) / 2: f"{low:g} to {high:g}" for low, high in bins},
    )


def read_training(folder: Path) -> dict[str, Any]:
    """Read a training folder: its curves by step, and its cost."""
    run, lines = read_json(folder / "run.json"), read_metrics(folder)
    names = [name for name in dict.fromkeys(key for line in lines for key in line) if name not in _NO_CURVES]
    cost: dict[str, Any] = {"steps": max((line["step"] for line in lines), default=0)}
    return {
        "curves": {name: _thinned([(line["step"], line[name]) for line in lines if name in line]) for name in names},
        "settings": run.get("settings", {}),
        "environment": {key: run[key] for key in ("command", "versions", "device", "commit", "date") if key in run},
        "cost": cost | {_UNITS.get(key, key): line[key] for line in lines for key in _COST if key in line},
    }


def _thinned(points: list[tuple[int, Number]]) -> list[Point]:
    """Average neighbors so that at most `_MAX_POINTS` are left; NaN is a gap."""
    num = max(1, math.ceil(len(points) / _MAX_POINTS))
    groups = [points[i : i + num] for i in range(0, len(points), num)]
    means = [[sum(column) / len(group) for column in zip(*group)] for group in groups]
    return [Point(x, y if math.isfinite(y) else None) for x, y in means]


def _curve_charts(trained: list[dict[str, Any]]) -> list[Chart]:
    """Draw all metrics logged by the runs, by step."""
    known = [*_CURVES, *dict.fromkeys(name for run in trained for name in run["curves"] if name not in _CURVES)]
    charts = []
    for name in known:
        title, unit = _CURVES.get(name, (name.replace("_", " ").capitalize(), ""))
        series = [_series(run, run["curves"][name]) for run in trained if name in run["curves"]]
        charts += [Chart(title, "step", unit, series, whole=True)] if series else []
    return charts


def read_evaluation(folder: Path) -> dict[str, Any]:
    """Read the folder of an evaluation: its table, and its metrics by position."""
    record = read_json(folder / "eval.json")
    if missing := {"comparison", "settings", "unit", "models"} - set(record):
        raise ValueError(f"{folder}/eval.json has no {', '.join(sorted(missing))}: expected one of `tokenweight eval`")
    table = read_table(record)
    tokens = sum(sum(measure["num_tokens"]) for measure in record["models"][0]["measures"] if measure["name"] == "all")
    return {
        "models": short_names(table),
        "edges": record["settings"]["edges"],
        "unit": record["unit"],
        "measures": list({entry.measure: entry for row in table for entry in row}.values()),
        "entries": [{entry.measure: entry for entry in row} for row in table],
        "bold": [{entry.measure for entry in row if entry.best} for row in table],
        "chances": _chances(record),
        "heads": [
            (name, head_map(model["heads"]), heads_line(model["heads"]))
            for name, model in zip(short_names(table), record["models"])
            if "heads" in model
        ],
        "notes": notes(table, unit=record["unit"]),
        "settings": {"models": [row[0].model for row in table], "data": record.get("data"), **record["settings"]},
        "environment": record.get("environment", {}),
        "cost": {"predicted tokens": f"{tokens:,.0f}", "models": len(table)},
    }


def _chances(record: dict[str, Any]) -> dict[str, float]:
    """Chance accuracy by the name of the metric, where the evaluation recorded it."""
    cells = [cell for cell in record["models"][0].get("probe_grid", []) if "chance" in cell]
    names = {f"probe_{cell['family']}": cell["chance"] for cell in cells}
    return names | {f"probe_{cell['family']}_{cell['length']}": cell["chance"] for cell in cells}


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
    counts = [run["entries"][0][f"position_{first}"].num_documents for first, _ in bins]
    note = f"Of {max(counts):,} {run['unit']}s; the last bin of {counts[-1]:,}." if counts else ""
    chart = Chart("Loss by position", "position in the document", "nats", losses, note, labels=labels, labeled=True)
    if len(run["models"]) == 1:
        return [chart]
    has_interval = any(point.low is not None for series in changes for point in series.points)
    interval = "with 95 % intervals" if has_interval else f"without intervals: too few {run['unit']}s"
    title, unit = f"Change from {run['models'][0]}", f"nats, {interval}; less is better"
    return [chart, chart._replace(title=title, y=unit, series=changes[1:], kind="dots", zero=True)]
