"""Sums and bootstrap intervals against loops, an exact enumeration, and the truth of a simulation."""

import itertools
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tokenweight.evaluate import intervals, paired_difference
from tokenweight.evaluate.intervals import Difference, Sums, document_sums, row_sums

NAN = float("nan")


def sums(total, num_tokens):
    return Sums(torch.tensor(total, dtype=torch.float64), torch.tensor(num_tokens, dtype=torch.float64))


def some_sums(num_documents, *, seed=0):
    """Sums of documents of uneven length, for a model and its baseline on the same tokens."""
    generator = torch.Generator().manual_seed(seed)
    num_tokens = torch.randint(1, 50, (num_documents,), generator=generator).double()
    means = 3 + torch.randn(2, num_documents, generator=generator, dtype=torch.float64)
    return Sums(means[0] * num_tokens, num_tokens), Sums(means[1] * num_tokens, num_tokens)


def test_rows_are_summed_over_their_weights_and_what_weighs_nothing_is_not_read():
    values = torch.tensor([[NAN, 0.1, 2.0, math.inf], [0.1, 0.2, NAN, 0.3], [NAN, NAN, NAN, NAN]])
    weights = torch.tensor([[0.0, 0.5, 3.0, 0.0], [1.0, 1.0, 0.0, 2.0], [0.0, 0.0, 0.0, 0.0]])
    third, fifth, tenth = (torch.tensor(value).double().item() for value in (0.3, 0.2, 0.1))
    weighted, counted = row_sums(values, weights), row_sums(values, weights > 0)
    # Two or three roundings of float64; in float32 the numbers would be off by 1e-8.
    assert weighted.total.tolist() == pytest.approx([0.5 * tenth + 6, tenth + fifth + 2 * third, 0], rel=1e-15)
    assert weighted.num_tokens.tolist() == [3.5, 4, 0]
    assert counted.total.tolist() == pytest.approx([tenth + 2, tenth + fifth + third, 0], rel=1e-15)
    assert counted.num_tokens.tolist() == [2, 3, 0]


def test_the_mean_of_a_mask_is_a_share_of_tokens():
    chosen = torch.tensor([[True, True, False, True], [False, False, True, False]])
    mask = torch.tensor([[False, True, True, True], [False, True, True, False]])
    assert row_sums(chosen & mask, mask).mean == 3 / 5


def test_the_mean_counts_tokens_not_documents_and_is_nan_without_any():
    assert sums([8.0, 3.0], [4.0, 1.0]).mean == 11 / 5
    assert math.isnan(sums([0.0, 0.0], [0.0, 0.0]).mean)


def test_rows_of_one_document_are_added_up_in_the_order_of_documents():
    rows = sums([1.0, 2.0, 4.0, 8.0, 16.0], [1.0, 3.0, 5.0, 7.0, 9.0])
    added = document_sums(rows, ["b", "a", "b", "c", "b"])
    assert (added.total.tolist(), added.num_tokens.tolist()) == ([21, 2, 8], [15, 3, 7])


def test_a_name_for_each_row_is_asked_for():
    with pytest.raises(ValueError, match="names 1 rows: expected one name for each of 2 rows"):
        document_sums(sums([1.0, 2.0], [1.0, 1.0]), ["a"])


@given(st.integers(2, 9), st.integers(0, 1000))
def test_equal_models_differ_by_exactly_nothing(num_documents, seed):
    model, _ = some_sums(num_documents, seed=seed)
    found = paired_difference(model, Sums(*(column.clone() for column in model)), num_resamples=50)
    assert found == Difference(0.0, (0.0, 0.0), num_documents)


@given(st.integers(2, 9), st.integers(0, 1000), st.floats(-2, 2))
def test_a_model_worse_by_the_same_on_every_token_is_worse_by_that_in_every_draw(num_documents, seed, by):
    baseline, _ = some_sums(num_documents, seed=seed)
    model = Sums(baseline.total + by * baseline.num_tokens, baseline.num_tokens)
    # Means of up to 6 nats, of a few documents: a few roundings of 6 * 2**-53 each.
    close = pytest.approx(by, abs=2e-14)
    found = paired_difference(model, baseline, num_resamples=50)
    assert (found.value, *found.interval) == (close, close, close)


@given(st.integers(2, 9), st.integers(0, 1000))
def test_exchanged_models_have_the_mirrored_interval(num_documents, seed):
    model, baseline = some_sums(num_documents, seed=seed)
    found, mirrored = paired_difference(model, baseline), paired_difference(baseline, model)
    assert mirrored.value == -found.value
    assert mirrored.interval == pytest.approx((-found.interval[1], -found.interval[0]), rel=1e-12)  # interpolated


def test_the_limits_are_percentiles_of_the_differences_of_all_possible_draws():
    model, baseline = some_sums(5)
    differences = []
    for drawn in itertools.product(range(5), repeat=5):
        means = [sum(s.total[i] for i in drawn) / sum(s.num_tokens[i] for i in drawn) for s in (model, baseline)]
        differences.append((means[0] - means[1]).item())
    found = paired_difference(model, baseline, level=0.9)
    assert found.value == pytest.approx(model.mean - baseline.mean, abs=0)
    for limit, share in zip(found.interval, (0.05, 0.95)):
        below = sum(value < limit - 1e-12 for value in differences) / len(differences)
        up_to = sum(value <= limit + 1e-12 for value in differences) / len(differences)
        # The share of 10,000 draws below their true percentile has a standard deviation of sqrt(.05 * .95 / 10000) =
        # 0.0022; four of them.
        assert below - 0.0088 <= share <= up_to + 0.0088


