"""The context gain of a row, by a loop over its tokens."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tokenweight.data.context_gain import gains_of_rows

LOSSES = st.floats(0, 8, width=32)


@given(st.lists(st.tuples(LOSSES, LOSSES, st.booleans()), min_size=1, max_size=30))
def test_the_gain_of_a_row_is_that_of_its_tokens_under_the_mask(rows):
    long, short, mask = (torch.tensor(column)[None] for column in zip(*rows))
    found = gains_of_rows(long.double(), short.double(), mask)
    gains = [short - long for long, short, counts in rows if counts]
    if not gains:
        assert all(math.isnan(value.item()) for value in found)
        return
    num_keys = sum(short - long > 2 and long < 2 for long, short, counts in rows if counts)
    assert found.gain_mean.item() == pytest.approx(np.mean(gains), abs=1e-12)
    assert found.gain_positive.item() == sum(b > 0 for b in gains) / len(gains)
    assert found.gain_p90.item() == pytest.approx(np.percentile(gains, 90), abs=1e-12)
    assert found.key_token_ratio.item() == num_keys / len(gains)
