"""Documents -> rows of tokens of one length, in a folder that `datasets.load_from_disk` opens."""

import contextlib
import hashlib
import itertools
import logging
import os
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from transformers import PreTrainedTokenizerBase

from tokenweight.data.chat import ChatCutter
from tokenweight.data.documents import Document
from tokenweight.data.order import Decomposer, InOrder
from tokenweight.data.packing import Cutter, RowSummary
from tokenweight.data.shards import (
    FORMATS,
    check_format,
    check_name,
    finish_dataset,
    is_finished,
    locked,
    new_shard,
    read_note,
    strip_note,
    unlock,
)
from tokenweight.data.tokenize import Tokenize, tokenizing
from tokenweight.models import special_tokens
from tokenweight.records import differences, make_folder, read_json, remove_abandoned, rename_folder, write_json

logger = logging.getLogger(__name__)
SHARD_TOKENS = 1 << 24
"""Tokens of a shard: what is cut again, at most, after an interruption. More once `MAX_SHARDS` are there."""
MAX_SHARDS = 1000
"""Shards of this size; later ones each hold a thousandth of all tokens before them."""
BATCH_CHARACTERS = 1 << 22
"""Characters of the documents tokenized at once, by as many threads as the tokenizer has."""
_TOKENS = pa.list_(pa.int32())
_OF_ONE = pa.schema({"input_ids": _TOKENS, "document": pa.string(), "offset": pa.int64()})
_SCHEMAS = {
    "drop": _OF_ONE,
    "decompose": _OF_ONE,
    "pack": pa.schema(
        {
            "input_ids": _TOKENS,
            "position_ids": _TOKENS,
            "documents": pa.list_(pa.string()),
            "offsets": pa.list_(pa.int64()),
        }
    ),
}
_SHORT = {False: ("drop", "pack", "decompose"), True: ("keep", "pack")}
"""Treatments of texts, and of chats, that are shorter than a row; the first by default."""


def prepare_rows(
    documents: Iterable[Document],
    tokenizer: PreTrainedTokenizerBase,
    length: int,
    out: str | os.PathLike[str],
    *,
    short: str | None = None,
    shortest: int | None = None,
    in_order: bool = False,
    chat: bool = False,
    skip_invalid: bool = False,
    max_rows: int | None = None,
    num_proc: int = 1,
    format: str = "arrow",
    provenance: dict[str, Any] | None = None,
) -> RowSummary:
    """Cut each document into rows of exactly `length` tokens, or of 2^k + 1, and write them to the new folder `out`.

    A row begins with what the tokenizer puts before a text (BOS, if that is its rule), no token is lost between rows,
    and no text becomes a control token (`text_tokens`). `Cutter` and `Decomposer` say what becomes of short documents.

    Until it is complete, the folder is called `out.unfinished`. An interrupted call, repeated, resumes after the last
    complete shard; the rows are the same to the byte. If `out` is there, made by the same call, nothing is done.

    Args:
        documents: read one at a time, so that memory does not grow with the corpus.
        length: tokens of a row; with "decompose", those of the longest row that are predicted.
        short: "drop" (the default), a row is of one document (the paper); "pack", what fills no row shares rows, where
            `position_ids` restart at 0 with each document; "decompose", rows have 2^k + 1 tokens. Of chats "keep" (the
            default), each is a row of its own length, or "pack".
        shortest: with "decompose", those of the shortest; by default 256, or `length` if that is less.
        in_order: with "pack", whether texts share rows in the order they come in, not as they fit best.
        chat: whether documents are conversations, as `read_documents(..., text_column=None)` reads them. Then `labels`
            are -100 but in answers (`chat_tokens`), and rows of at most `length` tokens hold whole ones (`ChatCutter`).
        skip_invalid: leave out conversations that the template cannot render, rather than raise.
        max_rows: stop after this many.
        num_proc: processes that tokenize, spawned beside this one (call it under `if __name__ == "__main__"`); 1: none.
        format: format of the shards: arrow, which are mapped into memory, or parquet, which other tools read.
        provenance: kept in `rows.json` beside the summary.

    Raises:
        ValueError: if `out` or `out.unfinished` was made differently, no row is left, or a text cannot be tokenized.
    """
    out, (prefix, suffix) = Path(out), special_tokens(tokenizer)
    check_name(out)
    _check(format, length, len(prefix) + 2, max_rows=max_rows, num_proc=num_proc)
    settings = {**(provenance or {}), "length": length, "max_rows": max_rows, "format": format, "prefix": prefix}
    settings |= {"suffix": suffix, **_of_short(short, length, shortest, in_order, chat, len(prefix))}
    settings |= {"chat": True, "skip_invalid": skip_invalid} if chat else {}
    return _prepared(out, documents, tokenizer, num_proc, settings)


