"""Where texts come from: files, folders, data sets, the hub; one document at a time."""

import codecs
import collections
import contextlib
import csv
import io
import itertools
import json
import logging
import os
import random
import re
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import datasets
import pyarrow as pa
import pyarrow.parquet as pq

from tokenweight.data.chat import CHAT_COLUMNS, chat_columns, conversation_text
from tokenweight.records import counted, read_json

logger = logging.getLogger(__name__)
TEXT_SUFFIXES = (".txt", ".text", ".md", ".rst", "")
"""Files that are read as one document each. Other files of text, such as sources of programs, are as well if they are
chosen: by their own name, or by a pattern for the files of a folder."""
LINE_SUFFIXES = (".jsonl", ".ndjson")
"""Files of one JSON object a line."""
TABLE_SUFFIXES = {".csv": ",", ".tsv": "\t"}
"""Files of one document a row, by what separates their columns, if the first line names one of texts."""
COMPRESSED = {".gz": "gzip", ".zst": "zstd", ".bz2": "bz2"}
"""May follow any of the suffixes above, which may be in upper case."""
_PERHAPS_LINES = (".json", "")
"""Files of lines if the first one is a JSON object with a text: `.json.gz` of C4, `part-00000` of Spark."""
_PANDOC, _UNPACK = "extract its text first, as by `pandoc -t plain {0} -o {0}.txt`", "unpack it first"
_REMEDIES = {
    **dict.fromkeys([".html", ".htm", ".xhtml", ".docx", ".odt", ".epub", ".ipynb"], _PANDOC),
    ".pdf": "extract its text first, as by `pdftotext {0} {0}.txt`",
    ".json": "expected an object on each line, as `jq -c '.[]' {0} > {0}l` writes the values of an array",
    ".arrow": "name the folder of the data set",
    ".parquet": "unpack it first, as Parquet compresses by itself",
    **dict.fromkeys([".tar", ".tgz", ".tbz", ".tbz2", ".txz", ".zip", ".7z", ".rar"], _UNPACK),
    **dict.fromkeys([".xz", ".lzma", ".lz4", ".br"], _UNPACK),
}
"""Files of texts in a form that is not read, and what makes of them one that is."""
_CHAT = "column {0!r} holds a chat: --chat reads it, and its answers alone are predicted (docs/data.md)"
_FILES = (*filter(None, TEXT_SUFFIXES), *LINE_SUFFIXES, *TABLE_SUFFIXES, *COMPRESSED, *_REMEDIES)
BUFFER_CHARACTERS = 1 << 28
"""Of the documents among which `shuffled` draws the next one."""
_UTF16 = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)
_LONGEST_LINE = 1 << 28
"""Bytes of a first line, at most, that are looked at to find out whether a file holds JSON lines."""


class ColumnError(ValueError):
    """The column of texts is missing, or holds something else: mostly another one was meant."""


class _InvalidChat(ValueError):
    """A record has the columns of a chat, but no conversation in them: its file is one of records all the same."""


class Document(NamedTuple):
    """One text; `name` says where it came from: a file, or a file and its line."""

    name: str
    text: str


class Source(NamedTuple):
    """Something that holds documents: a file, a folder that `datasets` wrote, or a data set of the hub."""

    name: str
    kind: str
    """One of text, lines, table, parquet, dataset, hub."""


def find_sources(
    names: Sequence[str | os.PathLike[str]], *, text_column: str | None = "text", glob: Sequence[str] = ()
) -> list[Source]:
    """What the names stand for, folders opened, in sorted order. Nothing is read yet but the first lines of files whose
    names leave open whether they hold JSON lines.

    A file that is named twice, or reached by several links, is taken once, with a warning; linked folders are followed.

    Args:
        names: text files (one document each), .jsonl, .csv and .parquet files (one document a row), each perhaps
            compressed (.gz, .zst, .bz2), folders of all these, folders that `datasets` wrote, and hub ids.
        text_column: of JSON lines in files that are not called .jsonl; None, if records are chats.
        glob: patterns for the files of folders, as in `**/*.py`; one without a slash is for files at any depth. Files
            of text that match one are read, whatever their suffix, and no others. By default those of `TEXT_SUFFIXES`,
            `LINE_SUFFIXES`, `TABLE_SUFFIXES` and .parquet are.

    Raises:
        ValueError: naming what does not exist or cannot be read, or the folder in which nothing can be read.
    """
    sources = []
    if glob and not any(map(os.path.isdir, names)):
        raise ValueError(f"glob {','.join(glob)}: applies to folders, and none is named")
    for name in map(str, names):
        path = Path(name)
        if path.is_dir():
            sources += _in_folder(path, text_column, glob)
        elif path.exists():
            sources.append(_chosen(path, text_column))
        elif path.is_symlink():
            raise ValueError(f"{_shown(name)}: a link to {_shown(os.readlink(name))}, which does not exist")
        elif re.fullmatch(r"[\w.-]+/[\w.-]+", name) and path.suffix.lower() not in _FILES:
            sources.append(Source(name, "hub"))
        else:
            hint = "; for a pattern, name the folder, and the pattern as --glob" if re.search(r"[*?[]", name) else ""
            raise ValueError(f"{_shown(name)}: no such file or folder{hint}")
    return _once(sources)


