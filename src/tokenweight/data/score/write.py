"""Scores on disk: rows with their short losses, in shards that several processes may share."""

import logging
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from tokenweight.data.columns import BESIDE, COLUMNS, TRANSLATED, is_score
from tokenweight.data.row_scorer import RowScorer
from tokenweight.data.shards import (
    check_format,
    check_name,
    finish_dataset,
    locked,
    new_shard,
    read_note,
    shard_lease,
    unlock,
)
from tokenweight.data.stores import row_lengths
from tokenweight.models import numbered_from
from tokenweight.records import Lease, LeaseLost, differences, make_folder, pauses, read_json, write_json

logger = logging.getLogger(__name__)
SHARD_TOKENS = 1 << 20
"""Tokens of a shard: what is scored again, at most, after an interruption. More where there would be `MAX_SHARDS`."""
MAX_SHARDS = 1000


@dataclass
class ScoreSummary:
    """Counts of what was scored: in all shards that are there, and by this call."""

    rows: int = 0
    tokens: int = 0
    new_tokens: int = 0
    """Tokens scored by this call; the others were there."""
    seconds: float = 0.0
    shards: int = 0
    missing_shards: int = 0
    """Shards not there yet: the shares of other processes."""
    differences: dict[str, list[float]] = field(default_factory=dict)
    """With long losses: `RowScorer.score` of all rows, for each context by the suffix of its columns."""
    groups: list[int] = field(default_factory=lambda: [0, 0])
    """With a scorer of another tokenizer: `RowScorer.groups` of all rows."""

    def __str__(self) -> str:
        lines = [f"{self.rows:,} rows, {self.tokens:,} tokens, {self.new_tokens:,} of them scored now"]
        if self.new_tokens:
            lines[0] += f" in {self.seconds:,.0f} s, {self.new_tokens / self.seconds:,.0f} tokens/s"
        for suffix, (number, total, above) in self.differences.items():
            context = f"with {suffix[1:]} tokens: "
            found = (
                f"mean |difference| {total / number:.3f} nats, {above / number:.2%} above 2" if number else "no token"
            )
            lines.append(f"{context}{found} (beyond the first window)")
        if self.groups[0]:
            lines.append(f"{self.groups[1] / self.groups[0]:.1%} of the groups of aligned tokens hold several of ours")
        if self.missing_shards:
            lines.append(f"{self.missing_shards} of {self.shards} shards are not there yet: other processes' shares")
        return "; ".join(lines)


def score_rows(
    rows: datasets.Dataset,
    scorer: RowScorer,
    out: str | os.PathLike[str],
    *,
    provenance: dict[str, Any],
    shard_tokens: int | None = None,
    format: str = "arrow",
    share: tuple[int, int] = (0, 1),
    progress: Callable[[int, int], object] = lambda done, total: None,
    announce: Callable[[str], object] = lambda line: None,
    check: Callable[[range], object] = lambda rows: None,
) -> ScoreSummary:
    """Write `rows` with the columns of `scorer` to the folder `out`.

    Called again with the same provenance, it scores only the shards that are missing, and, with a warning, those that
    are damaged; a shard that another process is working on is left to it. The folder becomes a data set, which
    `datasets.load_from_disk` opens, or of Parquet files, when the last shard is there.

    Args:
        rows: with `input_ids` and, where documents are packed, `position_ids`; all other columns are kept.
        provenance: written to `scores.json`: whatever the scores depend on.
        shard_tokens: tokens of a shard, about; by default `SHARD_TOKENS`, or more, so that there are `MAX_SHARDS` at
            most.
        format: format of the shards: arrow, which are mapped into memory, or parquet, which other tools read.
        share: (i, n): every n-th shard, from the i-th; n processes, each with its own i, do all.
        progress: called after each batch with its number of tokens, and that of all rows of the share.
        announce: called before the first shard, if the share is not all of them, with a line that names its shards.
        check: called before the rows of a shard are read, with their numbers; it raises what is wrong with them.

    Raises:
        ValueError: if `out` holds scores of another provenance, naming what differs; if a loss is not finite.
    """
    out = Path(out)
    check_name(out)
    check_format(format)
    _check_not_scored(rows, scorer)
    lengths = row_lengths(rows)
    shard_tokens = shard_tokens or _shard_tokens(lengths)
    contexts, with_long = [*provenance.get("contexts", ()), *scorer.contexts], scorer.with_long
    settings = {"contexts": contexts, "long": provenance.get("long", with_long), "shard_tokens": shard_tokens}
    _claim(out, {**provenance, **settings, "format": format})
    shards = _shards(lengths, shard_tokens)
    files = [out / f"scores-{number:05d}-of-{len(shards):05d}.{format}" for number in range(len(shards))]
    _announce(share, len(shards), announce)
    summary, begun = ScoreSummary(shards=len(shards)), time.perf_counter()
    ours = list(zip(files, shards))[share[0] :: share[1]]
    summary.new_tokens = _score_missing(ours, rows, scorer, lengths, progress, check)
    summary.seconds = time.perf_counter() - begun
    return _finished(out, files, summary)


