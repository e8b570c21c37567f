"""Comparison of models: the value of every metric, its change from the baseline, and its uncertainty."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Literal, NamedTuple

import torch

from tokenweight.evaluate.intervals import Sums, paired_difference

GRID = ("family", "length", "depth", "distance", "chance", "accuracy", "margin", "loss")
"""The fields of a `ProbeRecord` that an evaluation keeps."""


Judge = Literal["self", "pair", "third"]
"""The model whose losses chose (or weighted) the tokens of a metric: itself, itself and the baseline alike, or
a third."""


class Measure(NamedTuple):
    """One metric of one model, with a sum for each document, so that models can be compared in pairs.

    Example:
        >>> measure = Measure("all", "cost", "nats", "lower", total=[210.0, 90.0], num_tokens=[100.0, 50.0])
        >>> measure.value
        2.0
        >>> baseline = measure._replace(total=[200.0, 85.0])
        >>> round(paired_difference(measure.sums, baseline.sums).value, 3)
        0.1
    """

    name: str
    group: str
    """"long", "short" or "cost"; any other gets separate columns."""
    unit: str
    """"nats", "share", or "perplexity", which is `exp` of the mean of sums in nats, and whose change is a ratio."""
    better: str | None
    """"lower", "higher", or None if neither is better."""
    total: list[float]
    """Sum over the tokens (or probes) of each document."""
    num_tokens: list[float]
    """Number of these tokens, or the sum of their weights."""
    summary: bool = False
    """Whether it is shown in the terminal."""
    judge: Judge | None = None
    """None where the tokens do not depend on any model's losses."""
    baseline_total: list[float] | None = None
    """The baseline's sums over the same tokens, if these depend on the pair; else the baseline's `total` is used."""

    @property
    def sums(self) -> Sums:
        """The sums of the documents, as `paired_difference` takes them."""
        return Sums(*(torch.tensor(column, dtype=torch.float64) for column in (self.total, self.num_tokens)))

    @property
    def value(self) -> float | None:
        """The mean over all tokens, or its `exp` for a perplexity; None without tokens."""
        mean = self.sums.mean
        return None if math.isnan(mean) else math.exp(mean) if self.unit == "perplexity" else mean


class Entry(NamedTuple):
    """One cell of the table: a metric of a model, and its change from the first model."""

    model: str
    measure: str
    group: str
    unit: str
    better: str | None
    value: float | None
    change: float | None
    """The value minus that of the baseline, or their ratio for a perplexity; None for the baseline."""
    low: float | None
    """Lower and upper limit of the 95 % interval of the change; None where there are too few documents, or where one of
    the two models chose the tokens: it chose those that it happened to predict well, which favors it."""
    high: float | None
    clear: bool
    """Whether the interval excludes "no change"."""
    best: bool
    """Whether no model has a better value, and its change is clear (for the baseline: the changes of all others). False
    for all models where their tokens differ."""
    num_documents: int
    """Number of documents with tokens of this metric; for probes, of facts asked for; for suites, of samples."""
    summary: bool
    judge: Judge | None
    """The judge of the `Measure`."""


def compare(models: Sequence[tuple[str, Sequence[Measure]]], *, seed: int = 0) -> list[list[Entry]]:
    """Make the table: a row for each model, the first of which is the baseline, with all of its metrics.

    Args:
        models: name and measures, of the same documents in the same order.
        seed: seed of the bootstrap (`paired_difference`).
    """
    names = list(dict.fromkeys(measure.name for _, measures in models for measure in measures))
    known = [{measure.name: measure for measure in measures} for _, measures in models]
    columns = {name: [measures[name] for measures in known if name in measures] for name in names}
    table = []
    for (model, _), measures in zip(models, known):
        first = known[0] if measures is not known[0] else {}
        table.append(
            [_entry(model, measures[name], first.get(name), columns[name], seed) for name in names if name in measures]
        )
    others = [entry for row in table[1:] for entry in row]
    unclear = {entry.measure for entry in others if not entry.clear}
    compared = {entry.measure for entry in others} - unclear
    table[0] = [entry._replace(best=entry.best and entry.measure in compared) for entry in table[0]]
    return [table[0], *([entry._replace(best=entry.best and entry.clear) for entry in row] for row in table[1:])]


def is_flattered(judge: Judge | None, baseline_judge: Judge | None) -> bool:
    """Whether a change compares two models on tokens that one of them chose."""
    return judge != "pair" and "self" in (judge, baseline_judge)


def _entry(model: str, measure: Measure, baseline: Measure | None, column: list[Measure], seed: int) -> Entry:
    numbers = [other.value for other in column if other.value is not None]
    best = None
    if all(other.judge != "self" for other in column):
        best = {"lower": min, "higher": max}.get(measure.better or "")
    is_best = best is not None and len(set(numbers)) > 1 and measure.value == best(numbers)
    change = low = high = None
    clear = False
    if baseline is not None and measure.baseline_total is not None:
        baseline = measure._replace(total=measure.baseline_total)
    if baseline is not None and None not in (measure.value, baseline.value):
        change, interval, _ = paired_difference(measure.sums, baseline.sums, seed=seed)
        interval = None if is_flattered(measure.judge, baseline.judge) else interval
        low, high = (None, None) if interval is None else interval
        clear = interval is not None and not interval[0] <= 0 <= interval[1]
        if measure.unit == "perplexity":
            change, low, high = (None if number is None else math.exp(number) for number in (change, low, high))
    num_documents = int((measure.sums.num_tokens > 0).sum())
    head = (model, measure.name, measure.group, measure.unit, measure.better, measure.value)
    return Entry(*head, change, low, high, clear, is_best, num_documents, measure.summary, measure.judge)


def short_names(table: Sequence[Sequence[Entry]]) -> list[str]:
    """The last parts of the names of a table's models, if all differ; else the full names."""
    names = [row[0].model for row in table]
    short = [Path(name).name for name in names]
    return short if len(set(short)) == len(names) else names
