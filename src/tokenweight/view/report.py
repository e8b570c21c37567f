"""Runs as one HTML page that opens from disk and asks no network: tinted texts, charts, tables, settings."""

import base64
import hashlib
import json
import math
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from tokenweight.data import ScoredRow, load_scores, read_rows
from tokenweight.evaluate import notes, read_table, short_names
from tokenweight.method import document_positions, parse_weighting
from tokenweight.records import read_json, read_metrics, replaced, run_kind
from tokenweight.view.summaries import KINDS, by_kind, by_position, difference_histogram, token_kinds
from tokenweight.view.terminal import seen_before, token_pieces

MAX_BYTES = 5_000_000
"""Of a page: a browser opens it at once, and it can be sent by mail."""
_SLIDERS: dict[str, tuple[str, float, float, float] | None] = {
    "uniform": None,
    "dense": ("interpolation", 0, 1, 0.05),
    "sparse": ("keep", 0.01, 1, 0.01),
    "longce": ("cap", 0.5, 20, 0.5),
    "ppmi": ("keep", 0.01, 1, 0.01),
    "npmi": ("keep", 0.01, 1, 0.01),
}
"""The setting of each weighting that a slider changes: its name, least value, greatest value, step."""
_SCRIPTS = ("report.weights.js", "report.charts.js", "report.text.js", "report.js")
_MAX_POINTS = 1000  # of a curve: more would share their pixels
_COST = ("train_runtime", "train_samples_per_second", "train_steps_per_second", "num_input_tokens_seen")
_NO_CURVES = ("step", "epoch", "total_flos", "train_loss", *_COST)


class Excerpt(NamedTuple):
    """How much of scored folders is on the page, and which of their scores."""

    rows: int = 1
    """Rows of each folder, from the first."""
    num: int = 2048
    """Tokens of each row whose text is shown; numbers are of the whole rows."""
    size: int | None = None
    """Of the short context, where scores of several are stored."""
    model: str | None = None
    """Gives the long losses, if they are not stored."""


def write_report(folders: Sequence[Path], out: Path, excerpt: Excerpt) -> int:
    """Write a page about folders that `score`, `train` or `eval` have written, side by side.

    The page is one file that loads nothing. It appears whole or not at all; an existing one is replaced.

    Returns:
        Its size in bytes.

    Raises:
        ValueError: if a folder is none of these, an option makes no sense, or the page would exceed `MAX_BYTES`.
    """
    if not folders:
        raise ValueError("name at least one folder that `tokenweight score`, `train` or `eval` has written")
    if excerpt.rows < 1 or excerpt.num < 1:
        raise ValueError(f"--rows {excerpt.rows} --num {excerpt.num}: expected at least 1 row and 1 token")
    if not out.parent.is_dir():
        raise ValueError(f"--out {out}: no such folder")
    kinds = [run_kind(folder) for folder in folders]
    if "scored" not in kinds and excerpt != Excerpt():
        raise ValueError("--rows, --num, --size and --model choose from scored folders: found none")
    page = render([_read(folder, kind, excerpt) for folder, kind in zip(folders, kinds)]).encode()
    if len(page) > MAX_BYTES:
        lower = f"--rows {excerpt.rows}" if excerpt.rows > 1 else f"--num {excerpt.num}"
        hint = f"lower {lower}, or name fewer runs" if "scored" in kinds else "name fewer runs"
        raise ValueError(f"{out} would have {len(page) / 1e6:.1f} MB: expected at most {MAX_BYTES / 1e6:g}; {hint}")
    with replaced(out) as part:
        part.write_bytes(page)
    return len(page)


