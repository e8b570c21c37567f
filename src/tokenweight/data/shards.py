"""Files of rows that are complete or absent, with notes of what they hold; together, a folder of `datasets` (Arrow), or
a folder of Parquet files."""

import contextlib
import hashlib
import os
import re
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from tokenweight.data.contents import Contents, contents_of
from tokenweight.data.stores import BLOCKS, fingerprint, in_threads, local_folder, remote_url, write_blocks
from tokenweight.records import (
    Held,
    Lease,
    leased,
    reached,
    read_json,
    remove_abandoned,
    replaced,
    write_json,
    writing_to,
)

FORMATS = ("arrow", "parquet")
"""Formats of shards, and suffixes of their names: Arrow is mapped into memory, Parquet is what others read."""
_GROUP_TOKENS = 1 << 20
"""Tokens of an Arrow batch or a Parquet row group, about: as many are held in memory until they are written."""
_CONTENTS = "contents.json"
"""The sum of the notes of all shards, so that opening a data set reads one of them, however many shards there are."""
_REMEDIES = {
    "rows": "remove {} and prepare the rows again",
    "scores": "`tokenweight score` with the same options makes it again",
}


class ShardFile:
    """Appends rows to a file, and sums up what they hold: an Arrow stream, which `datasets.Dataset.from_file` maps into
    memory, or a Parquet file.

    Args:
        part: the file to write.
        schema: that of all rows.
        path: the name that the file will have; its suffix is the format.
    """

    def __init__(self, part: Path, schema: pa.Schema, path: Path) -> None:
        self.part, self.schema, self.path = part, schema, path
        self.num_rows = 0
        self.contents = Contents()
        self._held: list[pa.Table] = []
        self._num_held = 0

    def __enter__(self) -> "ShardFile":
        with writing_to(self.path.parent):
            self.sink = pa.OSFile(str(self.part), "wb")
            opened = pq.ParquetWriter if self._is_parquet else pa.ipc.new_stream
            self.stream = opened(self.sink, self.schema)
        return self

    @property
    def _is_parquet(self) -> bool:
        return self.path.suffix == ".parquet"

    def write(self, table: pa.Table) -> None:
        """Append rows that have the columns of the schema."""
        reached("batch", self.path)
        with writing_to(self.path.parent):
            self._append(table.cast(self.schema))
        self.num_rows += len(table)
        if "input_ids" in table.column_names:
            self.contents += contents_of(table)
        reached("batch", self.path)

    def _append(self, table: pa.Table) -> None:
        self._held.append(table)
        if "input_ids" in table.column_names:
            self._num_held += pc.sum(pc.list_value_length(table["input_ids"])).as_py() or 0
        if self._num_held >= _GROUP_TOKENS:
            self._write_group()

    def _write_group(self) -> None:
        if self._held:
            table = pa.concat_tables(self._held).combine_chunks()
            self.stream.write_table(table, max(len(table), 1))
        self._held, self._num_held = [], 0

    def __exit__(self, kind: type[BaseException] | None, *error: object) -> None:
        with writing_to(self.path.parent):
            try:
                if kind is None:
                    self._write_group()
                self.stream.close()
                self.sink.flush()
            finally:
                self.sink.close()


@contextlib.contextmanager
def new_shard(path: Path, schema: pa.Schema) -> Iterator[tuple[ShardFile, dict[str, Any]]]:
    """A file of rows that gets its name when it is complete, and leaves nothing behind otherwise.

    Yields:
        The file, and a note to which more may be added. The note is written beside the shard, with what the shard
        holds, its size and its checksum, before the shard gets its name: where there is a shard, there is its note.
    """
    note: dict[str, Any] = {}
    with replaced(path) as part:
        with ShardFile(part, schema, path) as file:
            yield file, note
        contents = file.contents.to_json() if "input_ids" in schema.names else {"rows": file.num_rows}
        note |= {**contents, "bytes": part.stat().st_size, "sha256": checksum(part)}
        write_json(_note(path), note)


def read_note(path: Path) -> dict[str, Any] | None:
    """The note of a shard, whose contents are compared with it; None if there is no shard.

    Raises:
        ValueError: naming a shard that is not what was written.
    """
    if not path.is_file():
        return None
    note = read_json(_note(path))
    found = checksum(path)
    if note.get("sha256") != found:
        raise ValueError(f"{path} is damaged: its sha256 is {found[:16]}…, {str(note.get('sha256'))[:16]}… was written")
    return note


def strip_note(path: Path, *names: str) -> None:
    """Remove from the note of a shard what was needed to resume after it."""
    note = read_json(_note(path))
    write_json(_note(path), {key: value for key, value in note.items() if key not in names})


