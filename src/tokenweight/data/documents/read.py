"""The documents of files, folders of `datasets` and data sets of the hub, one at a time."""

import codecs
import contextlib
import csv
import io
import logging
import os
import random
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import datasets
import pyarrow as pa
import pyarrow.parquet as pq

from tokenweight.data.chat import chat_columns
from tokenweight.data.documents.parse import ColumnError, Document, holds, of_file, of_line, of_record, without
from tokenweight.records import counted

logger = logging.getLogger(__name__)
TABLE_SUFFIXES = {".csv": ",", ".tsv": "\t"}
"""Separators of columns in files of one document per row, if the first line names a column of texts."""
COMPRESSED = {".gz": "gzip", ".zst": "zstd", ".bz2": "bz2"}
"""May follow any of the suffixes above, which may be in upper case."""
BUFFER_CHARACTERS = 1 << 28
"""Characters of the documents among which `shuffled` draws the next one."""
LONGEST_LINE = 1 << 28
"""Most bytes of a first line that are read to find out whether a file holds JSON lines."""


class Source(NamedTuple):
    """Something that holds documents: a file, a folder that `datasets` wrote, or a data set of the hub."""

    name: str
    kind: str
    """One of text, lines, table, parquet, dataset, hub."""


def read_documents(
    sources: Iterable[Source],
    *,
    text_column: str | None = "text",
    subset: str | None = None,
    split: str = "train",
    skip_invalid: bool = False,
) -> Iterator[Document]:
    """Read the documents of each source, so that memory holds one file's buffer and one document at most.

    Args:
        text_column: of .jsonl, .csv and .parquet files and data sets; None, if records are chats, in columns `messages`
            (or `conversations`), or `prompt` and `completion`, each perhaps with `tools`. Documents are conversations
            then, as JSON, for `prepare_rows(..., chat=True)`.
        subset: subset of a data set of the hub; by default the one it names default.
        split: split of a data set of the hub.
        skip_invalid: leave out what is no document (null, a list, invalid JSON, not UTF-8 …), and warn how many there
            were. Whatever makes the rest of a file unreadable, such as a truncated archive, is still an error.

    Raises:
        ValueError: naming the file, and the line or row, that is damaged, is not UTF-8, not JSON, or lacks the text
            column or a text in it.
    """
    invalid: list[ValueError] = []
    num_invalid = 0
    try:
        for source in sources:
            for found in _documents(source, text_column, subset, split):
                if isinstance(found, Document):
                    yield found
                elif not skip_invalid:
                    hint = "" if isinstance(found, ColumnError) else "; --skip_invalid leaves such documents out"
                    raise ValueError(f"{found}{hint}")
                else:
                    num_invalid += 1
                    invalid[1:] = [found]
    finally:
        if num_invalid:
            logger.warning("left out %s of no text, such as %s", counted(num_invalid, "document"), invalid[0])


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


def shown(name: str | os.PathLike[str]) -> str:
    """A name of a file as text, whatever its bytes are and whatever the locale takes them for."""
    return os.fsencode(name).decode("utf-8", "backslashreplace")


def suffix_of(path: Path) -> str:
    """The suffix before compression, in lower case."""
    compressed = path.suffix.lower() in COMPRESSED
    return (path.with_suffix("") if compressed else path).suffix.lower()


@contextlib.contextmanager
def open_text(file: Path) -> Iterator[io.BufferedReader]:
    """The bytes of a file, decompressed."""
    # Opened here, since Arrow would take names that are not UTF-8 for errors.
    with file.open("rb") as raw, pa.input_stream(raw, compression=COMPRESSED.get(file.suffix.lower())) as stream:
        yield io.BufferedReader(stream, buffer_size=1 << 20)


def says_something(line: bytes) -> bool:
    """Whether a line is not empty."""
    return bool(line.removeprefix(codecs.BOM_UTF8).strip())


def table_rows(opened: io.BufferedReader, separator: str, *, errors: str = "strict") -> Iterator[list[str]]:
    """The rows of a table, the one with the names of its columns first. In quotes, a text may hold separators and
    lines."""
    csv.field_size_limit(LONGEST_LINE)  # instead of 131072 characters
    text = io.TextIOWrapper(opened, "utf-8-sig", newline="", errors=errors)
    yield from filter(None, csv.reader(text, delimiter=separator, strict=True))


def _documents(
    source: Source, text_column: str | None, subset: str | None, split: str
) -> Iterator[Document | ValueError]:
    """The documents of a source; for what is none, the error that says why."""
    name = shown(source.name)
    number = 0
    if source.kind == "text" and text_column is None:
        yield ColumnError(f"{name}: a text: expected a file of records, with messages, or prompt and completion")
    elif source.kind == "text":
        with naming(lambda: name), open_text(Path(source.name)) as opened:
            content = opened.read()
        yield of_file(content, name)
    elif source.kind == "lines":
        with naming(lambda: f"{name}, line {number}"), open_text(Path(source.name)) as lines:
            for number, line in enumerate(lines, 1):
                if says_something(line):
                    yield of_line(line, f"{name}:{number}", f"{name}, line {number}", text_column)
    elif source.kind == "table":
        with naming(lambda: f"{name}, after row {number}"), open_text(Path(source.name)) as opened:
            rows = table_rows(opened, TABLE_SUFFIXES[suffix_of(Path(source.name))])
            header = next(rows, [])
            for number, row in enumerate(rows, 1):
                where = f"{name}, row {number}"
                if len(row) != len(header):  # separators of a text that is not in quotes
                    yield ValueError(f"{where}: expected {len(header)} values, as in the first line, found {len(row)}")
                else:
                    yield of_record(dict(zip(header, row)), f"{name}:{number}", where, text_column)
    else:
        with naming(lambda: f"{name}, after row {number}" if number else name):
            for number, record in enumerate(_records(source, text_column, subset, split), 1):
                yield of_record(record, f"{name}:{number}", f"{name}, row {number}", text_column)


def _records(source: Source, text_column: str | None, subset: str | None, split: str) -> Iterator[dict[str, Any]]:
    if source.kind == "hub":
        yield from _hub(source.name, subset, split)
        return
    with contextlib.ExitStack() as files:
        if source.kind == "parquet":
            opened = pq.ParquetFile(files.enter_context(Path(source.name).open("rb")))
            columns = opened.schema_arrow.names
        else:
            table = datasets.load_from_disk(source.name)
            columns = table.column_names
        if not holds(columns, text_column):
            raise without(text_column, columns, shown(source.name))
        read = chat_columns(columns) if text_column is None else [text_column]
        batches: Iterable[Any]
        if source.kind == "parquet":
            batches = opened.iter_batches(16, columns=read)
        else:
            batches = table.select_columns(read).with_format("arrow").iter(16)
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
def naming(where: Callable[[], str]) -> Iterator[None]:
    """Say in one line which file, or which line of it, could not be read."""
    try:
        yield
    except (OSError, UnicodeError, csv.Error, pa.ArrowException) as error:
        raise ValueError(f"{where()}: cannot be read: {' '.join(str(error).split())}") from error
