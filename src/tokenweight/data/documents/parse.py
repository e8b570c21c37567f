"""One document from the bytes of a file or line, or from the columns of a record; or the error that says why not."""

import codecs
import json
from collections.abc import Collection
from typing import Any, NamedTuple

from tokenweight.data.chat import CHAT_COLUMNS, chat_columns, conversation_text

_CHAT = "column {0!r} holds a chat: --chat reads it, and its answers alone are predicted (docs/data.md)"
_UTF16 = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)


class ColumnError(ValueError):
    """The column of texts is missing, or holds something else: usually another one was meant."""


class InvalidChat(ValueError):
    """A record has the columns of a chat, but no conversation in them: its file is one of records all the same."""


class Document(NamedTuple):
    """One text; `name` says where it came from: a file, or a file and its line."""

    name: str
    text: str


def of_file(content: bytes, name: str) -> Document | ValueError:
    """The document in a file of text."""
    if (place := content.find(0)) >= 0 and not content.startswith(_UTF16):
        return ValueError(f"{name}: no text (byte {place} is 0): expected a text in UTF-8; unpack an archive first")
    text = _decoded(content, name)
    return Document(name, text) if isinstance(text, str) else text


def of_line(line: bytes, name: str, where: str, text_column: str | None) -> Document | ValueError:
    """The document in a line of JSON, under that name; an error says `where` the line is."""
    text = _decoded(line, where)
    if isinstance(text, ValueError):
        return text
    try:
        record = json.loads(text)
    except (ValueError, RecursionError) as error:  # a number of too many digits, too many brackets
        return ValueError(f"{where}: not JSON ({error})")
    return of_record(record, name, where, text_column)


def of_record(record: Any, name: str, where: str, text_column: str | None) -> Document | ValueError:
    """The document of a record: the text in its column, or its conversation."""
    if not isinstance(record, dict):
        expected = "an object with messages" if text_column is None else f"an object with a text in {text_column!r}"
        return ValueError(f"{where}: found {_type(record)}: expected {expected}")
    if not holds(record, text_column):
        return without(text_column, record, where)
    if text_column is None:
        try:
            return Document(name, conversation_text({column: record[column] for column in chat_columns(record)}))
        except ValueError as error:
            return InvalidChat(f"{where}: {error}")
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


def holds(columns: Collection[str], text_column: str | None) -> bool:
    """Whether columns are those of a text, or of a chat."""
    return bool(chat_columns(columns)) if text_column is None else text_column in columns


def without(text_column: str | None, columns: Collection[str], where: str) -> ColumnError:
    """The error for columns without one of texts, or of chats."""
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
    """The JSON name of a value's type."""
    if value is None:
        return "null"
    names = {bool: "a boolean", int: "a number", float: "a number", str: "a text", list: "a list", dict: "an object"}
    return names.get(type(value), type(value).__name__)