def _prepared(
    out: Path,
    documents: Iterable[Document],
    tokenizer: PreTrainedTokenizerBase,
    num_proc: int,
    settings: dict[str, Any],
) -> RowSummary:
    if _is_complete(out, settings):
        return _summary(out)
    with _unfinished(out, settings) as folder:
        if not is_finished(folder):  # else the call was interrupted when all rows were there
            _make(folder, documents, tokenizer, num_proc, settings)
        return _stripped(folder)


def _make(
    folder: Path,
    documents: Iterable[Document],
    tokenizer: PreTrainedTokenizerBase,
    num_proc: int,
    settings: dict[str, Any],
) -> None:
    """Write the missing shards, and make a data set of all."""
    cutter = _cutter(settings)
    with tokenizing(tokenizer, num_proc, chat="chat" in settings) as tokenize:
        _write_shards(folder, _Read(documents), tokenize, cutter, settings)
    cutter.check_any_rows()
    write_json(folder / "rows.json", {**settings, **vars(cutter.summary)})
    finish_dataset(folder, [shard.name for shard in _shards(folder)])


def _cutter(settings: dict[str, Any]) -> Cutter:
    length, frame, pack = settings["length"], (settings["prefix"], settings["suffix"]), settings["short"] == "pack"
    if "chat" in settings:  # a template frames its conversations
        return ChatCutter(length, [], [], pack=pack, skip_invalid=settings["skip_invalid"])
    if settings["short"] == "decompose":
        return Decomposer(length, *frame, shortest=settings["shortest"])
    return (InOrder if settings.get("in_order") else Cutter)(length, *frame, pack=pack)


def _of_short(
    short: str | None, length: int, shortest: int | None, in_order: bool, chat: bool, num_before: int
) -> dict[str, Any]:
    """The settings of one way to treat short documents; a ValueError for those that do not fit it.

    Args:
        num_before: tokens that a tokenizer puts before a text.
    """
    short = _SHORT[chat][0] if short is None else short
    if short not in _SHORT[chat]:
        raise ValueError(f"short {short}: expected {' or '.join(_SHORT[chat])} of {'chats' if chat else 'texts'}")
    if in_order and (short != "pack" or chat):
        found = "chats are packed as they fit" if chat else f"rows of short {short} hold one document each"
        raise ValueError(f"in_order: {found}: expected texts and short pack")
    if short != "decompose":
        if shortest is not None:
            raise ValueError(f"shortest {shortest}: only with short decompose, found {short}")
        return {"short": short, **({"in_order": True} if in_order else {})}
    shortest = min(256, length) if shortest is None else shortest
    for name, number in (("length", length), ("shortest", shortest)):
        if number < 2 or number & (number - 1):
            raise ValueError(f"{name} {number}: expected a power of two with short decompose")
    if shortest > length:
        raise ValueError(f"shortest {shortest}: expected at most length, {length}")
    if shortest <= num_before:
        raise ValueError(f"shortest {shortest}: expected more than the {num_before} tokens before a text")
    return {"short": short, "shortest": shortest}


def _check(format: str, length: int, least: int, **numbers: int | None) -> None:
    """Raise a ValueError for settings that make no sense."""
    check_format(format)
    for name, number in numbers.items():
        if number is not None and number < 1:
            raise ValueError(f"{name} {number}: expected at least 1")
    if length < least:
        raise ValueError(f"length {length}: expected at least {least} tokens")


def _stripped(folder: Path) -> RowSummary:
    """The summary of a folder, whose notes no longer say how to resume after a shard."""
    for shard in _shards(folder):
        strip_note(shard, "source", "cutter")
    return _summary(folder)


def _summary(folder: Path) -> RowSummary:
    note = read_json(folder / "rows.json")
    return RowSummary(**{name: note[name] for name in vars(RowSummary())})


_OF_THE_CALL = ("environment", "sources")
"""Settings in which an interrupted call may differ: texts that were read are compared by their contents."""


def _is_complete(out: Path, settings: dict[str, Any]) -> bool:
    """Whether the folder was made by a call with these settings.

    Raises:
        ValueError: if it holds anything else, naming what differs.
    """
    if not out.exists():
        return False
    note = read_json(out / "rows.json") if (out / "rows.json").is_file() else {}
    if "rows" not in note or not is_finished(out):
        raise ValueError(f"out {out}: exists already; name a new folder")
    if found := differences(note, settings):
        raise ValueError(f"out {out}: already holds rows made with other settings ({found}); name a new folder")
    return True


@contextlib.contextmanager
def _unfinished(out: Path, settings: dict[str, Any]) -> Iterator[Path]:
    """A folder that is renamed to `out` when it is complete. After an error, it is removed if it holds no shard."""
    folder = out.with_name(f"{out.name}.unfinished")
    make_folder(folder)
    note = folder / "rows.json"
    with locked(note, known=True) as alone:
        if not alone:
            raise ValueError(f"out {out}: another process is making it")
        remove_abandoned(folder, ".rows-*")
        try:
            if out.exists():
                raise ValueError(f"out {out}: exists already; name a new folder")
            if not _shards(folder):
                write_json(note, settings)
            elif found := differences(read_json(note), settings, ignored=_OF_THE_CALL):
                raise ValueError(
                    f"out {out}: {folder} was started with other settings ({found}); resume with those, or remove it"
                )
            yield folder
            unlock(folder)
            rename_folder(folder, out)
        finally:
            if folder.is_dir() and not _shards(folder):
                shutil.rmtree(folder, ignore_errors=True)