def test_the_interval_holds_the_truth_as_often_as_documented_and_pairing_removes_what_is_common_to_both_models():
    num_documents, num_trials, truth = 40, 500, 0.1
    generator = torch.Generator().manual_seed(1)
    num_tokens = torch.full((num_documents,), 20.0, dtype=torch.float64)
    hits, widths = 0, []
    for trial in range(num_trials):
        common, noise = torch.randn(2, num_documents, generator=generator, dtype=torch.float64)
        baseline = 4 + 10 * common  # unpaired, this alone would make the interval some ten times as wide
        model = baseline + truth + noise
        found = paired_difference(
            Sums(model * num_tokens, num_tokens), Sums(baseline * num_tokens, num_tokens), num_resamples=400, seed=trial
        )
        low, high = found.interval
        hits += low <= truth <= high
        widths.append(high - low)
    # Student's t with 39 degrees of freedom is below 1.96 * sqrt(39 / 40) with probability 0.940; 500 trials find that
    # to within sqrt(.94 * .06 / 500) = 0.0106. Three of them; limits from 400 draws cost another 0.003.
    assert hits / num_trials == pytest.approx(0.940, abs=0.035)
    # 2 * 1.96 standard errors of the noise alone, 1 / sqrt(40), whose estimate in a trial has a bias of 2 %.
    assert sum(widths) / num_trials == pytest.approx(2 * 1.96 / math.sqrt(40), rel=0.05)


def test_a_seed_gives_the_same_interval_whatever_is_drawn_elsewhere_and_another_seed_another(monkeypatch):
    model, baseline = some_sums(12)
    torch.manual_seed(0)
    first = paired_difference(model, baseline, seed=3)
    torch.manual_seed(1)
    assert paired_difference(model, baseline, seed=3) == first
    other = paired_difference(model, baseline, seed=4)
    assert other.value == first.value
    assert other.interval != first.interval
    monkeypatch.setattr(intervals, "_CHUNK", 100)  # eight resamples at a time
    assert paired_difference(model, baseline, seed=3) == first


def test_a_wider_level_gives_a_wider_interval():
    model, baseline = some_sums(12)
    (low, high), (lower, higher) = (paired_difference(model, baseline, level=level).interval for level in (0.8, 0.95))
    assert lower < low < model.mean - baseline.mean < high < higher


def test_documents_without_tokens_change_nothing():
    model, baseline = some_sums(6)
    zero = torch.zeros(2, dtype=torch.float64)
    longer = [Sums(*(torch.cat([zero, column, zero]) for column in found)) for found in (model, baseline)]
    assert paired_difference(*longer) == paired_difference(model, baseline)


@pytest.mark.parametrize(
    ("model", "baseline", "value", "num_documents"),
    [
        (sums([6.0], [2.0]), sums([2.0], [2.0]), 2.0, 1),
        (sums([6.0, 0.0], [2.0, 0.0]), sums([2.0, 0.0], [2.0, 0.0]), 2.0, 1),
        # All three drawn documents may be the second, in which the baseline has no token.
        (sums([6.0, 1.0, 1.0], [2.0, 1.0, 1.0]), sums([2.0, 0.0, 2.0], [2.0, 0.0, 2.0]), 1.0, 3),
        (sums([0.0, 0.0], [0.0, 0.0]), sums([0.0, 0.0], [0.0, 0.0]), NAN, 0),
        (sums([], []), sums([], []), NAN, 0),
    ],
)
def test_where_no_honest_interval_can_be_made_there_is_none(model, baseline, value, num_documents):
    found = paired_difference(model, baseline)
    assert found.value == pytest.approx(value, abs=0, nan_ok=True)
    assert (found.interval, found.num_documents) == (None, num_documents)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"baseline": sums([1.0], [1.0])}, "sums of 2 documents, the baseline of 1: expected the same documents"),
        ({"model": sums([1.0, NAN], [1.0, 1.0])}, "the sums of the model are not all finite"),
        ({"baseline": sums([1.0, math.inf], [1.0, 1.0])}, "the sums of the baseline are not all finite"),
        ({"level": 1.0}, "level=1.0, .*: expected level between 0 and 1"),
        ({"level": 0.0}, "level=0.0, .*: expected level between 0 and 1"),
        ({"level": 0.9, "num_resamples": 19}, "num_resamples=19: expected .* at least 2 / "),
        ({"num_resamples": 0}, "num_resamples=0: expected .* at least 2 / "),
    ],
)
def test_what_makes_no_sense_is_refused(changes, message):
    given = {"model": sums([1.0, 2.0], [1.0, 1.0]), "baseline": sums([2.0, 2.0], [1.0, 1.0]), **changes}
    with pytest.raises(ValueError, match=message):
        paired_difference(given.pop("model"), given.pop("baseline"), **given)
