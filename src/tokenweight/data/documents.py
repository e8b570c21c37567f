"""Where texts come from: files, folders, data sets, the hub; one document at a time."""

import contextlib
import io
import json
import logging
import os
import random
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import IO, Any, NamedTuple

import datasets
import pyarrow as pa
import pyarrow.parquet as pq

logger = logging.getLogger(__name__)
TEXT_SUFFIXES = (".txt", ".text", ".md", ".rst", "")
"""Files of a folder that are read as one document each. Any text file may be named directly."""
LINE_SUFFIXES = (".jsonl", ".ndjson")
"""Files of one JSON object a line."""
COMPRESSED = {".gz": "gzip", ".zst": "zstd", ".bz2": "bz2"}
"""May follow any of the suffixes above."""
_UNREADABLE = (".json", ".csv", ".tsv", ".arrow")
"""Files of texts in a form that is not read; named directly, they would be taken for one text."""
_FILES = (*filter(None, TEXT_SUFFIXES), *LINE_SUFFIXES, *COMPRESSED, *_UNREADABLE, ".parquet")
BUFFER_CHARACTERS = 1 << 28
"""Of the documents among which `shuffled` draws the next one."""


class Document(NamedTuple):
    """One text; `name` says where it came from: a file, or a file and its line."""

    name: str
    text: str


class Source(NamedTuple):
    """Something that holds documents: a file, a folder that `datasets` wrote, or a data set of the hub."""

    name: str
    kind: str
    """One of text, lines, parquet, dataset, hub."""


def find_sources(names: Sequence[str | os.PathLike[str]]) -> list[Source]:
    """What the names stand for, folders opened, in sorted order. Nothing is read yet.

    Args:
        names: text files (one document each), .jsonl and .parquet files (one document a row), each perhaps compressed
            (.gz, .zst, .bz2), folders of all these, folders that `datasets` wrote, and hub ids.

    Raises:
        ValueError: naming what does not exist, or the folder in which nothing can be read.
    """
    sources = []
    for name in map(str, names):
        path = Path(name)
        if path.is_dir():
            sources += _in_folder(path)
        elif path.exists() and _plain(path).suffix in _UNREADABLE:
            raise ValueError(f"{name}: {path.suffix} files are not read: expected .txt, .md, .jsonl or .parquet")
        elif path.exists():
            sources.append(Source(name, _kind(path)))
        elif re.fullmatch(r"[\w.-]+/[\w.-]+", name) and path.suffix not in _FILES:
            sources.append(Source(name, "hub"))
        else:
            raise ValueError(f"{name}: no such file or folder")
    return sources


def read_documents(
    sources: Iterable[Source], *, text_column: str = "text", subset: str | None = None, split: str = "train"
) -> Iterator[Document]:
    """Read the documents of each source, so that memory holds one file's buffer and one document at most.

    Args:
        text_column: of .jsonl and .parquet files and data sets.
        subset: of a data set of the hub; by default the one it names default.
        split: of a data set of the hub.

    Raises:
        ValueError: naming the file, and the line or row, that is damaged, is not UTF-8, not JSON, or lacks the text
            column.
    """
    for source in sources:
        if source.kind == "text":
            yield _text_file(Path(source.name))
        elif source.kind == "lines":
            yield from _json_lines(Path(source.name), text_column)
        else:
            rows = _records(source, text_column, subset, split)
            for number, record in enumerate(rows, 1):
                yield Document(f"{source.name}:{number}", _text_of(record, text_column, f"{source.name}, row {number}"))


def shuffled(
    documents: Iterable[Document], seed: int, *, num_characters: int = BUFFER_CHARACTERS
) -> Iterator[Document]:
    """Draw each next document from a buffer of about `num_characters`: as random an order as a bounded memory allows.

    The same documents and seed give the same order on every machine.
    """
    generator = random.Random(seed)
    held: list[Document] = []
    size = 0
    for document in documents:
        held.append(document)
        size += len(document.text)
        while size > num_characters:
            place = generator.randrange(len(held))
            held[place], held[-1] = held[-1], held[place]
            drawn = held.pop()
            size -= len(drawn.text)
            yield drawn
    generator.shuffle(held)
    yield from held


def _plain(path: Path) -> Path:
    """The name before compression."""
    return path.with_suffix("") if path.suffix in COMPRESSED else path


