"""Weights against the reference numbers, against the paper's worked example, and against what every scheme promises."""

import dataclasses
import json
import math
import re
import sys
import types
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import models
from tokenweight import NPMI, PPMI, Dense, LongCE, Sparse, Uniform, parse_weighting
from tokenweight.method import Custom, NonFinite, Weighting, as_weighting

GOLDEN = json.loads((Path(__file__).parents[1] / "golden" / "weights.json").read_text())
KINDS = {"dense": Dense, "sparse": Sparse, "longce": LongCE, "ppmi": PPMI, "npmi": NPMI}
SETTINGS = {
    "dense": ["interpolation"],
    "sparse": ["keep"],
    "longce": ["cap"],
    "ppmi": ["shift", "keep"],
    "npmi": ["shift", "keep"],
}
TOP = [Sparse(keep=0.3), PPMI(keep=0.3), NPMI(shift=1.5, keep=0.3)]
NORMALIZED = [Dense(), Dense(0.0), *TOP]
EVERY = [Uniform(), *NORMALIZED, LongCE(), as_weighting(models.emphasize)]


@st.composite
def some_losses(draw, min_valid=0):
    """Losses of a batch with a mask; rounding to few decimals makes scores equal."""
    random = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    shape = draw(st.integers(1, 4)), draw(st.integers(2, 60))
    decimals = draw(st.sampled_from([0, 1, 8]))
    long, short = (6 * torch.rand(2, *shape, generator=random, dtype=torch.float64)).round(decimals=decimals)
    mask = torch.rand(shape, generator=random) < draw(st.sampled_from([0.2, 0.8, 1.0]))
    mask[:, 1 : 1 + min_valid] = True
    mask[:, 0] = False
    return long, short, mask


def losses(*shape, seed=0, decimals=8, dtype=torch.float64):
    long, short = (6 * torch.rand(2, *shape, generator=torch.Generator().manual_seed(seed))).round(decimals=decimals)
    mask = torch.ones(shape, dtype=torch.bool)
    mask[:, 0] = False
    return long.to(dtype), short.to(dtype), mask


@pytest.mark.parametrize("case", range(len(GOLDEN)))
def test_weights_equal_those_of_the_reference_implementation(case):
    long, short = torch.tensor(GOLDEN[case]["long"]), torch.tensor(GOLDEN[case]["short"])
    mask = torch.ones_like(long, dtype=torch.bool)
    mask[:, 0] = False
    for name, expected in GOLDEN[case]["weights"].items():
        kind, *settings = name.split("_")
        values = dict(zip(SETTINGS[kind], map(float, settings)))
        weights = KINDS[kind](**values)(long, short, mask)
        assert (weights - torch.tensor(expected)).abs().max() < 1e-5, name


# Table 1 of the paper; "<.01" is taken for .005. The weight of each token is above or below 1 as printed.
TABLE = [0.26, 0.01, 0.07, 1.00, 0.29, 0.14, 0.005, 1.08, 0.61, 0.005, 0.01, 0.68, 0.20]
SIGNS = [1, -1, -1, -1, 1, 1, 1, -1, -1, 1, 1, -1, -1]  # "inspired": worse with the long context, yet above 1
ABOVE = [True, False, False, True, True, False, False, True, True, False, False, True, True]


@pytest.mark.parametrize("interpolation", [0.0, 0.75])
@pytest.mark.parametrize("row_mean", [0.15, 0.19])
def test_dense_raises_and_lowers_the_tokens_of_the_worked_example_as_printed(row_mean, interpolation):
    others = 100
    rest = (row_mean * (len(TABLE) + others) - sum(TABLE)) / others
    long = torch.tensor([[0.0, *(d * s for d, s in zip(TABLE, SIGNS)), *[rest] * others]], dtype=torch.float64)
    mask = torch.ones_like(long, dtype=torch.bool)
    mask[:, 0] = False
    weights = Dense(interpolation)(long, torch.zeros_like(long), mask)[0, 1 : 1 + len(TABLE)]
    assert (weights > 1).tolist() == ABOVE
    assert (weights < 1).tolist() == [not above for above in ABOVE]
    expected = interpolation + (1 - interpolation) * torch.tensor(TABLE, dtype=torch.float64) / row_mean
    torch.testing.assert_close(weights, expected)