def render(runs: Sequence[dict[str, Any]]) -> str:
    """The page about runs, each as one of the functions below describes it."""
    try:
        import jinja2
    except ImportError as error:
        raise ValueError(
            f"a report needs jinja2, which is missing: pip install 'tokenweight[report]' ({error})"
        ) from error
    style, script = _part("report.css"), "".join(map(_part, _SCRIPTS))
    runs = [{**run, "place": place} for place, run in enumerate(runs)]
    drawn = [{key: value for key, value in run.items() if key not in ("facts", "table")} for run in runs]
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    return environment.from_string(_part("report.html.j2")).render(
        runs=runs,
        scored=[run for run in runs if run["kind"] == "scored"],
        training=[run for run in runs if run["kind"] == "training"],
        evaluations=[run for run in runs if run["kind"] == "evaluation"],
        schemes=_schemes(),
        style=style,
        script=script,
        style_hash=_hash(style),
        script_hash=_hash(script),
        # Pure ASCII in which no tag can begin, whatever the texts hold.
        data=json.dumps({"schemes": _schemes(), "runs": drawn}, separators=(",", ":")).replace("<", "\\u003c"),
    )


def _part(name: str) -> str:
    return (Path(__file__).parent / "page" / name).read_text(encoding="utf-8")


def _hash(text: str) -> str:
    """By which a content security policy allows this inline script or style, and no other."""
    return f"sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}"


def _schemes() -> list[dict[str, Any]]:
    schemes: list[dict[str, Any]] = []
    for name, slider in _SLIDERS.items():
        weighting = parse_weighting(name)
        schemes.append({"name": name, "label": type(weighting).__name__})
        if slider:
            setting, low, high, step = slider
            value = getattr(weighting, setting)
            schemes[-1] |= {"setting": setting, "value": value, "low": low, "high": high, "step": step}
    return schemes


def _read(folder: Path, kind: str, excerpt: Excerpt) -> dict[str, Any]:
    if kind == "scored":
        run = read_scored(folder, excerpt)
    else:
        run = read_training(folder) if kind == "training" else read_evaluation(folder)
    return {"kind": kind, "name": str(folder), **_finite(run)}


def _finite(value: Any) -> Any:
    """The value with None in place of numbers that JSON does not have."""
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _facts(settings: dict[str, Any], environment: dict[str, Any], cost: dict[str, Any]) -> dict[str, Any]:
    return {"Settings": _flat(settings), "Made with": _flat(environment), "Cost": _flat(cost)}


def _flat(values: dict[str, Any], prefix: str = "") -> list[list[str]]:
    """Names and values as text: those of a dictionary inside another behind its name and a dot; None is left out."""
    pairs: list[list[str]] = []
    for key, value in values.items():
        if isinstance(value, dict):
            pairs += _flat(value, f"{prefix}{key}.")
        elif value is not None and value != []:
            text = (" " if key == "command" else ", ").join(map(str, value)) if isinstance(value, list) else str(value)
            pairs.append([prefix + key, text])
    return pairs


def read_scored(folder: Path, excerpt: Excerpt) -> dict[str, Any]:
    """A scored folder: its first rows, and what does not depend on the weighting that the page is switched to."""
    data, provenance = load_scores(folder, size=excerpt.size)
    numbers = range(min(excerpt.rows, len(data)))
    rows = read_rows(folder, 0, excerpt.rows, excerpt.model, size=excerpt.size)
    pieces = [token_pieces(row.tokens[0].tolist(), row.tokenizer) for row in rows]
    uniform = [row.mask.float() for row in rows]
    size = provenance.get("context", {}).get("size")
    settings = {key: value for key, value in provenance.items() if key not in ("contexts", "environment")}
    if excerpt.model is not None:
        settings["long losses of"] = excerpt.model
    cost = {"rows": len(data), "rows on this page": len(rows)}
    kinds = by_kind(rows, uniform, pieces) if rows[0].tokenizer is not None else []  # ids are of no kind
    return {
        "size": size,
        "rows": [_row(number, row, texts, excerpt.num) for number, row, texts in zip(numbers, rows, pieces)],
        "histogram": difference_histogram([_beyond(row, size) for row in rows])._asdict(),
        "positions": [
            {"first": place.first, "stop": place.stop, "num_tokens": place.num_tokens}
            for place in by_position(rows, uniform)
        ],
        "kinds": [{**share._asdict(), "bit": KINDS.index(share.kind)} for share in kinds],
        "facts": _facts(settings, provenance.get("environment", {}), cost),
    }


