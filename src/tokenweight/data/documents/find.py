"""Sources named on a command line: files that hold documents, folders of them, data sets of the hub."""

import collections
import contextlib
import csv
import itertools
import logging
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from tokenweight.data.documents.parse import ColumnError, Document, InvalidChat, holds, of_line, without
from tokenweight.data.documents.read import (
    COMPRESSED,
    LONGEST_LINE,
    TABLE_SUFFIXES,
    Source,
    naming,
    open_text,
    says_something,
    shown,
    suffix_of,
    table_rows,
)
from tokenweight.records import counted, read_json

logger = logging.getLogger(__name__)
TEXT_SUFFIXES = (".txt", ".text", ".md", ".rst", "")
"""Files that are read as one document each. Other files of text, such as source code, are too if they are
chosen: by their own name, or by a pattern for the files of a folder."""
LINE_SUFFIXES = (".jsonl", ".ndjson")
"""Files of one JSON object per line."""
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
"""Formats of texts that are not read, and how to convert them."""
_FILES = (*filter(None, TEXT_SUFFIXES), *LINE_SUFFIXES, *TABLE_SUFFIXES, *COMPRESSED, *_REMEDIES)


def find_sources(
    names: Sequence[str | os.PathLike[str]], *, text_column: str | None = "text", glob: Sequence[str] = ()
) -> list[Source]:
    """The sources that names stand for, folders expanded, in sorted order. Nothing is read yet but the first lines of
    files whose names leave open whether they hold JSON lines.

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
            raise ValueError(f"{shown(name)}: a link to {shown(os.readlink(name))}, which does not exist")
        elif re.fullmatch(r"[\w.-]+/[\w.-]+", name) and path.suffix.lower() not in _FILES:
            sources.append(Source(name, "hub"))
        else:
            hint = "; for a pattern, name the folder, and the pattern as --glob" if re.search(r"[*?[]", name) else ""
            raise ValueError(f"{shown(name)}: no such file or folder{hint}")
    return _once(sources)


def sources_note(sources: Iterable[Source]) -> dict[str, int]:
    """The number of files and of their bytes: whether texts have changed, as far as that shows without reading them."""
    files: list[Path] = []
    for source in sources:
        path = Path(source.name)
        files += path.rglob("*.arrow") if source.kind == "dataset" else [path] if source.kind != "hub" else []
    return {"files": len(files), "bytes": sum(file.stat().st_size for file in files)}


def _kind(path: Path, text_column: str | None) -> str | None:
    """The format of a file, however it was found. None if it is no text, or is one only if it is chosen."""
    suffix = suffix_of(path)
    if suffix == ".parquet":
        return "parquet" if path.suffix.lower() == suffix else None
    if suffix in TABLE_SUFFIXES and holds(_header(path), text_column):
        return "table"
    if suffix in LINE_SUFFIXES or (
        suffix in _PERHAPS_LINES and isinstance(_first(path, text_column), (Document, InvalidChat))
    ):
        return "lines"
    return "text" if suffix in TEXT_SUFFIXES and text_column is not None else None


def _header(file: Path) -> list[str]:
    with naming(lambda: shown(file)), open_text(file) as opened:
        with contextlib.suppress(csv.Error):  # the file need not be a table of texts
            return next(table_rows(opened, TABLE_SUFFIXES[suffix_of(file)], errors="replace"), [])
        return []


def _first(file: Path, text_column: str | None) -> Document | ValueError:
    """The document in the first line that is not empty, if the file holds JSON lines."""
    if not file.is_file():  # a pipe could not be read again
        return ValueError(f"{shown(file)}: no file")
    with naming(lambda: shown(file)), open_text(file) as opened:
        line = next(filter(says_something, iter(lambda: opened.readline(LONGEST_LINE), b"")), b"")
    return of_line(line, "", shown(file), text_column)


def _chosen(path: Path, text_column: str | None) -> Source:
    """A file that is named, or matches a pattern: any text, unless its format is not read."""
    kind, suffix = _kind(path, text_column), suffix_of(path)
    if kind is None and suffix in TABLE_SUFFIXES:
        raise without(text_column, _header(path), shown(path))
    if kind is None and suffix in _REMEDIES:
        error = _first(path, text_column) if suffix == ".json" else None
        if isinstance(error, ColumnError):
            raise error
        raise ValueError(f"{shown(path)}: such files are not read: {_REMEDIES[suffix].format(shown(path.name))}")
    return Source(str(path), kind or "text")


def _in_folder(folder: Path, text_column: str | None, glob: Sequence[str]) -> list[Source]:
    if (folder / "state.json").is_file() and not glob:
        return [Source(str(folder), "dataset")]
    if (folder / "dataset_dict.json").is_file() and not glob:
        splits = ", ".join(read_json(folder / "dataset_dict.json").get("splits", ()))
        raise ValueError(f"{shown(folder)} holds several splits ({splits}): name one of its folders")
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
        raise ValueError(f"{shown(folder)}: found no text in this folder: {expected}")
    for files, what, hint in ((others, "of no text", chosen), (broken, "behind broken links", "")):
        if files:
            number, example = counted(len(files), "file"), shown(files[0])
            logger.warning("%s: left out %s %s, such as %s%s", shown(folder), number, what, example, hint)
    return found


def _patterns(files: Sequence[Path]) -> list[str]:
    """Patterns for the most frequent suffixes of files that were left out and look like text."""
    suffixes = collections.Counter(file.suffix for file in files if suffix_of(file) not in _REMEDIES)
    first = {file.suffix: file for file in reversed(files) if suffix_of(file) not in _REMEDIES}
    common = [suffix for suffix, _ in suffixes.most_common() if suffix]
    return [f"'*{suffix}'" for suffix in itertools.islice(filter(lambda one: _is_text(first[one]), common), 3)]


def _is_text(file: Path) -> bool:
    """Whether a file begins like a text; a byte of 0 is in no text, and in most pictures and programs."""
    with contextlib.suppress(OSError, ValueError), open_text(file) as opened:
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
        raise ValueError(f"{shown(error.filename)}: cannot be read: {error.strerror}") from error

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
            again.append(shown(source.name))
        kept.setdefault(key, source)
    if again:
        logger.warning("%d files are named twice or linked, and taken once, such as %s", len(again), again[0])
    return list(kept.values())