@given(some_losses())
def test_without_any_preference_dense_and_sparse_are_plain_cross_entropy(arguments):
    ones = arguments[2].double()
    for weighting in (Uniform(), Dense(1.0), Sparse(keep=1.0)):
        torch.testing.assert_close(weighting(*arguments), ones, rtol=1e-12, atol=0)


@pytest.mark.parametrize("weighting", NORMALIZED, ids=str)
@given(some_losses(min_valid=1))
def test_the_mean_weight_of_a_row_is_one(weighting, arguments):
    mask = arguments[2]
    mean = weighting(*arguments).sum(dim=1) / mask.sum(dim=1)
    torch.testing.assert_close(mean, torch.ones_like(mean), rtol=1e-12, atol=0)


def slow_scores(weighting, long, short):
    if isinstance(weighting, NPMI):
        return [max(a - b - math.log(weighting.shift), 0) for a, b in zip(long, short)]
    if isinstance(weighting, PPMI):
        return [max(b - a - math.log(weighting.shift), 0) for a, b in zip(long, short)]
    return [abs(a - b) for a, b in zip(long, short)]


@pytest.mark.parametrize("weighting", [*TOP, Sparse(keep=0.01), PPMI(keep=0.9), NPMI(keep=0.7)], ids=str)
@given(some_losses())
def test_exactly_the_asked_share_is_kept_and_nothing_left_out_scores_higher(weighting, arguments):
    """Also where fewer scores are positive than asked for, which ties of zeros fill up."""
    for long, short, mask, weights in zip(*(tensor.tolist() for tensor in (*arguments, weighting(*arguments)))):
        valid = [t for t, is_valid in enumerate(mask) if is_valid]
        scores = slow_scores(weighting, long, short)
        kept = [t for t, weight in enumerate(weights) if weight]
        if not any(scores[t] for t in valid):
            assert [weights[t] for t in valid] == [1.0] * len(valid)
            continue
        assert len(kept) == max(1, math.floor(weighting.keep * len(valid)))
        assert set(kept) <= set(valid)
        assert [weights[t] for t in kept] == pytest.approx([len(valid) / len(kept)] * len(kept), rel=1e-12)
        assert min(scores[t] for t in kept) >= max((scores[t] for t in valid if t not in kept), default=0)


@pytest.mark.parametrize("weighting", TOP, ids=str)
def test_the_choice_among_equal_scores_is_independent_of_the_batch_and_of_padding(weighting):
    long, short, mask = losses(5, 80, decimals=0)  # at most 7 different scores for 79 tokens
    mask[:, 30:33] = False
    expected = weighting(long, short, mask)
    assert torch.equal(weighting(long, short, mask), expected)
    order = torch.tensor([3, 0, 4, 1, 2])
    assert torch.equal(weighting(long[order], short[order], mask[order]), expected[order])
    alone = torch.cat([weighting(long[i : i + 1], short[i : i + 1], mask[i : i + 1]) for i in range(5)])
    assert torch.equal(alone, expected)
    padded = [torch.nn.functional.pad(tensor, (0, 50), value=value) for tensor, value in ((long, 9.0), (short, 1.0))]
    padding_mask = torch.nn.functional.pad(mask, (0, 50), value=False)
    assert torch.equal(weighting(*padded, padding_mask)[:, :80], expected)
    reseeded = type(weighting)(**{**vars(weighting), "seed": weighting.seed + 1})
    assert not torch.equal(reseeded(long, short, mask), expected)


@pytest.mark.parametrize("seed", [0, 1, 2, -1, 2**40])
def test_the_choice_among_equal_scores_prefers_no_part_of_the_row(seed):
    long, short = torch.ones(1, 1001), torch.zeros(1, 1001)
    mask = torch.ones(1, 1001, dtype=torch.bool)
    mask[:, 0] = False
    quarters = Sparse(keep=0.2, seed=seed)(long, short, mask)[0, 1:].view(4, 250).count_nonzero(dim=1)
    assert quarters.sum() == 200
    # Hypergeometric with mean 50 and standard deviation 5.5; a fair order leaves 4 of them once in 4000 rows.
    assert (quarters - 50).abs().max() < 22


