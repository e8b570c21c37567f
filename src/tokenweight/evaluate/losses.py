"""What training did: losses by position, and losses of the same tokens by context."""

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import datasets
import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from tokenweight.data import key_tokens, row_tensors
from tokenweight.evaluate.compare import GRID, Measure
from tokenweight.evaluate.intervals import Sums, document_sums, row_sums
from tokenweight.evaluate.probe_scoring import ask_probes, probe_measures
from tokenweight.evaluate.settings import Plan
from tokenweight.evaluate.suites import suite_measures
from tokenweight.method import LongCE, ShortContext, document_positions, prediction_mask
from tokenweight.models import Scorer, check_length, identity, load_model, numbered_from, own_device, token_nll


class PositionBin(NamedTuple):
    """Mean loss (nats) of the tokens at positions `[start, stop)` of their rows."""

    start: int
    stop: int
    nll: float
    num_tokens: int


def losses_by_position(
    nll: Float[Tensor, "rows seq"], mask: Bool[Tensor, "rows seq"], *, first: int = 256
) -> list[PositionBin]:
    """Mean loss in bins that double: `[0, first)`, `[first, 2 first)`, `[2 first, 4 first)` and so on.

    Args:
        nll: loss of each token, in nats, token-aligned.
        mask: True where a token was predicted and counts; bins without one are left out.
        first: tokens of the first bin.
    """
    edges = position_edges(nll.shape[1], first=first)
    columns = torch.arange(nll.shape[1], device=nll.device).expand(nll.shape)
    bins = zip(pairwise(edges), sums_by_position(nll, mask, columns, edges))
    return [
        PositionBin(start, stop, sums.mean, int(sums.num_tokens.sum()))
        for (start, stop), sums in bins
        if sums.num_tokens.any()
    ]


