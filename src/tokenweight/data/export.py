"""Scored rows -> rows with their loss weights, in the columns that other trainers read; or the rows as they are, in
files that other tools read. See docs/data.md."""

import itertools
import json
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import datasets
import numpy as np
import pyarrow as pa
import torch
from jaxtyping import Bool, Float, Int

from tokenweight.data.columns import COLUMNS
from tokenweight.data.contents import Contents
from tokenweight.data.dataset import check_scores, choose_scores, load_rows, open_rows
from tokenweight.data.shards import check_name, finish_dataset, new_shard, unlock, verify
from tokenweight.data.stores import local_folder, row_lengths
from tokenweight.method import SCORES, Weighting, check_finite, document_positions, prediction_mask
from tokenweight.models import numbered_from, score_columns
from tokenweight.records import environment, new_folder, read_json, write_json, writing_to

_ROWS_PER_BATCH = 16
"""Rows held in memory at once."""
_TINY = 1e-30
"""In place of a weight of 0, where 0 would mean that the token is not predicted: float32 and bfloat16 can represent
it, and it is negligible in any sum of losses."""


SHARD_TOKENS = 1 << 24
"""Tokens of a Parquet file, about."""
COPIES = ("parquet", "jsonl")
"""Formats of `export_rows`."""


class WeighedRow(NamedTuple):
    """One row, or one document of it, with what a loss needs."""

    number: int
    """Number of the row, from 0."""
    tokens: Int[np.ndarray, " seq"]
    weights: Float[np.ndarray, " seq"]
    """0 where no token is predicted."""
    mask: Bool[np.ndarray, " seq"]
    """True where a token is predicted and counts."""
    positions: Int[np.ndarray, " seq"] | None

    @property
    def labels(self) -> Int[np.ndarray, " seq"]:
        """The tokens, -100 where none is predicted."""
        return np.where(self.mask, self.tokens, np.int32(-100))


@dataclass
class ExportSummary:
    """Counts of what was written, in rows of the new data set and in tokens."""

    rows: int = 0
    tokens: int = 0
    predicted: int = 0
    sum_weights: float = 0.0
    left_out: int = 0
    """Documents in which no token is predicted, where each document gets a row of its own."""

    def __str__(self) -> str:
        mean = self.sum_weights / max(1, self.predicted)
        left_out = f"; {self.left_out:,} documents left out, in which none is" if self.left_out else ""
        predicted = f"{self.predicted:,} of them predicted, with a mean weight of {mean:.4g}"
        return f"{self.rows:,} rows, {self.tokens:,} tokens, {predicted}{left_out}"


def export_weights(
    folder: str | os.PathLike[str],
    weighting: Weighting,
    out: str | os.PathLike[str],
    *,
    format: str,
    size: int | None = None,
) -> ExportSummary:
    """Weigh the rows of a scored folder and write them to the new folder `out`, made whole or not at all.

    `out` opens with `datasets.load_from_disk`, or as the Arrow file `data.arrow` in it. `weights.json` beside it says
    which scores and which weighting made the weights.

    Args:
        folder: scored with the long losses, and with what else the weighting uses.
        format: hf, trl, llamafactory, ms-swift or tinker: docs/data.md says how each of them uses the weights.
        size: size of the short context; by default the only one that is stored.

    Raises:
        ValueError: if `out` exists, the format is unknown, a column is missing, a loss or weight is not finite, or the
            format cannot carry what a row holds; for a weighting that keeps a history, and for one that compares
            a reference model with losses that are comparable with each other only.
    """
    out = Path(out)
    if format not in _FORMATS:
        raise ValueError(f"format {format}: expected one of {', '.join(_FORMATS)}")
    check_name(out)
    if out.exists():
        raise ValueError(f"out {out}: exists already; name a new folder")
    if weighting.history:
        raise ValueError(f"weighting {weighting}: keeps a history of training: expected one without")
    needed = score_columns(weighting, "scorer")
    rows, provenance = choose_scores(load_rows(folder), folder, size=size, needed=needed)
    check_scores(weighting, provenance, folder)
    verify(folder)
    summary = ExportSummary()
    with new_folder(out) as part:
        _write(part, _count(weigh_rows(rows, weighting), _FORMATS[format], summary))
        note = {
            "format": format,
            "weighting": str(weighting),
            "context": provenance.get("context"),
            **vars(summary),
        }
        write_json(part / "weights.json", {**note, "scores": provenance, "environment": environment()})
    return summary


