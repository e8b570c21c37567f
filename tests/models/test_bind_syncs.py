"""How often a training step makes the host wait for the device: every wait drains the queue of a GPU."""

import sys
from collections import Counter
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

import models
from tokenweight import Scorer, ShortContext, parse_weighting, with_weighted_loss
from tokenweight.method import NonFinite, as_weighting, check_finite
from tokenweight.train.statistics import LateChecks

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


# One wait before the model runs, for all that a batch says; one for which tokens a selection has chosen, without which
# all would be read. Losses and weights are looked at later, where somebody collects what is checked.
@pytest.mark.parametrize(
    ("weighting", "settings", "expected"),
    [
        ("uniform", {}, {"inputs.py": 1}),
        ("longce", {}, {"inputs.py": 1}),
        ("dense", {}, {"inputs.py": 1}),
        ("sparse", {}, {"inputs.py": 1, "rows.py": 1}),
        ("dense", {"self_scored": True}, {"inputs.py": 1}),
        ("gain", {}, {"inputs.py": 1}),
        ("gain:interpolation=0", {}, {"inputs.py": 1, "rows.py": 1}),
        ("expected(gain)", {"self_scored": True}, {"inputs.py": 1}),
    ],
)
@pytest.mark.parametrize("collected", [True, False])
def test_a_step_waits_for_the_device_as_few_times_as_its_checks_need(weighting, settings, expected, collected):
    step, checks = bound_step(weighting, **settings), LateChecks(lambda error, where: error)
    found = Counter()
    with checks.collecting(None) if collected else nullcontext():
        places = waits_of(step)
    for (package, _, file), count in places.items():
        # The number of transformers differs from version to version; `vanishes` asks numbers on the host.
        if package != "transformers" and file != "expected.py":
            found[file] += count
    looks = found.pop("finite.py", 0)
    assert found == expected
    assert looks == 0 if collected else looks > 0


def test_a_scorer_that_is_told_of_documents_waits_for_them_and_no_more():
    model, tokens = models.tiny("gpt2").train(), models.some_tokens(1, 24)
    with_weighted_loss(model, parse_weighting("dense"), Scorer(model, ShortContext(8, 4)))
    positions = torch.cat([torch.arange(11), torch.arange(13)])[None]
    labels = tokens.masked_fill(positions == 0, -100)
    with LateChecks(lambda error, where: error).collecting(None):
        places = waits_of(lambda: model(tokens, labels=labels, position_ids=positions).loss.backward())
    found = Counter()
    for (package, _, file), count in places.items():
        if package == "tokenweight" and file != "scoring.py":  # where positions are on the host
            found[file] += count
    assert found == {"inputs.py": 1, "scorer.py": 2, "causal.py": 1}


@pytest.mark.parametrize("step", [1, 2])
def test_what_is_not_finite_is_raised_a_step_later_with_its_place(step):
    checks, finite = LateChecks(lambda error, where: ValueError(f"{where}: {error}")), torch.rand(2, 4)
    wrong, mask = finite.clone(), torch.ones(2, 4, dtype=torch.bool)
    wrong[1, 2], wrong[1, 3], wrong[0, 0] = torch.inf, torch.nan, torch.nan
    mask[0, 0] = False
    for number in range(1, 4):
        for micro in "ab":
            with checks.collecting(f"step {number}{micro}"):
                here = (number, micro) == (step, "b")
                check_finite({"the long loss": finite, "the short loss": wrong if here else finite}, mask)
        if number == step + 1:
            expected = f"step {step}b: the short loss of row 1, position 2 is inf"
            with pytest.raises(ValueError, match=expected):
                checks.step()
            break
        checks.step()
    with pytest.raises(NonFinite, match="the long loss of row 1, position 2 is inf"):  # again at once
        check_finite({"the long loss": wrong}, mask)


def test_the_last_step_is_looked_at_when_all_is_done():
    checks = LateChecks(lambda error, where: error)
    with checks.collecting(None):
        check_finite({"the long loss": torch.tensor([[1.0, torch.nan]])}, torch.ones(1, 2, dtype=torch.bool))
    with pytest.raises(NonFinite, match="the long loss of row 0, position 1 is nan"):
        checks.finish()
    checks.finish()


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
