"""Summary numbers of sequences of tokens: how many, how long, which token ids, and a fingerprint of them all."""

import hashlib
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from tokenweight.data.columns import COLUMNS

# Fingerprints of sequences are the coefficients of a polynomial, whose value at _BASE is that of all of them. So two
# parts can be joined without their tokens, and the result does not depend on where the data set was cut into parts.
_PRIME = 2**127 - 1
_BASE = int.from_bytes(hashlib.sha256(b"tokenweight").digest()) % _PRIME


@dataclass(frozen=True)
class Contents:
    """Numbers about a data set, or about a part of it. Those of consecutive parts are joined by `+`."""

    rows: int = 0
    tokens: int = 0
    shortest: int | None = None
    """Tokens of the shortest sequence; None without a sequence."""
    longest: int | None = None
    smallest: int | None = None
    """The smallest token id; None without a token."""
    largest: int | None = None
    unpredicted: int = 0
    """Rows in which no token is predicted: all labels are -100, or each token begins a document."""
    first_unpredicted: int | None = None
    """The number of the first of them, from 0."""
    digest: int = 0
    """Digest of all tokens, positions and labels, in order."""

    def __add__(self, other: "Contents") -> "Contents":
        return Contents(
            self.rows + other.rows,
            self.tokens + other.tokens,
            _among(min, self.shortest, other.shortest),
            _among(max, self.longest, other.longest),
            _among(min, self.smallest, other.smallest),
            _among(max, self.largest, other.largest),
            self.unpredicted + other.unpredicted,
            _among(min, self.first_unpredicted, _plus(other.first_unpredicted, self.rows)),
            (self.digest * pow(_BASE, other.rows, _PRIME) + other.digest) % _PRIME,
        )

    @property
    def fingerprint(self) -> str:
        """16 hex digits of all token ids, positions and labels, in order: what losses depend on."""
        return hashlib.sha256(f"{self.rows} {self.digest}".encode()).hexdigest()[:16]

    @property
    def token_range(self) -> tuple[int, int]:
        """The smallest and the largest token id; (0, 0) without a token."""
        return self.smallest or 0, self.largest or 0

    @property
    def numbers(self) -> dict[str, Any]:
        """Numbers of sequences and tokens, as in `run.json`."""
        return {"num": self.rows, "tokens": self.tokens, "shortest": self.shortest, "longest": self.longest}

    def to_json(self) -> dict[str, Any]:
        """The form in which it is written to a note."""
        return {**vars(self), "digest": f"{self.digest:032x}"}

    @classmethod
    def from_json(cls, note: dict[str, Any]) -> "Contents":
        """Read what `to_json` returned, perhaps with more beside it.

        Raises:
            ValueError: naming what is missing.
        """
        if missing := [name for name in cls.__dataclass_fields__ if name not in note]:
            raise ValueError(f"a note of contents has no {', '.join(missing)}: expected one of this version")
        return cls(**{**{name: note[name] for name in cls.__dataclass_fields__}, "digest": int(note["digest"], 16)})


def contents_of(table: pa.Table) -> Contents:
    """Summarize every token of a table with a column `input_ids`, and perhaps `position_ids` and `labels`."""
    lengths = _lengths(table, "input_ids")
    if not len(lengths):
        return Contents()
    extremes = pc.min_max(_values(table, "input_ids")).as_py()
    digest = 0
    for row in _row_digests(table):
        digest = (digest * _BASE + row) % _PRIME
    silent = np.flatnonzero(~_predicted(table, lengths)).tolist()
    return Contents(
        rows=len(lengths),
        tokens=int(lengths.sum()),
        shortest=int(lengths.min()),
        longest=int(lengths.max()),
        smallest=extremes["min"],
        largest=extremes["max"],
        unpredicted=len(silent),
        first_unpredicted=silent[0] if silent else None,
        digest=digest,
    )


def _predicted(table: pa.Table, lengths: np.ndarray) -> np.ndarray:
    """Whether some token of each row is predicted, as `prediction_mask` says."""
    starts = np.cumsum(lengths) - lengths
    mask = np.ones(int(lengths.sum()), dtype=bool)
    mask[starts[lengths > 0]] = False
    if "position_ids" in table.column_names:
        mask &= np.asarray(_values(table, "position_ids")) != 0
    if "labels" in table.column_names:
        mask &= np.asarray(_values(table, "labels")) != -100
    counts = np.concatenate([[0], np.cumsum(mask)])
    return counts[starts + lengths] > counts[starts]


def _row_digests(table: pa.Table) -> list[int]:
    """A fingerprint of each row: of the names, lengths and values of its columns."""
    columns: list[tuple[str, list[int], Any]] = []
    for name in (name for name in COLUMNS if name in table.column_names):
        stops = np.cumsum(_lengths(table, name))
        columns.append((name, [0, *stops.tolist()], np.asarray(_values(table, name), dtype="<i8").view(np.uint8)))
    found = []
    for row in range(len(table)):
        digest = hashlib.blake2b(digest_size=15)  # below the prime
        for name, starts, values in columns:
            start, stop = starts[row : row + 2]
            digest.update(f"{name} {stop - start} ".encode())
            digest.update(values[8 * start : 8 * stop])
        found.append(int.from_bytes(digest.digest()))
    return found


def _lengths(table: pa.Table, name: str) -> np.ndarray:
    return np.asarray(pc.list_value_length(table.column(name)), dtype=np.int64)


def _values(table: pa.Table, name: str) -> Any:
    return pc.list_flatten(table.column(name).combine_chunks())


def _plus(number: int | None, more: int) -> int | None:
    return None if number is None else number + more


def _among(choose: Any, *numbers: int | None) -> int | None:
    known = [number for number in numbers if number is not None]
    return choose(known) if known else None