def export_rows(folder: str | os.PathLike[str], out: str | os.PathLike[str], *, format: str) -> Contents:
    """Write the rows of a folder, with all of their columns, to the new folder `out`, made whole or not at all.

    `scores.json` or `rows.json`, which say where they are from, are written beside them. All commands can read the
    Parquet files again; in JSON lines, `rows.jsonl`, a float32 is as short as possible, and NaN is null.

    Args:
        folder: a folder of scored rows, or of rows without scores.
        format: parquet or jsonl.

    Raises:
        ValueError: if `out` exists, the format is unknown, or the rows are damaged.
    """
    out, folder = Path(out), Path(folder)
    if format not in COPIES:
        raise ValueError(f"format {format}: expected one of {', '.join(COPIES)}")
    if out.suffix == f".{format}":
        raise ValueError(f"out {out}: a folder is written, with files of that suffix in it: expected a name without it")
    check_name(out)
    if out.exists():
        raise ValueError(f"out {out}: exists already; name a new folder")
    folder = local_folder(folder)
    rows, contents = open_rows(folder)
    verify(folder)
    names = [name for name in ("scores", "rows") if (folder / f"{name}.json").is_file()]
    notes = {name: read_json(folder / f"{name}.json") for name in names}
    with new_folder(out) as part:
        for name, note in notes.items():
            write_json(part / f"{name}.json", {**note, "format": format})
        if format == "jsonl":
            _write_lines(rows, part / "rows.jsonl")
        else:
            _write_parquet(rows, part, next(iter(notes), "data"))
    return contents


def _write_parquet(rows: datasets.Dataset, folder: Path, name: str) -> None:
    numbers = (np.cumsum(row_lengths(rows)) - 1) // SHARD_TOKENS
    shards = np.split(np.arange(len(rows)), np.flatnonzero(np.diff(numbers)) + 1)
    files = [f"{name}-{number:05d}.parquet" for number in range(len(shards))]
    for file, shard in zip(files, shards):
        with new_shard(folder / file, rows.features.arrow_schema) as (written, _):
            for table in rows.select(shard).with_format("arrow").iter(_ROWS_PER_BATCH):
                written.write(table)
    finish_dataset(folder, files)
    unlock(folder)


def _write_lines(rows: datasets.Dataset, path: Path) -> None:
    with writing_to(path.parent), path.open("w", encoding="utf-8") as file:
        for row in rows:
            file.write(json.dumps({name: _of_json(value) for name, value in row.items()}, ensure_ascii=False) + "\n")


def _of_json(value: Any) -> Any:
    """A value of a column as JSON has it; a float32 as the shortest number that is read as the same."""
    if isinstance(value, np.ndarray):
        return [_of_json(one) for one in (value if value.dtype == np.float32 else value.tolist())]
    if isinstance(value, dict):
        return {name: _of_json(one) for name, one in value.items()}
    if isinstance(value, list):
        return [_of_json(one) for one in value]
    if isinstance(value, np.float32):
        value = float(str(value))
    if isinstance(value, np.generic):
        value = value.item()
    return None if isinstance(value, float) and not np.isfinite(value) else value


def weigh_rows(rows: datasets.Dataset, weighting: Weighting) -> Iterator[WeighedRow]:
    """Weigh rows that hold `input_ids` and the scores that weights need, one at a time.

    Args:
        rows: in numpy format; `position_ids` and `labels` say, if they are there, which tokens are predicted.

    Raises:
        ValueError: naming a row in which a loss or weight is not finite, or whose labels are not its tokens: the losses
            are those of the tokens.
    """
    scores = [name for name in SCORES if name in score_columns(weighting, "scorer")]
    names = [*scores, *(name for name in COLUMNS if name in rows.column_names)]
    for number, row in enumerate(rows.select_columns(names)):
        tokens = row["input_ids"]
        columns = {name: torch.as_tensor(np.array(row[name]))[None] for name in names}
        mask = prediction_mask(columns.get("labels", columns["input_ids"]), columns.get("position_ids"))
        if "labels" in columns and (differs := mask & (columns["labels"] != columns["input_ids"])).any():
            position = int(differs.nonzero()[0, 1])
            raise ValueError(f"row {number}: label and token {position} differ: expected the token, or -100")
        for name in scores:
            with numbered_from(number):
                check_finite({name: columns[name]}, mask)
        long = columns.get("long_nll", torch.zeros(mask.shape))  # not read, where it was not asked for
        positions = document_positions(columns["input_ids"], columns.get("position_ids"))
        used: dict[str, Any] = {**{name: columns.get(name) for name in SCORES}, "positions": positions}
        try:
            weights = weighting(long, columns.get("short_nll", long), mask, **used).float()
        except ValueError as error:  # which counts the rows of its batch
            raise ValueError(f"row {number}, weighed alone: {error}") from None
        tokens = tokens.astype(np.int32)
        yield WeighedRow(number, tokens, weights[0].numpy(), mask[0].numpy(), row.get("position_ids"))


