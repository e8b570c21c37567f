"""Losses by position, losses of the same tokens by context, and LongPPL, as sums over the tokens of each document."""

import itertools
from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import datasets
import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from transformers import PreTrainedModel

from tokenweight.data import key_tokens, row_tensors
from tokenweight.evaluate.comparison import Judge, Measure
from tokenweight.evaluate.intervals import Sums, document_sums, row_sums
from tokenweight.evaluate.settings import EvalPlan
from tokenweight.method import LongCE, ShortContext, document_positions
from tokenweight.models import ContrastScorer, Scorer, numbered_from

PAPER_CONTEXT = ShortContext(size=4096 + 1024, stride=1024)
"""The short context of LongPPL's authors, `trunc_len=4096, sliding_window=1024`: 4096 to 5119 tokens.

Their package begins to score at position 4096, not 5120, which changes nothing: the first window contains everything
before these tokens, so that their two losses are equal, and none of them is a key token."""

TOKEN_WEIGHTS = np.dtype([("key", "?"), ("soft", "<f4"), ("nll", "<f4")])
"""Per-token output of a judge of LongPPL: whether it is a key token, its weight min(p_long / p_short, 5), and its loss
with the full context."""

_WEIGHTED = {"longppl": "key", "longppl_soft": "soft"}
"""Metrics whose tokens are weighted by a judge, and the field of `TOKEN_WEIGHTS` with these weights."""


def position_edges(length: int, *, first: int = 256) -> list[int]:
    """Edges of bins that double in width: 0, first, 2 first, 4 first and so on, up to `length`.

    Raises:
        ValueError: if `first` is less than 1.
    """
    if first < 1:
        raise ValueError(f"first={first}: expected at least 1 token")
    edges = [0]
    while edges[-1] < length:
        edges.append(min(max(first, 2 * edges[-1]), length))
    return edges


def sums_by_position(
    nll: Float[Tensor, "rows seq"],
    mask: Bool[Tensor, "rows seq"],
    positions: Int[Tensor, "rows seq"],
    edges: Sequence[int],
) -> list[Sums]:
    """Sum the losses of each sequence at positions `[edges[0], edges[1])`, `[edges[1], edges[2])` and so on.

    With edges `[0, size]` this is the loss at short range, which shows a short-context regression.

    Args:
        nll: loss of each token in nats, token-aligned.
        mask: True where a token was predicted and counts (`prediction_mask`).
        positions: of each token in its document (`document_positions`).
        edges: in ascending order; tokens outside do not count.

    Example:
        >>> nll, mask = torch.tensor([[9.0, 1.0, 2.0, 3.0]]), torch.tensor([[False, True, True, True]])
        >>> [sums.mean for sums in sums_by_position(nll, mask, torch.arange(4)[None], [0, 2, 4])]
        [1.0, 2.5]
    """
    return [row_sums(nll, mask & (start <= positions) & (positions < stop)) for start, stop in pairwise(edges)]


def losses_by_context(
    scorers: Sequence[Scorer],
    tokens: Int[Tensor, "rows seq"],
    long_nll: Float[Tensor, "rows seq"],
    mask: Bool[Tensor, "rows seq"],
    position_ids: Int[Tensor, "rows seq"] | None = None,
) -> list[Sums]:
    """Sum the losses of the same tokens under each short context and under the full one, to measure context gain.

    The tokens are those at positions of at least the largest size in their documents, so that no context is shorter
    than nominal: with `ShortContext(size, size // 2)`, they see `size // 2` to `size - 1` tokens. Shorter documents
    have no such token. The gain from more context is the `paired_difference` of two entries.

    Args:
        scorers: one for each context, all of one model.
        tokens: sequences of one length.
        long_nll: losses with the full context, by the same model (`token_nll`).
        mask: True where a token was predicted and counts (`prediction_mask`).
        position_ids: a document begins where they restart at 0.

    Returns:
        Sums of each sequence, for each scorer and then for the full context.
    """
    longest = max(scorer.context.size for scorer in scorers)
    targets = mask & (document_positions(tokens, position_ids) >= longest)
    short_nll = [scorer(tokens, position_ids=position_ids, long_nll=long_nll) for scorer in scorers]
    return [row_sums(nll, targets) for nll in (*short_nll, long_nll)]


