"""Documents -> rows of tokens of one length, in a folder that `datasets.load_from_disk` opens."""

import contextlib
import hashlib
import json
import os
import shutil
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from transformers import PreTrainedTokenizerBase

TEXT_SUFFIXES = (".txt", ".text", ".md", ".rst", "")
"""Files of a folder that are read as one document each. Any text file may be named directly."""
_SCHEMA = pa.schema({"input_ids": pa.list_(pa.int32()), "document": pa.string(), "offset": pa.int64()})


class Document(NamedTuple):
    """One text; `name` says where it came from: a file, or a file and its line."""

    name: str
    text: str


@dataclass
class RowSummary:
    """What became of the documents, counted in documents, rows and tokens."""

    documents: int = 0
    rows: int = 0
    tokens: int = 0
    """In rows, special tokens included."""
    dropped_tokens: int = 0
    """In no row: the ends of documents, and what `max_rows` left unread of the last one."""
    short_documents: int = 0
    """Documents shorter than a row, which give none."""
    empty_documents: int = 0
    longest_document: int = 0

    def count(self, num_tokens: int, num_rows: int, length: int, step: int) -> None:
        """Add a document of `num_tokens` tokens that gave `num_rows` rows of `length`, each with `step` of its
        tokens."""
        self.documents += 1
        self.rows += num_rows
        self.tokens += num_rows * length
        self.dropped_tokens += num_tokens - num_rows * step
        self.short_documents += num_tokens < step
        self.longest_document = max(self.longest_document, num_tokens)


def read_documents(paths: Sequence[str | os.PathLike[str]], *, text_column: str = "text") -> Iterator[Document]:
    """Read text files (one document each), .jsonl files (one document a line), and folders of them, in sorted order.

    Raises:
        ValueError: naming the file, and the line, that is missing, is not UTF-8, not JSON, or lacks the text column.
    """
    for path in map(Path, paths):
        if not path.exists():
            raise ValueError(f"{path}: no such file or folder")
        if path.is_dir():
            files = [file for file in sorted(path.rglob("*")) if file.is_file() and _is_text(file.relative_to(path))]
            if not files:
                raise ValueError(f"{path}: found no text file in this folder: expected .jsonl, .txt or .md")
        else:
            files = [path]
        for file in files:
            yield from _read_file(file, text_column)


def _is_text(file: Path) -> bool:
    hidden = any(part.startswith(".") for part in file.parts)
    return not hidden and file.suffix in (*TEXT_SUFFIXES, ".jsonl")


def _read_file(file: Path, text_column: str) -> Iterator[Document]:
    where = str(file)
    try:
        if file.suffix != ".jsonl":
            yield Document(str(file), file.read_text(encoding="utf-8"))
            return
        with file.open("rb") as lines:
            for number, line in enumerate(lines, 1):
                where = f"{file}, line {number}"
                if line.strip():
                    yield Document(f"{file}:{number}", _text_of(line.decode("utf-8"), text_column, where))
    except UnicodeDecodeError as error:
        raise ValueError(f"{where}: not UTF-8 text (byte {error.start} is {error.object[error.start]:#04x})") from None


def _text_of(line: str, text_column: str, where: str) -> str:
    try:
        record = json.loads(line)
    except ValueError as error:
        raise ValueError(f"{where}: not JSON ({error})") from None
    text = record.get(text_column) if isinstance(record, dict) else None
    if not isinstance(text, str):
        found = ", ".join(record) if isinstance(record, dict) else type(record).__name__
        raise ValueError(f"{where}: no text in column {text_column!r}: found {found}")
    return text


