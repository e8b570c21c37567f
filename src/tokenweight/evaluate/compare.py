"""Models side by side: the value of every measure, its change from the baseline, and how far that may be chance."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch

from tokenweight.evaluate.intervals import Sums, paired_difference

GRID = ("family", "length", "depth", "accuracy", "margin")
"""What an evaluation says of the probes of one family, length and depth."""


class Measure(NamedTuple):
    """What one model gets in one respect, with a sum for each document, so that models can be compared in pairs."""

    name: str
    group: str
    """"long", "short" or "cost"; any other gets columns of its own."""
    unit: str
    """"nats", "share", or "perplexity": this is `exp` of the mean of sums in nats, and its change is a ratio."""
    better: str | None
    """"lower", "higher", or None where neither is."""
    total: list[float]
    """Sum over the tokens (or probes) of each document."""
    num_tokens: list[float]
    """How many these are, or the sum of their weights."""
    summary: bool = False
    """Whether it is in the table that the terminal shows."""

    @property
    def sums(self) -> Sums:
        """The sums of the documents, as `paired_difference` takes them."""
        return Sums(*(torch.tensor(column, dtype=torch.float64) for column in (self.total, self.num_tokens)))

    @property
    def value(self) -> float | None:
        """The mean over all tokens, of a perplexity its `exp`; None if there is no token."""
        mean = self.sums.mean
        return None if math.isnan(mean) else math.exp(mean) if self.unit == "perplexity" else mean


class Entry(NamedTuple):
    """One cell of the table: a measure of a model, and its change from the first model."""

    model: str
    measure: str
    group: str
    unit: str
    better: str | None
    value: float | None
    change: float | None
    """Value less that of the baseline, of a perplexity the ratio of the two; None for the baseline."""
    low: float | None
    """Limits of the 95 % interval of the change; None where there are too few documents for one."""
    high: float | None
    clear: bool
    """Whether the interval excludes that nothing changed."""
    best: bool
    """Whether no model has a better value, and one has a worse."""
    num_documents: int
    """That hold a token of this measure; of a probe, the facts asked for."""
    summary: bool


def compare(models: Sequence[tuple[str, Sequence[Measure]]], *, seed: int = 0) -> list[list[Entry]]:
    """The row of each model, the first one being the baseline: each has the measures of all, where it has them.

    Args:
        models: name and measures, of the same documents in the same order.
        seed: of the draws of documents (`paired_difference`).
    """
    names = list(dict.fromkeys(measure.name for _, measures in models for measure in measures))
    known = [{measure.name: measure for measure in measures} for _, measures in models]
    columns = {name: [measures[name].value for measures in known if name in measures] for name in names}
    table = []
    for (model, _), measures in zip(models, known):
        first = known[0] if measures is not known[0] else {}
        table.append(
            [_entry(model, measures[name], first.get(name), columns[name], seed) for name in names if name in measures]
        )
    return table


def _entry(model: str, measure: Measure, baseline: Measure | None, values: list[float | None], seed: int) -> Entry:
    numbers = [value for value in values if value is not None]
    best = {"lower": min, "higher": max}.get(measure.better or "")
    is_best = best is not None and len(set(numbers)) > 1 and measure.value == best(numbers)
    change = low = high = None
    clear = False
    if baseline is not None and None not in (measure.value, baseline.value):
        change, interval, _ = paired_difference(measure.sums, baseline.sums, seed=seed)
        low, high = (None, None) if interval is None else interval
        clear = interval is not None and not interval[0] <= 0 <= interval[1]
        if measure.unit == "perplexity":
            change, low, high = (None if number is None else math.exp(number) for number in (change, low, high))
    num_documents = int((measure.sums.num_tokens > 0).sum())
    head = (model, measure.name, measure.group, measure.unit, measure.better, measure.value)
    return Entry(*head, change, low, high, clear, is_best, num_documents, measure.summary)


def short_names(table: Sequence[Sequence[Entry]]) -> list[str]:
    """The models of a table by the last parts of their names, if these tell them apart."""
    names = [row[0].model for row in table]
    short = [Path(name).name for name in names]
    return short if len(set(short)) == len(names) else names
