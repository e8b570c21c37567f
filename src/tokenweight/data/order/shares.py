"""Counts of tokens with more context than the short one: on all others, weights can only be 1."""

import collections
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from tokenweight.data.dataset import load_rows, read_prepared, read_provenance
from tokenweight.data.shards import dataset_files, noted_contents
from tokenweight.data.stores import local_folder

_ROWS_READ = 256


class ContextShare(NamedTuple):
    """Counts of tokens of a source with more context than the short one."""

    source: str
    """The text file, folder or data set that `prepare` was given; or the folder of rows, if those do not say."""
    tokens: int
    """Tokens that are predicted."""
    beyond: int
    """Those among them that have more tokens of their document before them, in their row, than a short context has."""

    @property
    def share(self) -> float:
        """`beyond` among `tokens`; 0 without any."""
        return self.beyond / self.tokens if self.tokens else 0.0


def context_shares(folder: str | os.PathLike[str], size: int) -> list[ContextShare]:
    """Counts, for each source, of tokens with more context than `size` tokens: those that long training can change.

    Lengths of rows are read, and names of documents where there are several sources; of packed rows, and of rows in
    which not all is predicted, `position_ids` and `labels`, too.

    Args:
        folder: a folder of rows, scored or not, whoever wrote them.
        size: tokens of the short context.

    Raises:
        ValueError: as `load_rows` does.
    """
    texts = _texts(folder)
    only = texts[0] if len(texts) == 1 else str(folder)
    totals: dict[str, np.ndarray] = collections.defaultdict(lambda: np.zeros(2, dtype=np.int64))
    known: dict[str, str] = {}
    for table in _tables(local_folder(folder), ("document", "documents") if len(texts) > 1 else ()):
        for name, counts in _counts(table, size):
            if name is None:
                if counts.any():  # what fills up a packed row is in no document, and is not predicted
                    totals[only] += counts
                continue
            file, _, line = name.rpartition(":")
            file = file if line.isdecimal() else name
            if file not in known:
                known[file] = _source(name, texts) or only
            totals[known[file]] += counts
    order = {text: place for place, text in enumerate(texts)}
    named = sorted(totals, key=lambda name: order.get(name, len(order)))
    return [ContextShare(name, *totals[name].tolist()) for name in named]


def _tables(folder: Path, names: Sequence[str]) -> Iterator[pa.Table]:
    """The columns that say how long documents are, and what they are called."""
    wanted = ("input_ids", "position_ids", "labels", *names)
    files = dataset_files(folder) if noted_contents(folder) is not None else []
    if not files or not files[0].endswith(".parquet"):
        rows = load_rows(folder)
        columns = [name for name in wanted if name in rows.column_names]
        yield from rows.select_columns(columns).with_format("arrow").iter(_ROWS_READ)
        return
    for file in files:  # `load_rows` would write what is in Parquet files to a cache
        with pq.ParquetFile(folder / file) as opened:
            columns = [name for name in wanted if name in opened.schema_arrow.names]
            for batch in opened.iter_batches(_ROWS_READ, columns=columns):
                yield pa.Table.from_batches([batch])


def _counts(table: pa.Table, size: int) -> Iterator[tuple[str | None, np.ndarray]]:
    """The name of each document in each row, and how many of its tokens are predicted, in all and beyond `size`."""
    lengths = np.asarray(pc.list_value_length(table["input_ids"]), dtype=np.int64)
    names = table["document"].to_pylist() if "document" in table.column_names else [None] * len(lengths)
    if not {"position_ids", "labels"} & {*table.column_names}:
        yield from zip(names, np.maximum(np.stack([lengths - 1, lengths - size], axis=1), 0))
        return
    starts = np.cumsum(lengths) - lengths
    begins = np.zeros(int(lengths.sum()), dtype=bool)
    if "position_ids" in table.column_names:
        begins = _values(table, "position_ids") == 0
    begins[starts[lengths > 0]] = True
    piece, first = np.cumsum(begins) - 1, np.flatnonzero(begins)
    predicted = ~begins
    if "labels" in table.column_names:
        predicted &= _values(table, "labels") != -100
    beyond = predicted & (np.arange(len(begins)) - first[piece] >= size)
    counts = np.stack([np.bincount(piece, mask, minlength=len(first)) for mask in (predicted, beyond)], axis=1)
    row = np.searchsorted(starts, first, side="right") - 1
    place = np.arange(len(first)) - np.searchsorted(row, row)  # among the documents of its row
    packed = table["documents"].to_pylist() if "documents" in table.column_names else [[] for _ in lengths]
    for one, number, count in zip(row.tolist(), place.tolist(), counts.astype(np.int64)):
        yield packed[one][number] if number < len(packed[one]) else names[one], count


def _values(table: pa.Table, name: str) -> np.ndarray:
    return np.asarray(pc.list_flatten(table[name].combine_chunks()))


def _texts(folder: str | os.PathLike[str]) -> list[str]:
    """The texts that `prepare` was given, by its note; for scored rows, by that of the folder that was scored."""
    return [str(text) for text in read_prepared(read_provenance(folder)).get("texts") or ()]


def _source(document: str, texts: Sequence[str]) -> str | None:
    """The text of a command line that a document is from: the last folder or file that its name begins with."""
    found = []
    for text in texts:
        path = str(Path(text))
        if document == path or document.startswith((f"{path}:", f"{path}/")) or path == ".":
            found.append((len(path), text))
    return max(found)[1] if found else None
