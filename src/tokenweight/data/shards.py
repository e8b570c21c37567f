"""Arrow files that are whole or not there: temporary names, checksums, locks; together, a folder of `datasets`."""

import contextlib
import hashlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import datasets
import filelock
import pyarrow as pa

from tokenweight.records import reached, read_json, replaced, write_json, writing_to


class ArrowFile:
    """Appends rows to an Arrow stream, which `datasets.Dataset.from_file` maps into memory."""

    def __init__(self, path: Path, schema: pa.Schema) -> None:
        self.path, self.schema = path, schema
        self.num_rows = self.num_tokens = 0

    def __enter__(self) -> "ArrowFile":
        with writing_to(self.path.parent):
            self.sink = pa.OSFile(str(self.path), "wb")
            self.stream = pa.ipc.new_stream(self.sink, self.schema)
        return self

    def write(self, table: pa.Table) -> None:
        """Append rows that have the columns of the schema."""
        reached("batch", self.path)
        with writing_to(self.path.parent):
            self.stream.write_table(table.cast(self.schema))
        reached("batch", self.path)
        self.num_rows += len(table)
        if "input_ids" in table.column_names:
            self.num_tokens += len(table.column("input_ids").combine_chunks().flatten())

    def __exit__(self, *error: object) -> None:
        with writing_to(self.path.parent):
            try:
                self.stream.close()
                self.sink.flush()
            finally:
                self.sink.close()


@contextlib.contextmanager
def new_shard(path: Path, schema: pa.Schema) -> Iterator[tuple[ArrowFile, dict[str, Any]]]:
    """An Arrow file that gets its name when it is whole, and leaves nothing behind otherwise.

    Yields:
        The file, and a note to which more may be added. Beside the shard, the note is written with the checksum, before
        the shard gets its name: where there is a shard, there is its note.
    """
    note: dict[str, Any] = {}
    with replaced(path) as part:
        with ArrowFile(part, schema) as file:
            yield file, note
        note.update(rows=file.num_rows, tokens=file.num_tokens, sha256=checksum(part))
        write_json(_note(path), note)


def read_note(path: Path) -> dict[str, Any] | None:
    """The note of a shard; None if there is no shard.

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


def strip_note(path: Path) -> None:
    """Leave in the note of a shard what is said of every shard."""
    note = read_json(_note(path))
    write_json(_note(path), {key: note[key] for key in ("rows", "tokens", "sha256")})


@contextlib.contextmanager
def locked(path: Path, *, wait: bool = False) -> Iterator[bool]:
    """Whether this process is the only one that makes the file at `path`; the lock ends with the process, however."""
    lock = filelock.FileLock(path.with_name(f".{path.name}.lock"))
    try:
        lock.acquire(timeout=-1 if wait else 0)
    except filelock.Timeout:
        yield False
        return
    except NotImplementedError:  # a file system without locks: the worst is work done twice, under two names
        yield True
        return
    try:
        for left in path.parent.glob(f".{path.stem}.*"):  # of a process that was killed: this file, or its note
            if left.suffix != ".lock":
                left.unlink(missing_ok=True)
        yield True
    finally:
        lock.release()


def unlock(folder: Path) -> None:
    """Remove the files of locks, when nothing is left to be made in the folder."""
    for lock in folder.glob(".*.lock"):
        lock.unlink(missing_ok=True)


def finish_dataset(folder: Path, files: Sequence[str]) -> None:
    """Write the two small files that make shards in `folder` a data set for `datasets.load_from_disk`."""
    checksums = [read_json(_note(folder / file))["sha256"] for file in files]
    info, state_file = folder / "dataset_info.json", folder / "state.json"
    state: dict[str, Any] = {
        "_data_files": [{"filename": file} for file in files],
        "_fingerprint": hashlib.sha256("".join(checksums).encode()).hexdigest()[:16],
        "_format_columns": None,
        "_format_kwargs": {},
        "_format_type": None,
        "_output_all_columns": False,
        "_split": None,
    }
    features = datasets.Dataset.from_file(str(folder / files[0])).features
    with locked(info, wait=True), locked(state_file, wait=True):  # the last processes may come here together
        write_json(info, {"features": features.to_dict()})
        write_json(state_file, state)


def verify(folder: Path) -> None:
    """Raise a ValueError that names a shard of a finished folder that is not what was written, and what mends it."""
    remedies = {
        "rows": f"remove {folder} and prepare the rows again",
        "scores": "`tokenweight score` with the same options makes it again",
    }
    for kind, remedy in remedies.items():
        if not ((folder / f"{kind}.json").is_file() and (folder / "state.json").is_file()):
            continue
        for path in (folder / name for name in dataset_files(folder) if name.startswith(f"{kind}-")):
            try:
                note = read_note(path)
            except ValueError as error:
                raise ValueError(f"{error}; {remedy}") from None
            if note is None:
                raise ValueError(f"{path} is missing; {remedy}")


def dataset_files(folder: Path) -> list[str]:
    """The names of a data set's Arrow files."""
    return [file["filename"] for file in read_json(folder / "state.json")["_data_files"]]


def _note(path: Path) -> Path:
    return path.with_suffix(".json")


def checksum(path: Path) -> str:
    """The sha256 of a file, in hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
