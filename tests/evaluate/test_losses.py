"""Losses by position, computed by hand, and by context, with one forward pass per token."""

from itertools import accumulate

import pytest
import torch

import models
from tokenweight import Scorer, ShortContext, token_nll
from tokenweight.evaluate.losses import losses_by_context, position_edges, sums_by_position
from tokenweight.method import document_positions, prediction_mask


def test_what_is_outside_the_mask_is_not_read():
    nll, mask = torch.arange(14.0).view(2, 7), models.some_tokens(2, 7) % 2 == 0
    columns, edges = torch.arange(7).expand(2, 7), [0, 2, 7]
    assert mask.any(dim=1).all()
    for found, hidden in zip(*(sums_by_position(x, mask, columns, edges) for x in (nll, nll.where(mask, torch.nan)))):
        assert all(map(torch.equal, found, hidden))


def test_every_token_is_in_one_bin_and_small_losses_are_not_rounded_away_by_large_numbers_of_tokens():
    mask = torch.ones(3, 5000, dtype=torch.bool)
    nll, edges = torch.full(mask.shape, 0.1, dtype=torch.float32), position_edges(5000)
    bins = sums_by_position(nll, mask, torch.arange(5000).expand(mask.shape), edges)
    assert edges[-3:] == [2048, 4096, 5000]
    assert sum(sums.num_tokens.sum().item() for sums in bins) == mask.numel()
    # A sum of 7500 float32 numbers, one after the other, would be off by far more than one rounding of float64.
    assert [sums.mean for sums in bins] == pytest.approx([torch.tensor(0.1).item()] * len(bins), rel=1e-12)


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