def prepare_rows(
    documents: Iterable[Document],
    tokenizer: PreTrainedTokenizerBase,
    length: int,
    out: str | os.PathLike[str],
    *,
    max_rows: int | None = None,
    provenance: dict[str, Any] | None = None,
) -> RowSummary:
    """Cut each document into rows of exactly `length` tokens and write them to the new folder `out`.

    A row belongs to one document. It begins with what the tokenizer puts before a text (BOS, if that is its rule), and
    no token of the document is lost between rows; the end of a document that fills no row is dropped and counted.

    Args:
        documents: read one at a time, so that memory does not grow with the corpus.
        length: tokens of a row.
        out: a folder that does not exist; made whole or not at all.
        max_rows: stop after so many.
        provenance: kept in `rows.json` beside the summary.

    Raises:
        ValueError: if `out` exists, or no document has `length` tokens.
    """
    prefix, suffix = special_tokens(tokenizer)
    step = length - len(prefix)  # tokens of its document that a row holds
    if max_rows is not None and max_rows < 1:
        raise ValueError(f"--max_rows {max_rows}: expected at least 1")
    if step < 2:
        raise ValueError(f"--length {length}: expected at least {len(prefix) + 2} tokens")
    summary = RowSummary()
    with _new_folder(Path(out)) as folder:
        with ArrowFile(folder / "rows.arrow", _SCHEMA) as file:
            for document in documents:
                tokens = tokenizer(document.text, add_special_tokens=False, verbose=False)["input_ids"]
                summary.empty_documents += not tokens
                tokens += suffix
                room = None if max_rows is None else max_rows - summary.rows
                offsets = range(0, len(tokens) - step + 1, step)[:room]
                for offset in offsets:
                    row = np.array(prefix + tokens[offset : offset + step], dtype=np.int32)
                    file.write({"input_ids": row, "document": document.name, "offset": offset})
                summary.count(len(tokens), len(offsets), length, step)
                if summary.rows == max_rows:
                    break
        _refuse_no_rows(summary, length)
        finish_dataset(folder, ["rows.arrow"])
        note = {**(provenance or {}), "length": length, **asdict(summary)}
        (folder / "rows.json").write_text(json.dumps(note, indent=2) + "\n")
    return summary


@contextlib.contextmanager
def _new_folder(out: Path) -> Iterator[Path]:
    """A folder that gets its name when it is whole, and leaves nothing behind otherwise."""
    if out.exists():
        raise ValueError(f"--out {out}: exists already; name a new folder")
    unfinished = out.with_name(f".{out.name}.{os.getpid()}")
    unfinished.mkdir(parents=True)
    try:
        yield unfinished
        unfinished.rename(out)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


def _refuse_no_rows(summary: RowSummary, length: int) -> None:
    if summary.documents == summary.empty_documents:
        raise ValueError(f"the text is empty ({summary.documents} documents without a token)")
    if summary.rows == 0:
        raise ValueError(
            f"--length {length}: none of the {summary.documents} documents is that long; the longest has "
            f"{summary.longest_document} tokens"
        )


def special_tokens(tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], list[int]]:
    """What the tokenizer, by its own rule, puts before and after a text: ([BOS] or [], [EOS] or [])."""
    plain = tokenizer("a", add_special_tokens=False)["input_ids"]
    special = tokenizer("a")["input_ids"]
    for start in range(len(special) - len(plain) + 1):
        if special[start : start + len(plain)] == plain:
            return special[:start], special[start + len(plain) :]
    raise ValueError(f"{type(tokenizer).__name__}: cannot tell special tokens from text in {special}")


class ArrowFile:
    """Appends rows to an Arrow stream, which `datasets.Dataset.from_file` maps into memory."""

    def __init__(self, path: Path, schema: pa.Schema, *, rows_per_batch: int = 64) -> None:
        self.path, self.schema, self.rows_per_batch = path, schema, rows_per_batch
        self.pending: list[dict[str, Any]] = []

    def __enter__(self) -> "ArrowFile":
        self.sink = pa.OSFile(str(self.path), "wb")
        self.stream = pa.ipc.new_stream(self.sink, self.schema)
        return self

    def write(self, row: dict[str, Any]) -> None:
        """Append one row: a value for each column of the schema."""
        self.pending.append(row)
        if len(self.pending) >= self.rows_per_batch:
            self._flush()

    def write_table(self, table: pa.Table) -> None:
        """Append rows that have the columns of the schema."""
        self.stream.write_table(table.cast(self.schema))

    def _flush(self) -> None:
        if self.pending:
            self.write_table(pa.Table.from_pylist(self.pending, schema=self.schema))
        self.pending = []

    def __exit__(self, *error: object) -> None:
        if error[0] is None:
            self._flush()
        self.stream.close()
        self.sink.close()


