"""Losses by position, computed by hand."""

import pytest
import torch

from tokenweight.evaluation import PositionBin, losses_by_position

NLL = torch.tensor([[9.0, 1.0, 2.0, 3.0, 4.0, 6.0, 8.0], [9.0, 2.0, 5.0, 9.0, 0.5, 9.0, 1.0]])
MASK = torch.tensor([[0, 1, 1, 1, 1, 1, 0], [0, 1, 1, 0, 1, 0, 1]], dtype=torch.bool)


@pytest.mark.parametrize(
    ("first", "expected"),
    [
        (1, [(1, 2, 3 / 2, 2), (2, 4, 10 / 3, 3), (4, 7, 11.5 / 4, 4)]),  # [0, 1) has no token: nothing predicts it
        (2, [(0, 2, 3 / 2, 2), (2, 4, 10 / 3, 3), (4, 7, 11.5 / 4, 4)]),
        (3, [(0, 3, 10 / 4, 4), (3, 6, 13.5 / 4, 4), (6, 7, 1.0, 1)]),
        (256, [(0, 7, 24.5 / 9, 9)]),
    ],
)
def test_bins_double_and_hold_the_mean_loss_of_their_tokens(first, expected):
    assert losses_by_position(NLL, MASK, first=first) == [PositionBin(*values) for values in expected]


def test_what_is_outside_the_mask_is_not_read():
    nll = NLL.where(MASK, torch.nan)
    assert losses_by_position(nll, MASK, first=2) == losses_by_position(NLL, MASK, first=2)


@pytest.mark.parametrize("keep", [slice(0, 0), slice(2, 4)])
def test_bins_without_a_token_are_left_out(keep):
    mask = torch.zeros_like(MASK)
    mask[:, keep] = MASK[:, keep]
    bins = losses_by_position(NLL, mask, first=2)
    assert bins == ([] if keep.stop == 0 else [PositionBin(2, 4, 10 / 3, 3)])


def test_every_token_is_in_one_bin_and_small_losses_are_not_rounded_away_by_large_numbers_of_tokens():
    mask = torch.ones(3, 5000, dtype=torch.bool)
    nll = torch.full(mask.shape, 0.1, dtype=torch.float32)
    bins = losses_by_position(nll, mask)
    assert [(found.start, found.stop) for found in bins][-2:] == [(2048, 4096), (4096, 5000)]
    assert sum(found.num_tokens for found in bins) == mask.numel()
    # A sum of 7500 float32 numbers, one after the other, would be off by far more than one rounding of float64.
    assert [found.nll for found in bins] == pytest.approx([torch.tensor(0.1).item()] * len(bins), rel=1e-12)