def position_edges(length: int, *, first: int = 256) -> list[int]:
    """Edges of bins that double: 0, first, 2 first, 4 first and so on, and at last `length`.

    Raises:
        ValueError: if `first` is not at least 1.
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
    """Losses of the tokens of each row at positions `[edges[0], edges[1])`, `[edges[1], edges[2])` and so on.

    With edges `[0, size]`, the size that of the short context, this is the loss at short range: what training with
    token weights may have cost. Rows shorter than `size` count there whole.

    Args:
        nll: loss of each token, in nats, token-aligned.
        mask: True where a token was predicted and counts (`prediction_mask`).
        positions: of each token in its document (`document_positions`).
        edges: rising; tokens outside them do not count.
    """
    return [row_sums(nll, mask & (start <= positions) & (positions < stop)) for start, stop in pairwise(edges)]


def losses_by_context(
    scorers: Sequence[Scorer],
    tokens: Int[Tensor, "rows seq"],
    long_nll: Float[Tensor, "rows seq"],
    mask: Bool[Tensor, "rows seq"],
    position_ids: Int[Tensor, "rows seq"] | None = None,
) -> list[Sums]:
    """Losses of the same tokens with short contexts and with all of it: what the model gains from a longer context.

    The tokens are those at positions of at least the largest size in their documents, so that every context is as
    short as it says: of a scorer with `ShortContext(size, size // 2)`, they see `size // 2` to `size - 1` tokens.
    Shorter documents have no such token. The gain of more context is `paired_difference` of two entries.

    Args:
        scorers: one for each context, all with one model.
        tokens: rows of one length.
        long_nll: losses with the whole context, by the same model (`token_nll`).
        mask: True where a token was predicted and counts (`prediction_mask`).
        position_ids: where they restart at 0, a document begins.

    Returns:
        Sums of each row, for each scorer and then for the whole context.
    """
    longest = max(scorer.context.size for scorer in scorers)
    targets = mask & (document_positions(tokens, position_ids) >= longest)
    short_nll = [scorer(tokens, position_ids=position_ids, long_nll=long_nll) for scorer in scorers]
    return [row_sums(nll, targets) for nll in (*short_nll, long_nll)]


TOKEN_WEIGHTS = np.dtype([("key", "?"), ("soft", "<f4")])
"""What the evaluator of LongPPL says of each token: whether it is key, and min(p_long / p_short, 5)."""


class Rows(NamedTuple):
    """The rows of an evaluation, and what else it reads."""

    data: datasets.Dataset
    lengths: np.ndarray
    tokenizer: PreTrainedTokenizerBase | None
    haystack: str | None
    max_tokens: int

    @property
    def has_documents(self) -> bool:
        """Whether each row is known to belong to one document; packed rows do not."""
        return "document" in self.data.column_names

    @property
    def documents(self) -> list[str]:
        """The name of each row's document, or one of the row's own."""
        if self.has_documents:
            return [str(name) for name in self.data["document"]]
        return [f"row {number}" for number in range(len(self.data))]

    @property
    def num_tokens(self) -> int:
        """Of all rows."""
        return int(self.lengths.sum())

    def batches(self) -> Iterator[tuple[slice, slice]]:
        """Consecutive rows of one length, `max_tokens` of their tokens at a time, and where all these tokens are; of
        packed rows one, since not every attention keeps the documents of several apart."""
        packed = "position_ids" in self.data.column_names
        first = token = 0
        for length, group in itertools.groupby(self.lengths.tolist()):
            left, most = len(list(group)), 1 if packed else max(1, self.max_tokens // length)
            while left:
                num = min(left, most)
                yield slice(first, first + num), slice(token, token + num * length)
                first, token, left = first + num, token + num * length, left - num


def measure_model(
    name: str,
    plan: Plan,
    rows: Rows,
    weights: np.ndarray,
    *,
    writes_weights: bool = False,
    progress: Callable[[int], object] = lambda done: None,
) -> dict[str, Any]:
    """Load one model, run every measure, and let go of it.

    Args:
        name: folder, hub id or .gguf file.
        weights: of LongPPL, `TOKEN_WEIGHTS` of all tokens of all rows, one after the other.
        writes_weights: this model is the evaluator: it fills `weights` in, row by row, before they are used.
        progress: called with the number of tokens of each batch of rows.

    Returns:
        Who the model is; `measures`, a list of `Measure`; `probe_grid`, probes by family, length and depth; `suites`,
        fingerprints of their samples.

    Raises:
        ValueError: if a loss is not finite, or the model is not supported.
    """
    model = _loaded(name, plan)
    asked, samples = suite_measures(model, rows.tokenizer, plan)  # first: what they refuse, the rows need not be read
    read = row_measures(model, plan, rows, weights, writes_weights=writes_weights, progress=progress)
    grid = ask_probes(model, rows.tokenizer, rows.haystack, plan)
    measures = [*read, *probe_measures(grid, plan), *asked]
    cells = [{name: getattr(record, name) for name in GRID} for record in grid]
    for measure in measures:
        if not all(map(math.isfinite, measure.total)):
            raise ValueError(f"{measure.name} of {name} is not finite: expected finite losses and margins")
    return {**identity(model, name), "measures": measures, "probe_grid": cells, "suites": samples}


def row_measures(
    model: PreTrainedModel,
    plan: Plan,
    rows: Rows,
    weights: np.ndarray,
    *,
    writes_weights: bool = False,
    progress: Callable[[int], object] = lambda done: None,
) -> list[Measure]:
    """The measures that a model's losses on the rows give; arguments as of `measure_model`."""
    finder = _finder(model, plan, rows)
    scorers = [finder.with_context(ShortContext(size, size // 2)) for size in plan.sizes]
    found: dict[str, list[Sums]] = {}
    for batch, place in rows.batches():
        with numbered_from(batch.start):
            told = _batch_sums(rows.data[batch], plan, scorers, finder if writes_weights else None, weights[place])
        for key, sums in told.items():
            found.setdefault(key, []).append(sums)
        progress(place.stop - place.start)
    names = rows.documents
    documents = {key: document_sums(Sums(*map(torch.cat, zip(*sums))), names) for key, sums in found.items()}
    return _named_measures(documents, plan)


def find_key_tokens(
    name: str, plan: Plan, rows: Rows, weights: np.ndarray, *, progress: Callable[[int], object] = lambda done: None
) -> dict[str, Any]:
    """Let a model that is not in the table find the key tokens, and fill in `weights`. Returns who it is."""
    model = _loaded(name, plan)
    finder = _finder(model, plan, rows)
    for batch, place in rows.batches():
        tokens, positions, mask = row_tensors(rows.data[batch], model.device)
        with numbered_from(batch.start):
            long_nll = finder.long_nll(tokens, position_ids=positions)
            _write_weights(finder, tokens, positions, mask, long_nll, weights[place])
        progress(place.stop - place.start)
    return identity(model, name)


def _loaded(name: str, plan: Plan) -> PreTrainedModel:
    return load_model(name, dtype=plan.dtype).to(own_device())


def _finder(model: PreTrainedModel, plan: Plan, rows: Rows) -> Scorer:
    """The scorer whose windows tell key tokens."""
    bos = None if rows.tokenizer is None else rows.tokenizer.bos_token_id
    return Scorer(model, ShortContext(*plan.long_context), bos=bos, max_tokens=rows.max_tokens)


def _batch_sums(
    batch: dict[str, Any],
    plan: Plan,
    scorers: Sequence[Scorer],
    finder: Scorer | None,
    weights: np.ndarray,
) -> dict[str, Sums]:
    """The sums of each row, by the names of `_named_measures`."""
    tokens, positions, mask = row_tensors(batch, scorers[0].model.device)
    long_nll = scorers[0].long_nll(tokens, position_ids=positions)
    if finder is not None:
        _write_weights(finder, tokens, positions, mask, long_nll, weights)
    places = document_positions(tokens, positions)
    key, soft = (torch.from_numpy(np.ascontiguousarray(weights[name])).view_as(tokens) for name in ("key", "soft"))
    (short,) = sums_by_position(long_nll, mask, places, [0, plan.short])
    (beyond,) = sums_by_position(long_nll, mask, places, [plan.half, plan.length])
    *curve, full = losses_by_context(scorers, tokens, long_nll, mask, positions)
    return {
        "all": row_sums(long_nll, mask),
        "short_range": short,
        "beyond_half": beyond,
        "longppl": row_sums(long_nll, key),
        "longppl_soft": row_sums(long_nll, soft),
        "key_tokens": row_sums(key, mask),
        "context_full": full,
        **{f"context_{size}": sums for size, sums in zip(plan.sizes, curve)},
        **{
            f"position_{start}": sums
            for start, sums in zip(plan.edges, sums_by_position(long_nll, mask, places, plan.edges))
        },
    }


def _write_weights(
    finder: Scorer,
    tokens: Tensor,
    positions: Tensor | None,
    mask: Tensor,
    long_nll: Tensor,
    weights: np.ndarray,
) -> None:
    short_nll = finder(tokens, position_ids=positions, long_nll=long_nll)
    weights["key"] = key_tokens(long_nll, short_nll, mask).flatten().cpu().numpy()
    weights["soft"] = LongCE()(long_nll, short_nll, mask).flatten().float().cpu().numpy()


def _named_measures(found: dict[str, Sums], plan: Plan) -> list[Measure]:
    """The measures of the rows, in the order of the tables."""

    def measure(name: str, group: str, sums: Sums, *, unit: str = "nats", **settings: Any) -> Measure:
        better = settings.pop("better", "lower")
        return Measure(name, group, unit, better, sums.total.tolist(), sums.num_tokens.tolist(), **settings)

    full, smallest = found["context_full"], plan.sizes[0]
    benefits = {size: Sums(found[f"context_{size}"].total - full.total, full.num_tokens) for size in plan.sizes}
    return [
        measure("beyond_half", "long", found["beyond_half"], summary=True),
        *(
            measure(f"benefit_{size}", "long", sums, better="higher", summary=size == smallest)
            for size, sums in benefits.items()
        ),
        measure("context_full", "long", full),
        measure("longppl", "long", found["longppl"], unit="perplexity", summary=True),
        measure("longppl_soft", "long", found["longppl_soft"], unit="perplexity"),
        measure("key_tokens", "long", found["key_tokens"], unit="share", better=None),
        measure("short_range", "short", found["short_range"], summary=True),
        *(measure(f"context_{size}", "short", found[f"context_{size}"]) for size in plan.sizes),
        *(
            measure(f"position_{start}", "long" if start >= plan.half else "short", found[f"position_{start}"])
            for start in plan.edges[:-1]
        ),
        measure("all", "cost", found["all"], summary=True),
    ]


def open_weights(path: Path, num_tokens: int) -> np.memmap:
    """A new file of `TOKEN_WEIGHTS`, mapped into memory, to be filled in."""
    return np.lib.format.open_memmap(path, mode="w+", dtype=TOKEN_WEIGHTS, shape=(num_tokens,))


PAPER_CONTEXT = ShortContext(size=4096 + 1024, stride=1024)
"""The package's `trunc_len=4096, sliding_window=1024`: tokens see 4096 to 5119 tokens before them.

Windows and key tokens are the same. That the package begins to score at 4096, not at 5120, makes no difference: its
first window is the whole context of these tokens, whose losses are then the same and which are never key."""


def key_tokens_of_text(
    scorer: Scorer,
    tokenizer: PreTrainedTokenizerBase,
    pieces: Sequence[str],
    *,
    alpha: float = 2.0,
    beta: float = -2.0,
) -> Bool[Tensor, "seq"]:
    """The key tokens of a text, found by an evaluator with another tokenizer.

    The evaluator reads the text with its own tokens, special ones included. A token of ours is key if all its
    characters belong to key tokens of the evaluator.

    Args:
        scorer: of the evaluator.
        tokenizer: the evaluator's; it must be a fast one, which knows the characters of its tokens.
        pieces: the characters of each token of one document; joined, they are the text. A token without characters,
            such as BOS, has an empty piece and is never key.
        alpha: as for `key_tokens`.
        beta: as for `key_tokens`.

    Returns:
        On the CPU; one value for each piece.

    Raises:
        ValueError: if the tokenizer is not fast, or the evaluator has fewer positions than the text has tokens.

    Source: `find_key_token` and `cal_overlap` of the package `longppl` 0.3.0. Where an evaluator's tokens leave out the
    space before a word, that space counts to the word here and to no token there.
    """
    if not tokenizer.is_fast:
        raise ValueError(f"{type(tokenizer).__name__} is not a fast tokenizer: expected one that knows offsets")
    encoded = tokenizer("".join(pieces), return_tensors="pt", return_offsets_mapping=True, verbose=False)
    tokens = encoded["input_ids"].to(scorer.model.device)
    check_length(scorer.model.config, tokens.shape[1], "the evaluator's model: a text")
    long_nll = token_nll(scorer.model, tokens)
    short_nll = scorer(tokens, long_nll=long_nll)
    key = key_tokens(long_nll, short_nll, prediction_mask(tokens), alpha=alpha, beta=beta)
    return _same_characters(key[0].cpu(), encoded["offset_mapping"][0], pieces)


def _same_characters(
    key: Bool[Tensor, "theirs"], spans: Int[Tensor, "theirs 2"], pieces: Sequence[str]
) -> Bool[Tensor, "ours"]:
    """Which pieces of a text consist of characters of key tokens, given the span of characters of each of these."""
    stops = torch.tensor([0, *map(len, pieces)]).cumsum(dim=0)
    is_key = torch.zeros(int(stops[-1]), dtype=torch.bool)
    before = 0
    for (start, stop), chosen in zip(spans.tolist(), key.tolist()):
        if chosen:
            is_key[min(start, before) : stop] = True
        before = max(before, stop)
    num_key = torch.cat([torch.zeros(1, dtype=torch.long), is_key.cumsum(dim=0)])[stops].diff()
    return (num_key == stops.diff()) & (num_key > 0)