def _kind(path: Path) -> str:
    suffix = _plain(path).suffix
    return "parquet" if path.suffix == ".parquet" else "lines" if suffix in LINE_SUFFIXES else "text"


def _in_folder(folder: Path) -> list[Source]:
    if (folder / "state.json").is_file():
        return [Source(str(folder), "dataset")]
    if (folder / "dataset_dict.json").is_file():
        splits = ", ".join(json.loads((folder / "dataset_dict.json").read_text())["splits"])
        raise ValueError(f"{folder} holds several splits ({splits}): name one of its folders")
    found: list[Source] = []
    left_out: list[Source] = []
    for file in sorted(folder.rglob("*")):
        hidden = any(part.startswith(".") for part in file.relative_to(folder).parts)
        readable = _kind(file) != "text" or _plain(file).suffix in TEXT_SUFFIXES
        if file.is_file() and not hidden:
            (found if readable else left_out).append(Source(str(file), _kind(file)))
    if not found:
        raise ValueError(f"{folder}: found no text in this folder: expected .txt, .md, .jsonl or .parquet files")
    if left_out:
        logger.warning("%s: left out %d files that are no text, such as %s", folder, len(left_out), left_out[0].name)
    return found


@contextlib.contextmanager
def _opened(file: Path) -> Iterator[IO[bytes]]:
    with pa.input_stream(str(file), compression=COMPRESSED.get(file.suffix)) as stream:
        yield io.BufferedReader(stream, buffer_size=1 << 20)


def _text_file(file: Path) -> Document:
    with _named(lambda: str(file)), _opened(file) as opened:
        return Document(str(file), opened.read().decode("utf-8"))


def _json_lines(file: Path, text_column: str) -> Iterator[Document]:
    number = 0
    with _named(lambda: f"{file}, line {number}"), _opened(file) as lines:
        for number, line in enumerate(lines, 1):
            if line.strip():
                where = f"{file}, line {number}"
                try:
                    record = json.loads(line.decode("utf-8"))
                except json.JSONDecodeError as error:
                    raise ValueError(f"{where}: not JSON ({error})") from None
                yield Document(f"{file}:{number}", _text_of(record, text_column, where))


def _records(source: Source, text_column: str, subset: str | None, split: str) -> Iterator[dict[str, Any]]:
    if source.kind == "hub":
        yield from _hub(source.name, subset, split)
        return
    with _named(lambda: source.name):
        if source.kind == "parquet":
            opened = pq.ParquetFile(source.name)
            columns = opened.schema_arrow.names
            batches = opened.iter_batches(batch_size=16, columns=[text_column]) if text_column in columns else None
        else:
            table = datasets.load_from_disk(source.name)
            columns = table.column_names
            batches = (
                table.select_columns([text_column]).with_format("arrow").iter(16) if text_column in columns else None
            )
        if batches is None:
            raise ValueError(f"{source.name}: no column {text_column!r}: found {', '.join(columns)}")
        for batch in batches:
            yield from batch.to_pylist()


def _hub(name: str, subset: str | None, split: str) -> Iterable[dict[str, Any]]:
    try:
        return datasets.load_dataset(name, subset, split=split, streaming=True)
    except (OSError, ValueError, RuntimeError) as error:
        reason = " ".join(str(error).split())[:300]
        raise ValueError(
            f"{name}: no such file or folder, and no data set of the hub that can be read: {reason}"
        ) from error


@contextlib.contextmanager
def _named(where: Callable[[], str]) -> Iterator[None]:
    """Say in one line which file, or which line of it, could not be read."""
    try:
        yield
    except UnicodeDecodeError as error:
        byte = error.object[error.start]
        raise ValueError(f"{where()}: not UTF-8 text (byte {error.start} is {byte:#04x})") from None
    except (OSError, pa.ArrowException) as error:
        raise ValueError(f"{where()}: cannot be read: {' '.join(str(error).split())}") from error


def _text_of(record: Any, text_column: str, where: str) -> str:
    text = record.get(text_column) if isinstance(record, dict) else None
    if not isinstance(text, str):
        found = ", ".join(record) if isinstance(record, dict) else type(record).__name__
        raise ValueError(f"{where}: no text in column {text_column!r}: found {found}")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"{where}: half a surrogate pair at character {error.start}, which is no text") from None
    return text