@pytest.mark.parametrize("weighting", NORMALIZED, ids=str)
def test_a_row_without_scores_weighs_one_and_a_row_without_tokens_nothing_whatever_the_other_rows(weighting):
    long, short, mask = losses(3, 20)
    short[0], mask[1] = long[0], False
    if isinstance(weighting, NPMI):
        short[0] = long[0] - 0.4  # below log(1.5), hence not a positive score
    weights = weighting(long, short, mask)
    assert weights[0].tolist() == [0.0] + [1.0] * 19
    assert weights[1].tolist() == [0.0] * 20
    torch.testing.assert_close(weights[2:], weighting(long[2:], short[2:], mask[2:]), rtol=1e-14, atol=0)


@given(some_losses(), st.sampled_from([0.5, 1.0, 2.0]), st.sampled_from([0.1, 0.5]))
def test_npmi_is_ppmi_with_long_and_short_exchanged(arguments, shift, keep):
    long, short, mask = arguments
    assert torch.equal(NPMI(keep, shift=shift)(long, short, mask), PPMI(keep, shift=shift)(short, long, mask))


@pytest.mark.parametrize(("weighting", "kept"), [(PPMI(keep=0.25), 2), (NPMI(keep=0.25), 3), (Sparse(keep=0.25), 3)])
def test_ppmi_prefers_what_the_long_context_predicts_better_and_npmi_the_opposite(weighting, kept):
    long = torch.tensor([[0.0, 3.0, 1.0, 7.0, 2.0]])
    short = torch.tensor([[0.0, 3.1, 4.0, 2.0, 2.0]])
    mask = torch.tensor([[False, True, True, True, True]])
    assert weighting(long, short, mask).tolist() == [[4.0 if t == kept else 0.0 for t in range(5)]]


@pytest.mark.parametrize("difference", [1000.0, -1000.0])
def test_longce_neither_overflows_nor_exceeds_its_cap(difference):
    long = torch.full((1, 2), 2000.0)
    mask = torch.tensor([[False, True]])
    weights = LongCE(cap=3.0)(long, long + difference, mask)
    assert weights.tolist() == [[0.0, pytest.approx(3.0 if difference > 0 else 0.0, rel=1e-6)]]


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("name", ["long", "short"])
@pytest.mark.parametrize("weighting", EVERY, ids=str)
def test_a_loss_that_is_not_finite_is_refused_by_name_and_place_but_ignored_outside_the_mask(weighting, name, value):
    long, short, mask = losses(2, 9)
    mask[1, 4] = False
    expected = weighting(long, short, mask)
    spoilt = {"long": long, "short": short}[name]
    spoilt[1, 4] = spoilt[0, 0] = value
    assert torch.equal(weighting(long, short, mask), expected)
    mask[1, 4] = True
    with pytest.raises(ValueError, match=rf"{name} loss of row 1, position 4 is {value}"):
        weighting(long, short, mask)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("weighting", EVERY, ids=str)
def test_weights_are_computed_in_float32_from_losses_of_less_and_carry_no_gradient(weighting, dtype):
    long, short, mask = losses(2, 50, dtype=dtype)
    weights = weighting(long.requires_grad_(), short.requires_grad_(), mask)
    assert weights.dtype == torch.float32
    assert not weights.requires_grad
    assert torch.equal(weights, weighting(long.float(), short.float(), mask))


@pytest.mark.parametrize("weighting", EVERY, ids=str)
def test_weights_of_float64_losses_stay_float64(weighting):
    long, short, mask = losses(2, 50)
    assert weighting(long, short, mask).dtype == weighting(long, short.float(), mask).dtype == torch.float64


def test_dense_weights_of_differences_close_to_zero_are_finite():
    short = torch.tensor([[0.0, 1e-42, 3e-42]])  # T / sum(s) overflows in float32; T * s / sum(s) need not
    weights = Dense(0.0)(torch.zeros_like(short), short, torch.tensor([[False, True, True]]))
    torch.testing.assert_close(weights, torch.tensor([[0.0, 0.5, 1.5]]), rtol=1e-3, atol=0)  # 714 denormal steps


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (lambda long, short, mask: long[:, 1:], r"weights of shape \[2, 8\]: expected \[2, 9\]"),
        (lambda long, short, mask: long / (long != long[1, 3]), "weight by .* of row 1, position 3 is inf"),
        (lambda long, short, mask: long.where(long != long[1, 3], torch.nan), "row 1, position 3 is nan"),
    ],
)
def test_a_function_that_returns_a_wrong_shape_or_number_is_refused(function, message):
    with pytest.raises(ValueError, match=message):
        as_weighting(function)(*losses(2, 9))