@contextlib.contextmanager
def locked(path: Path, *, wait: bool = False, known: bool = False) -> Iterator[bool]:
    """Whether this process is the only one that makes the file at `path`: as `shard_lease`."""
    with shard_lease(path, wait=wait, known=known) as lease:
        yield bool(lease)


@contextlib.contextmanager
def shard_lease(path: Path, *, wait: bool = False, known: bool = False) -> Iterator[Lease | Held]:
    """`leased`, for a file with a note: what dead processes have left of both is removed."""
    with leased(path, wait=wait, known=known) as lease:
        if isinstance(lease, Lease):
            dead = lease.dead
            for name in (path.name, _note(path).name):
                remove_abandoned(path.parent, f".{name}.*[0-9]", dead)
        yield lease


def check_name(folder: Path) -> None:
    """Raise a ValueError unless a folder of this name is here, and Arrow, which takes names for UTF-8, can open files
    in it."""
    if (url := remote_url(folder)) is not None:
        raise ValueError(
            f"{url}: expected a folder on this machine, which `tokenweight upload` sends when it is complete"
        )
    try:
        str(folder).encode()
    except UnicodeEncodeError:
        shown = os.fsencode(folder).decode("utf-8", "backslashreplace")
        raise ValueError(f"{shown}: expected a name in UTF-8; in a locale without it, set PYTHONUTF8=1") from None


def unlock(folder: Path) -> None:
    """Remove the leases of dead processes, when nothing is left to be made in the folder."""
    for lock in folder.glob(".*.lock"):
        reached("unlock", lock)
        lock.unlink(missing_ok=True)


def check_format(format: str) -> None:
    """Raise a ValueError unless shards can be written in this format."""
    if format not in FORMATS:
        raise ValueError(f"format {format}: expected {' or '.join(FORMATS)}")


def is_finished(folder: Path) -> bool:
    """Whether `finish_dataset`, or `datasets`, has made a data set of a folder."""
    return (folder / "state.json").is_file() or _parquet_total(folder) is not None


def finish_dataset(folder: Path, files: Sequence[str]) -> None:
    """Write the small files that make shards in `folder` a data set: for `datasets.load_from_disk`, if they are of
    Arrow; Parquet files are one by themselves, and are listed beside the sum of their notes."""
    notes = [read_json(_note(folder / file)) for file in files]
    dataset, size = fingerprint(notes), sum(note["bytes"] for note in notes)
    total, info, state_file = (folder / name for name in (_CONTENTS, "dataset_info.json", "state.json"))
    if files[0].endswith(".parquet"):
        contents = sum(map(Contents.from_json, notes), Contents())
        with locked(total, wait=True):
            write_json(total, {"dataset": dataset, "files": [*files], "bytes": size, **contents.to_json()})
        return
    state: dict[str, Any] = {
        "_data_files": [{"filename": file} for file in files],
        "_fingerprint": dataset,
        "_format_columns": None,
        "_format_kwargs": {},
        "_format_type": None,
        "_output_all_columns": False,
        "_split": None,
    }
    features = datasets.Dataset.from_file(str(folder / files[0])).features
    locks = [locked(path, wait=True) for path in (total, info, state_file, folder / BLOCKS)]
    with locks[0], locks[1], locks[2], locks[3]:  # the last processes may come here together
        if "input_ids" in features:
            write_blocks(folder, files, dataset)
            contents = sum(map(Contents.from_json, notes), Contents())
            write_json(total, {"dataset": dataset, "bytes": size, **contents.to_json()})
        write_json(info, {"features": features.to_dict()})
        write_json(state_file, state)


def noted_contents(folder: Path, *, check: bool = False) -> Contents | None:
    """The contents of a finished folder, by its notes; None without any, or if it was saved anew since.

    Args:
        check: also compare the sizes of shards, and raise a ValueError that names one that is missing or was cut off,
            and the remedy. Nothing is read of the shards, and their own notes only if sizes are wrong: `verify`
            compares the contents.
    """
    total = _total(folder)
    if total is None:
        return None
    if check and sum(in_threads(_size, [f"{folder}/{file}" for file in total["files"]])) != total["bytes"]:
        _find_damage(folder)
    try:
        return Contents.from_json(total)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{folder / _CONTENTS} cannot be read: {error}") from None


def _find_damage(folder: Path) -> None:
    for path, remedy in _own_shards(folder):
        if not path.is_file():
            raise ValueError(f"{path} is missing; {remedy}")
        expected, found = read_json(_note(path)).get("bytes"), path.stat().st_size
        if expected != found:
            raise ValueError(f"{path} is damaged: it has {found} bytes, {expected} were written; {remedy}")


def _size(path: str) -> int:
    try:
        return os.stat(path).st_size
    except OSError:  # it is missing
        return 0


