"""The weightings of other papers: each against its formula, written out in float64, and against known numbers."""

import itertools
import math

import pytest
import torch
from weighed import KIN, some

from tokenweight.method import (
    ESLM,
    EXACT,
    BoundedGain,
    Dense,
    Expected,
    FirstWindow,
    Gain,
    KeyTokens,
    LongCE,
    LongFilter,
    Mix,
    Normalized,
    Rho1,
    Uniform,
    Warmup,
)

MEAN_ONE = [
    *(Gain(0.25), BoundedGain(0.0), LongFilter(), KeyTokens(1.0, -4.0), Rho1(), Expected(Dense()), Expected(Gain(0.0))),
    *(Normalized(LongCE()), Mix(Dense(), KeyTokens()), Warmup(Dense(), 30.0), FirstWindow(Dense(), 6)),
]


def assert_rows(weighting, formula, seed=0, **more):
    """The weights of each row are those of a function of the lists of its tokens under the mask."""
    long, short, mask, used = some(seed=seed)
    weights = weighting(long, short, mask, **used, **more)
    for row in range(len(mask)):
        chosen = mask[row]
        values = [one[row][chosen].tolist() for one in (long, short, used["ref_nll"], used["positions"])]
        assert weights[row][chosen].tolist() == pytest.approx(formula(*values), rel=1e-12, abs=1e-12)
        assert not weights[row][~chosen].any()


def mixed(scores, share):
    scores = [max(score, 0.0) for score in scores]
    mean = sum(scores) / len(scores)
    return [share + (1 - share) * (score / mean if mean else 1.0) for score in scores]


@pytest.mark.parametrize("share", [0.0, 0.3])
def test_scores_of_one_sign_are_mixed_with_one_as_in_dense(share):
    assert_rows(Gain(share), lambda long, short, *_: mixed([b - a for a, b in zip(long, short)], share))
    assert_rows(
        BoundedGain(share),
        lambda long, short, *_: mixed([1 - math.exp(-b) / math.exp(-a) for a, b in zip(long, short)], share),
    )
    assert_rows(
        LongFilter(share),
        lambda long, short, *_: mixed([math.exp(-a) * (b - a) for a, b in zip(long, short)], share),
    )


def test_longfilter_scores_the_worked_example_as_known_numbers_have_it():
    # Table 1 of Helm et al.: an apostrophe, qu, books, Mel, prints, inspired.
    long = torch.tensor([0.04, 0.02, 0.26, 3.76, 7.82, 8.75], dtype=torch.float64)
    short = torch.tensor([0.72, 0.63, 0.46, 4.84, 8.82, 8.49], dtype=torch.float64)
    expected = [0.653, 0.598, 0.154, 0.025, 0.0004, -0.00004]
    assert LongFilter().score(long, short).tolist() == [pytest.approx(one, rel=0.03) for one in expected]


def test_a_bounded_gain_is_at_most_one_and_does_not_overflow():
    scores = BoundedGain().score(torch.tensor([0.0, 500.0, 1.0]), torch.tensor([500.0, 0.0, 1.0]))
    assert scores.tolist() == [1.0, 0.0, 0.0]


def test_key_tokens_share_the_weight_and_without_any_all_weigh_one():
    def formula(long, short, *_):
        keys = [b - a > 1 and -a > -3 for a, b in zip(long, short)]
        return [key * len(keys) / sum(keys) for key in keys]

    assert_rows(KeyTokens(1.0, -3.0), formula)
    assert_rows(KeyTokens(50.0, -3.0), lambda long, *_: [1.0] * len(long))


def exact_of(counts, **settings):
    """Weights by bucket, where positions 8 to 15, 16 to 31 and so on have these counts of targets."""
    positions = torch.tensor([[8 << bucket for bucket, count in enumerate(counts) for _ in range(count)]])
    zeros, mask = torch.zeros(positions.shape, dtype=torch.float64), torch.ones(positions.shape, dtype=torch.bool)
    weights = EXACT(**settings)(zeros, zeros, mask, positions=positions)
    return {int(position): weight for position, weight in zip(positions[0], weights[0].tolist())}


def test_exact_weighs_the_tail_by_rarity_as_known_numbers_have_it():
    assert exact_of([4, 1], threshold=8) == pytest.approx({8: 1.125, 16: 1.25})
    assert exact_of([7, 4, 1], threshold=16) == pytest.approx({8: 1.0, 16: 1.125, 32: 1.25})
    assert exact_of([4, 1], threshold=8, gamma=0.0) == pytest.approx({8: 1.15, 16: 1.15})
    assert exact_of([4, 1], threshold=16) == pytest.approx({8: 1.0, 16: 1.15})
    assert exact_of([4, 1], threshold=1024) == {8: 1.0, 16: 1.0}


def test_exact_counts_targets_in_buckets_that_double_and_gains_alpha_in_the_tail():
    weighting = EXACT(alpha=0.3, gamma=0.7, threshold=20)
    long, short, mask, used = some(rows=4, length=300)
    observed = weighting.observe(long, short, mask, positions=used["positions"])
    edges = [0, 8, 16, 32, 64, 128, 256, 10**12]
    positions = used["positions"][mask].tolist()
    counts = [sum(low <= position < high for position in positions) for low, high in itertools.pairwise(edges)]
    assert observed.tolist() == [*counts, *[0] * 25]
    weights = weighting(long, short, mask, **used)[mask].tolist()
    tail = [weight for weight, position in zip(weights, positions) if position >= 32]
    assert sum(tail) / len(tail) == pytest.approx(1.3)
    assert {weight for weight, position in zip(weights, positions) if position < 32} == {1.0}