@pytest.mark.parametrize("thing", [Dense, "dense", 3, None])
@pytest.mark.usefixtures("unchecked")
def test_what_is_neither_a_weighting_nor_a_function_is_refused(thing):
    with pytest.raises(ValueError, match="expected an instance such as Dense"):
        as_weighting(thing)


@pytest.mark.usefixtures("unchecked")
def test_losses_and_mask_of_different_shapes_are_refused_by_the_shapes():
    long, short, mask = losses(2, 9)
    with pytest.raises(ValueError, match=r"\[2, 9\].*\[1, 9\].*\[2, 9\]"):
        Dense()(long, short[:1], mask)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("uniform", Uniform()),
        ("dense", Dense()),
        (" Dense:interpolation=0.5 ", Dense(0.5)),
        ("sparse:keep=0.1, seed=7", Sparse(0.1, 7)),
        ("longce:cap=2", LongCE(2.0)),
        ("ppmi:shift=2,keep=0.1", PPMI(shift=2.0, keep=0.1)),
        ("npmi", NPMI()),
        ("models.emphasize", Custom(models.emphasize)),
        ("models.Threshold:above=2", models.Threshold(2.0)),
    ],
)
def test_a_weighting_is_read_from_text(text, expected):
    assert parse_weighting(text) == expected


@pytest.mark.parametrize(
    "weighting", [*EVERY, Dense(0.1 + 0.2), PPMI(keep=1e-5, seed=99, shift=3.0), models.Threshold(2.5)], ids=str
)
def test_the_text_of_a_weighting_reads_back_as_the_weighting(weighting):
    assert parse_weighting(str(weighting)) == weighting


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("spars", r"'spars' \(did you mean 'sparse'\?\): expected one of uniform, dense, sparse, longce, ppmi, npmi"),
        ("", "unknown weighting ''"),
        ("dense:keep=0.2", "unknown setting 'keep' of weighting 'dense': expected one of interpolation"),
        ("ppmi:shfit=2", r"'shfit'.*\(did you mean 'shift'\?\): expected one of keep, seed, shift"),
        ("uniform:keep=1", "unknown setting 'keep' of weighting 'uniform': it has none"),
        ("dense:interpolation=much", "interpolation='much' is not a number"),
        ("sparse:seed=1.5", "seed='1.5' is not"),
        ("dense:interpolation", "interpolation='' is not a number"),
        ("dense:interpolation=1.5", r"Dense: interpolation=1.5 is not a number from 0 to 1"),
        ("dense:interpolation=nan", "interpolation=nan is not"),
        ("sparse:keep=0", "Sparse: keep=0.0 is not a share above 0"),
        ("npmi:keep=1.1", "NPMI: keep=1.1 is not"),
        ("ppmi:shift=0", "PPMI: shift=0.0 is not a finite number above 0"),
        ("longce:cap=inf", "LongCE: cap=inf is not a finite number"),
        ("models.nothing", "'models.nothing' cannot be imported: .*nothing"),
        ("no_such_package.function", "cannot be imported: No module named 'no_such_package'"),
        ("math.pi", "expected an instance"),
        ("models.emphasize:above=2", "a function takes no settings, found 'models.emphasize:above=2'"),
    ],
)
@pytest.mark.usefixtures("unchecked")
def test_text_that_is_no_weighting_is_refused_in_one_line_that_says_why(text, message):
    with pytest.raises(ValueError, match=message) as refusal:
        parse_weighting(text)
    assert "\n" not in str(refusal.value)


@dataclasses.dataclass(frozen=True)
class Typed(Weighting):
    """Settings of several types."""

    flag: bool = False
    cap: float | None = None
    num: int = 0
    word: str = "a"

    def weigh(self, long, short, mask):
        return torch.ones_like(long)


