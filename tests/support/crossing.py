"""Combinations of parameters, of which `make test` runs a few."""

import itertools
from collections.abc import Sequence
from typing import Any

import pytest


def crossed(names: str, *values: Sequence[Any]) -> pytest.MarkDecorator:
    """All combinations of several parameters' values. Slow are those off the diagonal, on which each value occurs.

    A parameter of several names has tuples as values.
    """
    diagonal = {tuple(step % len(own) for own in values) for step in range(max(map(len, values)))}
    combinations = []
    for places in itertools.product(*(range(len(own)) for own in values)):
        chosen = [own[place] for own, place in zip(values, places)]
        flat = [part for one in chosen for part in (one if isinstance(one, tuple) else [one])]
        combinations.append(pytest.param(*flat, marks=() if places in diagonal else pytest.mark.slow))
    return pytest.mark.parametrize(names, combinations, ids=lambda value: getattr(value, "__name__", str(value)))