def test_exact_weighs_positions_that_were_never_trained_on():
    history = torch.zeros(32, dtype=torch.float64)
    zeros, mask = torch.zeros(1, 2), torch.ones(1, 2, dtype=torch.bool)
    weigh = EXACT(threshold=8)
    positions = torch.tensor([[0, 9]])
    assert weigh(zeros, zeros, mask, positions=positions, history=history).tolist() == [[1.0, pytest.approx(1.15)]]
    history[4] = 10
    assert weigh(zeros, zeros, mask, positions=positions, history=history)[0, 1] > 1.15


def test_rho1_keeps_the_largest_excess_losses_of_each_row():
    def formula(long, short, ref, _):
        excess = [a - r for a, r in zip(long, ref)]
        kept = sorted(excess, reverse=True)[: math.floor(0.6 * len(excess))]
        return [(one >= kept[-1]) * len(excess) / len(kept) for one in excess]

    assert_rows(Rho1(0.6), formula)
    long, short, mask, used = some()
    used["ref_nll"] = long + 10  # also where the trained model is better everywhere
    assert ((Rho1(0.6)(long, short, mask, **used) > 0).sum(dim=1) == (mask.sum(dim=1) * 0.6).long()).all()


@pytest.mark.parametrize("keep", [0.1, 0.6, 0.9])
@pytest.mark.parametrize("kind", [ESLM, lambda keep: Rho1(keep, over="batch")], ids=["eslm", "rho1"])
def test_over_the_batch_the_share_kept_is_that_of_the_largest_in_all_rows(kind, keep):
    weighting = kind(keep)
    long, short, mask, used = some(rows=6, length=900)
    weights = weighting(long, short, mask, **used)
    values = (long if isinstance(weighting, ESLM) else long - used["ref_nll"])[mask]
    kept = weights[mask] > 0
    assert weights[mask][kept].unique().tolist() == pytest.approx([1 / keep])
    assert values[kept].min() > values[~kept].max()
    assert kept.double().mean().item() == pytest.approx(keep, abs=0.003)
    assert (weights[mask].mean() - 1).abs() < 0.02


def test_a_threshold_is_that_of_all_tokens_of_a_batch_wherever_they_were():
    weighting = ESLM(0.5)
    long, short, mask, _ = some(rows=4, length=500)
    together = weighting(long, short, mask)
    parts = [weighting.observe(long[rows], short[rows], mask[rows]) for rows in ([0, 1], [2], [3])]
    assert torch.equal(weighting(long[:1], short[:1], mask[:1], history=sum(parts)), together[:1])


def test_small_losses_are_told_apart():
    long = torch.rand(1, 5000, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * 0.05
    mask = torch.ones(1, 5000, dtype=torch.bool)
    kept = ESLM(0.9)(long, long, mask) > 0
    assert kept.double().mean().item() == pytest.approx(0.9, abs=0.005)


@pytest.mark.parametrize("weighting", MEAN_ONE, ids=str)
def test_the_mean_weight_of_a_row_is_one(weighting):
    long, short, mask, used = some()
    mean = weighting(long, short, mask, **used).sum(dim=1) / mask.sum(dim=1)
    torch.testing.assert_close(mean, torch.ones_like(mean), rtol=1e-12, atol=0)


@pytest.mark.parametrize("weighting", KIN, ids=str)
def test_rows_padding_and_what_is_outside_the_mask_change_nothing(weighting):
    long, short, mask, used = some()
    expected = weighting(long, short, mask, **used)
    assert not expected[:, 0].any()
    assert not expected.isnan().any()
    order = torch.tensor([2, 0, 1])
    permuted = weighting(long[order], short[order], mask[order], **{name: one[order] for name, one in used.items()})
    torch.testing.assert_close(permuted, expected[order], rtol=1e-12, atol=0)

    def pad(values, value):
        values = torch.nn.functional.pad(values, (0, 13), value=value)
        return values if values.dtype == torch.bool else values.where(torch.nn.functional.pad(mask, (0, 13)), value)

    noise = {name: pad(one, 7 if name == "positions" else math.nan) for name, one in used.items()}
    padded = weighting(pad(long, math.inf), pad(short, math.nan), pad(mask, False), **noise)
    torch.testing.assert_close(padded[:, :40], expected, rtol=1e-12, atol=0)
    assert not padded[:, 40:].any()


@pytest.mark.parametrize("weighting", KIN, ids=str)
def test_a_weighting_says_truly_whether_it_is_pointwise_and_whether_it_reads_losses(weighting):
    """What a token weighs with others beside it, given the same history, and with other losses."""
    long, short, mask, used = some()
    seen = []
    expected = weighting(long, short, mask, **used, history=lambda observed: seen.append(observed) or observed)
    history = {"history": seen[0]} if weighting.history else {}
    if weighting.history:
        assert seen[0].dtype == torch.float64
        assert seen[0].shape == (weighting.history,)
    if weighting.pointwise:
        shuffled = [one.flatten()[None] for one in (long, short, mask)]
        alone = weighting(*shuffled, **{name: one.flatten()[None] for name, one in used.items()}, **history)
        torch.testing.assert_close(alone.view(expected.shape), expected, rtol=1e-12, atol=0)
    if not weighting.uses_short:
        assert torch.equal(weighting(long, long, mask, **used), expected)
    if not weighting.of_losses:
        assert torch.equal(weighting(long + 1, short * 2, mask, **used, **history), expected)
    for name in used.keys() - weighting.uses:
        rest = {other: one for other, one in used.items() if other != name}
        assert torch.equal(weighting(long, short, mask, **rest), expected)


def test_flags_are_those_of_the_formula():
    assert EXACT().pointwise
    assert not EXACT().of_losses
    assert not Uniform().of_losses
    assert ESLM().of_losses
    assert Rho1().history == 0
    assert Rho1(over="batch").history == ESLM().history > 0
