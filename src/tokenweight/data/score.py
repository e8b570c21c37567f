"""Scores on disk: rows with their short losses, in shards, with a note of who scored them and how."""

import logging
import os
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from transformers import PreTrainedTokenizerBase

from tokenweight.data.columns import BESIDE, COLUMNS, TRANSLATED, is_score
from tokenweight.data.contents import Contents
from tokenweight.data.dataset import open_rows, read_provenance, row_lengths
from tokenweight.data.row_scorer import RowScorer
from tokenweight.data.shards import (
    Verifier,
    check_format,
    check_name,
    finish_dataset,
    locked,
    new_shard,
    read_note,
    shard_lease,
    unlock,
)
from tokenweight.data.stores import remote_url
from tokenweight.data.tokenize import text_prefix, text_tokens
from tokenweight.method import ScoreWeighting, ShortContext, divergence_kind
from tokenweight.models import (
    AlignedScorer,
    check_length,
    check_stale_rows,
    check_tokenizer,
    check_tokens,
    config_fingerprint,
    count_scorer,
    find_tokenizer,
    identity,
    load_model,
    load_tokenizer,
    numbered_from,
    own_device,
)
from tokenweight.records import (
    Lease,
    LeaseLost,
    differences,
    environment,
    make_folder,
    pauses,
    read_json,
    write_json,
)

logger = logging.getLogger(__name__)
SHARD_TOKENS = 1 << 20
"""Tokens of a shard: what is scored again, at most, after an interruption. More where there would be `MAX_SHARDS`."""
MAX_SHARDS = 1000


@dataclass
class ScoreSummary:
    """What was scored: in all shards that are there, and by this call."""

    rows: int = 0
    tokens: int = 0
    new_tokens: int = 0
    """Scored by this call; the others were there."""
    seconds: float = 0.0
    shards: int = 0
    missing_shards: int = 0
    """Not there yet: the shares of other processes."""
    differences: dict[str, list[float]] = field(default_factory=dict)
    """With long losses: `RowScorer.score` of all rows, for each context by the suffix of its columns."""
    groups: list[int] = field(default_factory=lambda: [0, 0])
    """Of a scorer with another tokenizer: `RowScorer.groups` of all rows."""

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


def score_folder(
    folder: str | os.PathLike[str],
    model_name: str,
    contexts: Sequence[ShortContext] | None,
    out: str | os.PathLike[str],
    *,
    revision: str | None = None,
    dtype: str = "auto",
    attn_implementation: str | None = None,
    with_long: bool = False,
    divergence: ScoreWeighting | None = None,
    as_reference: bool = False,
    top_k: int | None = None,
    max_tokens: int = 32768,
    shard_tokens: int | None = None,
    format: str = "arrow",
    share: tuple[int, int] = (0, 1),
    progress: Callable[[int, int], object] = lambda done, total: None,
    announce: Callable[[str], object] = lambda line: None,
) -> ScoreSummary:
    """Score a folder of rows with the model of that name, on the GPU if there is one. See `score_rows`.

    Args:
        folder: that `prepare` wrote, or any other of `datasets` or of Parquet files with a column `input_ids`.
        model_name: of a model, whose tokenizer may be another (`AlignedScorer`); or count, which needs none, as in
            count:order=4 (`CountScorer`).
        contexts: the short contexts; None for one, a quarter of the longest row, which is announced.
        divergence: as for `RowScorer`, and so are `as_reference` and `top_k`, of rows that may be scored already.

    Raises:
        ValueError: if rows, tokenizer, model and windows do not fit, before any work starts.
    """
    (rows, contents), made = open_rows(folder), read_provenance(folder)
    role = _role({"as_reference": as_reference, "top_k": top_k})
    if role is not None:
        sizes = ",".join(str(context.size) for context in contexts or ())
        unused = {"size": sizes, "long": with_long, "divergence": divergence and divergence_kind(divergence)}
        _refuse(f"a {role} reads whole sequences", unused)
    contexts = () if role is not None else _contexts(contexts, contents.longest or 0, announce)
    options: dict[str, Any] = {"divergence": divergence, "as_reference": as_reference, "with_long": with_long}
    options |= {"top_k": top_k}
    loading: dict[str, Any] = {"revision": revision, "attn_implementation": attn_implementation, "dtype": dtype}
    task = _Task(model_name, folder, rows, contents, made, contexts, max_tokens, options, loading)
    scorer, provenance = _by_model(task, announce) if count_scorer(model_name) is None else _by_counts(task)
    provenance = _beside(provenance if top_k is None else {**provenance, "top_k": top_k}, made, role)
    source = remote_url(folder) or str(folder)
    provenance |= {"rows": source, "rows_fingerprint": contents.fingerprint, "environment": environment()}
    told: dict[str, Any] = {"progress": progress, "announce": announce, "check": Verifier(folder)}
    shards: dict[str, Any] = {"shard_tokens": shard_tokens, "format": format, "share": share}
    return score_rows(rows, scorer, out, provenance=provenance, **shards, **told)


