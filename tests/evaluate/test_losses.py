"""Losses by position, computed by hand, and by context, with one forward pass per token."""

from itertools import accumulate

import pytest
import torch

import models
from tokenweight import Scorer, ShortContext, token_nll
from tokenweight.evaluate import PositionBin, losses_by_position
from tokenweight.evaluate.losses import losses_by_context, position_edges, sums_by_position
from tokenweight.method import document_positions, prediction_mask

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


@pytest.mark.parametrize(
    ("length", "first", "edges"),
    [(7, 1, [0, 1, 2, 4, 7]), (8, 2, [0, 2, 4, 8]), (9, 4, [0, 4, 8, 9]), (5, 9, [0, 5]), (0, 4, [0])],
)
def test_edges_double_and_end_with_the_row(length, first, edges):
    assert position_edges(length, first=first) == edges


def test_bins_of_no_token_are_refused():
    with pytest.raises(ValueError, match="first=0: expected at least 1 token"):
        position_edges(8, first=0)


# Documents of 3, 5, 1 and 1 tokens; a document that begins with skipped positions, and one that skips later (PoSE).
PACKED = torch.tensor([[0, 1, 2, 0, 1, 2, 3, 4, 0, 0], [5, 6, 7, 8, 0, 1, 2, 3, 9, 10]])


def test_positions_in_documents_count_the_tokens_before():
    assert document_positions(PACKED, PACKED).tolist() == [
        [0, 1, 2, 0, 1, 2, 3, 4, 0, 0],
        [0, 1, 2, 3, 0, 1, 2, 3, 4, 5],
    ]
    assert document_positions(PACKED).tolist() == [list(range(10))] * 2


def test_sums_by_position_speak_of_each_row_and_of_positions_in_documents():
    labels = models.some_tokens(2, 10)
    labels[0, 4] = labels[1, 2] = labels[1, 9] = -100
    mask = prediction_mask(labels, PACKED)
    nll = torch.arange(20.0).view(2, 10).square().masked_fill(~mask, torch.nan)
    positions = document_positions(labels, PACKED)
    edges = [1, 3, 4, 50]
    expected = [[[0.0, 0], [0.0, 0]] for _ in edges[1:]]
    for row in range(2):
        for column in range(10):
            for number in range(3):
                if mask[row, column] and edges[number] <= positions[row, column] < edges[number + 1]:
                    expected[number][row][0] += (10 * row + column) ** 2
                    expected[number][row][1] += 1
    found = sums_by_position(nll, mask, positions, edges)
    assert [torch.stack([*sums], dim=1).tolist() for sums in found] == expected
    assert [sums.num_tokens.tolist() for sums in found] == [[3, 3], [1, 2], [1, 1]]


CONTEXTS = [ShortContext(4, 2), ShortContext(8, 4), ShortContext(6, 1)]


@torch.no_grad()
def loss_with_context(model, document, t, num_before):
    logits = model(document[None, t - num_before : t], use_cache=False).logits[0, -1]
    return -logits.log_softmax(dim=0)[document[t]].item()


@pytest.mark.parametrize("lengths", [[21], [13, 8, 17]])
def test_losses_by_context_are_of_the_same_tokens_each_with_the_context_it_says(lengths):
    model, tokens = models.tiny("gpt2"), models.some_tokens(2, sum(lengths))
    positions = torch.cat([torch.arange(length) for length in lengths]).expand(2, -1)
    labels = tokens.clone()
    labels[0, 10] = labels[1, 0] = labels[1, 12] = -100
    expected = torch.zeros(len(CONTEXTS) + 1, 2, 2, dtype=torch.float64)
    for row in range(2):
        for start, length in zip(accumulate([0, *lengths]), lengths):
            document = tokens[row, start : start + length]
            for t in range(8, length):
                if labels[row, start + t] != -100:
                    sizes = [size - stride + (t - size) % stride for size, stride in [(4, 2), (8, 4), (6, 1)]]
                    losses = [loss_with_context(model, document, t, num_before) for num_before in [*sizes, t]]
                    expected[:, row] += torch.tensor([[loss, 1] for loss in losses], dtype=torch.float64)
    position_ids = None if len(lengths) == 1 else positions
    found = losses_by_context(
        [Scorer(model, context) for context in CONTEXTS],
        tokens,
        token_nll(model, tokens, position_ids),
        prediction_mask(labels, position_ids),
        position_ids,
    )
    # Two float64 computations of losses up to 10, summed over some 20 tokens.
    torch.testing.assert_close(
        torch.stack([torch.stack([*sums], dim=1) for sums in found]), expected, rtol=1e-11, atol=0
    )


def test_rows_too_short_for_the_largest_context_hold_no_token_to_compare():
    model, tokens = models.tiny("gpt2"), models.some_tokens(2, 8)
    scorers = [Scorer(model, context) for context in CONTEXTS]
    found = losses_by_context(scorers, tokens, token_nll(model, tokens), prediction_mask(tokens))
    assert [sums.num_tokens.tolist() for sums in found] == [[0, 0]] * 4