def _documents(row: WeighedRow) -> list[WeighedRow]:
    """The documents of a row, for a format that does not know positions."""
    if row.positions is None:
        return [row]
    starts = np.flatnonzero(row.positions == 0)
    ends = [*starts[1:], len(row.tokens)]
    counted = [np.arange(end - start) for start, end in zip(starts, ends)]
    if not np.array_equal(row.positions, np.concatenate([*counted, np.arange(0)])):
        raise ValueError(f"row {row.number}: position_ids skip positions, which only --format hf can carry")
    return [
        WeighedRow(row.number, row.tokens[start:end], row.weights[start:end], row.mask[start:end], None)
        for start, end in zip(starts, ends)
    ]


def _hf(row: WeighedRow) -> dict[str, Any]:
    columns = {"input_ids": row.tokens, "labels": row.labels, "loss_weights": row.weights}
    return columns if row.positions is None else {**columns, "position_ids": row.positions.astype(np.int32)}


def _trl(row: WeighedRow) -> dict[str, Any]:
    seq_lengths = [len(document.tokens) for document in _documents(row)]
    return {**_hf(row._replace(positions=None)), "seq_lengths": seq_lengths}


def _ms_swift(document: WeighedRow) -> dict[str, Any]:
    if (document.weights < 0).any():
        raise ValueError(f"row {document.number} has a negative weight, which ms-swift takes for: not predicted")
    loss_scale = np.where(document.mask, document.weights.clip(min=_TINY), np.float32(0))
    content = {"token_ids": document.tokens, "loss_scale": loss_scale}
    return {"messages": [{"role": "assistant", "content": content}], "lengths": len(document.tokens)}


def _tinker(document: WeighedRow) -> dict[str, Any]:
    tokens = document.tokens
    return {"model_input": tokens[:-1], "target_tokens": tokens[1:], "weights": document.weights[1:]}


class _Format(NamedTuple):
    columns: Callable[[WeighedRow], dict[str, Any]]
    splits: bool
    """Whether each document gets a row of its own: the tool does not read positions."""


_FORMATS = {
    "hf": _Format(_hf, False),
    "trl": _Format(_trl, False),
    "llamafactory": _Format(_hf, True),
    "ms-swift": _Format(_ms_swift, True),
    "tinker": _Format(_tinker, True),
}
_INTS, _FLOATS = pa.list_(pa.int32()), pa.list_(pa.float32())
_CONTENT = pa.struct({"token_ids": _INTS, "loss_scale": _FLOATS})
_TYPES = {
    **dict.fromkeys(["input_ids", "labels", "position_ids", "seq_lengths", "model_input", "target_tokens"], _INTS),
    **dict.fromkeys(["loss_weights", "weights"], _FLOATS),
    "messages": pa.list_(pa.struct({"role": pa.string(), "content": _CONTENT})),
    "lengths": pa.int32(),
}


def _count(rows: Iterator[WeighedRow], format: _Format, summary: ExportSummary) -> Iterator[dict[str, Any]]:
    """The columns of each row that is written, counted in `summary`."""
    for row in rows:
        for part in _documents(row) if format.splits else [row]:
            if format.splits and not part.mask.any():
                summary.left_out += 1
                continue
            summary.rows += 1
            summary.tokens += len(part.tokens)
            summary.predicted += int(part.mask.sum())
            summary.sum_weights += float(part.weights.sum(dtype=np.float64))
            yield format.columns(part)


def _write(folder: Path, rows: Iterator[dict[str, Any]]) -> None:
    """Make `folder` a data set of rows that have the columns of the first one."""
    batch = list(itertools.islice(rows, _ROWS_PER_BATCH))
    if not batch:
        raise ValueError("no token is predicted in any row: expected labels other than -100")
    schema = pa.schema([(name, _TYPES[name]) for name in batch[0]])
    with new_shard(folder / "data.arrow", schema) as (file, _):
        while batch:
            file.write(pa.Table.from_pylist(batch, schema=schema))
            batch = list(itertools.islice(rows, _ROWS_PER_BATCH))
    finish_dataset(folder, ["data.arrow"])
    unlock(folder)