class Rows(NamedTuple):
    """The sequences to evaluate, and how to read them."""

    data: datasets.Dataset
    lengths: np.ndarray
    max_tokens: int = 32768
    """Tokens read in one forward pass."""
    prefix: Sequence[int] = ()
    """Special tokens at the start of a text, which windows start with too."""

    @property
    def has_documents(self) -> bool:
        """Whether each sequence is known to belong to one document; packed ones do not."""
        return "document" in self.data.column_names

    @property
    def documents(self) -> list[str]:
        """The name of each sequence's document, or a unique name if it has none."""
        if self.has_documents:
            return [str(name) for name in self.data["document"]]
        return [f"row {number}" for number in range(len(self.data))]

    @property
    def num_tokens(self) -> int:
        """Number of tokens in all rows."""
        return int(self.lengths.sum())

    def batches(self) -> Iterator[tuple[slice, slice]]:
        """Slices of consecutive sequences of one length, up to `max_tokens` each, and their slices of all tokens.

        A batch has one packed sequence, since not every attention kernel separates the documents of several.
        """
        packed = "position_ids" in self.data.column_names
        first = token = 0
        for length, group in itertools.groupby(self.lengths.tolist()):
            left, most = len(list(group)), 1 if packed else max(1, self.max_tokens // length)
            while left:
                num = min(left, most)
                yield slice(first, first + num), slice(token, token + num * length)
                first, token, left = first + num, token + num * length, left - num


def open_weights(path: Path, num_judges: int, num_tokens: int) -> np.memmap:
    """Create a file with a row of `TOKEN_WEIGHTS` for each judge and map it into memory, to be filled in."""
    return np.lib.format.open_memmap(path, mode="w+", dtype=TOKEN_WEIGHTS, shape=(num_judges, num_tokens))


class Judging(NamedTuple):
    """The source of the weights of LongPPL's tokens when a model is measured."""

    weights: np.ndarray
    """`TOKEN_WEIGHTS` of all tokens of all sequences, concatenated."""
    judge: Judge = "self"
    """Whether the measured model found them, or a third; with a `baseline`, both models did."""
    writes: bool = True
    """Whether the measured model fills in `weights` before they are used."""
    baseline: np.ndarray | None = None
    """Weights found by the baseline model."""


class _Batch(NamedTuple):
    """Sequences of one length, and their losses with the full context."""

    tokens: Int[Tensor, "rows seq"]
    positions: Int[Tensor, "rows seq"] | None
    mask: Bool[Tensor, "rows seq"]
    long_nll: Float[Tensor, "rows seq"]


def row_measures(
    model: PreTrainedModel,
    plan: EvalPlan,
    rows: Rows,
    judging: Judging,
    *,
    progress: Callable[[int], object] = lambda done: None,
) -> list[Measure]:
    """Compute every metric that follows from the model's losses on the sequences.

    Args:
        judging: source of the key tokens of LongPPL.
        progress: called with the number of tokens of each batch.
    """
    finder = _finder(model, plan, rows)
    scorers = [finder.with_context(ShortContext(size, size // 2)) for size in plan.sizes]
    found: dict[str, list[Sums]] = {}
    for numbers, place in rows.batches():
        with numbered_from(numbers.start):
            batch = _read(finder, rows.data[numbers])
            if judging.writes:
                judging.weights[place] = _token_weights(finder, batch)
            for key, sums in _batch_sums(batch, plan, scorers, judging.weights[place]).items():
                found.setdefault(key, []).append(sums)
        progress(place.stop - place.start)
    names = rows.documents
    documents = {key: document_sums(Sums(*map(torch.cat, zip(*sums))), names) for key, sums in found.items()}
    measures = [
        measure._replace(judge=judging.judge) if measure.name in _WEIGHTED else measure
        for measure in _named_measures(documents, plan)
    ]
    return measures if judging.baseline is None else pair_measures(measures, judging.weights, judging.baseline, rows)


def pair_measures(measures: Sequence[Measure], weights: np.ndarray, baseline: np.ndarray, rows: Rows) -> list[Measure]:
    """Let two models judge equally: the weight of a token is the mean of those from both models.

    Tokens that one model chose are those that it happened to predict well, so its mean over them is too low. Here the
    bias is the same for both: for two equally good models, the expected change is zero.

    Args:
        measures: metrics of one model.
        weights: the `TOKEN_WEIGHTS` that this model found.
        baseline: those that the baseline model found.
        rows: sequences that both read.

    Returns:
        The metrics, where LongPPL has these weights, and the sums of both models.
    """
    names, ends = rows.documents, rows.lengths.cumsum()
    sums: dict[str, list[list[float]]] = {name: [] for name in _WEIGHTED}
    for start, end in zip(ends - rows.lengths, ends):
        own, other = weights[start:end], baseline[start:end]
        for name, field in _WEIGHTED.items():
            mean = (own[field].astype(np.float64) + other[field]) / 2
            used = mean > 0
            losses = (judge["nll"][used].astype(np.float64) for judge in (own, other))
            sums[name].append([float(mean[used] @ nll) for nll in losses] + [float(mean.sum())])
    found = []
    for measure in measures:
        if measure.name in _WEIGHTED:
            own_total, other_total, number = torch.tensor(sums[measure.name], dtype=torch.float64).T
            total, num_tokens = document_sums(Sums(own_total, number), names)
            beside, _ = document_sums(Sums(other_total, number), names)
            measure = measure._replace(
                total=total.tolist(), num_tokens=num_tokens.tolist(), judge="pair", baseline_total=beside.tolist()
            )
        found.append(measure)
    return found


def find_key_tokens(
    model: PreTrainedModel | ContrastScorer,
    plan: EvalPlan,
    rows: Rows,
    weights: np.ndarray,
    *,
    progress: Callable[[int], object] = lambda done: None,
) -> None:
    """Let an evaluator, which is not measured itself, find the key tokens, and fill in `weights`, its `TOKEN_WEIGHTS`.

    Args:
        model: the evaluator; if its tokenizer is not that of the sequences, a wrapper that aligns the two.
    """
    finder = None if isinstance(model, ContrastScorer) else _finder(model, plan, rows)
    for numbers, place in rows.batches():
        with numbered_from(numbers.start):
            if finder is not None:
                weights[place] = _token_weights(finder, _read(finder, rows.data[numbers]))
            else:
                tokens, positions, mask = row_tensors(rows.data[numbers], torch.device("cpu"))
                found = model(tokens, ShortContext(*plan.long_context), position_ids=positions)
                weights[place] = _weights_of(found.long_nll, found.short_nll, mask)
        progress(place.stop - place.start)


def _finder(model: PreTrainedModel, plan: EvalPlan, rows: Rows) -> Scorer:
    """The scorer whose windows determine the key tokens."""
    return Scorer(model, ShortContext(*plan.long_context), prefix=rows.prefix, max_tokens=rows.max_tokens)


def _read(scorer: Scorer, batch: dict[str, Any]) -> _Batch:
    tokens, positions, mask = row_tensors(batch, scorer.model.device)
    return _Batch(tokens, positions, mask, scorer.long_nll(tokens, position_ids=positions))


def _token_weights(finder: Scorer, batch: _Batch) -> np.ndarray:
    """`TOKEN_WEIGHTS` of the tokens of a batch."""
    tokens, positions, mask, long_nll = batch
    return _weights_of(long_nll, finder(tokens, position_ids=positions, long_nll=long_nll), mask)


def _weights_of(
    long_nll: Float[Tensor, "rows seq"], short_nll: Float[Tensor, "rows seq"], mask: Bool[Tensor, "rows seq"]
) -> np.ndarray:
    """`TOKEN_WEIGHTS` of tokens, from their long and short losses."""
    weights = np.empty(long_nll.numel(), dtype=TOKEN_WEIGHTS)
    weights["key"] = key_tokens(long_nll, short_nll, mask).flatten().cpu().numpy()
    weights["soft"] = LongCE()(long_nll, short_nll, mask).flatten().float().cpu().numpy()
    weights["nll"] = long_nll.flatten().float().cpu().numpy()
    return weights


def _batch_sums(batch: _Batch, plan: EvalPlan, scorers: Sequence[Scorer], weights: np.ndarray) -> dict[str, Sums]:
    """The sums of each sequence, by the names of `_named_measures`."""
    tokens, positions, mask, long_nll = batch
    places = document_positions(tokens, positions)
    key, soft = (torch.from_numpy(np.ascontiguousarray(weights[name])).view_as(tokens) for name in ("key", "soft"))
    (short,) = sums_by_position(long_nll, mask, places, [0, plan.short])
    (beyond,) = sums_by_position(long_nll, mask, places, [plan.half, plan.length])
    *curve, full = losses_by_context(scorers, tokens, long_nll, mask, positions)
    bins = sums_by_position(long_nll, mask, places, plan.edges)
    return {
        "all": row_sums(long_nll, mask),
        "short_range": short,
        "beyond_half": beyond,
        "longppl": row_sums(long_nll, key),
        "longppl_soft": row_sums(long_nll, soft),
        "key_tokens": row_sums(key, mask),
        "context_full": full,
        **{f"context_{size}": sums for size, sums in zip(plan.sizes, curve)},
        **{f"position_{start}": sums for start, sums in zip(plan.edges, bins)},
    }


def _named_measures(found: dict[str, Sums], plan: EvalPlan) -> list[Measure]:
    """The metrics of the sequences, in the order of the tables."""

    def measure(
        name: str,
        group: str,
        sums: Sums | None = None,
        *,
        unit: str = "nats",
        better: str | None = "lower",
        summary: bool = False,
    ) -> Measure:
        total, num_tokens = found[name] if sums is None else sums
        return Measure(name, group, unit, better, total.tolist(), num_tokens.tolist(), summary)

    full, smallest = found["context_full"], plan.sizes[0]
    benefits = {size: Sums(found[f"context_{size}"].total - full.total, full.num_tokens) for size in plan.sizes}
    return [
        measure("beyond_half", "long", summary=True),
        *(
            measure(f"benefit_{size}", "long", sums, better="higher", summary=size == smallest)
            for size, sums in benefits.items()
        ),
        measure("context_full", "long"),
        measure("longppl", "long", unit="perplexity", summary=True),
        measure("longppl_soft", "long", unit="perplexity"),
        measure("key_tokens", "long", unit="share", better=None),
        measure("short_range", "short", summary=True),
        *(measure(f"context_{size}", "short") for size in plan.sizes),
        *(measure(f"position_{start}", "long" if start >= plan.half else "short") for start in plan.edges[:-1]),
        measure("all", "cost", summary=True),
    ]
