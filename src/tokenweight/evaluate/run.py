"""Evaluate a model and its baseline on the same tokens and probes: resolve, open, check, measure, compare, write."""

import hashlib
import json
import logging
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import datasets
import numpy as np
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from tokenweight.data import (
    Contents,
    check_predicted,
    checksum,
    holds_pieces,
    open_rows,
    read_provenance,
    row_lengths,
    scan_contents,
    text_tokens,
    verify,
)
from tokenweight.evaluate.comparison import GRID, Entry, Judge, Measure, compare
from tokenweight.evaluate.heads import (
    HeadSample,
    HeadScores,
    add_heads,
    choose_heads,
    head_samples,
    heads_markdown,
    masked_probes,
    retrieval_scores,
)
from tokenweight.evaluate.losses import Judging, Rows, find_key_tokens, open_weights, row_measures
from tokenweight.evaluate.probe_scoring import ProbeGrid, probe_measures, score_cells
from tokenweight.evaluate.probes import Probe
from tokenweight.evaluate.settings import EvalPlan, EvalSettings, make_plan
from tokenweight.evaluate.suites import suite_measures
from tokenweight.evaluate.tables import csv_text, grid_markdown, markdown
from tokenweight.models import (
    AlignedScorer,
    check_stale_rows,
    check_stale_windows,
    check_tokenizer,
    check_tokens,
    context_length,
    find_tokenizer,
    identity,
    load_config,
    load_model,
    own_device,
    parse_attention,
    predicts_one_more,
    text_prefix,
    tokenizer_fingerprint,
    with_dual_chunk,
)
from tokenweight.records import differences, environment, new_folder, read_json, write_json

logger = logging.getLogger(__name__)
_WEIGHTS = "token_weights.npy"


class _Task(NamedTuple):
    """An evaluation, with its data opened and checked, and its probes made."""

    names: list[str]
    """The models to measure now."""
    loaded: list[str]
    """The models that read all sequences, the evaluator first, which is not rerun if there is an earlier evaluation."""
    evaluator: str | None
    """The single model that finds the key tokens for all; None if each model and the first do so together."""
    aligned: PreTrainedTokenizerBase | None
    """The tokenizer of the evaluator, if it differs from that of the models."""
    plan: EvalPlan
    rows: Rows
    tokenizer: PreTrainedTokenizerBase | None
    probes: list[list[Probe]]
    """The probes of each family, length and depth, which are the same for all models."""
    samples: list[HeadSample]
    """The texts on which retrieval heads are found, likewise."""
    comparable: dict[str, Any]
    """Properties that an evaluation must share with its baseline."""
    earlier: dict[str, Any] | None
    """The record of an earlier evaluation, if that is the baseline."""


def evaluate(
    settings: EvalSettings, *, progress: Callable[[int, int], object] = lambda done, total: None
) -> dict[str, Any]:
    """Measure the model, and its baseline if that is not measured yet, and write the folder `settings.out`.

    The folder appears once it is complete, with `eval.json`, `table.md`, `table.csv` and `token_weights.npy` (those of
    LongPPL, so that no model needs to be rerun). Models are loaded one after another, the evaluator first.

    Args:
        progress: called after each batch of sequences with its number of tokens, and the total over all models.

    Returns:
        The contents of `eval.json`, which docs/evaluate.md describes.

    Raises:
        ValueError: in one line, before work starts, if settings, data, models, tokenizers or the earlier evaluation are
            incompatible.

    Example:
        >>> record = evaluate(EvalSettings("runs/dense", Path("validation"), Path("eval"), baseline="runs/uniform"))
        >>> for entry in read_table(record)[1]:
        ...     print(entry.measure, entry.value, entry.change, entry.low, entry.high)
    """
    task = _open(settings)
    total = task.rows.num_tokens * len(task.loaded)
    with new_folder(settings.out) as folder:
        record = _record(task, settings, folder / _WEIGHTS, lambda done: progress(done, total))
        write_json(folder / "eval.json", record)
        table = read_table(record)
        grid = grid_markdown([(_title(model), model.get("probe_grid", [])) for model in record["models"]])
        page = markdown(table, unit=record["unit"]) + grid + heads_markdown(record["models"])
        (folder / "table.md").write_text(page, encoding="utf-8")
        (folder / "table.csv").write_text(csv_text(table), encoding="utf-8")
    return record


def read_table(record: dict[str, Any]) -> list[list[Entry]]:
    """Read the rows of the table of an `eval.json`, one for each model."""
    return [[Entry(**entry) for entry in row] for row in record["comparison"]]


