"""The columns that scoring adds to rows: losses with each context, and the context gain of each row."""

import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import datasets
import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from transformers import PreTrainedModel

from tokenweight.data.columns import COLUMNS, TRANSLATED, translated
from tokenweight.method import ScoreWeighting, ShortContext, check_finite, document_positions, prediction_mask, vanishes
from tokenweight.models import AlignedScorer, Contrast, ContrastScorer, Scorer, Teacher, numbered_from


class ContextGain(NamedTuple):
    """Statistics of each row over the gains of the tokens that count, NaN where none does. The gain of a token is its
    short loss minus its long loss, in nats."""

    gain_mean: Float[Tensor, " batch"]
    gain_positive: Float[Tensor, " batch"]
    """The fraction of tokens that the long context predicts better."""
    gain_p90: Float[Tensor, " batch"]
    """The 90th percentile."""
    key_token_ratio: Float[Tensor, " batch"]
    """The fraction of `key_tokens`."""
    longfilter: Float[Tensor, " batch"]
    """The mean of the gain times the probability with the long context: what LongFilter selects documents by (Deng et
    al. 2025, arXiv 2510.25804, Eq. 7, where the tokens of the first window count too, with a gain of 0)."""


class RowScorer:
    """Scores batches of rows: a callable from columns to columns, for `Dataset.map`, Ray Data, or `score_rows`.

    It adds to a batch

    - for each context the short losses, token-aligned, in a column that is named by its size: `short_nll_1024`;
    - with the long losses: `long_nll`, and for each context the fields of `ContextGain`, such as `gain_mean_1024`: one
      number for each row, over the tokens that have more tokens before them than the short context holds;
    - with `divergence`, and of `CountScorer`, for each context that of the two predictions of a token, token-aligned:
      `divergence_1024`;
    - with `as_reference`, none of these, but its losses with the whole row as context: `ref_nll`;
    - with `top_k`, none of these, but what a student learns from a teacher: its likeliest tokens at each place and
      their log-probabilities, `teacher_ids` and `teacher_logprobs`; and `topk_median_nll`, one number for each row: the
      median of its losses over the predicted tokens that are within its top k, NaN without any (what SALT selects
      documents by).

    Args:
        scorer: a model that scores, or a scorer that supplies both losses itself, such as `CountScorer`.
        contexts: one or several short contexts.
        prefix: as for `Scorer`.
        with_long: also the losses with the whole row as context; those of a `ContrastScorer` are always there.
        divergence: for a model, the weighting whose expected score is the divergence, as for `Expected`; it implies
            `with_long`.
        as_reference: whether a model is the reference of `Rho1`, which reads whole rows alone; without contexts then.
        top_k: for a model that is a teacher, which reads whole rows alone as well, the tokens of each prediction.
        max_tokens: as for `Scorer`.

    Raises:
        ValueError: if two contexts have one size, or the model is not supported.
    """

    def __init__(
        self,
        scorer: PreTrainedModel | ContrastScorer,
        contexts: Sequence[ShortContext],
        *,
        prefix: Sequence[int] = (),
        with_long: bool = False,
        divergence: ScoreWeighting | None = None,
        as_reference: bool = False,
        top_k: int | None = None,
        max_tokens: int = 32768,
    ) -> None:
        sizes, alone = [context.size for context in contexts], as_reference or top_k is not None
        others = bool(sizes) or with_long or divergence is not None or isinstance(scorer, ContrastScorer)
        if alone and (others or (as_reference and top_k is not None)):
            name = "as_reference" if as_reference else "top_k"
            raise ValueError(f"{name}: found other scores beside it: expected a model, and nothing else")
        if not (sizes or alone) or len(set(sizes)) < len(sizes):
            raise ValueError(f"size: expected different sizes, found {', '.join(map(str, sizes)) or 'none'}")
        self.max_tokens = max_tokens
        self._contexts = {f"_{context.size}": context for context in contexts}
        self._contrast = self._scorer = self._teacher = None
        if isinstance(scorer, ContrastScorer):
            self._contrast = scorer
        elif top_k is not None:
            self._teacher = Teacher(scorer, top_k, max_tokens=max_tokens)
        else:
            first = ShortContext(2) if as_reference else contexts[0]  # a reference reads no window of it
            self._scorer = Scorer(scorer, first, prefix=() if as_reference else prefix, max_tokens=max_tokens)
            for context in contexts[1:]:
                self._scorer.with_context(context)  # raises, before any work
        if divergence is not None and self._contrast is not None:
            raise ValueError("divergence: expected none, of a scorer that gives its own")
        self.divergence, self.as_reference, self.top_k = divergence, as_reference, top_k
        self.with_long = with_long or divergence is not None or self._contrast is not None
        own = self._contrast is not None and "divergence" in self._contrast.provenance
        self._diverges = own or divergence is not None

    @property
    def contexts(self) -> list[dict[str, int]]:
        """Sizes and strides, as written to `scores.json`."""
        return [{"size": context.size, "stride": context.stride} for context in self._contexts.values()]

    @property
    def groups(self) -> tuple[int, int]:
        """The groups of an `AlignedScorer` in all rows so far, and how many hold several of our tokens."""
        aligned = self._contrast
        return (aligned.groups, aligned.shared_groups) if isinstance(aligned, AlignedScorer) else (0, 0)

    @property
    def features(self) -> dict[str, Any]:
        """The added columns and their types."""
        if self.as_reference:
            return {"ref_nll": datasets.List(datasets.Value("float32"))}
        if self.top_k is not None:
            kinds = {"teacher_ids": "int32", "teacher_logprobs": "float32"}
            of_token = {name: datasets.List(datasets.Value(kind), length=self.top_k) for name, kind in kinds.items()}
            rows = {name: datasets.List(feature) for name, feature in of_token.items()}
            return {**rows, "topk_median_nll": datasets.Value("float32")}
        sized = ["short_nll", *["divergence"] * self._diverges]
        each_token = ["long_nll"] * self.with_long + [name + suffix for name in sized for suffix in self._contexts]
        each_row = (
            [name + suffix for suffix in self._contexts for name in ContextGain._fields] if self.with_long else []
        )
        losses = {name: datasets.List(datasets.Value("float32")) for name in each_token}
        return losses | {name: datasets.Value("float32") for name in each_row}

    def __call__(self, batch: Mapping[str, Any]) -> dict[str, Any]:
        """Add the columns to a batch of rows, which may differ in length.

        Raises:
            ValueError: if a loss is not finite, naming row (of the batch) and position; if a token is unknown, or a row
                is padded.
        """
        return {**batch, **self.score(batch)[0]}

    def score(
        self,
        batch: Mapping[str, Any],
    ) -> tuple[dict[str, list], dict[str, list[float]]]:
        """The added columns; and, with long losses, for each context: how many tokens count, the sum of their
        |long - short| in nats, and how many differ by more than 2 nats."""
        columns: dict[str, list] = {name: [] for name in self.features}
        totals = {suffix: np.zeros(3) for suffix in self._contexts} if self.with_long else {}
        batch = _without_masks(batch)
        for start, stop in _equal_lengths(batch["input_ids"]):
            equal = {name: batch[name][start:stop] for name in COLUMNS if name in batch}
            with numbered_from(start):
                self._score(equal, columns, totals)
        return columns, {suffix: values.tolist() for suffix, values in totals.items()}

    def _score(self, batch: dict[str, Any], columns: dict[str, list], totals: dict[str, np.ndarray]) -> None:
        reader = self._teacher or self._scorer
        device = torch.device("cpu") if reader is None else reader.model.device
        tokens, positions, predicted = row_tensors(batch, device)
        if self._teacher is not None:
            top, nll = self._teacher(tokens, position_ids=positions)
            columns["teacher_ids"] += list(top.ids.cpu().numpy())
            columns["teacher_logprobs"] += _rows(top.logprobs)
            known = (top.ids == tokens[..., None]).any(dim=2) & predicted
            columns["topk_median_nll"] += nll.masked_fill(~known, torch.nan).nanquantile(0.5, dim=1).tolist()
            return
        if self.as_reference:
            assert self._scorer is not None
            columns["ref_nll"] += _rows(self._scorer.long_nll(tokens, position_ids=positions))
        for number, (suffix, found) in enumerate(self._contrasts(tokens, positions)):
            columns[f"short_nll{suffix}"] += _rows(found.short_nll)
            if self._diverges:
                assert found.divergence is not None
                columns[f"divergence{suffix}"] += _rows(found.divergence)
            if not self.with_long:
                continue
            columns["long_nll"] += _rows(found.long_nll) if number == 0 else []
            mask = predicted & (document_positions(tokens, positions) >= self._contexts[suffix].size)
            for name, values in gains_of_rows(found.long_nll, found.short_nll, mask)._asdict().items():
                columns[f"{name}{suffix}"] += values.tolist()
            difference = (found.long_nll - found.short_nll)[mask].abs().double()
            totals[suffix] += [len(difference), difference.sum().item(), (difference > 2).sum().item()]

    def _contrasts(self, tokens: Tensor, positions: Tensor | None) -> Iterator[tuple[str, Contrast]]:
        """The results with each context; without long losses, the short ones are in their place."""
        long_nll = states = divergence = None
        for suffix, context in self._contexts.items():
            if self._contrast is not None:
                yield suffix, self._contrast(tokens, context, position_ids=positions)
                continue
            assert self._scorer is not None
            if self.divergence is not None and states is None:
                states = self._scorer.long_states(tokens, position_ids=positions)
            if self.with_long and long_nll is None:
                long_nll = self._scorer.long_nll(tokens, position_ids=positions, states=states)
            scorer = self._scorer.with_context(context)
            if states is not None and long_nll is not None and self.divergence is not None:
                same = vanishes(self.divergence)
                windows = scorer.short_states(tokens, position_ids=positions, self_scored=same)
                divergence, short = scorer.divergence(tokens, self.divergence, states, windows)
                short_nll = short.filled(long_nll)
            else:
                short_nll = scorer(tokens, position_ids=positions, long_nll=long_nll)
            self._scorer.max_tokens = scorer.max_tokens  # less than before, if memory did not suffice
            yield suffix, Contrast(short_nll if long_nll is None else long_nll, short_nll, divergence)


