"""Scoring a folder of rows with a model by its name: what must fit, and the provenance of both."""

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import datasets
from transformers import PreTrainedTokenizerBase

from tokenweight.data.contents import Contents
from tokenweight.data.dataset import holds_pieces, open_rows, read_provenance
from tokenweight.data.row_scorer import RowScorer
from tokenweight.data.score.write import ScoreSummary, score_rows
from tokenweight.data.shards import Verifier
from tokenweight.data.stores import remote_url, row_lengths
from tokenweight.data.tokenize import text_tokens
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
    own_device,
    predicts_one_more,
    text_prefix,
)
from tokenweight.records import environment


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
        folder: one that `prepare` wrote, or any other of `datasets` or of Parquet files with a column `input_ids`.
        model_name: a model, whose tokenizer may be another (`AlignedScorer`); or count, which needs none, as in
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
    """Scorer, rows and options of a call."""

    name: str
    """Name of the scorer."""
    folder: str | os.PathLike[str]
    rows: datasets.Dataset
    contents: Contents
    made: dict[str, Any]
    """The provenance of the rows."""
    contexts: Sequence[ShortContext]
    max_tokens: int
    options: dict[str, Any]
    """Options of `RowScorer`, for a model with the tokenizer of the rows."""
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
    """The role of a model that is not the scorer."""
    return "reference" if options["as_reference"] else None if options["top_k"] is None else "teacher"


def _beside(provenance: dict[str, Any], made: dict[str, Any], role: str | None) -> dict[str, Any]:
    """The provenance of all scores: those of a reference or teacher are kept beside those that are there, and vice
    versa."""
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
        alone = holds_pieces(task.made) and predicts_one_more(config)
        check_length(config, (task.contents.longest or 0) - alone, "long: rows")
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