def finish_dataset(folder: Path, files: Sequence[str]) -> None:
    """Write the two small files that make Arrow files in `folder` a data set for `datasets.load_from_disk`."""
    parts = [datasets.Dataset.from_file(str(folder / file)) for file in files]
    parts[0].info.write_to_directory(str(folder))
    state: dict[str, Any] = {
        "_data_files": [{"filename": file} for file in files],
        "_fingerprint": hashlib.sha256("".join(part._fingerprint for part in parts).encode()).hexdigest()[:16],
        "_format_columns": None,
        "_format_kwargs": {},
        "_format_type": None,
        "_output_all_columns": False,
        "_split": None,
    }
    (folder / "state.json").write_text(json.dumps(state, indent=2))


def load_rows(folder: str | os.PathLike[str]) -> datasets.Dataset:
    """Open a folder of rows, mapped into memory, with its columns as numpy arrays.

    Raises:
        ValueError: if it is not a `datasets` folder, or has no column `input_ids`.
    """
    if not Path(folder).is_dir():
        raise ValueError(f"{folder}: no such folder of rows; make one with `tokenweight prepare`")
    try:
        rows = datasets.load_from_disk(str(folder))
    except IndexError:  # so `datasets` says that there are none
        raise ValueError(f"{folder} holds no rows") from None
    except (OSError, ValueError, KeyError) as error:
        raise ValueError(f"{folder} is not a finished `datasets` folder: {' '.join(str(error).split())}") from error
    if isinstance(rows, datasets.DatasetDict):
        raise ValueError(f"{folder} holds several splits ({', '.join(rows)}): name one of its folders")
    if "input_ids" not in rows.column_names:
        raise ValueError(f"{folder} has no column input_ids: found {', '.join(rows.column_names)}")
    if not len(rows):
        raise ValueError(f"{folder} holds no rows")
    return rows.with_format("numpy")


def row_lengths(rows: datasets.Dataset) -> np.ndarray:
    """Tokens of each row."""
    batches = rows.select_columns("input_ids").with_format("arrow").iter(1000)
    lengths = [np.asarray(batch.column("input_ids").combine_chunks().value_lengths()) for batch in batches]
    return np.concatenate(lengths) if lengths else np.zeros(0, dtype=np.int64)


def token_range(rows: datasets.Dataset) -> tuple[int, int]:
    """The smallest and the largest token id of all rows."""
    batches = rows.select_columns("input_ids").with_format("arrow").iter(1000)
    ranges = [pc.min_max(batch.column("input_ids").combine_chunks().flatten()).as_py() for batch in batches]
    return min(found["min"] for found in ranges), max(found["max"] for found in ranges)


def rows_fingerprint(rows: datasets.Dataset) -> str:
    """16 hex digits of all token ids and positions, in order: it changes with any edit of the rows."""
    columns = [name for name in ("input_ids", "position_ids") if name in rows.column_names]
    digest = hashlib.sha256(",".join(columns).encode())
    for batch in rows.select_columns(columns).with_format("arrow").iter(1000):
        for name in columns:
            column = batch.column(name).combine_chunks()
            digest.update(np.asarray(column.value_lengths(), dtype=np.int64).tobytes())
            digest.update(np.asarray(column.flatten(), dtype=np.int64).tobytes())
    return digest.hexdigest()[:16]