def _without_masks(batch: Mapping[str, Any]) -> Mapping[str, Any]:
    """A batch in which columns of other tools have become ours."""
    names = [name for name in (*COLUMNS, *TRANSLATED) if name in batch]
    if not {*names} & {*TRANSLATED}:
        return batch
    rows = [translated(dict(zip(names, values))) for values in zip(*(batch[name] for name in names))]
    for number, row in enumerate(rows):
        if len(row["input_ids"]) < len(batch["input_ids"][number]):
            raise ValueError(f"row {number} is padded: expected rows of `tokenweight.data.load_rows`, which are not")
    return {name: [row[name] for row in rows] for name in rows[0]}


def row_tensors(
    batch: Mapping[str, Any], device: torch.device
) -> tuple[Int[Tensor, "batch seq"], Int[Tensor, "batch seq"] | None, Bool[Tensor, "batch seq"]]:
    """Tokens, positions (None, if each row is one document) and mask of rows of one length."""
    tokens, positions, labels = (
        torch.from_numpy(np.stack(batch[name]).astype(np.int64)).to(device) if name in batch else None
        for name in COLUMNS
    )
    assert tokens is not None
    return tokens, positions, prediction_mask(tokens if labels is None else labels, positions)


def _rows(values: Tensor) -> list[np.ndarray]:
    return list(values.float().cpu().numpy())


