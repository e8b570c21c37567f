"""The context gain: how much better a long context predicts the tokens of a row than a short one."""

from typing import NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from tokenweight.method import check_finite


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
    """Sum up each row.

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
    )
