"""Scores on disk: rows with their short losses, in shards, with a note of who scored them and how."""

import contextlib
import itertools
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import datasets
import numpy as np
import pyarrow as pa
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from tokenweight.causal import prediction_mask
from tokenweight.model import (
    find_tokenizer,
    load_model,
    refuse_length,
    refuse_tokenizer,
    refuse_tokens,
    token_nll,
)
from tokenweight.records import environment, read_json, read_provenance, write_json
from tokenweight.rows import ArrowFile, finish_dataset, load_rows, row_lengths, rows_fingerprint, token_range
from tokenweight.scoring import Scorer, ShortContext

_NUMBERS = ("input_ids", "position_ids", "labels", "short_nll", "long_nll")
SHARD_TOKENS = 1 << 20
"""Tokens of a shard: what is scored again, at most, after an interruption."""


@dataclass
class ScoreSummary:
    """What was scored: in all shards, and by this call."""

    rows: int = 0
    tokens: int = 0
    new_tokens: int = 0
    """Scored by this call; the others were there."""
    seconds: float = 0.0

    def __str__(self) -> str:
        rate = f", {self.new_tokens / self.seconds:,.0f} tokens/s" if self.new_tokens else ""
        return f"{self.rows:,} rows, {self.tokens:,} tokens, {self.new_tokens:,} of them scored now{rate}"


def score_folder(
    folder: str | os.PathLike[str],
    model_name: str,
    context: ShortContext,
    out: str | os.PathLike[str],
    *,
    dtype: str = "auto",
    with_long: bool = False,
    max_tokens: int = 32768,
    progress: Callable[[int, int], object] = lambda done, total: None,
) -> ScoreSummary:
    """Score a folder of rows with the model of that name, on the GPU if there is one. See `score_rows`.

    Raises:
        ValueError: if rows, tokenizer, model and windows do not fit, before any work starts.
    """
    rows = load_rows(folder)
    made = read_provenance(folder)
    longest = int(row_lengths(rows).max(initial=0))
    if context.size >= longest:
        raise ValueError(
            f"--size {context.size}: the rows hold {longest} tokens: no token would have a shorter context"
        )
    tokenizer = find_tokenizer(model_name)
    refuse_tokenizer(tokenizer, model_name, made, folder)
    model = load_model(model_name, dtype=dtype).to("cuda" if torch.cuda.is_available() else "cpu")
    refuse_tokens(model.config, *token_range(rows), folder)
    refuse_length(
        model.config, longest if with_long else context.size, "--long: rows" if with_long else "--size: windows"
    )
    bos = None if tokenizer is None else tokenizer.bos_token_id
    provenance = {
        "model": model_name,
        "dtype": str(model.dtype).removeprefix("torch."),
        "rope_parameters": getattr(model.config, "rope_parameters", None),
        "tokenizer": made.get("tokenizer"),
        "tokenizer_fingerprint": made.get("tokenizer_fingerprint"),
        "size": context.size,
        "stride": context.stride,
        "bos": bos,
        "rows": str(folder),
        "rows_fingerprint": rows_fingerprint(rows),
        "environment": environment(),
    }
    scorer = Scorer(model, context, bos=bos, max_tokens=max_tokens)
    return score_rows(rows, scorer, out, provenance=provenance, with_long=with_long, progress=progress)


def score_rows(
    rows: datasets.Dataset,
    scorer: Scorer,
    out: str | os.PathLike[str],
    *,
    provenance: dict[str, Any],
    with_long: bool = False,
    progress: Callable[[int, int], object] = lambda done, total: None,
) -> ScoreSummary:
    """Write `rows` with a column `short_nll` (nats, float32, token-aligned) to the folder `out`.

    Shards are written under a temporary name and renamed. Called again with the same provenance, it scores only the
    shards that are missing; the folder becomes a data set, which `datasets.load_from_disk` opens, when the last one is
    there.

    Args:
        rows: with `input_ids` and, where documents are packed, `position_ids`; all other columns are kept.
        provenance: written to `scores.json`: whatever the scores depend on.
        with_long: also write `long_nll`, the losses of the scoring model with the whole row as context.
        progress: called after each batch with its number of tokens, and that of all rows.

    Raises:
        ValueError: if `out` holds scores of another provenance, naming what differs; if a loss is not finite.
    """
    out = Path(out)
    names = ("short_nll", "long_nll")[: 1 + with_long]
    for name in names:
        if name in rows.column_names:
            raise ValueError(f"the rows have a column {name} already: score the rows they were made from")
    added = {name: datasets.List(datasets.Value("float32")) for name in names}
    schema = datasets.Features({**rows.features, **added}).arrow_schema
    _claim(out, {**provenance, "long": with_long})
    lengths = row_lengths(rows)
    shards = _shards(lengths)
    files = [f"scores-{number:05d}-of-{len(shards):05d}.arrow" for number in range(len(shards))]
    summary, begun = ScoreSummary(rows=len(rows), tokens=int(lengths.sum())), time.perf_counter()
    for file, shard in zip(files, shards):
        if (out / file).is_file():
            continue
        with _shard_file(out / file, schema) as written:
            for batch in _batches(shard, lengths, scorer.max_tokens):
                written.write_table(_scored(rows, batch, scorer, names))
                num_tokens = int(lengths[batch].sum())
                summary.new_tokens += num_tokens
                progress(num_tokens, summary.tokens)
    summary.seconds = time.perf_counter() - begun
    finish_dataset(out, files)
    return summary