def _open(settings: EvalSettings) -> _Task:
    """Open the data, check everything that does not need a model's weights, and make the probes."""
    if settings.out.exists():
        raise ValueError(f"out {settings.out}: exists already; name a new folder")
    data, contents = _open_data(settings)
    lengths = row_lengths(data)
    plan = make_plan(settings, int(lengths.max()))
    earlier = _earlier(settings)
    names = [settings.model] if earlier or not settings.baseline else [settings.baseline, settings.model]
    evaluator = earlier["evaluator"]["model"] if earlier else settings.evaluator
    loaded = list(dict.fromkeys(names if earlier or evaluator is None else [evaluator, *names]))
    aligned = _other_tokenizer(evaluator, settings) if evaluator in loaded and evaluator not in names else None
    readers = [name for name in loaded if aligned is None or name != evaluator]
    tokenizer = _common_tokenizer(readers, settings)
    provenance = read_provenance(settings.data)
    rows = Rows(data, lengths, settings.max_tokens, text_prefix(tokenizer, provenance))
    pieces = holds_pieces(provenance)
    for name in readers:
        _check_model(name, settings, plan, rows, contents, pieces)
        _warn_of_training_data(name, settings, contents)
    probes, samples = _make_probes(settings, plan, tokenizer)
    comparable = {**plan.comparable(), **_fingerprints(rows, contents, tokenizer)}
    if earlier and (found := differences(earlier["settings"], comparable)):
        raise ValueError(f"baseline {settings.baseline}: was evaluated with other settings ({found})")
    return _Task(names, loaded, evaluator, aligned, plan, rows, tokenizer, probes, samples, comparable, earlier)


def _open_data(settings: EvalSettings) -> tuple[datasets.Dataset, Contents]:
    data, contents = open_rows(settings.data)
    if settings.num_rows is not None:
        if settings.num_rows < 1:
            raise ValueError(f"num_rows {settings.num_rows}: expected at least 1")
        data = data.select(range(min(settings.num_rows, len(data))))
        contents = scan_contents(data)
        check_predicted(contents, settings.data)
    verify(settings.data, range(len(data)))
    return data, contents


def _earlier(settings: EvalSettings) -> dict[str, Any] | None:
    """The record of an earlier evaluation, if that is the baseline."""
    if settings.baseline is None or not (Path(settings.baseline) / "eval.json").is_file():
        return None
    record, weights = read_json(Path(settings.baseline) / "eval.json"), Path(settings.baseline) / _WEIGHTS
    if missing := {"settings", "evaluator", "models"} - set(record):
        raise ValueError(f"baseline {settings.baseline}: eval.json has no {', '.join(sorted(missing))}")
    judge = record["evaluator"]
    if not weights.is_file() or checksum(weights) != judge.get("weights_sha256"):
        raise ValueError(f"baseline {settings.baseline}: {_WEIGHTS} is missing or damaged; evaluate it again")
    if settings.evaluator not in (None, judge["model"]):
        found = judge["model"] or "each model itself"
        raise ValueError(
            f"evaluator {settings.evaluator}: {found} found the key tokens of {settings.baseline}: "
            "expected the same evaluator, or none"
        )
    return record


def _other_tokenizer(evaluator: str | None, settings: EvalSettings) -> PreTrainedTokenizerBase | None:
    """The tokenizer of the evaluator, if it differs from that of the model."""
    found, own = (find_tokenizer(str(name)) for name in (evaluator, settings.model))
    if found is None or own is None or tokenizer_fingerprint(found) == tokenizer_fingerprint(own):
        return None
    return found


def _common_tokenizer(names: list[str], settings: EvalSettings) -> PreTrainedTokenizerBase | None:
    """The common tokenizer of all models that have one, which must also be that of the data."""
    provenance = read_provenance(settings.data)
    found = {name: tokenizer for name in names if (tokenizer := find_tokenizer(name)) is not None}
    for name, tokenizer in found.items():
        check_tokenizer(tokenizer, name, provenance, settings.data)
    prints = {name: tokenizer_fingerprint(tokenizer) for name, tokenizer in found.items()}
    if len(set(prints.values())) > 1:
        listed = ", ".join(f"{name} ({digits})" for name, digits in prints.items())
        raise ValueError(f"the models have different tokenizers: {listed}; their losses cannot be compared")
    return next(iter(found.values()), None)


