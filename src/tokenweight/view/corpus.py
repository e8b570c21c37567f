"""Context gain of a whole scored folder, from the statistics that `score --long` stores for each sequence.

No tokens are read, so that a folder of a hundred thousand sequences takes seconds.
"""

import math
import os
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import datasets
import numpy as np
from rich.box import SIMPLE_HEAD
from rich.console import RenderableType
from rich.table import Table
from rich.text import Text

from tokenweight.data import load_rows, row_lengths
from tokenweight.view.charts import MINUS, ticks
from tokenweight.view.summaries import Histogram
from tokenweight.view.terminal import ESCAPES

TOP_SHARE = 0.2
"""Fraction of the sequences, those with the largest gain, whose share of the total gain is shown."""
_BARS = 40  # characters of the longest bar


class DocumentGain(NamedTuple):
    """Mean gain of the sequences of a document; or of one sequence, if the folder names no documents, or only one."""

    name: str
    row: int
    """Number of its first sequence."""
    sequences: int
    mean_gain: float


class CorpusGain(NamedTuple):
    """Gain of the sequences of a folder from the long context over one of the short contexts.

    Each sequence counts equally. The gain of a token is its short loss minus its long loss, in nats; tokens of first
    windows, whose short context is the long one, do not count.
    """

    source: str
    """The folder; and the value of a column, if the sequences are split by it."""
    size: int
    """Tokens of the short context."""
    sequences: int
    """Number of sequences with counted tokens."""
    all_sequences: int
    tokens: int
    """Number of tokens of all sequences."""
    mean_gain: float
    """Mean over the sequences of their mean gains; the quantiles are of these, too."""
    quantiles: dict[str, float]
    better: float
    """Fraction of tokens that are better predicted with the long context."""
    key_token_ratio: float
    """The fraction of key tokens of LongPPL (`key_tokens`)."""
    top_share: float | None
    """Fraction of the total gain in the fifth of the sequences with the largest; None unless the total is positive.
    More than 1 if the other sequences lose."""
    histogram: Histogram
    """Histogram of the mean gains of the sequences."""
    best: list[DocumentGain]
    """The documents with the largest mean gain, from the largest."""
    worst: list[DocumentGain]
    """The documents with the smallest mean gain, from the smallest; no document is in both lists."""


def corpus_gains(
    folder: str | os.PathLike[str],
    *,
    size: int | None = None,
    by: str | None = None,
    top: int = 5,
    name: str | None = None,
) -> list[CorpusGain]:
    """Summarize a scored folder for each short context, from the largest, and for each value of a column.

    Args:
        folder: scored with `--long`.
        size: tokens of the only short context to summarize; by default all that are stored.
        by: name of a column that distinguishes sources.
        top: number of best, and of worst documents.
        name: name of the folder in the result; by default its path.

    Raises:
        ValueError: if the folder stores no gains, or none of that size, or has no such column.
    """
    rows = load_rows(folder)
    sizes = sorted(int(name.rpartition("_")[2]) for name in rows.column_names if name.startswith("gain_mean_"))[::-1]
    if not sizes:
        raise ValueError(f"{folder} stores no gain per sequence: score it with `tokenweight score … --long`")
    if size is not None and size not in sizes:
        raise ValueError(f"size {size}: {folder} stores gains of {', '.join(map(str, sizes))} tokens: name one of them")
    if top < 0:
        raise ValueError(f"top {top}: expected a number of documents, 0 or more")
    lengths, names, source = row_lengths(rows), _names(rows), str(folder) if name is None else name
    groups = {source: np.arange(len(rows))}
    if by is not None:
        groups = {f"{source}, {value}": places for value, places in _groups(rows, folder, by)}
    found = []
    for own in sizes if size is None else [size]:
        columns = [f"{name}_{own}" for name in ("gain_mean", "gain_positive", "key_token_ratio")]
        numbers = rows.select_columns(columns).with_format("numpy")[:]
        gains = np.stack([np.asarray(numbers[column], dtype=np.float64) for column in columns])
        found += [_summed(name, own, gains, lengths, names, places, top) for name, places in groups.items()]
    return found


