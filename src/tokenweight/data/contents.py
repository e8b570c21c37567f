"""What sequences of tokens amount to: how many, how long, which token ids, and a fingerprint of them all."""

import hashlib
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

COLUMNS = ("input_ids", "position_ids", "labels")
"""What losses depend on."""
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
    digest: int = 0
    """Of all tokens, positions and labels, in order."""

    def __add__(self, other: "Contents") -> "Contents":
        return Contents(
            self.rows + other.rows,
            self.tokens + other.tokens,
            _among(min, self.shortest, other.shortest),
            _among(max, self.longest, other.longest),
            _among(min, self.smallest, other.smallest),
            _among(max, self.largest, other.largest),
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

    def to_json(self) -> dict[str, Any]:
        """As it stands in a note."""
        return {**vars(self), "digest": f"{self.digest:032x}"}

    @classmethod
    def from_json(cls, note: dict[str, Any]) -> "Contents":
        """Read what `to_json` gave, perhaps with more beside it."""
        numbers = {name: note[name] for name in cls.__dataclass_fields__ if name != "digest"}
        return cls(**numbers, digest=int(note["digest"], 16))


def contents_of(table: pa.Table) -> Contents:
    """Look at every token of a table that has a column `input_ids`, and perhaps `position_ids` and `labels`."""
    lengths = _lengths(table, "input_ids")
    if not len(lengths):
        return Contents()
    extremes = pc.min_max(_values(table, "input_ids")).as_py()
    digest = 0
    for row in _row_digests(table):
        digest = (digest * _BASE + row) % _PRIME
    sizes = int(lengths.min()), int(lengths.max())
    return Contents(len(lengths), int(lengths.sum()), *sizes, extremes["min"], extremes["max"], digest)


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


def _among(choose: Any, *numbers: int | None) -> int | None:
    known = [number for number in numbers if number is not None]
    return choose(known) if known else None