def _warn_of_training_data(name: str, settings: EvalSettings, contents: Contents) -> None:
    """Warn if `train` trained a model on the sequences that it is evaluated on."""
    record = read_json(Path(name) / "run.json") if (Path(name) / "run.json").is_file() else {}
    data = record.get("settings", {}).get("data", [])
    paths = [data] if isinstance(data, str) else [one["path"] for one in data]
    made = [record.get("data", {}), *(one["data"] for one in record.get("mixture", {}).values())]
    paths += [str(one["rows"]) for one in made if "rows" in one]  # the sequences that were scored
    here = any(Path(path).resolve() == settings.data.resolve() for path in paths)
    if here or contents.fingerprint in [one.get("rows_fingerprint") for one in made]:
        logger.warning(
            "data %s: %s was trained on these sequences, and its losses on them say little: expected held-out ones",
            settings.data,
            name,
        )


def _check_model(
    name: str, settings: EvalSettings, plan: EvalPlan, rows: Rows, contents: Contents, pieces: bool
) -> None:
    """Raise a ValueError if a model, by its config, cannot read the sequences or the probes."""
    config = load_config(name)
    check_tokens(config, *contents.token_range, settings.data)
    positions = context_length(config)
    probe = max(plan.probe_lengths, default=0)
    if plan.attention is not None:
        parse_attention(plan.attention).of(config)
        positions = None
    read = plan.length - (pieces and predicts_one_more(config))
    for what, length in (("data: sequences", read), ("probe_lengths: probes", probe)):
        if positions is not None and length > positions:
            raise ValueError(
                f"{what} of {length} tokens: {name} has {positions} positions; extend its context first "
                "(docs/models.md)"
            )
    for size in [*plan.sizes, plan.long_context[0]]:
        check_stale_windows(config, size)
    check_stale_rows(config, [*set(rows.lengths.tolist()), *plan.probe_lengths])


def _make_probes(
    settings: EvalSettings, plan: EvalPlan, tokenizer: PreTrainedTokenizerBase | None
) -> tuple[list[list[Probe]], list[HeadSample]]:
    if tokenizer is None:
        asked_for = {"probes": plan.families, "suites": plan.suites, "heads": ["on"] * plan.heads}
        for name, asked in asked_for.items():
            instead = ", or none" if name == "probes" else ""
            if asked:
                raise ValueError(
                    f"{name} {','.join(asked)}: {settings.model} has no tokenizer: expected a tokenizer{instead}"
                )
        return [], []
    options = {name: getattr(plan, name) for name in ("families", "depths", "distances", "seed", "haystack")}
    grid = ProbeGrid(lengths=plan.probe_lengths, num=plan.num_probes, by=plan.probe_by, **options)
    instead = "--probes none"
    try:
        probes = grid.make(tokenizer)
        instead = "no --heads"
        return probes, head_samples(tokenizer, plan) if plan.heads else []
    except ValueError as error:
        lengths = ",".join(map(str, plan.probe_lengths))
        raise ValueError(f"probe_lengths {lengths}: {error}; or {instead}") from None


def _fingerprints(rows: Rows, contents: Contents, tokenizer: PreTrainedTokenizerBase | None) -> dict[str, Any]:
    """Fingerprints that must also match: tokens, positions, labels and documents of the data, and the tokenizer."""
    return {
        "rows_fingerprint": contents.fingerprint,
        "documents_fingerprint": hashlib.sha256(json.dumps(rows.documents).encode()).hexdigest()[:16],
        "tokenizer_fingerprint": None if tokenizer is None else tokenizer_fingerprint(tokenizer),
    }


def _record(task: _Task, settings: EvalSettings, path: Path, progress: Callable[[int], object]) -> dict[str, Any]:
    """Measure the models, and compare them."""
    weights = _open_weights(task, settings, path)
    models, judge = _measured(task, weights, progress)
    weights.flush()
    models = (task.earlier["models"] if task.earlier else []) + models
    judge = {**judge, "weights_sha256": checksum(path)}
    _check_samples(models)
    table = compare([(_title(model), _measures(model)) for model in models], seed=settings.seed)
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


def _title(model: dict[str, Any]) -> str:
    """The name of a model in tables; a model may be compared with itself under another attention."""
    return model["model"] if model.get("attention") is None else f"{model['model']}, {model['attention']}"


def _measures(model: dict[str, Any]) -> list[Measure]:
    return [Measure(*(measure[name] for name in Measure._fields)) for measure in model["measures"]]


def _check_samples(models: list[dict[str, Any]]) -> None:
    """Raise a ValueError if a suite gave the models different samples, since the harness or its data have changed."""
    for model in models[1:]:
        if found := differences(models[0]["suites"], model["suites"]):
            raise ValueError(f"suites: {models[0]['model']} and {model['model']} saw different samples ({found})")


