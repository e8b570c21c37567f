"""Arrow files that are mapped into memory without being read."""

import contextlib
import copy
import mmap
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
from datasets.table import ConcatenationTable, IndexedTableMixin, MemoryMappedTable

from tokenweight.data.stores.blocks import advise, map_pages, read_blocks
from tokenweight.records import read_json


def map_table(path: Path) -> MemoryMappedTable:
    """The table in an Arrow stream, as `MemoryMappedTable.from_file` returns it, but without reading all of its pages:
    only the heads of batches are read, a page or two each."""
    return MemoryMappedTable(_read(path)[0], str(path))


def _read(path: Path) -> tuple[pa.Table, mmap.mmap]:
    pages = map_pages(path)
    with pa.ipc.open_stream(pa.BufferReader(pa.py_buffer(pages))) as stream:
        table = stream.read_all()
    advise([pages], "MADV_NORMAL")  # rows are read from their first page to their last
    return table, pages


def map_rows(folder: Path) -> datasets.Dataset:
    """The rows of a folder that `finish_dataset` has made, as `datasets.load_from_disk` returns them. No page of a
    shard is read, if the heads of its blocks were kept (`write_blocks`)."""
    info = datasets.DatasetInfo.from_dict(read_json(folder / "dataset_info.json"))
    state = read_json(folder / "state.json")
    return datasets.Dataset(_Shards.opened(folder.absolute(), state), info=info, fingerprint=state["_fingerprint"])


@contextlib.contextmanager
def read_sparsely(rows: datasets.Dataset) -> Iterator[None]:
    """Within it, only those pages of mapped rows are read that are looked at, and none ahead."""
    maps = getattr(rows.data, "maps", ())
    advise(maps, "MADV_RANDOM")
    try:
        yield
    finally:
        advise(maps, "MADV_NORMAL")


def _replayed(name: str) -> Callable[..., Any]:
    """A method of `_Shards` that changes the columns, by its name."""

    def method(self: "_Shards", *args: Any, **kwargs: Any) -> "_Shards":
        table, replays = getattr(self.table, name)(*args, **kwargs), [*self.replays, (name, args, kwargs)]
        return _Shards(table, self.folder, self.state, self.rows, self.maps, copy.deepcopy(replays))

    return method


class _Shards(ConcatenationTable):
    """The rows of all shards of a folder in one table, so that it takes no longer to rename a column of a thousand
    shards than of one. The tables that a `ConcatenationTable` consists of are made when something else is done."""

    def __init__(self, table: pa.Table, folder: Path, state: Any, rows: Any, maps: Any, replays: list[Any]) -> None:
        self.table, self.folder, self.state, self.rows, self.maps = table, folder, state, rows, maps
        self.replays = replays

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or "_batches" in vars(self):
            raise AttributeError(name)
        IndexedTableMixin.__init__(self, self.table)  # once rows are read, not for each change of a column
        return getattr(self, name)

    def __deepcopy__(self, memo: dict[int, Any]) -> "_Shards":
        return self  # nothing of it changes

    @classmethod
    def opened(cls, folder: Path, state: dict[str, Any], replays: Sequence[Any] = ()) -> "_Shards":
        files = [file["filename"] for file in state["_data_files"]]
        found = read_blocks(folder, files, state["_fingerprint"])
        if found is None:
            with ThreadPoolExecutor(16) as threads:  # which wait for the disk, or for a server, together
                read = list(threads.map(lambda file: _read(folder / file), files))
            tables, maps = [table for table, _ in read], [pages for _, pages in read]
            found = pa.concat_tables(tables, promote_options="default"), [*map(len, tables)], maps
        table, rows, maps = found
        for name, args, kwargs in replays:
            table = getattr(table, name)(*args, **kwargs)
        return cls(table, folder, state, rows, maps, [*replays])

    def __reduce__(self) -> tuple[Any, ...]:
        return _Shards.opened, (self.folder, self.state, self.replays)

    @property
    def blocks(self) -> list[list[MemoryMappedTable]]:
        made, start = [], 0
        for file, rows in zip(self.state["_data_files"], self.rows):
            path = str(self.folder / file["filename"])
            made.append([MemoryMappedTable(self.fast_slice(start, rows), path, self.replays)])
            start += rows
        return made

    drop, select, rename_columns = _replayed("drop"), _replayed("select"), _replayed("rename_columns")
    replace_schema_metadata = _replayed("replace_schema_metadata")