def test_settings_of_a_weighting_of_ones_own_have_the_types_that_it_says(monkeypatch):
    monkeypatch.setitem(sys.modules, "own", types.SimpleNamespace(Typed=Typed))
    assert parse_weighting("own.Typed:flag=true,cap=5,num=3,word=0.5") == Typed(True, 5.0, 3, "0.5")
    assert parse_weighting("own.Typed(flag=False, word='b')") == Typed(word="b")
    for text in ("flag=0", "cap=x", "num=0.5"):
        with pytest.raises(ValueError, match=f"{text[:3]}.* is not"):
            parse_weighting(f"own.Typed:{text}")


@pytest.mark.parametrize("text", [".emphasize", "..a.b", "collections.OrderedDict", "tokenweight.method.Weighting"])
@pytest.mark.usefixtures("unchecked")
def test_a_path_to_something_else_is_refused_by_the_path(text):
    with pytest.raises(ValueError, match=re.escape(text)):
        parse_weighting(text)


class Protocol(Weighting):
    """Reads all that can be read; the history counts tokens and sums up divergences."""

    uses = frozenset({"short_nll", "positions", "ref_nll", "divergence"})
    history = 2

    def weigh(self, long, short, mask, *, positions, ref_nll, divergence, history):
        return long + 10 * short + 100 * positions + 1e3 * ref_nll + 1e4 * divergence + history[0] + history[1]

    def observe(self, long, short, mask, *, divergence, **used):
        return torch.stack([mask.double().sum(), divergence.double().sum()])


def protocol():
    long, short, mask = losses(2, 9)
    ref_nll, divergence = losses(2, 9, seed=1)[:2]
    return long, short, mask, {"positions": torch.arange(9).expand(2, 9), "ref_nll": ref_nll, "divergence": divergence}


def test_a_weighting_is_given_what_it_asks_for_and_a_history_of_these_rows_or_of_more():
    long, short, mask, used = protocol()
    values = long + 10 * short + 100 * used["positions"] + 1e3 * used["ref_nll"] + 1e4 * used["divergence"]
    observed = torch.stack([mask.double().sum(), used["divergence"][mask].sum()])
    weights = Protocol()(long, short, mask, **used, other=None)
    torch.testing.assert_close(weights, (values + observed.sum()).where(mask, 0))
    more = Protocol()(long, short, mask, **used, history=lambda observed: observed + 1)
    torch.testing.assert_close(more, weights + 2 * mask)
    assert torch.equal(Protocol()(long, short, mask, **used, history=observed + 1), more)


@pytest.mark.parametrize("name", ["ref_nll", "divergence"])
def test_what_a_weighting_asks_for_is_checked_as_losses_are(name):
    long, short, mask, used = protocol()
    expected = Protocol()(long, short, mask, **used)
    used[name][0, 0] = math.nan  # outside the mask
    assert torch.equal(Protocol()(long, short, mask, **used), expected)
    used[name][1, 3] = math.inf
    with pytest.raises(NonFinite, match=f"{name} of row 1, position 3 is inf"):
        Protocol()(long, short, mask, **used)
    with pytest.raises(ValueError, match=name):
        Protocol()(long, short, mask, **{**used, name: used[name][:1]})
    with pytest.raises(ValueError, match=f"needs {name} of every token"):
        Protocol()(long, short, mask, **{**used, name: None})


def test_weightings_say_of_themselves_whether_they_use_short_losses():
    assert [weighting.uses_short for weighting in EVERY] == [False] + [True] * (len(EVERY) - 1)


def test_a_weighting_is_never_given_what_is_not_finite():
    seen = []

    class Recording(Weighting):
        def weigh(self, long, short, mask):
            seen.extend([long, short])
            return torch.ones_like(long)

    long, short = torch.ones(2, 4), torch.ones(2, 4)
    long[1, 2], short[0, 1] = torch.nan, torch.inf
    with pytest.raises(NonFinite) as caught:
        Recording()(long, short, torch.ones(2, 4, dtype=torch.bool))
    assert (caught.value.name, caught.value.row, caught.value.position) == ("the long loss", 1, 2)
    assert all(losses.isfinite().all() for losses in seen)
    assert len(seen) == 2
