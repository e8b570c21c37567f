"""What training with token weights did: a model and its baseline, measured on the same tokens and probes."""

import hashlib
import json
import shutil
from collections.abc import Callable
from dataclasses import asdict
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from transformers import PreTrainedTokenizerBase

from tokenweight.data import Contents, checksum, load_rows, read_contents, row_lengths, scan_contents, verify
from tokenweight.evaluate.compare import Entry, Measure, compare
from tokenweight.evaluate.losses import Rows, find_key_tokens, measure_model, open_weights
from tokenweight.evaluate.probe_scoring import generation_budget
from tokenweight.evaluate.probes import WITHOUT_DEPTH, make_probes
from tokenweight.evaluate.settings import EvalSettings, Plan, make_plan, read_haystack
from tokenweight.evaluate.tables import csv_text, grid_markdown, markdown
from tokenweight.models import (
    check_stale_rows,
    check_stale_windows,
    check_tokenizer,
    check_tokens,
    context_length,
    find_tokenizer,
    load_model,
    tokenizer_fingerprint,
)
from tokenweight.records import differences, environment, new_folder, read_json, read_provenance, write_json

_WEIGHTS = "token_weights.npy"


class _Task(NamedTuple):
    """What is to be measured, all of it checked."""

    names: list[str]
    """The models to measure now."""
    evaluator: str
    plan: Plan
    rows: Rows
    comparable: dict[str, Any]
    """What an evaluation must have in common with its baseline."""
    earlier: dict[str, Any] | None
    """The record of an evaluation that is the baseline."""

    @property
    def loaded(self) -> list[str]:
        """The models that read all rows; where the baseline was evaluated earlier, so were the key tokens."""
        return list(dict.fromkeys(self.names if self.earlier else [self.evaluator, *self.names]))


def evaluate(
    settings: EvalSettings, *, progress: Callable[[int, int], object] = lambda done, total: None
) -> dict[str, Any]:
    """Measure the model, and its baseline if that is not measured yet, and write the folder `settings.out`.

    The folder appears when it is whole, with `eval.json`, `table.md`, `table.csv` and `token_weights.npy` (those of
    LongPPL, so that its evaluator need not be asked again). Models are loaded one after another, the evaluator first.

    Args:
        progress: called after each batch of rows with its number of tokens, and that of all rows and models.

    Returns:
        What is in `eval.json`; docs/evaluate.md describes it.

    Raises:
        ValueError: in one line, before work starts, if settings, rows, models, tokenizers or the earlier evaluation do
            not fit each other.
    """
    task = _checked(settings)
    total = task.rows.num_tokens * len(task.loaded)
    with new_folder(settings.out) as folder:
        if task.earlier:
            shutil.copyfile(Path(str(settings.baseline)) / _WEIGHTS, folder / _WEIGHTS)
        record = _record(task, settings, folder / _WEIGHTS, lambda done: progress(done, total))
        write_json(folder / "eval.json", record)
        table = read_table(record)
        grid = grid_markdown([(model["model"], model.get("probe_grid", [])) for model in record["models"]])
        (folder / "table.md").write_text(markdown(table, unit=record["unit"]) + grid, encoding="utf-8")
        (folder / "table.csv").write_text(csv_text(table), encoding="utf-8")
    return record


def read_table(record: dict[str, Any]) -> list[list[Entry]]:
    """The rows of the table of an `eval.json`, one for each model."""
    return [[Entry(**entry) for entry in row] for row in record["comparison"]]


def _measures(model: dict[str, Any]) -> list[Measure]:
    return [Measure(*(measure[name] for name in Measure._fields)) for measure in model["measures"]]