def _summed(
    source: str,
    size: int,
    gains: np.ndarray,
    lengths: np.ndarray,
    names: list[str] | None,
    places: np.ndarray,
    top: int,
) -> CorpusGain:
    """Summarize the sequences with these indices; `gains` are means, fractions of better tokens, and of key tokens."""
    own = places[~np.isnan(gains[0, places])]
    means, better, key = gains[:, own]
    documents = _documents(own, means, names)
    if names is not None and len(documents) == 1:  # then list its sequences instead
        documents = _documents(own, means, [f"{name} (row {row})" for row, name in enumerate(names)])
    num = min(top, len(documents) // 2) if len(documents) > 1 else top
    ordered, total = np.sort(means)[::-1], means.sum()
    return CorpusGain(
        source=source,
        size=size,
        sequences=len(own),
        all_sequences=len(places),
        tokens=int(lengths[places].sum()),
        mean_gain=_mean(means),
        quantiles={f"p{level}": float(np.percentile(means, level)) if len(own) else math.nan for level in (10, 50, 90)},
        better=_mean(better),
        key_token_ratio=_mean(key),
        top_share=float(ordered[: math.ceil(TOP_SHARE * len(own))].sum() / total) if total > 0 else None,
        histogram=_histogram(means),
        best=documents[:num],
        worst=documents[::-1][:num] if len(documents) > 1 else [],
    )


def _mean(values: np.ndarray) -> float:
    return float(values.mean()) if len(values) else math.nan


def _names(rows: datasets.Dataset) -> list[str] | None:
    """The document of each sequence; for packed ones, the first and the number of others."""
    if "document" in rows.column_names:
        return rows.select_columns("document").with_format("arrow")[:].column("document").to_pylist()
    if "documents" not in rows.column_names:
        return None
    lists = rows.select_columns("documents").with_format("arrow")[:].column("documents").to_pylist()
    others = [f" and {len(own) - 1} more" if len(own) > 1 else "" for own in lists]
    return [f"{own[0] if own else ''}{more} (row {row})" for row, (own, more) in enumerate(zip(lists, others))]


def _groups(rows: datasets.Dataset, folder: str | os.PathLike[str], by: str) -> list[tuple[str, np.ndarray]]:
    if by not in rows.column_names or isinstance(rows.features[by], datasets.List):
        known = [name for name, kind in rows.features.items() if getattr(kind, "dtype", None) == "string"]
        raise ValueError(f"by {by}: {folder} has no such column of names: expected one of {', '.join(known) or 'none'}")
    column = rows.select_columns(by).with_format("arrow")[:].column(by).combine_chunks().dictionary_encode()
    values, places = column.dictionary.to_pylist(), column.indices.to_numpy(zero_copy_only=False)
    return [(str(value), np.flatnonzero(places == number)) for number, value in enumerate(values)]


def _documents(places: np.ndarray, means: np.ndarray, names: list[str] | None) -> list[DocumentGain]:
    """The documents of the sequences with these indices, from the largest mean gain."""
    found: dict[str, tuple[int, int, float]] = {}
    for row, mean in zip(places.tolist(), means.tolist()):
        name = f"row {row}" if names is None else names[row]
        first, num, total = found.get(name, (row, 0, 0.0))
        found[name] = first, num + 1, total + mean
    documents = [DocumentGain(name, first, num, total / num) for name, (first, num, total) in found.items()]
    return sorted(documents, key=lambda document: (-document.mean_gain, document.row))


def _histogram(means: np.ndarray) -> Histogram:
    """At most a dozen bins with round edges for at least 98 % of the sequences; the outer two include the others."""
    if not len(means):
        return Histogram([], [])
    low, high = np.quantile(means, [0.01, 0.99]).tolist()
    inner = ticks(low, high, min(10, math.ceil(math.sqrt(len(means)))))
    step = inner[1] - inner[0] if len(inner) > 1 else 10 ** math.floor(math.log10(abs(low) or 1))
    inner = inner or [step * math.floor(low / step)]
    edges = [round(edge, 12) for edge in (inner[0] - step, *inner, inner[-1] + step)]
    counts = np.bincount(np.digitize(means, edges[1:-1]), minlength=len(edges) - 1)
    return Histogram(edges, counts.tolist())


def corpus_view(gains: Sequence[CorpusGain]) -> list[RenderableType]:
    """Show the numbers of several folders or contexts as a table, and the gains of each as a text histogram."""
    look: dict[str, Any] = {"box": SIMPLE_HEAD, "collapse_padding": True, "pad_edge": False}
    table = Table(**look, caption=CORPUS_NOTE, caption_justify="left")
    for name in ("", *(gain.source for gain in gains)):
        table.add_column(Text(name.translate(ESCAPES)), justify="right" if name else "left", overflow="fold")
    for name, cells in corpus_lines(gains):
        table.add_row(name, *cells)
    shown: list[RenderableType] = [table]
    for gain in gains:
        shown += [_bars(gain)] if gain.sequences >= MIN_BARS else []
        shown += [_lists(gain)] if gain.best else []
    return shown


MIN_BARS = 5
"""Fewest sequences whose gains are drawn as a histogram."""


def corpus_lines(gains: Sequence[CorpusGain]) -> list[tuple[str, list[str]]]:
    """Lines of the table: name of a number, and its value for each folder and context."""
    p10, p50, p90 = ([_shown(gain.quantiles[level], "+.4f") for gain in gains] for level in ("p10", "p50", "p90"))
    return [
        ("short context (tokens)", [f"{gain.size:,}" for gain in gains]),
        ("sequences", [_counted(gain) for gain in gains]),
        ("tokens", [f"{gain.tokens:,}" for gain in gains]),
        (f"mean gain: short {MINUS} long loss (nats)", [_shown(gain.mean_gain, "+.4f") for gain in gains]),
        ("  10 % of the sequences gain less than", p10),
        ("  half of them", p50),
        ("  90 %", p90),
        ("tokens that the long context predicts better", [_shown(gain.better, ".1%") for gain in gains]),
        ("key tokens of LongPPL (gain above 2 nats)", [_shown(gain.key_token_ratio, ".2%") for gain in gains]),
        (
            "of the whole gain, in the fifth with most",
            ["-" if gain.top_share is None else f"{gain.top_share:.0%}" for gain in gains],
        ),
    ]


CORPUS_NOTE = "Beyond the first window; means, quantiles and percentages over sequences, each of which counts the same."
"""Scope of the numbers."""


def _counted(gain: CorpusGain) -> str:
    """Describe how many of the sequences count."""
    return f"{gain.sequences:,}" + f" of {gain.all_sequences:,}" * (gain.sequences < gain.all_sequences)


def _shown(value: float, form: str) -> str:
    return "-" if math.isnan(value) else format(value, form)


def bin_labels(histogram: Histogram) -> list[str]:
    """Names of the bins of mean gains; the outer two include what lies beyond."""
    edges = [f"{edge:+.4g}" if edge else "0" for edge in histogram.edges]
    return [f"below {edges[1]}", *(f"{a} to {b}" for a, b in pairwise(edges[1:-1])), f"{edges[-2]} or more"]


def _bars(gain: CorpusGain) -> Text:
    labels, most = bin_labels(gain.histogram), max(gain.histogram.counts)
    text = Text(f"{gain.source.translate(ESCAPES)}, context of {gain.size:,}: mean gain of {_counted(gain)} sequences")
    text.stylize("bold")
    for label, count in zip(labels, gain.histogram.counts):
        bar = "█" * math.ceil(_BARS * count / most)
        text.append(f"\n{label:>20}  {bar} {count:,}" if count else f"\n{label:>20}", "not bold")
    return text


def _lists(gain: CorpusGain) -> Table:
    table = Table(box=SIMPLE_HEAD, collapse_padding=True, pad_edge=False)
    table.add_column("mean\ngain", justify="right")
    table.add_column("most", overflow="fold")
    if gain.worst:
        table.add_column("mean\ngain", justify="right")
        table.add_column("least", overflow="fold")
    for place, best in enumerate(gain.best):
        cells = [f"{best.mean_gain:+.4f}", document_name(best)]
        if gain.worst:
            cells += [f"{gain.worst[place].mean_gain:+.4f}", document_name(gain.worst[place])]
        table.add_row(*map(Text, cells))
    return table


def document_name(document: DocumentGain) -> str:
    """The name of a document, with the number of its first sequence for `show --row`."""
    name = document.name.translate(ESCAPES)
    if name.endswith(f"(row {document.row})") or name == f"row {document.row}":
        return name
    more = f", {document.sequences} sequences from" if document.sequences > 1 else ","
    return f"{name}{more} row {document.row}"


def corpus_records(gains: Sequence[CorpusGain]) -> list[dict[str, Any]]:
    """Convert to JSON types, with None for undefined numbers."""

    def plain(value: Any) -> Any:
        if isinstance(value, float):
            return value if math.isfinite(value) else None
        if hasattr(value, "_asdict"):
            return plain(value._asdict())
        if isinstance(value, dict):
            return {key: plain(one) for key, one in value.items()}
        return [plain(one) for one in value] if isinstance(value, list) else value

    return [plain(gain) for gain in gains]


def name_folders(folders: Sequence[str | os.PathLike[str]]) -> list[str]:
    """The last parts of the paths, if all differ; else the full paths."""
    short = [Path(folder).absolute().name for folder in folders]
    return short if len(set(short)) == len(short) else [str(folder) for folder in folders]
