"""The heads of all blocks of a folder and the lengths of its rows, kept in one small file: no page of a shard is read
to open the folder, and a shard is opened when one of its rows is read.

A shard is an Arrow stream: a schema, then blocks (record batches). The head of a block says how many rows it has, and
where the values of each column stand in the body that follows. Arrow's reader reads each of them, with a page around.
"""

import contextlib
import hashlib
import itertools
import json
import logging
import mmap
import os
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from operator import itemgetter
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from tokenweight.records import replaced, writing_to

logger = logging.getLogger(__name__)
BLOCKS = "blocks.bin"
"""The size of the first part in eight bytes; then parts that are each compressed by zlib, whose checksum finds damage.
The first: a line of JSON with the fingerprint `dataset` and the number of shards; a `_Shard` for each; the schema. Then
two for each shard: the lengths of its rows; the bytes of head and body of each block, and the heads."""
_SIZE, _LENGTH = np.dtype("<i8"), np.dtype("<i4")
_END = b"\xff\xff\xff\xff\0\0\0\0"  # of an Arrow stream
_IN_TURN = 64  # files that one thread opens: to start it takes longer than to open some


def in_threads(work: Callable[[Any], Any], items: Sequence[Any]) -> list[Any]:
    """What `work` makes of each item, in order. If there are many, up to 16 threads wait for a server together."""
    parts = [items[start : start + _IN_TURN] for start in range(0, len(items), _IN_TURN)]
    if len(parts) <= 1:
        return [work(item) for item in items]
    with ThreadPoolExecutor(16) as threads:
        return [made for some in threads.map(lambda part: [work(item) for item in part], parts) for made in some]


def read_shard(path: Path) -> pa.Table:
    """The table in an Arrow stream. Only the heads of its blocks are read for it, a page or two each."""
    pages = _pages(path)
    with pa.ipc.open_stream(pa.BufferReader(pa.py_buffer(pages))) as stream:
        table = stream.read_all()
    _advise(pages, "MADV_NORMAL")  # rows are read from their first page to their last
    return table


def list_lengths(table: pa.Table) -> np.ndarray:
    """The number of tokens in each row."""
    return np.asarray(pc.list_value_length(table["input_ids"]))


def _pages(path: Path) -> mmap.mmap:
    """A file mapped into memory, of which a page is read when it is looked at, and none ahead.

    For a file that Arrow maps, it asks the kernel to read ahead whatever it looks at: that would read the corpus.
    """
    with path.open("rb") as file:
        pages = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    _advise(pages, "MADV_RANDOM")
    return pages


def _advise(pages: mmap.mmap, advice: str) -> None:
    """Tell the kernel how a mapped file will be read, on systems that take advice."""
    if hasattr(mmap, advice):
        pages.madvise(getattr(mmap, advice))


class _Shard(NamedTuple):
    size: int
    rows: int
    blocks: int
    lengths: int  # bytes of its parts
    heads: int


def write_blocks(folder: Path, files: Sequence[str], dataset: str) -> None:
    """Keep the heads and lengths of shards. Nothing is kept if they are not of one schema, or hold more than blocks:
    Arrow's reader then reads each.

    Args:
        dataset: the fingerprint of the contents of all shards.
    """
    with ThreadPoolExecutor(16) as threads:  # which wait for the disk, or for a server, together
        found = list(threads.map(lambda file: _found(folder / file), files))
    schema = found[0][0]
    if schema is None or any(other != schema for other, *_ in found):
        return
    line = json.dumps({"dataset": dataset, "shards": len(files)}).encode()
    known = np.array([shard for _, shard, *_ in found], _SIZE).tobytes()
    first = zlib.compress(line + b"\n" + known + schema, 9)
    parts = [part for _, _, *both in found for part in both]
    with replaced(folder / BLOCKS) as file, writing_to(folder):
        file.write_bytes(b"".join([np.array([len(first)], _SIZE).tobytes(), first, *parts]))
    mark_shards(folder, files)


def fingerprint(notes: Iterable[Mapping[str, Any]]) -> str:
    """The fingerprint of the contents of shards with these notes."""
    return hashlib.sha256("".join(str(note.get("sha256")) for note in notes).encode()).hexdigest()[:16]


