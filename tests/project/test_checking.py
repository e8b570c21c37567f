"""The tests check the signatures of the package while they run."""

import beartype
import jaxtyping
import pytest
import torch

from tokenweight import ShortContext, linear_nll
from tokenweight.records.counts import counted


def test_a_wrong_shape_and_a_wrong_type_are_noticed():
    states, head, targets = torch.zeros(3, 4), torch.zeros(7, 4), torch.zeros(3, dtype=torch.long)
    assert linear_nll(states, head, targets).shape == (3,)
    for wrong in ((states[:, :2], head, targets), (states, head, targets[:2]), (states, head, targets.float())):
        with pytest.raises(jaxtyping.TypeCheckError):
            linear_nll(*wrong)
    with pytest.raises(jaxtyping.TypeCheckError):
        ShortContext.of("8")
    with pytest.raises(beartype.roar.BeartypeCallHintViolation):  # a signature without shapes
        counted("8", "token")