def sources_note(sources: Iterable[Source]) -> dict[str, int]:
    """How many files there are, and their bytes: whether texts have changed, as far as that is seen without reading."""
    files: list[Path] = []
    for source in sources:
        path = Path(source.name)
        files += path.rglob("*.arrow") if source.kind == "dataset" else [path] if source.kind != "hub" else []
    return {"files": len(files), "bytes": sum(file.stat().st_size for file in files)}


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
        subset: of a data set of the hub; by default the one it names default.
        split: of a data set of the hub.
        skip_invalid: leave out what is no document (null, a list, no JSON, not UTF-8 …), and warn of how many there
            were. What makes the rest of a file unreadable, such as a cut archive, is an error all the same.

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


def _shown(name: str | os.PathLike[str]) -> str:
    """A name of a file as text, whatever its bytes are and whatever the locale takes them for."""
    return os.fsencode(name).decode("utf-8", "backslashreplace")


def _suffix(path: Path) -> str:
    """The suffix before compression, in lower case."""
    compressed = path.suffix.lower() in COMPRESSED
    return (path.with_suffix("") if compressed else path).suffix.lower()


def _kind(path: Path, text_column: str | None) -> str | None:
    """How a file is read: the same, however it was found. None if it is no text, or is one only if it is chosen."""
    suffix = _suffix(path)
    if suffix == ".parquet":
        return "parquet" if path.suffix.lower() == suffix else None
    if suffix in TABLE_SUFFIXES and _holds(_header(path), text_column):
        return "table"
    if suffix in LINE_SUFFIXES or (
        suffix in _PERHAPS_LINES and isinstance(_first(path, text_column), (Document, _InvalidChat))
    ):
        return "lines"
    return "text" if suffix in TEXT_SUFFIXES and text_column is not None else None


def _holds(columns: Collection[str], text_column: str | None) -> bool:
    return bool(chat_columns(columns)) if text_column is None else text_column in columns


def _header(file: Path) -> list[str]:
    with naming(lambda: _shown(file)), _opened(file) as opened:
        with contextlib.suppress(csv.Error):  # of a file that need not be a table of texts
            return next(_table_rows(opened, TABLE_SUFFIXES[_suffix(file)], errors="replace"), [])
        return []


def _first(file: Path, text_column: str | None) -> Document | ValueError:
    """The document in the first line that is not empty, if the file holds JSON lines."""
    if not file.is_file():  # a pipe could not be read again
        return ValueError(f"{_shown(file)}: no file")
    with naming(lambda: _shown(file)), _opened(file) as opened:
        line = next(filter(_says_something, iter(lambda: opened.readline(_LONGEST_LINE), b"")), b"")
    return _of_line(line, "", _shown(file), text_column)


def _says_something(line: bytes) -> bool:
    return bool(line.removeprefix(codecs.BOM_UTF8).strip())


def _chosen(path: Path, text_column: str | None) -> Source:
    """A file that is named, or matches a pattern: any text, unless it is one in another form."""
    kind, suffix = _kind(path, text_column), _suffix(path)
    if kind is None and suffix in TABLE_SUFFIXES:
        raise _without(text_column, _header(path), _shown(path))
    if kind is None and suffix in _REMEDIES:
        error = _first(path, text_column) if suffix == ".json" else None
        if isinstance(error, ColumnError):
            raise error
        raise ValueError(f"{_shown(path)}: such files are not read: {_REMEDIES[suffix].format(_shown(path.name))}")
    return Source(str(path), kind or "text")


