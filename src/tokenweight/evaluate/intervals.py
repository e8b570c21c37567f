"""Sums over the tokens of each document, and a paired bootstrap over documents for the difference of two models."""

from collections.abc import Hashable, Sequence
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Float64, Shaped
from torch import Tensor

_CHUNK = 1 << 20  # documents drawn at a time, so that memory does not grow with the number of resamples


class Sums(NamedTuple):
    """The sum of a metric over the tokens of each sequence or document, from which follows the mean over all tokens.

    Sums of several batches are joined by `Sums(*map(torch.cat, zip(*batches)))`.
    """

    total: Float64[Tensor, " documents"]
    """Sum over the tokens: of losses in nats, or of zeros and ones, whose mean is a fraction."""
    num_tokens: Float64[Tensor, " documents"]
    """Number of these tokens, or the sum of their weights."""

    @property
    def mean(self) -> float:
        """Total over number of tokens, in which every token counts equally; NaN without tokens."""
        return (self.total.sum() / self.num_tokens.sum()).item()


def row_sums(values: Shaped[Tensor, "rows seq"], weights: Bool[Tensor, "rows seq"] | Float[Tensor, "rows seq"]) -> Sums:
    """Sum `values` over the tokens of each sequence, in float64, on the CPU.

    Args:
        values: the loss of each token, or True and False to get a fraction.
        weights: a mask, or weights >= 0; values of weight 0 are not read.
    """
    weights = weights.cpu().double()
    values = values.cpu().double().masked_fill(weights == 0, 0)
    return Sums((weights * values).sum(dim=1), weights.sum(dim=1))


def document_sums(sums: Sums, documents: Sequence[Hashable]) -> Sums:
    """Add up the rows of each document, in the order in which documents appear.

    Sequences cut from one document are correlated: intervals that treated them as independent would be too narrow.

    Args:
        documents: the name of each row's document, such as the column `document` of the rows.
    """
    if len(documents) != len(sums.total):
        raise ValueError(f"documents names {len(documents)} rows: expected one name for each of {len(sums.total)} rows")
    number = {name: number for number, name in enumerate(dict.fromkeys(documents))}
    index = torch.tensor([number[name] for name in documents], dtype=torch.long)
    return Sums(*(torch.zeros(len(number), dtype=torch.float64).index_add(0, index, column) for column in sums))


class Difference(NamedTuple):
    """The mean of a model minus that of its baseline, with a percentile interval from resampled documents."""

    value: float
    interval: tuple[float, float] | None
    """None where no valid interval exists: fewer than two documents have tokens, or so few that a resample may leave a
    model without any token."""
    num_documents: int
    """Number of documents with tokens."""


def paired_difference(
    model: Sums, baseline: Sums, *, level: float = 0.95, num_resamples: int = 10_000, seed: int = 0
) -> Difference:
    """Difference of two token-weighted means with a percentile interval, from a paired bootstrap over documents.

    Documents are drawn with replacement, each with both of its sums, so that a document's difficulty for both models
    cancels out. For losses, `exp` of value and limits is the ratio of the two perplexities and its interval.

    The interval is too narrow for few documents: with normal differences and documents of one length, a 95 % interval
    covers the truth in 94 % of all cases for 40 documents, in 90 % for 10 and in 85 % for 5.

    Args:
        model: sums of each document.
        baseline: sums of the same documents, in the same order.
        level: coverage of the interval.
        num_resamples: number of bootstrap resamples.
        seed: the same seed draws the same documents for every measure.

    Raises:
        ValueError: if the numbers of documents differ, a sum is not finite, or a setting is invalid.

    Example:
        >>> baseline = row_sums(torch.rand(40, 100), torch.ones(40, 100))
        >>> model = Sums(baseline.total - 5, baseline.num_tokens)
        >>> value, (low, high), num_documents = paired_difference(model, baseline)
        >>> print(f"{value:.3f} [{low:.3f}, {high:.3f}], {num_documents} documents")
        -0.050 [-0.050, -0.050], 40 documents

    Source: Efron and Tibshirani 1993, An Introduction to the Bootstrap, chapter 13 (percentile intervals).
    """
    if len(model.total) != len(baseline.total):
        found = f"the model has sums of {len(model.total)} documents, the baseline of {len(baseline.total)}"
        raise ValueError(f"{found}: expected the same documents")
    if not 0 < level < 1 or num_resamples * (1 - level) < 2:
        expected = "level between 0 and 1, num_resamples of at least 2 / (1 - level)"
        raise ValueError(f"level={level}, num_resamples={num_resamples}: expected {expected}")
    for name, sums in (("model", model), ("baseline", baseline)):
        if not all(column.isfinite().all() for column in sums):
            raise ValueError(f"the sums of the {name} are not all finite: expected finite losses")
    with_tokens = (model.num_tokens > 0) | (baseline.num_tokens > 0)
    model, baseline = (Sums(*(column[with_tokens] for column in sums)) for sums in (model, baseline))
    value, num_documents = model.mean - baseline.mean, len(model.total)
    if num_documents < 2:
        return Difference(value, None, num_documents)
    differences = _resampled(model, baseline, num_resamples, torch.Generator().manual_seed(seed))
    if not differences.isfinite().all():
        return Difference(value, None, num_documents)
    low, high = differences.quantile(torch.tensor([(1 - level) / 2, (1 + level) / 2], dtype=torch.float64)).tolist()
    return Difference(value, (low, high), num_documents)


def _resampled(
    model: Sums, baseline: Sums, num_resamples: int, generator: torch.Generator
) -> Float64[Tensor, " resamples"]:
    """The difference of the means in each draw of documents."""
    num_documents = len(model.total)
    differences = []
    for chunk in torch.arange(num_resamples).split(max(1, _CHUNK // num_documents)):
        drawn = torch.randint(num_documents, (len(chunk), num_documents), generator=generator)
        means = [sums.total[drawn].sum(dim=1) / sums.num_tokens[drawn].sum(dim=1) for sums in (model, baseline)]
        differences.append(means[0] - means[1])
    return torch.cat(differences)