def _record(task: _Task, settings: EvalSettings, path: Path, progress: Callable[[int], object]) -> dict[str, Any]:
    """Measure the models, and compare them."""
    models, judge = _measured(task, path, progress)
    if task.earlier:
        models, judge = task.earlier["models"] + models, task.earlier["evaluator"]
    else:
        judge["weights_sha256"] = checksum(path)
    _check_samples(models)
    table = compare([(model["model"], _measures(model)) for model in models], seed=settings.seed)
    return {
        "data": str(settings.data),
        "haystack": None if settings.haystack is None else str(settings.haystack),
        "max_tokens": settings.max_tokens,
        "settings": task.comparable,
        "evaluator": judge,
        "unit": "document" if task.rows.has_documents else "row",
        "documents": list(dict.fromkeys(task.rows.documents)),
        "models": models,
        "comparison": [[entry._asdict() for entry in row] for row in table],
        "environment": environment(),
    }


def _check_samples(models: list[dict[str, Any]]) -> None:
    """Raise a ValueError if a suite gave the models different samples: the harness, or its data, have changed."""
    for model in models[1:]:
        if found := differences(models[0]["suites"], model["suites"]):
            raise ValueError(f"--suites: {models[0]['model']} and {model['model']} saw different samples ({found})")


def _measured(
    task: _Task, path: Path, progress: Callable[[int], object]
) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """The records of the models; and who the evaluator is, if it is asked: then it comes first."""
    weights: np.memmap = np.load(path, mmap_mode="r") if task.earlier else open_weights(path, task.rows.num_tokens)
    records, judge = {}, {}
    for name in task.loaded:
        finds = not task.earlier and name == task.evaluator
        if name not in task.names:
            judge = find_key_tokens(name, task.plan, task.rows, weights, progress=progress)
            continue
        record = measure_model(name, task.plan, task.rows, weights, writes_weights=finds, progress=progress)
        if finds:
            judge = {key: record[key] for key in record if key not in ("measures", "probe_grid", "suites")}
        records[name] = {**record, "measures": [{**m._asdict(), "value": m.value} for m in record["measures"]]}
    if not task.earlier:
        weights.flush()
    return [records[name] for name in task.names], judge


def _checked(settings: EvalSettings) -> _Task:
    if settings.out.exists():
        raise ValueError(f"--out {settings.out}: exists already; name a new folder")
    rows = _open_rows(settings)
    plan = make_plan(settings, int(rows.lengths.max()))
    earlier = _earlier(settings)
    names = [settings.model] if earlier or not settings.baseline else [settings.baseline, settings.model]
    evaluator = earlier["evaluator"]["model"] if earlier else settings.evaluator or names[0]
    task = _Task(names, evaluator, plan, rows, {}, earlier)
    task = task._replace(rows=rows._replace(tokenizer=_common_tokenizer(task.loaded, settings)))
    for name in task.loaded:
        _check_model(name, settings, plan, task.rows)
    _check_probes(settings, plan, task.rows)
    comparable = {**asdict(plan), **_fingerprints(settings, task.rows)}
    if earlier and (found := differences(earlier["settings"], comparable)):
        raise ValueError(f"--baseline {settings.baseline}: was evaluated otherwise ({found})")
    return task._replace(comparable=comparable)


def _open_rows(settings: EvalSettings) -> Rows:
    data = load_rows(settings.data)
    if settings.num_rows is not None:
        if settings.num_rows < 1:
            raise ValueError(f"--num_rows {settings.num_rows}: expected at least 1")
        data = data.select(range(min(settings.num_rows, len(data))))
    verify(settings.data, range(len(data)))
    lengths = row_lengths(data)
    if not lengths.all():
        raise ValueError(f"{settings.data}: row {int(np.argmin(lengths))} is empty")
    return Rows(data, lengths, None, read_haystack(settings), settings.max_tokens)