def mark_shards(folder: Path, files: Sequence[str]) -> None:
    """Give shards the time of the file `BLOCKS`, as a sign that they are those whose heads it has: copies keep it."""
    time = (folder / BLOCKS).stat().st_mtime_ns
    for file in files:
        with contextlib.suppress(OSError):  # of somebody else, or on a system without times: opened without heads
            os.utime(folder / file, ns=(time, time))


def _found(path: Path) -> tuple[bytes | None, _Shard, bytes, bytes]:
    """The schema of a shard (None if not all else is blocks), and what is kept of it."""
    file = pa.py_buffer(_pages(path))
    heads, bodies, kinds, end = [], [], [], 0
    for message in pa.ipc.MessageReader.open_stream(pa.BufferReader(file)):
        start, end = end, message.metadata.address - file.address + message.metadata.size
        heads.append(file[start:end].to_pybytes())
        bodies.append(0 if message.body is None else message.body.size)
        kinds.append(message.type)
        end += bodies[-1]
    plain = kinds == ["schema"] + ["record batch"] * (len(kinds) - 1) and file[end:].to_pybytes() == _END
    schema, *heads = heads
    sizes = np.array([[*map(len, heads)], bodies[1:]], _SIZE).T
    lengths = list_lengths(pa.ipc.open_stream(pa.BufferReader(file)).read_all())
    of_rows = zlib.compress(lengths.astype(_LENGTH).tobytes(), 9)
    of_blocks = zlib.compress(sizes.tobytes() + b"".join(heads), 9)
    known = _Shard(file.size, len(lengths), len(heads), len(of_rows), len(of_blocks))
    return schema if plain else None, known, of_rows, of_blocks


