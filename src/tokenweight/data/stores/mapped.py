"""Arrow files that are mapped into memory when their rows are read."""

import bisect
import copy
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property, lru_cache, partial
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
from datasets.table import ConcatenationTable, InMemoryTable, MemoryMappedTable
from datasets.table import Table as AnyTable

from tokenweight.data.stores.blocks import Blocks, in_threads, list_lengths, read_shard
from tokenweight.records import read_json

_OPEN = 128
"""Shards that are open at once, each of them with a file descriptor, of which a process often may have 1,024."""
_ROWS_READ = 1000
_Number = int | np.integer


def map_table(path: Path) -> MemoryMappedTable:
    """The table in an Arrow stream, as `MemoryMappedTable.from_file` returns it, but without reading all of its pages:
    only the heads of batches are read, a page or two each."""
    return MemoryMappedTable(read_shard(path), str(path))


def map_rows(folder: Path) -> datasets.Dataset:
    """The rows of a folder that `finish_dataset` has made, as `datasets.load_from_disk` returns them. No page of a
    shard is read before its rows are, if the heads of blocks were kept (`write_blocks`)."""
    info = datasets.DatasetInfo.from_dict(read_json(folder / "dataset_info.json"))
    state = read_json(folder / "state.json")
    return datasets.Dataset(_opened(folder.absolute(), state), info=info, fingerprint=state["_fingerprint"])


def _opened(folder: Path, state: dict[str, Any], replays: Sequence[Any] = ()) -> AnyTable:
    kept = Blocks.opened(folder, state)
    if kept is not None:
        return _Shards(kept, (folder, state), replays)
    files = [file["filename"] for file in state["_data_files"]]
    with ThreadPoolExecutor(16) as threads:  # which wait for the disk, or for a server, together
        tables = list(threads.map(lambda file: map_table(folder / file), files))
    return _replayed(ConcatenationTable.from_tables(tables), replays)


def row_lengths(rows: datasets.Dataset) -> np.ndarray:
    """The number of tokens in each row. No token is read for it."""
    if rows._indices is None and isinstance(rows.data, _Shards) and rows.data.has_tokens:
        lengths = in_threads(rows.data.kept.lengths, range(len(rows.data.kept.rows)))
    else:
        batches = rows.select_columns("input_ids").with_format("arrow").iter(_ROWS_READ)
        lengths = [list_lengths(batch) for batch in batches]
    return np.concatenate(lengths, dtype=np.int64) if lengths else np.zeros(0, dtype=np.int64)


def _replayed(table: Any, replays: Sequence[Any]) -> Any:
    """A table with changes of its columns: names of methods, and their arguments."""
    for name, args, kwargs in replays:
        table = getattr(table, name)(*args, **kwargs)
    return table


def _changed(name: str) -> Callable[..., Any]:
    """A method of `_Shards` that changes the columns, by its name."""

    def method(self: "_Shards", *args: Any, **kwargs: Any) -> "_Shards":
        changed = _Shards(self.kept, self.source, [*self.replays, copy.deepcopy((name, args, kwargs))])
        return self if changed.schema.equals(self.schema, check_metadata=True) else changed

    return method


class _Shards(ConcatenationTable):
    """The rows of all shards of a folder in one table, of which each is opened when its rows are read: neither opening
    the folder nor a change of columns takes longer for a thousand shards than for one."""

    def __init__(self, kept: Blocks, source: tuple[Any, ...], replays: Sequence[Any]) -> None:
        self.kept, self.source, self.replays = kept, source, replays
        self.empty = _replayed(kept.schema.empty_table(), replays)
        self._open = lru_cache(_OPEN)(partial(_mapped, kept, replays))

    def __deepcopy__(self, memo: dict[int, Any]) -> "_Shards":
        return self  # nothing of it changes

    def __reduce__(self) -> tuple[Any, ...]:
        return _opened, (*self.source, self.replays)

    @property
    def has_tokens(self) -> bool:
        """Whether the tokens are those that were written, and not another column by their name."""
        names = pa.table({name: [name] for name in self.kept.schema.names})
        return _replayed(names, self.replays)["input_ids"].to_pylist() == ["input_ids"]

    def _parts(self, offset: _Number, length: _Number | None) -> Iterator[tuple[MemoryMappedTable, int, int]]:
        """The shards that hold some of these rows, with the first row in it, and how many there are."""
        if offset < 0:
            raise IndexError("Offset must be non-negative")
        offset, stop = int(offset), len(self) if length is None else min(int(offset + length), len(self))
        while offset < stop:
            number = bisect.bisect_right(self.kept.ends, offset)
            left = self.kept.ends[number] - offset
            yield self._open(number), self.kept.rows[number] - left, min(left, stop - offset)
            offset += left

    def fast_slice(self, offset: _Number = 0, length: _Number | None = None) -> pa.Table:
        """The rows from an offset on, as `pyarrow.Table.slice` returns them."""
        parts = [table.fast_slice(first, count) for table, first, count in self._parts(offset, length)]
        return parts[0] if len(parts) == 1 else pa.concat_tables([self.empty, *parts])

    def slice(self, offset: _Number = 0, length: _Number | None = None) -> ConcatenationTable:
        """The rows from an offset on, without opening other shards."""
        parts = [table.slice(first, count) for table, first, count in self._parts(offset, length)]
        return ConcatenationTable.from_blocks(parts or [InMemoryTable(self.empty)])

    def fast_gather(self, indices: Sequence[int] | np.ndarray) -> pa.Table:
        """The rows of these numbers, one after the other."""
        return pa.concat_tables([self.fast_slice(int(index), 1) for index in indices])

    @cached_property
    def table(self) -> pa.Table:
        """All rows. Whatever is not done by a method here is done with it."""
        return pa.concat_tables([self.empty, *(block.table for (block,) in self.blocks)])

    @property
    def blocks(self) -> list[list[MemoryMappedTable]]:
        return [[table] for table in in_threads(partial(_mapped, self.kept, self.replays), range(len(self.kept.rows)))]

    def __len__(self) -> int:
        return self.kept.ends[-1]

    num_rows = property(__len__)
    schema = property(lambda self: self.empty.schema)
    column_names = property(lambda self: self.empty.column_names)
    num_columns = property(lambda self: self.empty.num_columns)
    shape = property(lambda self: (len(self), self.num_columns))
    drop, select, rename_columns = _changed("drop"), _changed("select"), _changed("rename_columns")
    replace_schema_metadata = _changed("replace_schema_metadata")


def _mapped(kept: Blocks, replays: Sequence[Any], number: int) -> MemoryMappedTable:
    table = _replayed(kept.table(number), replays)
    return MemoryMappedTable(table, str(kept.path(number)), [*copy.deepcopy(replays)])
