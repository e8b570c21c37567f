"""The heads of all blocks of a folder, kept in one small file, so that no page of a shard is read to open the folder.

A shard is an Arrow stream: a schema, then blocks (record batches). The head of a block says how many rows it has, and
where the values of each column stand in the body that follows. Arrow's reader reads each of them, with a page around.
"""

import itertools
import json
import mmap
import os
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from tokenweight.records import replaced, writing_to

BLOCKS = "blocks.bin"
"""Compressed by zlib, whose checksum finds damage: a line of JSON, the bytes of head and body of each block, the
schema, and the heads. The line has the fingerprint `dataset`, the bytes of the schema, and name, bytes, rows and blocks
of each shard."""
_END = b"\xff\xff\xff\xff\0\0\0\0"  # of an Arrow stream
_IN_TURN = 64  # files that one thread opens: to start it takes longer than to open some


def in_threads(work: Callable[[Any], Any], items: Sequence[Any]) -> list[Any]:
    """What `work` makes of each item, in order. If there are many, up to 16 threads wait for a server together."""
    parts = [items[start : start + _IN_TURN] for start in range(0, len(items), _IN_TURN)]
    if len(parts) <= 1:
        return [work(item) for item in items]
    with ThreadPoolExecutor(16) as threads:
        return [made for some in threads.map(lambda part: [work(item) for item in part], parts) for made in some]


def map_pages(path: Path) -> mmap.mmap:
    """A file mapped into memory, of which a page is read when it is looked at, and none ahead.

    For a file that Arrow maps, it asks the kernel to read ahead whatever it looks at: that would read the corpus.
    """
    with path.open("rb") as file:
        pages = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    advise([pages], "MADV_RANDOM")
    return pages


def advise(maps: Iterable[mmap.mmap], advice: str) -> None:
    """Tell the kernel how mapped files will be read, on systems that take advice."""
    if hasattr(mmap, advice):
        for pages in maps:
            pages.madvise(getattr(mmap, advice))


def write_blocks(folder: Path, shards: Sequence[tuple[str, int]], dataset: str) -> None:
    """Keep the heads of shards, given by name and number of rows. Nothing is kept if they are not of one schema, or
    hold more than blocks: Arrow's reader then reads each.

    Args:
        dataset: the fingerprint of the contents of all shards.
    """
    with ThreadPoolExecutor(16) as threads:  # which wait for the disk, or for a server, together
        found = list(threads.map(lambda shard: _heads(folder / shard[0]), shards))
    schema = found[0][0]
    if schema is None or any(other != schema for other, *_ in found):
        return
    counted = [[name, file.st_size, rows, len(heads)] for (name, rows), (_, heads, _, file) in zip(shards, found)]
    line = json.dumps({"dataset": dataset, "schema": len(schema), "shards": counted})
    kept = [head for _, heads, _, _ in found for head in heads]
    sizes = np.array([[*map(len, kept)], [body for _, _, bodies, _ in found for body in bodies]], "<i8").T
    with replaced(folder / BLOCKS) as part, writing_to(folder):
        part.write_bytes(zlib.compress(b"".join([line.encode(), b"\n", sizes.tobytes(), schema, *kept]), 9))
        newest = max(file.st_mtime_ns for *_, file in found)  # perhaps by the clock of another host
        os.utime(part, ns=(newest, newest))


def _heads(path: Path) -> tuple[bytes | None, list[bytes], list[int], os.stat_result]:
    """The schema of a shard (None if not all else is blocks), the heads of its blocks and the bytes of their bodies."""
    stat, file = path.stat(), pa.py_buffer(map_pages(path))
    heads, bodies, kinds, end = [], [], [], 0
    for message in pa.ipc.MessageReader.open_stream(pa.BufferReader(file)):
        start, end = end, message.metadata.address - file.address + message.metadata.size
        heads.append(file[start:end].to_pybytes())
        bodies.append(0 if message.body is None else message.body.size)
        kinds.append(message.type)
        end += bodies[-1]
    plain = kinds == ["schema"] + ["record batch"] * (len(kinds) - 1) and file[end:].to_pybytes() == _END
    return heads[0] if plain else None, heads[1:], bodies[1:], stat


def read_blocks(folder: Path, files: Sequence[str], dataset: str) -> tuple[pa.Table, list[int], list[mmap.mmap]] | None:
    """The rows of shards, how many are in each, and their maps. None if the heads that were kept are not theirs: of
    other contents, or older than a shard, as after a copy that does not keep the times of files.

    Raises:
        ValueError: if what was kept is damaged or does not fit the shards, naming it.
    """
    path = folder / BLOCKS
    if not path.is_file():
        return None
    try:
        line, _, rest = zlib.decompress(path.read_bytes()).partition(b"\n")
        note, written = json.loads(line), path.stat().st_mtime_ns
        if note["dataset"] != dataset or [name for name, *_ in note["shards"]] != [*files]:
            return None
        maps = in_threads(lambda shard: _mapped(f"{folder}/{shard[0]}", shard[1], written), note["shards"])
        if None in maps:
            return None
        rows = [rows for _, _, rows, _ in note["shards"]]
        table = pa.ipc.open_stream(pa.PythonFile(_Parts(_stream(memoryview(rest), note, maps)), "r")).read_all()
        if len(table) != sum(rows):
            raise ValueError(f"{len(table)} rows in the blocks, {sum(rows)} were written")
    except (zlib.error, OSError, ValueError, LookupError, TypeError) as error:
        if getattr(error, "errno", None) is not None:  # of the system, and not Arrow's
            raise
        remedy = "remove it, and shards are opened without it, more slowly"
        raise ValueError(f"{path} does not fit the shards beside it: {error}; {remedy}") from error
    return table, rows, maps


def _mapped(path: str, size: int, written: int) -> mmap.mmap | None:
    """A shard of so many bytes, mapped into memory; None if it is newer than the heads that were `written`."""
    file = os.open(path, os.O_RDONLY)
    try:
        found = os.fstat(file)
        if found.st_size != size:
            raise ValueError(f"{path} has {found.st_size} bytes, {size} were written")
        return None if found.st_mtime_ns > written else mmap.mmap(file, size, access=mmap.ACCESS_READ)
    finally:
        os.close(file)


def _stream(kept: memoryview, note: dict[str, Any], maps: Iterable[mmap.mmap]) -> Iterator[pa.Buffer | memoryview]:
    """One Arrow stream of the blocks of all shards: heads as they were kept, and bodies where they are mapped."""
    count = sum(blocks for *_, blocks in note["shards"])
    sizes = iter(np.frombuffer(kept, "<i8", 2 * count).reshape(-1, 2).tolist())
    head = 16 * count + note["schema"]
    yield kept[16 * count : head]
    for (name, size, _, blocks), mapped in zip(note["shards"], maps):
        pages, at = pa.py_buffer(mapped), note["schema"]
        for length, body in itertools.islice(sizes, blocks):
            yield kept[head : head + length]
            if body:
                yield pages[at + length : at + length + body]
            head, at = head + length, at + length + body
        if at + len(_END) != size:
            raise ValueError(f"{name} has {size} bytes, its blocks end at {at}")
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
