"""What a weighting that depends on the target should cost in the end: how far its optimum is from the truth.

For a context, let p be what follows and w(y) the weight of each y that could. The minimizer of the expected weighted
loss is q(y) = w(y) p(y) / Z with Z = sum over y of w(y) p(y) (docs/weightings.md), and the loss that it costs is

    KL(p || q) = log Z - sum over y of p(y) log w(y).

It is 0 where w does not depend on y, and infinite where w is 0 for a y that could follow. Here p is what the model that
was trained with uniform weights predicts with the long context, and w is made of that and of what it predicts with the
short one; the statistic of a row (its mean score, or the score of the last token that is kept) is that of its targets.
"""

import statistics
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from controls import Shuffled
from miniature import Bench, Experiment, experiment_of
from torch import Tensor
from worlds import Rows

from tokenweight.method import (
    Dense,
    KeyTokens,
    LongCE,
    ScoreWeighting,
    Sparse,
    Weighting,
    parse_weighting,
    sliding_windows,
)

ROWS = 64
"""Held-out rows that are read."""


def weights_of_all(weighting: Weighting, long: Tensor, short: Tensor, targets: Tensor) -> Tensor:
    """The weight that each token of the vocabulary would have at each position of a row.

    Args:
        weighting: one whose weights follow from a score.
        long: -log p with the long context, `[positions, vocabulary]`.
        short: the same with the short context.
        targets: the tokens that stand there.
    """
    assert isinstance(weighting, ScoreWeighting)
    scores = weighting.score(long, short)
    own = scores.gather(1, targets[:, None])[:, 0]
    if isinstance(weighting, Sparse):
        last = own.sort(descending=True).values[max(1, int(weighting.keep * len(own))) - 1]
        return (scores >= last).to(long.dtype) / weighting.keep
    if isinstance(weighting, Dense):
        share = scores.clamp(min=0) / own.clamp(min=0).mean()
        return weighting.interpolation + (1 - weighting.interpolation) * share
    assert isinstance(weighting, LongCE | KeyTokens)
    return scores


def price(weights: Tensor, long: Tensor) -> Tensor:
    """KL(p || q) at each position, in nats; infinite, too, where all weights are 0, and nothing is learned."""
    p = (-long).exp()
    total = (p * weights).sum(dim=1).log()
    return (total - (p * weights.log()).where(p > 1e-7, 0).sum(dim=1)).nan_to_num(nan=torch.inf, posinf=torch.inf)


@torch.no_grad()
def both_losses(model: torch.nn.Module, tokens: Tensor, experiment: Experiment) -> tuple[Tensor, Tensor]:
    """-log p of all tokens of the vocabulary at positions 1 and later of a row, with the long and the short context."""
    long = -model(input_ids=tokens[None]).logits[0, :-1].double().log_softmax(dim=1)
    short = long.clone()  # in the first window
    for start, first, stop in sliding_windows(len(tokens), experiment.size, experiment.stride):
        logits = model(input_ids=tokens[None, start:stop]).logits[0, :-1].double()
        short[first - 1 : stop - 1] = -logits[first - 1 - start :].log_softmax(dim=1)
    return long, short


def predicted_prices(folder: Path, units: Sequence[tuple[int, ...]]) -> dict[str, list[float]]:
    """For each arm that scores itself, of each unit, the price of its optimum at plain tokens beyond `size`."""
    experiment = experiment_of(folder)
    bench = Bench(experiment, folder)
    rows = Rows(*(values[:ROWS] for values in bench.held_out()))
    arms = {name: arm for name, arm in experiment.arms.items() if arm.get("scorer") == "self" and "rope" not in arm}
    weightings = {name: parse_weighting(arm["weighting"]) for name, arm in arms.items()}
    found: dict[str, list[float]] = {name: [] for name in weightings}
    for unit in units:
        model = bench.trained("uniform", list(unit))
        sums: dict[str, list[float]] = {name: [] for name in weightings}
        for tokens, plain in zip(torch.as_tensor(rows.tokens), rows.plain):
            long, short = both_losses(model, tokens, experiment)
            chosen = torch.as_tensor(plain & (np.arange(len(plain)) >= experiment.size))[1:]
            for name, weighting in weightings.items():
                if isinstance(weighting, ScoreWeighting) and not isinstance(weighting, Shuffled):
                    weights = weights_of_all(weighting, long, short, tokens[1:])
                    sums[name].append(float(price(weights, long)[chosen].mean()))
                else:
                    sums[name].append(0.0)  # a weight of the context
        for name, values in sums.items():
            found[name].append(statistics.fmean(values))
    return found
