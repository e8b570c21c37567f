"""LongPPL of two models that judge alike: by hand, and for equally good models over many seeds."""

import datasets
import numpy as np
import pytest
import torch

from tokenweight import LongCE
from tokenweight.data import key_tokens
from tokenweight.evaluate import Measure, Rows, compare, notes, pair_measures, paired_difference
from tokenweight.evaluate.intervals import Sums
from tokenweight.evaluate.losses import TOKEN_WEIGHTS

NAMES = ("longppl", "longppl_soft")
DOCUMENTS, TOKENS = 60, 100


def rows_of(lengths, documents):
    tokens = [[0] * length for length in lengths]
    return Rows(datasets.Dataset.from_dict({"input_ids": tokens, "document": documents}), np.array(lengths))


def empty_measures():
    return [Measure(name, "long", "perplexity", "lower", [], [], judge="self") for name in NAMES]


def test_a_token_has_the_mean_of_both_weights_and_both_models_are_summed_over_it():
    rows = rows_of([3, 2, 2], list("aab"))
    own = np.array([(1, 2, 1), (0, 0, np.nan), (0, 1, 4), (1, 5, 0.5), (0, 1, 3), (0, 1, 1), (1, 1, 2)], TOKEN_WEIGHTS)
    other = np.array(
        [(1, 3, 2), (0, 0, np.nan), (1, 4, 3), (0, 1, 1.5), (0, 1, 3), (0, 1, 2), (0, 3, 1)], TOKEN_WEIGHTS
    )
    other_measure = Measure("all", "cost", "nats", "lower", [1.0, 2.0], [5.0, 2.0])
    key, soft, kept = pair_measures([*empty_measures(), other_measure], own, other, rows)
    assert kept == other_measure
    assert (key.total, key.num_tokens) == ([1 + 0.5 * 4 + 0.5 * 0.5, 0.5 * 2], [2.0, 0.5])
    assert key.baseline_total == [2 + 0.5 * 3 + 0.5 * 1.5, 0.5 * 1]
    assert (soft.total, soft.num_tokens) == ([2.5 + 2.5 * 4 + 3 * 0.5 + 3, 1 + 2 * 2], [9.0, 3.0])
    assert soft.baseline_total == [2.5 * 2 + 2.5 * 3 + 3 * 1.5 + 3, 2 + 2 * 1]
    assert (key.judge, soft.judge) == ("pair", "pair")
    again, _ = pair_measures(empty_measures(), other, own, rows)  # the other way round
    assert (again.total, again.baseline_total, again.num_tokens) == (key.baseline_total, key.total, key.num_tokens)


def judged(truth, noise, generator):
    """`TOKEN_WEIGHTS` of a model whose losses have errors of their own, and its losses."""
    long, short = (nll + noise * torch.randn(nll.shape, generator=generator, dtype=nll.dtype) for nll in truth)
    mask = torch.ones(1, DOCUMENTS * TOKENS, dtype=torch.bool)
    found = np.empty(mask.numel(), TOKEN_WEIGHTS)
    found["key"], found["soft"] = key_tokens(long, short, mask)[0], LongCE()(long, short, mask)[0]
    found["nll"] = long[0]
    return found


def by_baseline(model, baseline, field):
    """Sums of both models over the tokens that the baseline alone chose."""
    weight = baseline[field].astype(float)
    sums = [(weight * judge["nll"]).reshape(DOCUMENTS, TOKENS).sum(axis=1) for judge in (model, baseline)]
    number = torch.from_numpy(weight.reshape(DOCUMENTS, TOKENS).sum(axis=1))
    return [Sums(torch.from_numpy(total), number) for total in sums]


@pytest.mark.slow
@pytest.mark.parametrize("noise", [0.3, 0.5])
def test_of_equal_models_the_interval_holds_that_they_are_equal_as_often_as_it_says(noise):
    rows = rows_of([TOKENS] * DOCUMENTS, [str(number) for number in range(DOCUMENTS)])
    holds = {name: {"pair": 0, "baseline": 0} for name in NAMES}
    for seed in range(200):
        generator = torch.Generator().manual_seed(seed)
        shape = (1, DOCUMENTS * TOKENS)
        long = torch.empty(shape, dtype=torch.float64).exponential_(0.5, generator=generator)
        # Of most tokens the context tells little; of a tenth it tells about what makes a key token.
        gain = 0.3 * torch.randn(shape, generator=generator, dtype=torch.float64)
        gain += 2 * torch.rand(shape, generator=generator) * 2 * (torch.rand(shape, generator=generator) < 0.1)
        model, baseline = (judged((long, long + gain), noise, generator) for _ in range(2))
        for measure in pair_measures(empty_measures(), model, baseline, rows):
            pairs = {
                "pair": (measure.sums, measure._replace(total=measure.baseline_total).sums),
                "baseline": by_baseline(model, baseline, {"longppl": "key", "longppl_soft": "soft"}[measure.name]),
            }
            for judge, sums in pairs.items():
                low, high = paired_difference(*sums, num_resamples=400).interval
                holds[measure.name][judge] += low <= 0 <= high
    for name, found in holds.items():
        assert 180 <= found["pair"] <= 198, (name, found)  # 95 %, give or take three standard errors
        assert found["baseline"] < 100, (name, found)  # the baseline is flattered by its own choice


def with_judges(*judges):
    """A table of LongPPL in which these judged, each model worse than the first in every document."""
    table = []
    for number, judge in enumerate(judges):
        total = [value * (1 + number / 10) for value in (10.0, 12.0, 9.0, 11.0)]
        beside = [10.0, 12.0, 9.0, 11.0] if judge == "pair" else None
        measure = Measure("longppl", "long", "perplexity", "lower", total, [5.0] * 4, True, judge, beside)
        table.append((f"m{number}", [measure]))
    return compare(table)


def test_no_interval_and_no_best_value_where_one_of_the_two_models_judged():
    for judges, clear in {
        ("self", "pair", "pair"): [True, True],
        ("third", "third", "third"): [True, True],
        ("self", "third", "third"): [False, False],
        ("third", "self", "third"): [False, True],
        (None, None, None): [True, True],
    }.items():
        table = with_judges(*judges)
        found = [entry for (entry,) in table[1:]]
        assert [entry.clear for entry in found] == clear
        assert [entry.low is not None for entry in found] == clear
        assert all(entry.change is not None and entry.change > 1 for entry in found)
        assert table[0][0].best == ("self" not in judges)
        said = [line for line in notes(table) if "LongPPL" in line and "ratios" not in line]
        assert len(said) == ("self" in judges)
        assert not any("too few" in line for line in notes(table))


def test_a_pair_without_a_token_has_neither_value_nor_change():
    first = Measure("longppl", "long", "perplexity", "lower", [0.0], [0.0], judge="self")
    other = first._replace(judge="pair", baseline_total=[0.0])
    (entry,) = compare([("a", [first]), ("b", [other])])[1]
    assert (entry.value, entry.change) == (None, None)
    # The baseline alone may choose none where the other does.
    other = other._replace(total=[4.0], num_tokens=[2.0], baseline_total=[2.0])
    (entry,) = compare([("a", [first]), ("b", [other])])[1]
    assert entry.change == pytest.approx(np.e)
