"""Alternatives to `Cutter`: rows of pieces of 2^k + 1 tokens, and of documents in the order they come in."""

import random
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from tokenweight.data.packing import Cutter, Piece
from tokenweight.records import counted


@dataclass
class Decomposer(Cutter):
    """Cuts each document alone into rows of 2^k + 1 tokens, `shortest` to `length` of which are predicted.

    Each piece is the longest that the rest of the document fills. Where that rest would fill two of the longest, the
    length is drawn, with odds inverse to it: then each length is expected to hold equally many tokens. What is left
    of a document, less than the shortest piece, is dropped. The draw depends on the number of the document alone.

    Source: Pouransari et al. 2024, Dataset Decomposition, arXiv 2405.13226; `scripts/make_dd_buckets.py` of its code.
    """

    shortest: int = 256

    @property
    def step(self) -> int:
        """Tokens of a document that the shortest row holds."""
        return self._room(self.shortest)

    def rows(self, document: str, tokens: np.ndarray) -> Iterator[dict[str, Any]]:
        """The rows of this document, whose tokens are without `prefix` and `suffix`."""
        tokens = self._begun(tokens)
        sizes = [self.shortest]
        while sizes[-1] < self.length:
            sizes.append(2 * sizes[-1])
        drawn, offset = random.Random(self.summary.documents), 0
        while (left := len(tokens) - offset) >= self.step:
            if left >= self._room(2 * self.length):
                size = drawn.choices(sizes, weights=sizes[::-1])[0]  # odds times size are the same for all
            else:
                size = max(size for size in sizes if self._room(size) <= left)
            stop = offset + self._room(size)
            yield self._row([Piece(document, offset, tokens[offset:stop])])
            offset = stop

    def check_any_rows(self) -> None:
        """Raise a ValueError if all documents together gave no row."""
        count = self.summary
        if count.documents > count.empty_documents and count.rows == 0:
            raise ValueError(
                f"shortest {self.shortest}: none of {counted(count.documents, 'document')} is that long; the longest "
                f"has {count.longest_document} tokens"
            )
        super().check_any_rows()

    def _row(self, pieces: list[Piece]) -> dict[str, Any]:
        (piece,) = pieces
        tokens = np.append(np.array(self.prefix, np.int32), piece.tokens)
        self.summary.rows += 1
        self.summary.tokens += len(tokens)
        self.summary.dropped_tokens -= len(piece.tokens)
        return {"input_ids": tokens, "document": piece.document, "offset": piece.offset}

    def _room(self, size: int) -> int:
        """Tokens of a document in a row of which `size` are predicted."""
        return size + 1 - len(self.prefix)


class InOrder(Cutter):
    """Packs pieces that fill no row of their own in the order they come in, and cuts them where a row ends: rows hold
    neighbours of a path through similar documents, while `Cutter` looks for the best fit among all held pieces."""

    def _hold(self, piece: Piece) -> None:
        self.held.append(piece)

    def rows(self, document: str, tokens: np.ndarray) -> Iterator[dict[str, Any]]:
        """The rows that are full after this document, whose tokens are without `prefix` and `suffix`."""
        yield from super().rows(document, tokens)
        yield from self.last_rows()

    def _packed(self) -> dict[str, Any]:
        pieces, room = [], self.length
        while (fits := room - len(self.prefix)) >= 2:
            piece = self.held.pop(0)
            if len(piece.tokens) > fits:
                self.held.insert(0, Piece(piece.document, piece.offset + fits, piece.tokens[fits:]))
                piece = piece._replace(tokens=piece.tokens[:fits])
            pieces.append(piece)
            room -= len(self.prefix) + len(piece.tokens)
        return self._row(pieces)