@dataclass(frozen=True)
class _Task:
    """Who scores what, and how."""

    name: str
    """Of the scorer."""
    folder: str | os.PathLike[str]
    rows: datasets.Dataset
    contents: Contents
    made: dict[str, Any]
    """The provenance of the rows."""
    contexts: Sequence[ShortContext]
    max_tokens: int
    options: dict[str, Any]
    """Of `RowScorer`, for a model with the tokenizer of the rows."""
    loading: dict[str, Any]
    """Arguments of `load_model`."""


def _by_counts(task: _Task) -> tuple[RowScorer, dict[str, Any]]:
    """The scorer of rows by counts, and its provenance."""
    name, counts = task.name, count_scorer(task.name)
    assert counts is not None
    dtype, of = task.loading["dtype"], task.options["divergence"]
    unused = {**task.loading, "dtype": dtype != "auto" and dtype, "as": _role(task.options)}
    _refuse(f"{name} scores without a model", unused)
    if of is not None and (kind := divergence_kind(of)) != counts.provenance.get("divergence"):
        raise ValueError(f"divergence {kind}: {name} stores kl, and no other: leave it out")
    counts.check_tokens(task.contents.token_range[1], task.folder)
    provenance = {**counts.provenance, **_tokenized_by(task.made)}
    return RowScorer(counts, task.contexts, max_tokens=task.max_tokens), provenance


def _by_model(task: _Task, announce: Callable[[str], object]) -> tuple[RowScorer, dict[str, Any]]:
    """The scorer of rows by a model, and its provenance."""
    name, folder, made, options, max_tokens = task.name, task.folder, task.made, task.options, task.max_tokens
    of = options["divergence"]
    tokenizer = find_tokenizer(name, revision=task.loading["revision"])
    of_rows = _other_tokenizer(tokenizer, name, made, folder)
    if of_rows is not None:
        other = f"{name} has another tokenizer than {folder}"
        _refuse(other, {"as": _role(options), "divergence": of and divergence_kind(of)})
        announce(f"{other}: their tokens are aligned by bytes")
    model = load_model(name, **task.loading).to(own_device())
    if tokenizer is None or of_rows is None:
        whole = options["with_long"] or _role(options) is not None or of is not None
        _check_fit(model.config, task, with_long=whole)
        prefix = text_prefix(tokenizer, made)
        scorer = RowScorer(model, task.contexts, prefix=prefix, max_tokens=max_tokens, **options)
        kind = {} if of is None else {"divergence": divergence_kind(of)}
        return scorer, {**_made_by(model, name, made, prefix), **kind}
    prefix = text_prefix(tokenizer, {})
    aligned = AlignedScorer(model, tokenizer, of_rows, max_tokens=max_tokens, tokenize=text_tokens, prefix=prefix)
    provenance = {**_made_by(model, name, made, aligned.prefix), **aligned.provenance}
    return RowScorer(aligned, task.contexts, max_tokens=max_tokens), provenance


def _role(options: dict[str, Any]) -> str | None:
    """What a model is, if it is not the scorer."""
    return "reference" if options["as_reference"] else None if options["top_k"] is None else "teacher"


def _beside(provenance: dict[str, Any], made: dict[str, Any], role: str | None) -> dict[str, Any]:
    """The provenance of all scores: those of a reference or teacher stand beside those that are there, and the other
    way round."""
    there: dict[str, Any] = {name: made[name] for name in ("reference", "teacher") if name in made}
    if role is None:
        return {**provenance, **there}
    return {**(made if _is_scored(made) else _tokenized_by(made)), **there, role: provenance}


def _is_scored(made: dict[str, Any]) -> bool:
    """Whether the provenance of rows is that of scores."""
    return "contexts" in made