def _beyond(row: ScoredRow, size: int | None) -> ScoredRow:
    """The row without the first window of each document: there, the short context is the long one."""
    if size is None:
        return row
    return row._replace(mask=row.mask & (document_positions(row.tokens, row.position_ids) >= size))


def _row(number: int, row: ScoredRow, pieces: list[str], num: int) -> dict[str, Any]:
    """Losses and kinds of all tokens of a row, and the passage of its text in which the losses differ most."""
    length = len(pieces)
    difference = (row.short_nll - row.long_nll).abs().where(row.mask, 0)[0]
    start = int(difference.unfold(0, min(num, length), 1).sum(dim=1).argmax())
    places = document_positions(row.tokens, row.position_ids)[0].tolist()
    starts = [column for column, place in enumerate(places) if place == 0]
    seen: list[int | None] = []
    kinds: list[int] = []  # of each token a bit for each of KINDS
    for first, stop in pairwise([*starts, length]):
        marks = token_kinds(pieces[first:stop])
        seen += [None if place is None else first + place for place in seen_before(pieces[first:stop])]
        kinds += [sum(marks[kind][t] << bit for bit, kind in enumerate(KINDS)) for t in range(stop - first)]
    return {
        "number": number,
        "start": start,
        "pieces": pieces[start : start + num],
        "seen": seen[start : start + num],
        "long": _losses(row.long_nll, row.mask),
        "short": _losses(row.short_nll, row.mask),
        "kinds": kinds,
        "places": places if len(starts) > 1 else None,
    }


def _losses(nll: Tensor, mask: Tensor) -> list[float | None]:
    """Float32 losses in the fewest digits that mean them and no other; None where no token is predicted."""
    return [float(str(loss)) if counts else None for loss, counts in zip(nll[0].numpy(), mask[0].tolist())]


def read_training(folder: Path) -> dict[str, Any]:
    """A training folder: its curves by step, and what it cost."""
    run, lines = read_json(folder / "run.json"), read_metrics(folder)
    names = [name for name in dict.fromkeys(key for line in lines for key in line) if name not in _NO_CURVES]
    environment: dict[str, Any] = {
        key: run[key] for key in ("command", "versions", "device", "commit", "date") if key in run
    }
    cost: dict[str, Any] = {"steps": max((line["step"] for line in lines), default=0)}
    cost |= {key: line[key] for line in lines for key in _COST if key in line}
    return {
        "curves": {name: _thinned([[line["step"], line[name]] for line in lines if name in line]) for name in names},
        "facts": _facts(run.get("settings", {}), environment, cost),
    }


def _thinned(points: list[list[Any]]) -> list[list[Any]]:
    """Means of neighbors, of as many as leave at most `_MAX_POINTS`."""
    num = max(1, math.ceil(len(points) / _MAX_POINTS))
    groups = [points[i : i + num] for i in range(0, len(points), num)]
    return [[sum(column) / len(group) for column in zip(*group)] for group in groups]


def read_evaluation(folder: Path) -> dict[str, Any]:
    """The folder of an evaluation: its table, and the losses by position with their changes."""
    record = read_json(folder / "eval.json")
    if missing := {"comparison", "settings", "unit", "models"} - set(record):
        raise ValueError(f"{folder}/eval.json has no {', '.join(sorted(missing))}: expected one of `tokenweight eval`")
    table = read_table(record)
    found = [{entry.measure: entry for entry in row} for row in table]
    names = [row[0].model for row in table]
    bins = [
        {"first": first, "stop": stop, "entries": [entries[f"position_{first}"]._asdict() for entries in found]}
        for first, stop in pairwise(record["settings"]["edges"])
    ]
    tokens = sum(sum(measure["num_tokens"]) for measure in record["models"][0]["measures"] if measure["name"] == "all")
    return {
        "models": short_names(table),
        "bins": bins,
        "table": {
            "measures": list({entry.measure: entry for row in table for entry in row}.values()),
            "entries": found,
            "notes": notes(table, unit=record["unit"]),
        },
        "facts": _facts(
            {"models": names, "data": record.get("data"), **record["settings"]},
            record.get("environment", {}),
            {"predicted tokens": f"{tokens:,.0f}", "models": len(names)},
        ),
    }