def _open_weights(task: _Task, settings: EvalSettings, path: Path) -> np.memmap:
    """A row of weights for each model, or one for the evaluator; those of an earlier evaluation are filled in."""
    num_earlier = len(task.earlier["models"]) if task.earlier else 0
    num_judges = num_earlier + len(task.names) if task.evaluator is None else 1
    weights = open_weights(path, num_judges, task.rows.num_tokens)
    if task.earlier:
        before = np.load(Path(str(settings.baseline)) / _WEIGHTS, mmap_mode="r")
        weights[: len(before)] = before
    return weights


def _measured(
    task: _Task, weights: np.memmap, progress: Callable[[int], object]
) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """The records of the models; and the identity of the evaluator, if there is one, which then runs first."""
    records, judge = {}, task.earlier["evaluator"] if task.earlier else {"model": None}
    heads: dict[str, HeadScores] = {}
    for name in task.loaded:
        finds = not task.earlier and name == task.evaluator
        model = load_model(name, dtype=task.plan.dtype, attn_implementation=task.plan.attn_implementation).to(
            own_device()
        )
        found = {**identity(model, name), "attention": None}
        if task.plan.attention is not None:
            attention = parse_attention(task.plan.attention).of(model.config)
            model, found["attention"] = with_dual_chunk(model, attention), str(attention)
        if finds:
            judge = (
                found
                if task.aligned is None
                else {**found, "tokenizer_fingerprint": tokenizer_fingerprint(task.aligned)}
            )
        if name in task.names:
            judging = _judging(task, weights, name, found["weights_fingerprint"], judge)
            if task.samples:  # before sequences, like suites
                heads[name] = retrieval_scores(model, task.samples)
            own = measure_model(name, model, task, judging, heads.get(name), progress=progress)
            records[name] = {**found, **own}
        else:
            find_key_tokens(_finder(model, task), task.plan, task.rows, weights[0], progress=progress)
        del model  # before the next one is loaded
    measured = [records[name] for name in task.names]
    if heads:
        first = task.earlier["models"][0] if task.earlier else None
        add_heads(measured, [heads[name] for name in task.names], first)
    return measured, judge


def _finder(model: PreTrainedModel, task: _Task) -> PreTrainedModel | AlignedScorer:
    """The evaluator; if its tokenizer differs, each token has the losses of the group that it is in."""
    if task.aligned is None:
        return model
    assert task.tokenizer is not None
    options: dict[str, Any] = {"tokenize": text_tokens, "prefix": text_prefix(task.aligned, {})}
    return AlignedScorer(model, task.aligned, task.tokenizer, whole=True, max_tokens=task.rows.max_tokens, **options)


def _judging(task: _Task, weights: np.memmap, name: str, fingerprint: str, judge: dict[str, Any]) -> Judging:
    """The source of the key tokens when a model is measured: itself and the first model, or the evaluator."""
    if task.evaluator is None:
        number = len(weights) - len(task.names) + task.names.index(name)
        return Judging(weights[number], baseline=weights[0] if number else None)
    # A copy of the evaluator judges identically.
    judged_by: Judge = "self" if fingerprint == judge["weights_fingerprint"] else "third"
    return Judging(weights[0], judged_by, writes=not task.earlier and name == task.evaluator)


def measure_model(
    name: str,
    model: PreTrainedModel,
    task: _Task,
    judging: Judging,
    heads: HeadScores | None = None,
    *,
    progress: Callable[[int], object] = lambda done: None,
) -> dict[str, Any]:
    """Compute every metric of one model.

    Args:
        judging: source of the key tokens of LongPPL.
        heads: retrieval scores of the model.
        progress: called with the number of tokens of each batch of sequences.

    Returns:
        `measures`; `probe_grid`, probes by family, length and depth; `suites`, fingerprints of their samples; `heads`
        with the probes without some.

    Raises:
        ValueError: if a loss is not finite, or the model is not supported.
    """
    plan = task.plan
    masked = None if heads is None or plan.mask_heads is None else choose_heads(plan, heads)
    asked, samples = suite_measures(model, task.tokenizer, plan)  # first, so that it fails before any sequence is read
    read = row_measures(model, plan, task.rows, judging, progress=progress)
    grid, without = [], {}
    if task.probes:
        assert task.tokenizer is not None
        grid = score_cells(model, task.tokenizer, task.probes, plan.probe_by)
        if masked is not None:
            without["heads"] = {"masked": masked_probes(model, task.tokenizer, task.probes, plan, masked, grid)}
    measures = [*read, *probe_measures(grid, plan), *asked]
    for measure in measures:
        if not all(map(math.isfinite, measure.total)):
            raise ValueError(f"{measure.name} of {name} is not finite: expected finite losses and margins")
    return {
        "measures": [{**measure._asdict(), "value": measure.value} for measure in measures],
        "probe_grid": [{name: getattr(record, name) for name in GRID} for record in grid],
        "suites": samples,
        **without,
    }