def _shards(folder: Path) -> list[Path]:
    return sorted(path for path in folder.glob("rows-*") if path.suffix[1:] in FORMATS)


def _write_shards(folder: Path, source: "_Read", tokenize: Tokenize, cutter: Cutter, settings: dict[str, Any]) -> None:
    """Write the shards that are not there yet."""
    schema = _SCHEMAS["pack" if settings["short"] == "pack" else "drop"]
    if "chat" in settings:
        schema = schema.append(pa.field("labels", _TOKENS))
    num_shards = _resume(folder, cutter, source, settings["format"])
    tables = _tables(source, tokenize, cutter, schema, settings["max_rows"])
    for number in itertools.count(num_shards):
        if (table := next(tables, None)) is None:
            return
        full = max(SHARD_TOKENS, cutter.summary.tokens // MAX_SHARDS)
        with new_shard(folder / _name(number, settings["format"]), schema) as (file, note):
            while table is not None:
                file.write(table)
                table = next(tables, None) if file.contents.tokens < full else None
            note.update(source=source.taken, cutter=cutter.state())


def _name(number: int, format: str) -> str:
    return f"rows-{number:05d}.{format}"


def _resume(folder: Path, cutter: Cutter, source: "_Read", format: str) -> int:
    """The number of complete shards; cutter and source continue after the last of them."""
    state: dict[str, Any] = {}
    for number in itertools.count():
        try:
            note = read_note(folder / _name(number, format))
        except ValueError as error:
            logger.warning("%s; it is made again, and those after it", error)
            note = None
        if note is None:
            break
        state = note
    for shard in _shards(folder):
        if shard.name >= _name(number, format):
            shard.unlink()
    if state:
        cutter.restore(state["cutter"])
        source.skip(state["source"], folder)
    return number


class _Read:
    """Documents, counted and hashed as they are read; `taken` is the state after those whose rows were made, as some
    are read ahead of that."""

    def __init__(self, documents: Iterable[Document]) -> None:
        self.documents, self.num, self.digest = iter(documents), 0, hashlib.sha256()
        self.taken = self.state()

    def __iter__(self) -> Iterator[Document]:
        for document in self.documents:
            self.num += 1
            self.digest.update(f"{len(document.name)} {len(document.text)} {document.name}".encode())
            self.digest.update(document.text.encode())
            yield document

    def state(self) -> dict[str, Any]:
        return {"documents": self.num, "sha256": self.digest.hexdigest()}

    def skip(self, state: dict[str, Any], folder: Path) -> None:
        for _ in itertools.islice(self, state["documents"]):
            pass
        self.taken = self.state()
        if self.taken != state:
            raise ValueError(f"the texts have changed since {folder} was started: remove it to start over")


def _batches(source: _Read) -> Iterator[tuple[list[Document], dict[str, Any]]]:
    """Documents of about `BATCH_CHARACTERS`, and the state of the source after them."""
    batch: list[Document] = []
    size = 0
    for document in source:
        batch.append(document)
        size += len(document.text)
        if size >= BATCH_CHARACTERS:
            yield batch, source.state()
            batch, size = [], 0
    if batch:
        yield batch, source.state()


def _tables(
    source: _Read, tokenize: Tokenize, cutter: Cutter, schema: pa.Schema, max_rows: int | None
) -> Iterator[pa.Table]:
    """The rows of each batch of documents, where there are any."""

    def table(rows: Iterable[dict[str, Any]]) -> list[pa.Table]:
        room = None if max_rows is None else max_rows - cutter.summary.rows
        chosen = list(itertools.islice(rows, room))
        return [_table(chosen, schema)] if chosen else []

    for names, arrays, state in tokenize(_batches(source)):
        source.taken = state
        yield from table(row for name, ids in zip(names, arrays) for row in cutter.rows(name, ids))
        if cutter.summary.rows == max_rows:
            return
    yield from table(cutter.last_rows())


def _table(rows: list[dict[str, Any]], schema: pa.Schema) -> pa.Table:
    columns = []
    for field in schema:
        values = [row[field.name] for row in rows]
        if field.type == _TOKENS:
            offsets = np.cumsum([0, *map(len, values)], dtype=np.int32)
            columns.append(pa.ListArray.from_arrays(offsets, np.concatenate(values)))
        else:
            columns.append(pa.array(values, field.type))
    return pa.Table.from_arrays(columns, schema=schema)
