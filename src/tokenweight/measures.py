"""Every measure of one model: losses of rows by position and context, LongPPL, and what it answers.

docs/evaluation.md says what each measure is. A row is read once with its whole context, and once more in windows for
each short context; whatever is said of its tokens is summed up at once: of a row, memory holds a few numbers.
"""

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import datasets
import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from tokenweight.answers import ask_probes, probe_measures, suite_measures
from tokenweight.benefit import key_tokens
from tokenweight.causal import document_positions
from tokenweight.columns import row_tensors
from tokenweight.comparison import GRID, Measure
from tokenweight.evalplan import Plan
from tokenweight.evaluation import losses_by_context, sums_by_position
from tokenweight.intervals import Sums, document_sums, row_sums
from tokenweight.model import load_model, own_device, weights_fingerprint
from tokenweight.scoring import Scorer, ShortContext
from tokenweight.weighting import LongCE

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
    return {**_identity(name, model), "measures": measures, "probe_grid": cells, "suites": samples}


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
        for key, sums in _batch_sums(
            rows.data[batch], batch.start, plan, scorers, finder if writes_weights else None, weights[place]
        ).items():
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
        long_nll = finder.long_nll(tokens, position_ids=positions, first_row=batch.start)
        _write_weights(finder, tokens, positions, mask, long_nll, batch.start, weights[place])
        progress(place.stop - place.start)
    return _identity(name, model)


def _identity(name: str, model: PreTrainedModel) -> dict[str, Any]:
    return {
        "model": name,
        "revision": getattr(model.config, "_commit_hash", None),
        "weights_fingerprint": weights_fingerprint(model),
        "dtype": str(model.dtype).removeprefix("torch."),
        "rope_parameters": getattr(model.config, "rope_parameters", None),
    }


def _loaded(name: str, plan: Plan) -> PreTrainedModel:
    return load_model(name, dtype=plan.dtype).to(own_device())


def _finder(model: PreTrainedModel, plan: Plan, rows: Rows) -> Scorer:
    """The scorer whose windows tell key tokens."""
    bos = None if rows.tokenizer is None else rows.tokenizer.bos_token_id
    return Scorer(model, ShortContext(*plan.long_context), bos=bos, max_tokens=rows.max_tokens)


def _batch_sums(
    batch: dict[str, Any],
    first_row: int,
    plan: Plan,
    scorers: Sequence[Scorer],
    finder: Scorer | None,
    weights: np.ndarray,
) -> dict[str, Sums]:
    """The sums of each row, by the names of `_named_measures`."""
    tokens, positions, mask = row_tensors(batch, scorers[0].model.device)
    long_nll = scorers[0].long_nll(tokens, position_ids=positions, first_row=first_row)
    if finder is not None:
        _write_weights(finder, tokens, positions, mask, long_nll, first_row, weights)
    places = document_positions(tokens, positions)
    key, soft = (torch.from_numpy(np.ascontiguousarray(weights[name])).view_as(tokens) for name in ("key", "soft"))
    (short,) = sums_by_position(long_nll, mask, places, [0, plan.short])
    (beyond,) = sums_by_position(long_nll, mask, places, [plan.half, plan.length])
    *curve, full = losses_by_context(scorers, tokens, long_nll, mask, positions, first_row=first_row)
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
    first_row: int,
    weights: np.ndarray,
) -> None:
    short_nll = finder(tokens, position_ids=positions, long_nll=long_nll, first_row=first_row)
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