def _in_folder(folder: Path, text_column: str | None, glob: Sequence[str]) -> list[Source]:
    if (folder / "state.json").is_file() and not glob:
        return [Source(str(folder), "dataset")]
    if (folder / "dataset_dict.json").is_file() and not glob:
        splits = ", ".join(read_json(folder / "dataset_dict.json").get("splits", ()))
        raise ValueError(f"{_shown(folder)} holds several splits ({splits}): name one of its folders")
    found: list[Source] = []
    others: list[Path] = []
    broken: list[Path] = []
    pattern = re.compile("|".join(map(_regex, glob)) or "(?s:.*)")
    for file in sorted(_files(folder)):
        if not pattern.fullmatch(file.relative_to(folder).as_posix()):
            continue
        if not file.exists():
            broken.append(file)
        elif file.is_file() and glob:
            found.append(_chosen(file, text_column))
        elif file.is_file() and (kind := _kind(file, text_column)):
            found.append(Source(str(file), kind))
        else:
            others.append(file)
    patterns = _patterns(others)
    chosen = f"; read by {' or '.join(f'--glob {pattern}' for pattern in patterns)}" if patterns else ""
    if not found:
        expected = (
            f"nothing matches {' '.join(glob)}" if glob else f"expected .txt, .md, .jsonl, .csv or .parquet{chosen}"
        )
        raise ValueError(f"{_shown(folder)}: found no text in this folder: {expected}")
    for files, what, hint in ((others, "of no text", chosen), (broken, "behind broken links", "")):
        if files:
            number, example = counted(len(files), "file"), _shown(files[0])
            logger.warning("%s: left out %s %s, such as %s%s", _shown(folder), number, what, example, hint)
    return found


def _patterns(files: Sequence[Path]) -> list[str]:
    """Patterns for the most frequent suffixes of files that were left out and look like text."""
    suffixes = collections.Counter(file.suffix for file in files if _suffix(file) not in _REMEDIES)
    first = {file.suffix: file for file in reversed(files) if _suffix(file) not in _REMEDIES}
    common = [suffix for suffix, _ in suffixes.most_common() if suffix]
    return [f"'*{suffix}'" for suffix in itertools.islice(filter(lambda one: _is_text(first[one]), common), 3)]


def _is_text(file: Path) -> bool:
    """Whether a file begins like one; a byte of 0 is in no text, and in most pictures and programs."""
    with contextlib.suppress(OSError, ValueError), _opened(file) as opened:
        return b"\0" not in opened.read(4096)
    return False


def _regex(glob: str) -> str:
    """A pattern of paths as a regular expression: `**/` is any number of folders, also none."""
    parts = re.split(r"(\*\*/|\*\*|\*|\?|\[[^]]+\])", glob if "/" in glob else f"**/{glob}")
    known = {"**/": "(?:.*/)?", "**": ".*", "*": "[^/]*", "?": "[^/]"}
    words = [f"[{part[1:-1].replace('!', '^', 1)}]" if part[:1] == "[" else known.get(part) for part in parts]
    return "".join(word or re.escape(part) for word, part in zip(words, parts))


def _files(folder: Path) -> Iterator[Path]:
    """All files below a folder that are not hidden, and links to nothing. A folder is entered once, whatever links lead
    to it."""

    def fail(error: OSError) -> None:
        raise ValueError(f"{_shown(error.filename)}: cannot be read: {error.strerror}") from error

    entered = set()
    for path, folders, files in os.walk(folder, onerror=fail, followlinks=True):
        entered.add(os.path.realpath(path))
        inner = [name for name in sorted(folders) if not name.startswith(".")]
        folders[:] = [name for name in inner if os.path.realpath(os.path.join(path, name)) not in entered]
        yield from (Path(path, name) for name in files if not name.startswith("."))


def _once(sources: list[Source]) -> list[Source]:
    """Each file once, by whatever name it was found first."""
    kept: dict[Any, Source] = {}
    again = []
    for source in sources:
        stat = None if source.kind == "hub" else os.stat(source.name)
        key = source.name if stat is None else (stat.st_dev, stat.st_ino)
        if key in kept:
            again.append(_shown(source.name))
        kept.setdefault(key, source)
    if again:
        logger.warning("%d files are named twice or linked, and taken once, such as %s", len(again), again[0])
    return list(kept.values())


@contextlib.contextmanager
def _opened(file: Path) -> Iterator[io.BufferedReader]:
    # Opened here, since Arrow would take names that are not UTF-8 for errors.
    with file.open("rb") as raw, pa.input_stream(raw, compression=COMPRESSED.get(file.suffix.lower())) as stream:
        yield io.BufferedReader(stream, buffer_size=1 << 20)


