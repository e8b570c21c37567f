"""Documents cut into rows of one length: one document per row, or several."""

import bisect
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np

from tokenweight.records import counted

HELD_ROWS = 4
"""Rows' worth of tokens that are held back, so that pieces can be found that fill a row."""


class Piece(NamedTuple):
    """Consecutive tokens of one document, `offset` tokens after its first."""

    document: str
    offset: int
    tokens: np.ndarray


@dataclass
class RowSummary:
    """Counts of documents, rows and tokens, kept and dropped."""

    documents: int = 0
    rows: int = 0
    tokens: int = 0
    """Tokens in rows, special tokens included."""
    dropped_tokens: int = 0
    """Tokens of documents in no row: the ends of documents, or what filled no last row."""
    short_documents: int = 0
    """Documents shorter than a row."""
    empty_documents: int = 0
    longest_document: int = 0
    predicted_tokens: int = 0
    """For conversations, tokens of answers in rows."""
    cut_documents: int = 0
    """Conversations longer than a row, which end with an earlier answer."""
    left_out_documents: int = 0
    """Conversations of which no answer ends within a row."""

    def __str__(self) -> str:
        if self.predicted_tokens or self.left_out_documents:
            return (
                f"{counted(self.rows, 'row')}, {self.tokens:,} tokens from {counted(self.documents, 'conversation')}, "
                f"{self.predicted_tokens:,} of them in answers; longer than a row: {self.cut_documents:,} cut after an "
                f"answer, {self.left_out_documents:,} left out ({self.dropped_tokens:,} tokens in no row)"
                + (f"; invalid and left out: {self.empty_documents:,}" if self.empty_documents else "")
            )
        return (
            f"{counted(self.rows, 'row')}, {self.tokens:,} tokens from {counted(self.documents, 'document')}; "
            f"{self.dropped_tokens:,} of their tokens are in no row; documents shorter than a row: "
            f"{self.short_documents:,} ({self.empty_documents:,} of them empty)"
        )


@dataclass
class Cutter:
    """Cuts documents into rows of exactly `length` tokens, and counts.

    A document ends with `suffix`. A row of a long one belongs to it alone: it begins with `prefix`, and no token is
    lost between two rows. What fills no row, the end of a document or a short one, is dropped; or, with `pack`, shares
    rows with others of its kind: each begins with `prefix` and at position 0, the longest that fits goes in first, and
    where none fits, the longest of all is cut. One token or two that are left of a row then, too few for a piece, are
    documents of one token, which nothing predicts and nothing sees.
    """

    length: int
    prefix: list[int]
    suffix: list[int]
    pack: bool = False
    summary: RowSummary = field(default_factory=RowSummary)
    held: list[Piece] = field(default_factory=list)
    """Pieces that wait for a row, the shortest first."""

    @property
    def step(self) -> int:
        """Tokens of its document that a row holds."""
        return self.length - len(self.prefix)

    def rows(self, document: str, tokens: np.ndarray) -> Iterator[dict[str, Any]]:
        """The rows that are full after this document, whose tokens are without `prefix` and `suffix`."""
        tokens = self._begun(tokens)
        whole = len(tokens) // self.step * self.step
        for offset in range(0, whole, self.step):
            yield self._row([Piece(document, offset, tokens[offset : offset + self.step])])
        if self.pack and len(tokens) > whole:
            self._hold(Piece(document, whole, tokens[whole:]))
            while self._num_held() >= HELD_ROWS * self.length:
                yield self._packed()

    def last_rows(self) -> Iterator[dict[str, Any]]:
        """The rows that are filled by the pieces held back."""
        while self._num_held() >= self.length:
            yield self._packed()

    def check_any_rows(self) -> None:
        """Raise a ValueError if all documents together gave no row."""
        count = self.summary
        if count.documents == count.empty_documents:
            raise ValueError(f"the text is empty ({count.documents} documents without a token)")
        if count.rows == 0:
            held = f", all together {self._num_held()}" if self.pack else "; lower it, or pack them by --short pack"
            raise ValueError(
                f"length {self.length}: none of {counted(count.documents, 'document')} is that long; the longest has "
                f"{count.longest_document} tokens{held}"
            )

    def state(self) -> dict[str, Any]:
        """The state from which another process can continue, as JSON."""
        held = [[piece.document, piece.offset, piece.tokens.tolist()] for piece in self.held]
        return {"summary": vars(self.summary), "held": held}

    def restore(self, state: dict[str, Any]) -> None:
        """Continue from a `state`."""
        self.summary = RowSummary(**state["summary"])
        self.held = [Piece(name, offset, np.array(tokens, np.int32)) for name, offset, tokens in state["held"]]

    def _begun(self, tokens: np.ndarray) -> np.ndarray:
        """The tokens of a document with its end, counted; all of them count as dropped until a row has them."""
        count = self.summary
        count.documents += 1
        count.empty_documents += not len(tokens)
        if len(tokens):
            tokens = np.append(tokens, np.array(self.suffix, np.int32))
        count.short_documents += len(tokens) < self.step
        count.longest_document = max(count.longest_document, len(tokens))
        count.dropped_tokens += len(tokens)
        return tokens

    def _hold(self, piece: Piece) -> None:
        bisect.insort(self.held, piece, key=_size)

    def _num_held(self) -> int:
        return sum(len(self.prefix) + len(piece.tokens) for piece in self.held)

    def _packed(self) -> dict[str, Any]:
        pieces, room, least = [], self.length, len(self.prefix) + 2
        while room >= least:
            place = bisect.bisect_right(self.held, room - len(self.prefix), key=_size)
            piece = self.held.pop(place - 1)  # with none that fits, place is 0 and the last, the longest, is taken
            fits = room - len(self.prefix)
            if len(piece.tokens) > fits:
                self._hold(Piece(piece.document, piece.offset + fits, piece.tokens[fits:]))
                piece = piece._replace(tokens=piece.tokens[:fits])
            pieces.append(piece)
            room -= len(self.prefix) + len(piece.tokens)
        return self._row(pieces)

    def _row(self, pieces: list[Piece]) -> dict[str, Any]:
        prefix = np.array(self.prefix, np.int32)
        parts = [np.append(prefix, piece.tokens) for piece in pieces]
        num_tokens = sum(map(len, parts))
        parts += [part[:1] for part in parts[:1]] * (self.length - num_tokens)
        self.summary.rows += 1
        self.summary.tokens += self.length
        self.summary.dropped_tokens -= num_tokens - len(self.prefix) * len(pieces)
        row = {"input_ids": np.concatenate(parts)}
        if not self.pack:
            return {**row, "document": pieces[0].document, "offset": pieces[0].offset}
        positions = np.concatenate([np.arange(len(part), dtype=np.int32) for part in parts])
        names, offsets = [piece.document for piece in pieces], [piece.offset for piece in pieces]
        return {**row, "position_ids": positions, "documents": names, "offsets": offsets}


def _size(piece: Piece) -> int:
    return len(piece.tokens)