def _equal_lengths(rows: Iterable[Any]) -> Iterator[tuple[int, int]]:
    """Ranges of consecutive rows of one length."""
    start = 0
    for _, group in itertools.groupby(rows, key=len):
        stop = start + sum(1 for _ in group)
        yield start, stop
        start = stop


def key_tokens(
    long_nll: Float[Tensor, "rows seq"],
    short_nll: Float[Tensor, "rows seq"],
    mask: Bool[Tensor, "rows seq"],
    *,
    alpha: float = 2.0,
    beta: float = -2.0,
) -> Bool[Tensor, "rows seq"]:
    """True where the long context helps much, and enough: short - long > alpha, and -long > beta.

    Args:
        long_nll: the evaluator's loss of each token with the whole context, in nats.
        short_nll: its loss with the short context.
        mask: True where a token was predicted and counts; no other is a key token.
        alpha: least gain in log-likelihood, in nats, at least 0.
        beta: least log-likelihood, in nats.

    Raises:
        ValueError: if `alpha` is negative, or a loss under `mask` is not finite.

    Source: Fang et al. 2025 (arXiv 2410.23771), key tokens of LongPPL, with its defaults.
    """
    if not alpha >= 0:
        raise ValueError(f"alpha={alpha}: expected at least 0 (tokens without a short context have a gain of 0)")
    check_finite({"the evaluator's long loss": long_nll, "the evaluator's short loss": short_nll}, mask)
    return mask & (short_nll - long_nll > alpha) & (-long_nll > beta)


def gains_of_rows(
    long_nll: Float[Tensor, "batch seq"], short_nll: Float[Tensor, "batch seq"], mask: Bool[Tensor, "batch seq"]
) -> ContextGain:
    """Summarize the gains of each row.

    Args:
        long_nll: nats, token-aligned.
        short_nll: the same with a short context.
        mask: True where a token counts: predicted, and with more tokens before it than the short context holds.
    """
    gain = (short_nll - long_nll).double()
    number = mask.sum(dim=1)

    def share(chosen: Tensor) -> Tensor:
        return (chosen & mask).sum(dim=1) / number.double()

    return ContextGain(
        gain_mean=(gain * mask).sum(dim=1) / number,
        gain_positive=share(gain > 0),
        gain_p90=gain.masked_fill(~mask, torch.nan).nanquantile(0.9, dim=1),
        key_token_ratio=share(key_tokens(long_nll, short_nll, mask)),
        longfilter=(gain * (-long_nll.double()).exp() * mask).sum(dim=1) / number,
    )
