"""The rows that the loss reads, found by a host-device synchronization; and a device-independent order of tokens."""

import torch
from jaxtyping import Bool, Int
from torch import Tensor


def active_rows(targets: Int[Tensor, " N"], vocabulary: int, weights: Tensor | None = None) -> Int[Tensor, " n"]:
    """Indices of the rows with a target and a non-zero weight; a target outside the vocabulary is a ValueError."""
    valid = targets != -100
    wrong = valid & ((targets < 0) | (targets >= vocabulary))
    active = valid if weights is None else valid & (weights != 0)
    # One host-device synchronization, where `any` and `nonzero` would be two.
    num_wrong, num_active = torch.stack([wrong.sum(), active.sum()]).tolist()
    if num_wrong:
        row = int(wrong.nonzero()[0])
        raise ValueError(
            f"target {int(targets[row])} in row {row}: expected -100 or a token id from 0 to {vocabulary - 1}"
        )
    return active.byte().argsort(descending=True, stable=True)[:num_active]


def split_rows(rows: Int[Tensor, " n"], first: Bool[Tensor, " n"]) -> tuple[Tensor, Tensor]:
    """Split rows into those where `first` is True and the others; one host-device synchronization, for their number."""
    ordered, num = rows[first.byte().argsort(descending=True, stable=True)], int(first.sum())
    return ordered[:num], ordered[num:]


def tie_order(length: int, seed: int, device: torch.device) -> Tensor:
    """A permutation of the positions by a hash of (seed, position): the same on every device, and for every length a
    prefix-consistent order, so that padding does not change it. The constants are those of splitmix64, in 63 bits."""
    top = (1 << 63) - 1
    begin = seed * 0x9E3779B97F4A7C15 % (1 << 62) + 1
    x = (torch.arange(length, device=device) + begin) * 0x1E3779B97F4A7C15 & top
    x = (x ^ (x >> 30)) * 0x3F58476D1CE4E5B9 & top
    x = (x ^ (x >> 27)) * 0x14D049BB133111EB & top
    return (x ^ (x >> 31)).argsort(stable=True)
