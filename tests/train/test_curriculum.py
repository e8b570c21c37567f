"""The lengths of steps: each length has its part of every cycle, short ones come first, and a seed decides."""

import collections
import doctest

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tokenweight.train import LengthCurriculum
from tokenweight.train.lengths import curriculum


@settings(max_examples=60)
@given(
    st.lists(st.floats(0.01, 1), min_size=1, max_size=6),
    st.integers(1, 90),
    st.integers(1, 12),
    st.sampled_from(["uniform", "linear", "pow2"]),
)
def test_each_length_has_had_its_part_of_the_steps_after_every_cycle(weights, steps, cycles, odds):
    parts = [weight / sum(weights) for weight in weights]
    order = LengthCurriculum(odds, cycles)
    had, total = collections.Counter(), 0
    for number in range(cycles + 2):  # also beyond the run
        drawn = order.cycle(number, parts, steps=steps, seed=3)
        had.update(drawn)
        total += len(drawn)
        assert total == (number + 1) * steps // cycles
        for place, part in enumerate(parts):
            assert abs(had[place] - total * part) < 2
        assert total != steps or number == cycles - 1 or steps < cycles


def test_the_examples_of_the_docstrings_are_true():
    assert doctest.testmod(curriculum).attempted == 2
    assert doctest.testmod(curriculum).failed == 0


def mean_places(odds):
    """Where in a cycle the steps of each of four lengths are on average, as a part of the cycle."""
    places = collections.defaultdict(list)
    for seed in range(80):
        drawn = LengthCurriculum(odds, 1).cycle(0, [0.25] * 4, steps=120, seed=seed)
        for place, length in enumerate(drawn):
            places[length].append(place / len(drawn))
    return [sum(found) / len(found) for _, found in sorted(places.items())]


def test_short_sequences_come_first_the_more_the_odds_differ():
    uniform, linear, pow2 = map(mean_places, ("uniform", "linear", "pow2"))
    assert uniform == pytest.approx([0.5] * 4, abs=0.03)
    for found in (linear, pow2):
        assert found == sorted(found)
    assert pow2[0] < linear[0] - 0.05 < uniform[0] - 0.1
    assert pow2[3] > linear[3] > 0.6


def test_the_first_step_of_a_cycle_has_the_odds_of_the_source():
    first = collections.Counter(
        LengthCurriculum("pow2", 1).cycle(0, [0.5, 0.25, 0.25], steps=8, seed=seed)[0] for seed in range(2000)
    )
    # Steps of each length, 4, 2 and 2, times 4, 2 and 1.
    assert [first[place] / 2000 for place in range(3)] == pytest.approx([16 / 22, 4 / 22, 2 / 22], abs=0.03)


def test_the_seed_and_the_number_of_the_cycle_decide():
    order = LengthCurriculum.parse("pow2:cycles=2")
    one, same, other = (order.cycle(0, [0.5, 0.5], steps=40, seed=seed) for seed in (1, 1, 2))
    assert one == same != other
    assert order.cycle(1, [0.5, 0.5], steps=40, seed=1) != one
    assert str(order) == "pow2:cycles=2"
    assert LengthCurriculum.parse("linear") == LengthCurriculum("linear", 8)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("grow", "^curriculum grow: expected uniform, linear, pow2"),
        ("pow2:cycles=0", "^curriculum pow2:cycles=0: cycles 0: expected at least 1"),
        ("pow2:cycles=many", "^curriculum pow2:cycles=many: found 'cycles=many': expected cycles"),
        ("pow2:steps=3", "^curriculum pow2:steps=3: found 'steps=3': expected cycles"),
    ],
)
def test_what_is_no_curriculum_is_refused(text, message):
    with pytest.raises(ValueError, match=message):
        LengthCurriculum.parse(text)