def _check_not_scored(rows: datasets.Dataset, scorer: RowScorer) -> None:
    scores = set(filter(is_score, rows.column_names))
    beside = scorer.as_reference or scorer.top_k is not None
    if there := sorted(scores & scorer.features.keys() if beside else scores - {*BESIDE}):
        raise ValueError(f"the rows have a column {there[0]} already: score the rows they were made from")


def _score_missing(
    ours: list[tuple[Path, np.ndarray]],
    rows: datasets.Dataset,
    scorer: RowScorer,
    lengths: np.ndarray,
    progress: Callable[[int, int], object],
    check: Callable[[range], object],
) -> int:
    """Score the shards that are not there and on which no live process works, and return their number of tokens."""
    schema = datasets.Features({**rows.features, **scorer.features}).arrow_schema
    total, new, left = sum(int(lengths[shard].sum()) for _, shard in ours), 0, ours
    for _ in pauses():
        unknown = []  # those of processes on other hosts, until they are seen alive or dead
        for file, shard in left:
            with shard_lease(file) as lease:
                if not isinstance(lease, Lease) and not lease.alive and not file.is_file():
                    unknown.append((file, shard))
                elif not isinstance(lease, Lease) or _is_whole(file):  # another process is working on it, or was
                    progress(int(lengths[shard].sum()), total)
                else:
                    check(range(int(shard[0]), int(shard[-1]) + 1))
                    batches = _batches(shard, lengths, scorer.max_tokens)
                    new += _write_shard(lease, schema, rows, batches, scorer, lambda done: progress(done, total))
        left = unknown
        if not left:
            break
    return new


def _write_shard(
    lease: Lease,
    schema: pa.Schema,
    rows: datasets.Dataset,
    batches: Iterator[np.ndarray],
    scorer: RowScorer,
    progress: Callable[[int], object],
) -> int:
    """Score the batches of one shard, and return its number of tokens: 0 if another process has taken it over."""
    try:
        with new_shard(lease.path, schema) as (written, note):
            note["differences"], before = {}, scorer.groups
            for batch in batches:
                table, totals = _scored(rows, batch, scorer)
                lease.check()
                written.write(table)
                _add(note["differences"], totals)
                progress(pc.sum(pc.list_value_length(table["input_ids"])).as_py())
            if scorer.groups != before:
                note["groups"] = [after - known for after, known in zip(scorer.groups, before)]
        return note["tokens"]
    except LeaseLost as error:
        logger.warning("%s, since nothing was heard of this one: it is left to that", error)
        return 0


def process_share(shard: str | None) -> tuple[int, int]:
    """The share of this process in a job: `--shard i/n` of a job array, and rank and world size under torchrun.

    Raises:
        ValueError: if the text is not i/n with 0 <= i < n.
    """
    index, count = 0, 1
    if shard is not None:
        first, slash, second = shard.partition("/")
        if not (slash and first.isdecimal() and second.isdecimal() and int(first) < int(second)):
            raise ValueError(f"shard {shard}: expected i/n, from 0/n to n-1/n")
        index, count = int(first), int(second)
    world = int(os.environ.get("WORLD_SIZE", "1"))
    return index * world + int(os.environ.get("RANK", "0")), count * world


def _announce(share: tuple[int, int], num_shards: int, announce: Callable[[str], object]) -> None:
    """Announce the shards of a share, and warn if some share has none."""
    index, count = share
    own = [str(number) for number in range(index, num_shards, count)]
    if count > 1:
        shown = own if len(own) <= 6 else [*own[:3], "…", own[-1]]
        announce(f"share {index} of {count}: {len(own)} of {num_shards} shards ({', '.join(shown) or 'none'})")
    if count > num_shards:
        logger.warning("%d processes share %d shards: some have nothing to do; make smaller shards", count, num_shards)