def verify(folder: str | os.PathLike[str], rows: range | None = None) -> int:
    """Read the shards of a finished folder and compare them with the checksums that were noted when they were written.

    Opening a folder does not do this, since it takes as long as reading all of it: `train` and `eval` do it once, in
    one process, before they begin, `score` and `show` for each shard that they read, when they first do.

    Args:
        folder: rows or scores. One that `tokenweight` did not write, or that was saved anew since, has no checksums,
            and nothing is compared.
        rows: only the shards that hold these rows.

    Returns:
        The number of shards that were compared.

    Raises:
        ValueError: naming a shard that is not what was written, or the folder, if shards were replaced together with
            their notes; and the remedy.
    """
    return Verifier(folder)(rows)


class Verifier:
    """Incremental `verify`: called with a range of rows, it reads each of their shards once."""

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        self._left: list[tuple[range, Path, str]] = []
        start, local = 0, local_folder(folder)
        if not local.is_dir():
            raise ValueError(f"{folder}: no such folder of rows")
        shards, notes = _own_shards(local), []
        for path, remedy in shards:
            with _named(remedy):
                notes.append(read_json(_note(path)))
            stop = start + notes[-1]["rows"]
            self._left.append((range(start, stop), path, remedy))
            start = stop
        total = _total(local)
        if total is not None and shards and total["dataset"] != fingerprint(notes):
            raise ValueError(f"{local}: shards and their notes were replaced since it was finished; {shards[0][1]}")

    def __call__(self, rows: range | None = None) -> int:
        """Raise a ValueError that names a shard of these rows (by default, of all) that is not what was written;
        return the number of those that were read."""
        read = [one for one in self._left if rows is None or _overlap(one[0], rows)]
        with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as threads:
            for _ in threads.map(_compare, read):  # raises what is wrong with the first of them
                pass
        done = {path for _, path, _ in read}
        self._left = [one for one in self._left if one[1] not in done]
        return len(read)


def _overlap(held: range, rows: range) -> bool:
    return held.start < rows.stop and rows.start < held.stop


def _compare(shard: tuple[range, Path, str]) -> None:
    _, path, remedy = shard
    with _named(remedy):
        if read_note(path) is None:
            raise ValueError(f"{path} is missing")


@contextlib.contextmanager
def _named(remedy: str) -> Iterator[None]:
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{error}; {remedy}") from None


def _own_shards(folder: Path) -> list[tuple[Path, str]]:
    """The shards of a finished folder that have notes, and the remedy for each."""
    for kind, remedy in _REMEDIES.items():
        if (folder / f"{kind}.json").is_file() and is_finished(folder):
            own = [folder / name for name in dataset_files(folder) if name.startswith(f"{kind}-")]
            if own:
                return [(path, remedy.format(folder)) for path in own]
    return []


def _total(folder: Path) -> dict[str, Any] | None:
    """The sum of the notes, and the `files`, unless `datasets` has saved another data set since they were written."""
    if not (folder / "state.json").is_file():
        return _parquet_total(folder)
    if not (folder / _CONTENTS).is_file():
        return None
    total, state = read_json(folder / _CONTENTS), read_json(folder / "state.json")
    if total.get("dataset") != state.get("_fingerprint"):
        return None
    return {**total, "files": [file["filename"] for file in state["_data_files"]]}


def _parquet_total(folder: Path) -> dict[str, Any] | None:
    """The sum of the notes of Parquet files that `tokenweight` wrote, if all are there."""
    if (folder / "state.json").is_file() or not (folder / _CONTENTS).is_file():
        return None
    total = read_json(folder / _CONTENTS)
    return total if "files" in total else None


def dataset_files(folder: Path) -> list[str]:
    """The names of a data set's files, of Arrow or Parquet, in order; none, if there is no data set."""
    if (folder / "state.json").is_file():
        return [file["filename"] for file in read_json(folder / "state.json")["_data_files"]]
    files = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*.parquet") if path.is_file())
    files = [name for name in files if not re.search(r"(^|/)[._]", name)]  # so Spark and Arrow name unfinished files
    total = _parquet_total(folder)
    if total is not None:
        if more := [name for name in files if name not in total["files"]]:
            raise ValueError(f"{folder} holds {more[0]} besides the files that were written there: move it elsewhere")
        return total["files"]
    ours = [name for kind in _REMEDIES if (folder / f"{kind}.json").is_file() for name in files if f"{kind}-" in name]
    if ours:
        raise ValueError(f"{folder} is not finished: it has {ours[0]}, but no {_CONTENTS}; give the command again")
    splits = {
        split[2] for name in files if (split := re.search(r"(^|/)(train|validation|valid|val|dev|test)(?![a-z])", name))
    }
    if len(splits) > 1:
        raise ValueError(f"{folder} holds several splits ({', '.join(sorted(splits))}): expected a folder of one")
    return files


def _note(path: Path) -> Path:
    return path.with_suffix(".json")


def checksum(path: Path) -> str:
    """The sha256 of a file, in hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
