"""What a context gives to a row, by a loop over its tokens."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tokenweight.data.context_gain import context_benefit

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
