"""Conversations as sequences: never cut within an answer or its context, alone or several to a sequence."""

import bisect
import logging
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Int32

from tokenweight.data.packing import HELD_ROWS, Cutter, Piece
from tokenweight.records import counted

logger = logging.getLogger(__name__)


@dataclass
class ChatCutter(Cutter):
    """Makes sequences of at most `length` tokens of whole conversations, and counts.

    Each is a sequence of its own; with `pack`, the longest that fits joins others. A longer one ends with its last
    answer that fits, so that every answer keeps all of its context; without such an answer it is left out. So is, with
    `skip_invalid`, what the template could not render, with a warning of the first.
    """

    skip_invalid: bool = False

    def rows(self, document: str, tokens: Int32[np.ndarray, "tokens 2"] | ValueError) -> Iterator[dict[str, Any]]:
        """The rows that are full after this conversation, from its tokens beside their labels, or the error that says
        why there are none.

        Raises:
            ValueError: the given one, unless such conversations are left out.
        """
        count = self.summary
        count.documents += 1
        if isinstance(tokens, ValueError):
            if not self.skip_invalid:
                raise ValueError(f"{tokens}; --skip_invalid leaves such conversations out")
            if not count.empty_documents:
                logger.warning("left out, as are all such conversations: %s", tokens)
            count.empty_documents += 1
            return
        count.longest_document = max(count.longest_document, len(tokens))
        count.dropped_tokens += len(tokens)
        kept = self._kept(tokens)
        count.left_out_documents += not len(kept)
        count.cut_documents += 0 < len(kept) < len(tokens)
        if len(kept) and not self.pack:
            yield self._row([Piece(document, 0, kept)])
        elif len(kept):
            self._hold(Piece(document, 0, kept))
            while self._num_held() >= HELD_ROWS * self.length:
                yield self._packed()

    def last_rows(self) -> Iterator[dict[str, Any]]:
        """The rows of the conversations held back."""
        while self.held:
            yield self._packed()

    def check_any_rows(self) -> None:
        """Raise a ValueError if all conversations together gave no row."""
        if self.summary.rows == 0:
            raise ValueError(
                f"length {self.length}: no answer ends within so many tokens in "
                f"{counted(self.summary.documents, 'conversation')}; the longest has {self.summary.longest_document}"
            )

    def _kept(self, tokens: Int32[np.ndarray, "tokens 2"]) -> Int32[np.ndarray, "kept 2"]:
        if len(tokens) <= self.length:
            return tokens
        predicted = tokens[:, 1] != -100
        ends = np.flatnonzero(predicted[:-1] & ~predicted[1:]) + 1
        ends = ends[ends <= self.length]
        return tokens[: ends[-1] if len(ends) else 0]

    def _packed(self) -> dict[str, Any]:
        pieces: list[Piece] = []
        room = self.length
        while place := bisect.bisect_right(self.held, room, key=lambda piece: len(piece.tokens)):
            pieces.append(self.held.pop(place - 1))
            room -= len(pieces[-1].tokens)
        return self._row(pieces)

    def _row(self, pieces: list[Piece]) -> dict[str, Any]:
        tokens = np.concatenate([piece.tokens for piece in pieces])
        self.summary.rows += 1
        self.summary.tokens += len(tokens)
        self.summary.predicted_tokens += int((tokens[1:, 1] != -100).sum())
        self.summary.dropped_tokens -= len(tokens)
        row = {"input_ids": tokens[:, 0].copy(), "labels": tokens[:, 1].copy()}
        if not self.pack:
            return {**row, "document": pieces[0].document, "offset": 0}
        positions = np.concatenate([np.arange(len(piece.tokens), dtype=np.int32) for piece in pieces])
        names = [piece.document for piece in pieces]
        return {**row, "position_ids": positions, "documents": names, "offsets": [0] * len(names)}