def _documents(
    source: Source, text_column: str | None, subset: str | None, split: str
) -> Iterator[Document | ValueError]:
    """The documents of a source; for what is none, the error that says so."""
    name = _shown(source.name)
    number = 0
    if source.kind == "text" and text_column is None:
        yield ColumnError(f"{name}: a text: expected a file of records, with messages, or prompt and completion")
    elif source.kind == "text":
        with naming(lambda: name), _opened(Path(source.name)) as opened:
            content = opened.read()
        yield _of_file(content, name)
    elif source.kind == "lines":
        with naming(lambda: f"{name}, line {number}"), _opened(Path(source.name)) as lines:
            for number, line in enumerate(lines, 1):
                if _says_something(line):
                    yield _of_line(line, f"{name}:{number}", f"{name}, line {number}", text_column)
    elif source.kind == "table":
        with naming(lambda: f"{name}, after row {number}"), _opened(Path(source.name)) as opened:
            rows = _table_rows(opened, TABLE_SUFFIXES[_suffix(Path(source.name))])
            header = next(rows, [])
            for number, row in enumerate(rows, 1):
                where = f"{name}, row {number}"
                if len(row) != len(header):  # separators of a text that is not in quotes
                    yield ValueError(f"{where}: expected {len(header)} values, as in the first line, found {len(row)}")
                else:
                    yield _of_record(dict(zip(header, row)), f"{name}:{number}", where, text_column)
    else:
        with naming(lambda: f"{name}, after row {number}" if number else name):
            for number, record in enumerate(_records(source, text_column, subset, split), 1):
                yield _of_record(record, f"{name}:{number}", f"{name}, row {number}", text_column)


def _of_file(content: bytes, name: str) -> Document | ValueError:
    if (place := content.find(0)) >= 0 and not content.startswith(_UTF16):
        return ValueError(f"{name}: no text (byte {place} is 0): expected a text in UTF-8; unpack an archive first")
    text = _decoded(content, name)
    return Document(name, text) if isinstance(text, str) else text


def _of_line(line: bytes, name: str, where: str, text_column: str | None) -> Document | ValueError:
    text = _decoded(line, where)
    if isinstance(text, ValueError):
        return text
    try:
        record = json.loads(text)
    except (ValueError, RecursionError) as error:  # a number of too many digits, too many brackets
        return ValueError(f"{where}: not JSON ({error})")
    return _of_record(record, name, where, text_column)


def _table_rows(opened: io.BufferedReader, separator: str, *, errors: str = "strict") -> Iterator[list[str]]:
    """The rows of a table, the one with the names of its columns first. In quotes, a text may hold separators and
    lines."""
    csv.field_size_limit(_LONGEST_LINE)  # instead of 131072 characters
    text = io.TextIOWrapper(opened, "utf-8-sig", newline="", errors=errors)
    yield from filter(None, csv.reader(text, delimiter=separator, strict=True))


def _of_record(record: Any, name: str, where: str, text_column: str | None) -> Document | ValueError:
    if not isinstance(record, dict):
        expected = "an object with messages" if text_column is None else f"an object with a text in {text_column!r}"
        return ValueError(f"{where}: found {_type(record)}: expected {expected}")
    if not _holds(record, text_column):
        return _without(text_column, record, where)
    if text_column is None:
        try:
            return Document(name, conversation_text({column: record[column] for column in chat_columns(record)}))
        except ValueError as error:
            return _InvalidChat(f"{where}: {error}")
    text = record[text_column]
    if not isinstance(text, str):
        if text_column in CHAT_COLUMNS and isinstance(text, list):
            return ColumnError(f"{where}: {_CHAT.format(text_column)}")
        return ColumnError(f"{where}: column {text_column!r} holds {_type(text)}: expected a text")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        return ValueError(f"{where}: half a surrogate pair at character {error.start}, which is no text")
    return Document(name, text)


def _without(text_column: str | None, columns: Collection[str], where: str) -> ColumnError:
    """What is said of columns without one of texts, or of chats."""
    found = ", ".join(columns)
    if text_column is None:
        return ColumnError(f"{where}: no chat: found {found}: expected messages, or prompt and completion")
    if chat := chat_columns(columns):
        return ColumnError(f"{where}: {_CHAT.format(chat[0])}")
    return ColumnError(f"{where}: no column {text_column!r}: found {found}; name another with --text_column")


def _decoded(content: bytes, where: str) -> str | ValueError:
    try:
        return content.decode("utf-8").removeprefix("\ufeff")  # the mark of some editors
    except UnicodeDecodeError as error:
        byte = content[error.start]
        hint = "; it looks like UTF-16 or UTF-32: convert it to UTF-8" if content.startswith(_UTF16) else ""
        return ValueError(f"{where}: not UTF-8 text (byte {error.start} is {byte:#04x}){hint}")


def _type(value: Any) -> str:
    """What JSON calls a value's type."""
    if value is None:
        return "null"
    names = {bool: "a boolean", int: "a number", float: "a number", str: "a text", list: "a list", dict: "an object"}
    return names.get(type(value), type(value).__name__)


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
        if not _holds(columns, text_column):
            raise _without(text_column, columns, _shown(source.name))
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
