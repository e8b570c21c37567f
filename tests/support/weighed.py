"""Weightings of every kind, and rows with all that they can ask for."""

import torch

from tokenweight.method import (
    ESLM,
    EXACT,
    BoundedGain,
    Dense,
    Expected,
    FirstWindow,
    Floor,
    Gain,
    KeyTokens,
    LongCE,
    LongFilter,
    Mix,
    Normalized,
    Rho1,
    Warmup,
)

KIN = [
    *(Gain(), BoundedGain(0.0), LongFilter(), KeyTokens(1.0, -4.0), EXACT(threshold=16), Rho1(), Rho1(over="batch")),
    *(ESLM(), Expected(Dense()), Mix(LongFilter(), EXACT(threshold=8), share=0.25), Floor(LongCE(), 0.5)),
    *(Normalized(LongCE()), Warmup(ESLM(0.5), 100.0), FirstWindow(Dense(), 6, 2.0)),
]


def some(rows=3, length=40, seed=0):
    """Losses, a mask and all that a weighting can ask for."""
    draw = torch.Generator().manual_seed(seed)
    long, short, ref_nll, divergence = 6 * torch.rand(4, rows, length, generator=draw, dtype=torch.float64)
    mask = torch.rand(rows, length, generator=draw) < 0.9
    mask[:, 0] = False
    positions = torch.arange(length).expand(rows, length).clone()
    return long, short, mask, {"positions": positions, "ref_nll": ref_nll, "divergence": divergence}