def load_scores(folder: str | os.PathLike[str]) -> tuple[datasets.Dataset, dict[str, Any]]:
    """Open a scored folder: its rows, and its provenance (empty, if it was not made by `score_rows`).

    Raises:
        ValueError: if it is not finished or holds no scores.
    """
    rows = load_rows(folder)
    if "short_nll" not in rows.column_names:
        raise ValueError(f"{folder} has no column short_nll: score it with `tokenweight score {folder}`")
    path = Path(folder) / "scores.json"
    return rows, read_json(path) if path.is_file() else {}


class ScoredRow(NamedTuple):
    """One row of a scored folder, as a batch of one, with what reads it."""

    tokens: Int[Tensor, "1 seq"]
    long_nll: Float[Tensor, "1 seq"]
    short_nll: Float[Tensor, "1 seq"]
    mask: Bool[Tensor, "1 seq"]
    tokenizer: PreTrainedTokenizerBase | None


def read_row(folder: str | os.PathLike[str], number: int, model_name: str | None = None) -> ScoredRow:
    """Read one row of a scored folder, with its long losses: stored ones, else those of a model.

    Args:
        number: of the row, from 0.
        model_name: gives the long losses if they are not stored, and the tokenizer; by default the scoring model.

    Raises:
        ValueError: if there is no such row, or no model is named where one is needed.
    """
    rows, provenance = load_scores(folder)
    if not 0 <= number < len(rows):
        raise ValueError(f"--row {number}: {folder} has rows 0 to {len(rows) - 1}")
    columns = {name: torch.as_tensor(np.array(value))[None] for name, value in rows[number].items() if name in _NUMBERS}
    tokens, positions = columns["input_ids"].long(), columns.get("position_ids")
    name = model_name or provenance.get("model")
    tokenizer = None if name is None else find_tokenizer(name)
    refuse_tokenizer(tokenizer, str(name), provenance, folder)
    long_nll = None if model_name else columns.get("long_nll")
    if long_nll is None:
        if name is None:
            raise ValueError(f"--model: {folder} stores no long losses and does not say which model scored it")
        long_nll = token_nll(load_model(name, dtype=provenance.get("dtype", "auto")), tokens, positions)
    mask = prediction_mask(columns.get("labels", tokens), positions)
    return ScoredRow(tokens, long_nll.float(), columns["short_nll"].float(), mask, tokenizer)


def _claim(out: Path, provenance: dict[str, Any]) -> None:
    """Note the provenance in a new folder, or compare it with the one that is there."""
    path = out / "scores.json"
    if not path.is_file():
        if out.exists() and any(out.iterdir()):
            raise ValueError(f"--out {out}: exists and holds no scores; name a new folder")
        out.mkdir(parents=True, exist_ok=True)
        write_json(path, provenance)
        return
    there = read_json(path)
    # The rows are compared by their fingerprint, not by the path that led to them.
    ours = {key: value for key, value in provenance.items() if key not in ("environment", "rows")}
    differences = [
        f"{key} is {there.get(key)!r} there, {value!r} now" for key, value in ours.items() if there.get(key) != value
    ]
    if differences:
        raise ValueError(f"--out {out}: holds scores made otherwise ({'; '.join(differences)}); name a new folder")


@contextlib.contextmanager
def _shard_file(path: Path, schema: pa.Schema) -> Iterator[ArrowFile]:
    """A shard that gets its name when it is whole, and leaves nothing behind otherwise."""
    unfinished = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with ArrowFile(unfinished, schema) as written:
            yield written
        os.replace(unfinished, path)
    finally:
        unfinished.unlink(missing_ok=True)


def _shards(lengths: np.ndarray) -> list[range]:
    """Consecutive rows of about `SHARD_TOKENS` tokens; the same for every call, whoever makes it."""
    step = max(1, SHARD_TOKENS // max(1, int(lengths[0])))
    return [range(start, min(start + step, len(lengths))) for start in range(0, len(lengths), step)]


def _batches(shard: range, lengths: np.ndarray, max_tokens: int) -> Iterator[list[int]]:
    """Consecutive rows of one length, up to `max_tokens` tokens together."""
    for length, group in itertools.groupby(shard, key=lambda row: int(lengths[row])):
        numbers, size = list(group), max(1, max_tokens // max(1, length))
        yield from (numbers[start : start + size] for start in range(0, len(numbers), size))


def _scored(rows: datasets.Dataset, batch: list[int], scorer: Scorer, names: tuple[str, ...]) -> pa.Table:
    """The rows of a batch as they are, with the columns `names` appended."""
    table = rows.with_format("arrow")[batch]

    def column(name: str) -> Tensor:
        values = table.column(name).combine_chunks().flatten().to_numpy(zero_copy_only=False)
        return torch.from_numpy(values.reshape(len(batch), -1).astype(np.int64)).to(scorer.model.device)

    tokens = column("input_ids")
    positions = column("position_ids") if "position_ids" in table.column_names else None
    losses = [scorer(tokens, position_ids=positions, first_row=batch[0])]
    if "long_nll" in names:
        losses.append(token_nll(scorer.model, tokens, positions))
    for name, values in zip(names, losses):
        table = table.append_column(name, pa.array(list(values.float().cpu().numpy()), pa.list_(pa.float32())))
    return table