def _earlier(settings: EvalSettings) -> dict[str, Any] | None:
    """The record of an earlier evaluation, if that is the baseline."""
    if settings.baseline is None or not (Path(settings.baseline) / "eval.json").is_file():
        return None
    record, weights = read_json(Path(settings.baseline) / "eval.json"), Path(settings.baseline) / _WEIGHTS
    if missing := {"settings", "evaluator", "models"} - set(record):
        raise ValueError(f"--baseline {settings.baseline}: eval.json has no {', '.join(sorted(missing))}")
    judge = record["evaluator"]
    if not weights.is_file() or checksum(weights) != judge.get("weights_sha256"):
        raise ValueError(f"--baseline {settings.baseline}: {_WEIGHTS} is missing or damaged; evaluate it again")
    if settings.evaluator not in (None, judge["model"]):
        raise ValueError(
            f"--evaluator {settings.evaluator}: {judge['model']} found the key tokens of {settings.baseline}: "
            "expected the same evaluator, or none"
        )
    return record


def _common_tokenizer(names: list[str], settings: EvalSettings) -> PreTrainedTokenizerBase | None:
    """The tokenizer of all models that have one; it must be one, and that of the rows."""
    provenance = read_provenance(settings.data)
    found = {name: tokenizer for name in names if (tokenizer := find_tokenizer(name)) is not None}
    for name, tokenizer in found.items():
        check_tokenizer(tokenizer, name, provenance, settings.data)
    prints = {name: tokenizer_fingerprint(tokenizer) for name, tokenizer in found.items()}
    if len(set(prints.values())) > 1:
        listed = ", ".join(f"{name} ({digits})" for name, digits in prints.items())
        raise ValueError(f"the models have different tokenizers: {listed}; their losses cannot be compared")
    return next(iter(found.values()), None)


def _check_model(name: str, settings: EvalSettings, plan: Plan, rows: Rows) -> None:
    """Raise a ValueError if a model cannot read rows or probes: seen from its config, without its weights."""
    config = load_model(name, dtype=plan.dtype, device_map="meta").config
    check_tokens(config, *_contents(settings, rows).token_range, settings.data)
    positions = context_length(config)
    for what, length in (
        ("--data: rows", plan.length),
        ("--probe_lengths: probes", max(plan.probe_lengths, default=0)),
    ):
        if positions is not None and length > positions:
            raise ValueError(
                f"{what} of {length} tokens: {name} has {positions} positions; extend its context first "
                "(docs/models.md)"
            )
    for size in [*plan.sizes, plan.long_context[0]]:
        check_stale_windows(config, size)
    check_stale_rows(config, [*set(rows.lengths.tolist()), *plan.probe_lengths])


def _check_probes(settings: EvalSettings, plan: Plan, rows: Rows) -> None:
    """Raise a ValueError if a family does not fit the shortest length, or there is no tokenizer to ask with."""
    if plan.families and rows.tokenizer is None:
        raise ValueError(
            f"--probes: {settings.model} has no tokenizer to make them with: expected one, or --probes none"
        )
    if plan.suites and rows.tokenizer is None:
        raise ValueError(f"--suites: {settings.model} has no tokenizer: expected one")
    for family, depth in product(plan.families, plan.depths):
        assert rows.tokenizer is not None
        room = generation_budget(family) if plan.probe_by == "generation" else 0
        try:
            make_probes(
                family,
                rows.tokenizer,
                length=min(plan.probe_lengths),
                depth=None if family in WITHOUT_DEPTH else depth,
                num=plan.num_probes,
                seed=plan.seed,
                haystack=rows.haystack,
                room=room,
            )
        except ValueError as error:
            raise ValueError(f"--probe_lengths: {error}; or --probes none") from None


def _contents(settings: EvalSettings, rows: Rows) -> Contents:
    return read_contents(settings.data) if settings.num_rows is None else scan_contents(rows.data)


def _fingerprints(settings: EvalSettings, rows: Rows) -> dict[str, Any]:
    """What else must be equal: tokens, positions and labels of the rows, their documents, and the tokenizer."""
    return {
        "rows_fingerprint": _contents(settings, rows).fingerprint,
        "documents_fingerprint": hashlib.sha256(json.dumps(rows.documents).encode()).hexdigest()[:16],
        "tokenizer_fingerprint": None if rows.tokenizer is None else tokenizer_fingerprint(rows.tokenizer),
    }
