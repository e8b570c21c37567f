"""How often a training step makes the host wait for the device: every wait drains the queue of a GPU."""

import sys
from collections import Counter
from pathlib import Path

import pytest
import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

import models
from tokenweight import Scorer, ShortContext, parse_weighting, with_weighted_loss
from tokenweight.method import as_weighting

aten = torch.ops.aten
# What needs a value, or a shape that depends on values, on the host.
WAITING = {
    aten._local_scalar_dense,
    aten.equal,
    aten.is_nonzero,
    aten.masked_select,
    aten.nonzero,
    aten.bincount,
    aten.repeat_interleave,
    aten._unique,
    aten._unique2,
    aten.unique_consecutive,
    aten.unique_dim,
}
COPIES = {torch.Tensor.tolist, torch.Tensor.numpy, torch.Tensor.cpu}
"""These read the memory of a CPU without any operation; on a GPU they wait."""


class CountWaits(TorchDispatchMode):
    """Counts operations on a CPU that would wait on a GPU, by the innermost frame of tokenweight or transformers."""

    def __init__(self):
        super().__init__()
        self.places = Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        indexed = function.overloadpacket in (aten.index, aten.index_put, aten.index_put_, aten._index_put_impl_)
        by_mask = indexed and any(i is not None and i.dtype in (torch.bool, torch.uint8) for i in args[1])
        if function.overloadpacket in WAITING or by_mask:
            self.add(function.overloadpacket.__name__)
        return function(*args, **(kwargs or {}))

    def add(self, name):
        frame = sys._getframe()
        while frame and package(frame) not in ("tokenweight", "transformers"):
            frame = frame.f_back
        where = (package(frame), name, Path(frame.f_code.co_filename).name) if frame else ("elsewhere", name, "")
        self.places[where] += 1


def package(frame):
    return frame.f_globals.get("__name__", "").partition(".")[0]


class CountCopies(TorchFunctionMode):
    def __init__(self, waits):
        super().__init__()
        self.waits = waits

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function in COPIES:
            self.waits.add(function.__name__)
        return function(*args, **(kwargs or {}))


def waits_of(run):
    with CountWaits() as waits, CountCopies(waits):
        run()
    return waits.places


def bound_step(weighting, *, self_scored=False):
    """Forward and backward of a bound model, as a function, with stored scores where those are needed."""
    model, tokens = models.tiny().train(), models.some_tokens(2, 24)
    scorer = Scorer(model, ShortContext(8, 4))
    weighting = parse_weighting(weighting)
    short_nll = scorer(tokens) if weighting.uses_short and not self_scored else None
    with_weighted_loss(model, weighting, scorer if self_scored else None)
    return lambda: model(tokens, labels=tokens, short_nll=short_nll, num_items_in_batch=46).loss.backward()


# Which rows have a target and a weight is 1 wait per loss, of which dense and sparse have 2; labels and stored scores
# are checked before the model runs, losses and weights after; of a scorer its tokens, its loss, and the scores.
@pytest.mark.parametrize(
    ("weighting", "settings", "expected"),
    [
        ("uniform", {}, {"loss.py": 1, "weightings.py": 1}),
        ("longce", {}, {"inputs.py": 1, "loss.py": 1, "weightings.py": 1}),
        ("dense", {}, {"inputs.py": 1, "loss.py": 2, "weightings.py": 1}),
        ("sparse", {}, {"inputs.py": 1, "loss.py": 2, "weightings.py": 1}),
        ("dense", {"self_scored": True}, {"inputs.py": 1, "loss.py": 3, "weightings.py": 2, "scorer.py": 1}),
    ],
)
def test_a_step_waits_for_the_device_as_few_times_as_its_checks_need(weighting, settings, expected):
    step = bound_step(weighting, **settings)
    found = Counter()
    for (package, _, file), count in waits_of(step).items():
        if package != "transformers":  # whose number differs from version to version
            found[file] += count
    assert found == expected


def test_a_mask_without_padding_costs_a_scorer_one_wait():
    model, tokens = models.tiny(), models.some_tokens(4, 24)
    scorer, mask = Scorer(model, ShortContext(8, 4)), torch.ones_like(tokens)
    without, beside = (waits_of(lambda m=m: scorer(tokens, attention_mask=m)).total() for m in (None, mask))
    assert beside == without + 1


def test_waits_are_counted_whoever_causes_them():
    numbers = torch.arange(6.0)
    waiting = [
        lambda: numbers[0].item(),
        lambda: bool(numbers.any()),
        lambda: numbers[numbers > 3],
        lambda: numbers.clone().index_put_((numbers > 3,), numbers[:2]),
        lambda: numbers.nonzero(),
        lambda: numbers.tolist(),
        lambda: torch.equal(numbers, numbers),
        lambda: numbers.masked_select(numbers > 3),
        lambda: numbers.unique(),
    ]
    assert [waits_of(run).total() for run in waiting] == [1] * len(waiting)
    free = [
        lambda: numbers[[4, 2]],
        lambda: numbers.argsort()[:3],
        lambda: numbers.where(numbers > 3, 0),
        lambda: numbers.masked_fill(numbers > 3, 0),
    ]
    assert [waits_of(run).total() for run in free] == [0] * len(free)


def test_a_weighting_is_given_finite_losses_though_all_are_checked_in_one_wait_after_it():
    given = []

    def note(long, short, mask):
        given.extend([long, short])
        return long

    long, short = torch.rand(2, 2, 4)
    long[1, 3], short[0, 2] = torch.inf, torch.nan
    with pytest.raises(ValueError, match="the long loss of row 1, position 3 is inf"):
        as_weighting(note)(long, short, torch.ones(2, 4, dtype=torch.bool))
    assert all(losses.isfinite().all() for losses in given)