def _other_tokenizer(
    tokenizer: PreTrainedTokenizerBase | None, name: str, made: dict[str, Any], folder: str | os.PathLike[str]
) -> PreTrainedTokenizerBase | None:
    """The tokenizer of the rows, if that of the model is another; None if it is the same, or one of them is unknown."""
    try:
        check_tokenizer(tokenizer, name, made, folder)
        return None
    except ValueError as error:
        try:
            of_rows = load_tokenizer(made["tokenizer"])
        except ValueError as reason:
            raise ValueError(f"{error}, or make that of the rows available to align the two ({reason})") from None
    check_tokenizer(of_rows, made["tokenizer"], made, folder)
    return of_rows


def _check_fit(config: Any, task: _Task, *, with_long: bool) -> None:
    """Raise a ValueError if a model cannot read the rows, or windows of them."""
    check_tokens(config, *task.contents.token_range, task.folder)
    if with_long:
        check_length(config, task.contents.longest or 0, "long: rows")
    else:
        check_length(config, max(context.size for context in task.contexts), "size: windows")
    check_stale_rows(config, row_lengths(task.rows).tolist() if with_long else [])


def _refuse(why: str, given: dict[str, Any]) -> None:
    """Raise a ValueError for an option that a scorer does not have."""
    for option, value in given.items():
        if value:
            raise ValueError(f"{option} {value}: {why}: leave it out")


def _made_by(model: Any, name: str, made: dict[str, Any], prefix: list[int]) -> dict[str, Any]:
    """The provenance of scores as far as the model, and what made the rows, decide it."""
    return {
        **identity(model, name),
        "config_fingerprint": config_fingerprint(model.config),
        **_tokenized_by(made),
        "prefix": prefix,
    }


def _tokenized_by(made: dict[str, Any]) -> dict[str, Any]:
    """The tokenizer of rows, as far as it is known."""
    return {name: made.get(name) for name in ("tokenizer", "tokenizer_fingerprint")}


def _contexts(
    given: Sequence[ShortContext] | None, longest: int, announce: Callable[[str], object]
) -> Sequence[ShortContext]:
    """The contexts of rows of up to `longest` tokens. ValueError if no token would have a shorter one."""
    if given is None:
        context = ShortContext.of(longest)
        announce(f"size {context.size}, a quarter of the longest sequence, and stride {context.stride}")
        return [context]
    ShortContext.of(longest, max(context.size for context in given))
    return given


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
    are damaged; a shard that another process is at is left to it. The folder becomes a data set, which
    `datasets.load_from_disk` opens, or of Parquet files, when the last shard is there.

    Args:
        rows: with `input_ids` and, where documents are packed, `position_ids`; all other columns are kept.
        provenance: written to `scores.json`: whatever the scores depend on.
        shard_tokens: tokens of a shard, about; by default `SHARD_TOKENS`, or more, so that there are `MAX_SHARDS` at
            most.
        format: of the shards: arrow, which are mapped into memory, or parquet, which other tools read.
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
    """Score the shards that are neither there nor in a living process's hands, and return their number of tokens."""
    schema = datasets.Features({**rows.features, **scorer.features}).arrow_schema
    total, new, left = sum(int(lengths[shard].sum()) for _, shard in ours), 0, ours
    for _ in pauses():
        unknown = []  # those of processes on other hosts, until they are seen to live or to be dead
        for file, shard in left:
            with shard_lease(file) as lease:
                if not isinstance(lease, Lease) and not lease.alive and not file.is_file():
                    unknown.append((file, shard))
                elif not isinstance(lease, Lease) or _is_whole(file):  # another process is at it, or was
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
    """Say which shards are those of a share, and warn of a share that has none."""
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
    """Tokens of a shard, where they are not chosen."""
    return max(SHARD_TOKENS, int(lengths.sum()) // MAX_SHARDS)


def _shards(lengths: np.ndarray, shard_tokens: int) -> list[np.ndarray]:
    """Consecutive rows of about `shard_tokens` tokens; the same for every call, whoever makes it."""
    numbers = (np.cumsum(lengths) - 1) // shard_tokens
    return np.split(np.arange(len(lengths)), np.flatnonzero(np.diff(numbers)) + 1)


def _is_whole(file: Path) -> bool:
    """Whether a shard is there. A damaged one is named, and removed."""
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
    """The values of rows as Arrow; of tokens with several numbers each, `[seq, k]`, which Arrow does not read."""
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