class Blocks:
    """The shards of a folder. One is opened by the heads that were kept if it is still the file that had them, by its
    size and its mark (`mark_shards`); and by Arrow's reader if it is not, as in a copy without the times of files, or
    if the heads are damaged.

    Attributes:
        schema: of all shards.
        rows: how many there are in each.
        ends: how many there are up to the end of each.
    """

    def __init__(self, folder: Path, files: Sequence[str], mark: int, kept: mmap.mmap) -> None:
        self._folder, self._files, self._mark, self._kept = folder, files, mark, kept
        start = _SIZE.itemsize + int(np.frombuffer(kept[: _SIZE.itemsize], _SIZE)[0])
        line, _, rest = zlib.decompress(kept[_SIZE.itemsize : start]).partition(b"\n")
        self.dataset, count = itemgetter("dataset", "shards")(json.loads(line))
        if count != len(files):
            raise ValueError(f"{count} shards, not {len(files)}")
        self._shards = np.frombuffer(rest, _SIZE, count * len(_Shard._fields)).reshape(count, -1)
        self._schema = rest[self._shards.nbytes :]
        self._stops = start + np.cumsum(self._shards[:, -2:].sum(1))
        self.schema = pa.ipc.read_schema(pa.py_buffer(self._schema))
        self.rows: list[int] = self._shards[:, _Shard._fields.index("rows")].tolist()
        self.ends = [*itertools.accumulate(self.rows)]

    @classmethod
    def opened(cls, folder: Path, state: Mapping[str, Any]) -> "Blocks | None":
        """What was kept of a folder with this `state.json`; None if nothing was, it is of other contents, or it is
        damaged."""
        path = folder / BLOCKS
        if not path.is_file():
            return None
        try:
            files, mark = [file["filename"] for file in state["_data_files"]], path.stat().st_mtime_ns
            found = cls(folder, files, mark, _pages(path))  # read after the time: what is replaced now marks no shard
            return found if found.dataset == state["_fingerprint"] else None
        except (zlib.error, ValueError, LookupError, TypeError) as error:
            _warn(path, error)
            return None

    def path(self, number: int) -> Path:
        """The file of a shard."""
        return self._folder / self._files[number]

    def _shard(self, number: int) -> _Shard:
        return _Shard(*self._shards[number].tolist())

    def table(self, number: int) -> pa.Table:
        """The rows of a shard.

        Raises:
            ValueError: if it has another size, other columns, or another number of rows than were written.
        """
        table = self._by(self._heads, number)
        if table is None:
            table = read_shard(self.path(number))
        for found, written in ((table.schema, self.schema), (len(table), self.rows[number])):
            if found != written:
                raise ValueError(f"{self.path(number)} holds {found}: {written} were written")
        return table

    def lengths(self, number: int) -> np.ndarray:
        """The number of tokens in each row of a shard.

        Raises:
            ValueError: as `table` does.
        """
        lengths = self._by(self._lengths, number)
        return list_lengths(self.table(number)) if lengths is None else lengths

    def _by(self, part: Callable[[int], Any], number: int) -> Any:
        """What a part says of a shard; None if the shard is another, or the part is damaged."""
        shard, found = self._shard(number), self.path(number).stat()
        if found.st_size != shard.size:
            raise ValueError(f"{self.path(number)} has {found.st_size} bytes: {shard.size} were written")
        if found.st_mtime_ns != self._mark:
            return None
        try:
            return part(number)
        except (zlib.error, OSError, ValueError, LookupError, TypeError) as error:
            if getattr(error, "errno", None) is not None:  # of the system, and not Arrow's
                raise
            _warn(self._folder / BLOCKS, error)
            return None

    def _lengths(self, number: int) -> np.ndarray:
        shard, stop = self._shard(number), self._stops[number] - self._shard(number).heads
        lengths = np.frombuffer(zlib.decompress(self._kept[stop - shard.lengths : stop]), _LENGTH)
        if len(lengths) != shard.rows:
            raise ValueError(f"{len(lengths)} lengths of {shard.rows} rows")
        return lengths

    def _heads(self, number: int) -> pa.Table:
        shard, stop = self._shard(number), self._stops[number]
        with self.path(number).open("rb") as file:
            pages = pa.py_buffer(mmap.mmap(file.fileno(), shard.size, access=mmap.ACCESS_READ))
        heads = memoryview(zlib.decompress(self._kept[stop - shard.heads : stop]))
        stream = _stream(memoryview(self._schema), heads, shard.blocks, pages)
        table = pa.ipc.open_stream(pa.PythonFile(_Parts(stream), "r")).read_all()
        if len(table) != shard.rows:
            raise ValueError(f"heads of {len(table)} rows, not {shard.rows}")
        return table


def _warn(path: Path, error: Exception) -> None:
    logger.warning("%s does not fit the shards beside it (%s): they are opened without it, more slowly", path, error)


def _stream(schema: memoryview, heads: memoryview, blocks: int, pages: pa.Buffer) -> Iterator[pa.Buffer | memoryview]:
    """The Arrow stream of a shard: heads as they were kept, and bodies where they are mapped."""
    yield schema
    sizes, head, at = np.frombuffer(heads, _SIZE, 2 * blocks), 2 * _SIZE.itemsize * blocks, len(schema)
    for length, body in sizes.reshape(-1, 2).tolist():
        yield heads[head : head + length]
        if body:
            yield pages[at + length : at + length + body]
        head, at = head + length, at + length + body
    if at + len(_END) != len(pages):
        raise ValueError(f"the blocks end at {at} of {len(pages)} bytes")
    yield memoryview(_END)


class _Parts:
    """A file for Arrow's reader that consists of buffers, of which nothing is copied or read before it is asked for."""

    closed = False

    def __init__(self, parts: Iterator[pa.Buffer | memoryview]) -> None:
        self._parts, self._part, self._at = parts, memoryview(b""), 0

    def read_buffer(self, size: int) -> pa.Buffer | memoryview:
        """The next bytes: fewer, if the next buffer is smaller."""
        if self._at == len(self._part):
            self._part, self._at = next(self._parts, memoryview(_END)), 0
        found = self._part[self._at : self._at + size]
        self._at += len(found)
        return found

    def read(self, size: int) -> bytes:
        return bytes(self.read_buffer(size))

    def close(self) -> None:
        """As of any file; the maps stay."""
