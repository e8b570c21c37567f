"""What a context gives to a row, by a loop over its tokens."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import models
from tokenweight.benefit import context_benefit, key_tokens
from tokenweight.causal import num_before

LOSSES = st.floats(0, 8, width=32)


@given(st.lists(st.tuples(LOSSES, LOSSES, st.booleans()), min_size=1, max_size=30))
def test_the_benefit_of_a_row_is_that_of_its_tokens_under_the_mask(rows):
    long, short, mask = (torch.tensor(column)[None] for column in zip(*rows))
    found = context_benefit(long.double(), short.double(), mask)
    benefits = [short - long for long, short, counts in rows if counts]
    if not benefits:
        assert all(math.isnan(value.item()) for value in found)
        return
    num_keys = sum(short - long > 2 and long < 2 for long, short, counts in rows if counts)
    assert found.benefit_mean.item() == pytest.approx(np.mean(benefits), abs=1e-12)
    assert found.benefit_positive.item() == sum(b > 0 for b in benefits) / len(benefits)
    assert found.benefit_p90.item() == pytest.approx(np.percentile(benefits, 90), abs=1e-12)
    assert found.key_token_ratio.item() == num_keys / len(benefits)


def test_key_tokens_need_both_a_gain_and_a_likely_token():
    long = torch.tensor([0.5, 1.9, 2.0, 2.1, 0.5, 0.5])
    short = torch.tensor([3.0, 4.0, 9.0, 9.0, 2.5, 2.4])
    assert key_tokens(long, short).tolist() == [True, True, False, False, False, False]
    assert key_tokens(long, short, alpha=1.8, beta=-3.0).tolist() == [True] * 6


def test_tokens_before_a_token_are_counted_in_its_document():
    positions = torch.tensor([[0, 1, 2, 0, 0, 1], [0, 1, 7, 8, 0, 5]])  # in the second row, positions are skipped
    tokens = models.some_tokens(2, 6)
    assert num_before(tokens, positions).tolist() == [[0, 1, 2, 0, 0, 1], [0, 1, 2, 3, 0, 1]]
    assert num_before(tokens).tolist() == [list(range(6))] * 2
    # A row that begins in the middle of a document counts from its own first token.
    assert num_before(tokens[:1], torch.tensor([[5, 6, 0, 1, 2, 3]])).tolist() == [[0, 1, 0, 1, 2, 3]]
