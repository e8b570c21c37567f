"""Arrow files that are mapped into memory without being read."""

import mmap
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import datasets
import pyarrow as pa
from datasets.table import MemoryMappedTable, concat_tables

from tokenweight.records import read_json


def map_table(path: Path) -> MemoryMappedTable:
    """The table in an Arrow stream, as `MemoryMappedTable.from_file` returns it, but without reading all of its pages.

    For a mapped file, Arrow asks the kernel to read ahead whatever it looks at: each open would read the corpus. Here
    only the heads of batches are read, a page or two each.
    """
    with path.open("rb") as file:
        pages = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    random, normal = getattr(mmap, "MADV_RANDOM", None), getattr(mmap, "MADV_NORMAL", None)
    if random is not None:
        pages.madvise(random)
    with pa.ipc.open_stream(pa.BufferReader(pa.py_buffer(pages))) as stream:
        table = stream.read_all()
    if normal is not None:
        pages.madvise(normal)  # rows are read from their first page to their last
    return MemoryMappedTable(table, str(path))


def map_rows(folder: Path) -> datasets.Dataset:
    """The rows of a folder that `finish_dataset` has made, as `datasets.load_from_disk` returns them."""
    info = datasets.DatasetInfo.from_dict(read_json(folder / "dataset_info.json"))
    state = read_json(folder / "state.json")
    with ThreadPoolExecutor(16) as threads:  # which wait for the disk, or for a server, together
        tables = list(threads.map(map_table, [folder / file["filename"] for file in state["_data_files"]]))
    return datasets.Dataset(concat_tables(tables), info=info, fingerprint=state["_fingerprint"])
