"""From scores to weights of mean 1: all tokens in proportion, or the highest alone."""

import math

import torch
from jaxtyping import Bool, Float
from torch import Tensor


def normalize(scores: Float[Tensor, "batch seq"], mask: Bool[Tensor, "batch seq"]) -> Float[Tensor, "batch seq"]:
    """Scale the scores of each row (>= 0, and 0 outside the mask) to mean 1 over the mask; only zeros become ones."""
    num_tokens = mask.sum(dim=1, keepdim=True)
    total = scores.sum(dim=1, keepdim=True)
    return torch.where(total > 0, scores / total * num_tokens, 1.0)  # T / total could overflow


def keep_top(
    scores: Float[Tensor, "batch seq"], mask: Bool[Tensor, "batch seq"], keep: float, seed: int
) -> Float[Tensor, "batch seq"]:
    """Keep the max(1, floor(keep * T)) largest scores (>= 0) of each row, and normalize; only zeros become ones."""
    num_tokens = mask.sum(dim=1, keepdim=True)
    num_kept = (num_tokens.double() * keep).floor().long().clamp(min=1)
    scores = scores.masked_fill(~mask, -1)
    most = max(1, math.floor(keep * scores.shape[1]))  # static, so that no device has to be asked
    threshold = scores.topk(most, dim=1).values.gather(1, num_kept - 1)
    above = scores > threshold
    equal = (scores == threshold) & mask
    order = _tie_order(scores.shape[1], seed, scores.device)
    rank = torch.empty_like(num_kept.expand_as(scores))
    rank[:, order] = equal[:, order].long().cumsum(dim=1)
    kept = above | (equal & (rank <= num_kept - above.sum(dim=1, keepdim=True)))
    no_score = (scores <= 0).all(dim=1, keepdim=True)
    return normalize(torch.where(no_score, mask, kept).to(scores.dtype), mask)


def _tie_order(length: int, seed: int, device: torch.device) -> Tensor:
    """A permutation of the positions by a hash of (seed, position): the same on every device, and for every length a
    prefix-consistent order, so that padding does not change it. The constants are those of splitmix64, in 63 bits."""
    top = (1 << 63) - 1
    begin = seed * 0x9E3779B97F4A7C15 % (1 << 62) + 1
    x = (torch.arange(length, device=device) + begin) * 0x1E3779B97F4A7C15 & top
    x = (x ^ (x >> 30)) * 0x3F58476D1CE4E5B9 & top
    x = (x ^ (x >> 27)) * 0x14D049BB133111EB & top
    return (x ^ (x >> 31)).argsort(stable=True)