def _claim(out: Path, provenance: dict[str, Any]) -> None:
    """Note the provenance in a new folder, or compare it with the one that is there."""
    path = out / "scores.json"
    if out.exists() and any(not file.name.startswith(".") for file in out.iterdir()) and not path.is_file():
        raise ValueError(f"out {out}: exists and holds no scores; name a new folder")
    if not path.is_file():
        make_folder(out)
        with locked(path, wait=True):
            if not path.is_file():
                write_json(path, provenance)
    # The rows are compared by their fingerprint, not by the path that led to them.
    noted = read_json(path)
    if noted.get("rows_fingerprint") != provenance.get("rows_fingerprint"):
        raise ValueError(f"out {out}: already holds scores of other sequences, {noted.get('rows')}; name a new folder")
    if found := differences(noted, provenance, ignored=("environment", "rows")):
        raise ValueError(f"out {out}: already holds scores computed with other settings ({found}); name a new folder")


def _shard_tokens(lengths: np.ndarray) -> int:
    """The default number of tokens of a shard."""
    return max(SHARD_TOKENS, int(lengths.sum()) // MAX_SHARDS)


def _shards(lengths: np.ndarray, shard_tokens: int) -> list[np.ndarray]:
    """Consecutive rows of about `shard_tokens` tokens; the same for every call, whoever makes it."""
    numbers = (np.cumsum(lengths) - 1) // shard_tokens
    return np.split(np.arange(len(lengths)), np.flatnonzero(np.diff(numbers)) + 1)


def _is_whole(file: Path) -> bool:
    """Whether a shard is there. A damaged one is logged and removed."""
    try:
        return read_note(file) is not None
    except ValueError as error:
        logger.warning("%s: scoring it again", error)
        file.unlink(missing_ok=True)
        return False


def _batches(shard: np.ndarray, lengths: np.ndarray, max_tokens: int) -> Iterator[np.ndarray]:
    """Consecutive rows, about `max_tokens` tokens together: what is held in memory at once."""
    numbers = (np.cumsum(lengths[shard]) - 1) // max_tokens
    yield from np.split(shard, np.flatnonzero(np.diff(numbers)) + 1)


def _scored(rows: datasets.Dataset, batch: np.ndarray, scorer: RowScorer) -> tuple[pa.Table, dict[str, list[float]]]:
    """The rows of a batch as they are, with the columns of the scorer appended; and the sums of their differences."""
    table = rows.with_format("arrow")[batch]
    read = {
        name: [row.values.to_numpy(zero_copy_only=False) for row in table.column(name)]
        for name in (*COLUMNS, *TRANSLATED)
        if name in table.column_names
    }
    with numbered_from(int(batch[0])):
        columns, totals = scorer.score(read)
    for name, feature in scorer.features.items():
        kind = datasets.Features({name: feature}).arrow_schema[0].type
        table = table.append_column(name, _array(columns[name], kind))
    return table, totals


def _array(values: list[Any], kind: pa.DataType) -> pa.Array:
    """The values of rows as Arrow, also for several numbers per token, `[seq, k]`, which Arrow does not read."""
    if not (pa.types.is_list(kind) and pa.types.is_fixed_size_list(kind.value_type)):
        return pa.array(values, kind)
    flat = pa.array(np.concatenate([row.reshape(-1) for row in values]), kind.value_type.value_type)
    of_tokens = pa.FixedSizeListArray.from_arrays(flat, kind.value_type.list_size)
    offsets = np.cumsum([0, *map(len, values)], dtype=np.int32)
    return pa.ListArray.from_arrays(offsets, of_tokens).cast(kind)


def _add(sums: dict[str, list[float]], more: dict[str, list[float]]) -> None:
    for suffix, values in more.items():
        sums[suffix] = [a + b for a, b in zip(sums.get(suffix, [0, 0, 0]), values)]


def _finished(out: Path, files: list[Path], summary: ScoreSummary) -> ScoreSummary:
    """Sum up the shards that are there; if they all are, the folder becomes a data set."""
    notes = [read_json(file.with_suffix(".json")) if file.is_file() else None for file in files]
    for note in notes:
        if note is None:
            summary.missing_shards += 1
            continue
        summary.rows += note["rows"]
        summary.tokens += note["tokens"]
        _add(summary.differences, note["differences"])
        summary.groups = [a + b for a, b in zip(summary.groups, note.get("groups", (0, 0)))]
    if not summary.missing_shards:
        finish_dataset(out, [file.name for file in files])
        unlock(out)
    return summary
