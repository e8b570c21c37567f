"""Expected weights against sums over the vocabulary in float64, and that what is learned with them is the truth."""

import pytest
import torch
from torch.nn.functional import log_softmax

from tokenweight.method import (
    NPMI,
    PPMI,
    BoundedGain,
    Dense,
    Expected,
    Gain,
    Head,
    KeyTokens,
    LongCE,
    LongFilter,
    Mix,
    ShortLosses,
    Sparse,
    divergence_kind,
    linear_divergence,
    linear_nll,
    loss,
    parse_divergence,
    vanishes,
    weighted_loss,
)
from tokenweight.method.kin import expected as expected_module

SCORED = [
    Dense(),
    Sparse(),
    PPMI(),
    NPMI(shift=1.5),
    LongCE(2.0),
    LongFilter(),
    KeyTokens(0.5, -4.0),
    Gain(),
    BoundedGain(),
]
HEADS = {"plain": {}, "biased": {"bias": True}, "scaled and capped": {"scale": 0.3, "softcap": 2.0}}


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def written_out(weighting, long_logits, short_logits):
    long, short = -log_softmax(long_logits, dim=-1), -log_softmax(short_logits, dim=-1)
    rows = []
    for one, other in zip(long, short):
        rows.append(sum((-a).exp() * weighting.score(a, b) for a, b in zip(one, other)))
    return torch.stack(rows)


def test_one_score_is_one_divergence_whatever_is_made_of_it():
    same = [(LongFilter(0.5), LongFilter()), (PPMI(0.1), PPMI(0.2, 7)), (Sparse(), Dense(0.1)), (Gain(0.1), Gain())]
    for one, other in same:
        assert Mix(Expected(one), Expected(other)).divergence_of == one
        assert divergence_kind(one) == divergence_kind(other)
        assert divergence_kind(parse_divergence(divergence_kind(one))) == divergence_kind(one)
    for one, other in (
        (PPMI(shift=2.0), PPMI()),
        (LongCE(2.0), LongCE()),
        (KeyTokens(1.0), KeyTokens()),
        (Gain(), Dense()),
    ):
        with pytest.raises(ValueError, match="expected one and the same"):
            Mix(Expected(one), Expected(other))


def test_where_both_losses_are_the_same_these_scores_are_0_and_those_are_not():
    assert all(
        map(vanishes, [Dense(), Sparse(), PPMI(), NPMI(shift=1.5), LongFilter(), KeyTokens(), Gain(), BoundedGain()])
    )
    assert not any(map(vanishes, [LongCE(), NPMI(shift=0.5), KeyTokens(-1.0)]))


@pytest.mark.parametrize("weighting", SCORED, ids=str)
def test_a_divergence_is_the_sum_over_the_vocabulary(weighting, monkeypatch):
    monkeypatch.setattr(expected_module, "CAST_BYTES", 1000)  # several parts of the vocabulary
    long, short = 3 * normal(5, 23), 3 * normal(5, 23, seed=1)
    torch.testing.assert_close(
        Expected(weighting).of_logits(long, short), written_out(weighting, long, short), rtol=1e-12, atol=1e-14
    )


def test_divergences_are_those_of_the_textbooks():
    long, short = normal(6, 50), normal(6, 50, seed=1)
    p, q = long.softmax(dim=1), short.softmax(dim=1)
    torch.testing.assert_close(Expected(Gain()).of_logits(long, short), (p * (p / q).log()).sum(dim=1))
    torch.testing.assert_close(Expected(BoundedGain()).of_logits(long, short), (p - q).abs().sum(dim=1) / 2)
    torch.testing.assert_close(Expected(Dense()).of_logits(long, short), (p * (p / q).log().abs()).sum(dim=1))


def test_large_logits_and_tokens_without_probability_are_no_obstacle():
    long = torch.tensor([[1e4, 1e4 - 1, -torch.inf], [0.0, 200.0, 0.0]])
    short = torch.tensor([[1e4, 1e4, -torch.inf], [0.0, 200.0, 0.0]])
    found = Expected(Gain()).of_logits(long, short)
    expected = written_out(Gain(), long[:1, :2].double(), short[:1, :2].double())
    torch.testing.assert_close(found.double(), torch.cat([expected, torch.zeros(1, dtype=torch.float64)]))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_what_is_computed_from_less_is_float32(dtype):
    long, short = normal(4, 30).to(dtype), normal(4, 30, seed=1).to(dtype)
    found = Expected(Dense()).of_logits(long, short)
    assert found.dtype == torch.float32
    torch.testing.assert_close(
        found.double(), written_out(Dense(), long.double(), short.double()), rtol=1e-4, atol=1e-5
    )


@pytest.mark.parametrize("head", HEADS.values(), ids=HEADS)
@pytest.mark.parametrize("chunk_size", [None, 3])
def test_losses_and_divergence_of_hidden_states_are_those_of_their_logits(head, chunk_size):
    long, short, weight = normal(11, 6), normal(11, 6, seed=1), normal(17, 6, seed=2)
    after = {**head, "bias": normal(17, seed=3)} if head.get("bias") else dict(head)
    targets = torch.randint(17, (11,), generator=torch.Generator().manual_seed(4))
    targets[[0, 7]] = -100
    found = linear_divergence(long, short, weight, targets, Gain(), chunk_size=chunk_size, **after)
    for nll, hidden in zip(found, (long, short)):
        torch.testing.assert_close(nll, linear_nll(hidden, weight, targets, **after), rtol=1e-12, atol=1e-12)

    def logits(hidden):
        z = after.get("scale", 1.0) * (hidden @ weight.T + after.get("bias", 0.0))
        return z if "softcap" not in after else after["softcap"] * (z / after["softcap"]).tanh()

    expected = written_out(Gain(), logits(long), logits(short)).where(targets != -100, 0)
    torch.testing.assert_close(found[2], expected, rtol=1e-10, atol=1e-12)


def test_hidden_states_are_multiplied_with_the_head_twice_and_no_logits_of_all_rows_are_held(monkeypatch):
    products, held = [], []
    multiply, empty = loss.multiply_into, torch.empty
    monkeypatch.setattr(loss, "multiply_into", lambda out, a, b: products.append(len(a)) or multiply(out, a, b))
    monkeypatch.setattr(torch, "empty", lambda *shape, **kind: held.append(shape) or empty(*shape, **kind))
    monkeypatch.setattr(expected_module, "BUFFER_BYTES", 2 * 4 * 20 * 500)
    long, short, weight = torch.randn(100, 4), torch.randn(100, 4), torch.randn(500, 4)
    linear_divergence(long, short, weight, torch.zeros(100, dtype=torch.long), Dense())
    assert sum(products) == 200
    assert held == [(20, 500), (20, 500)]


@pytest.mark.usefixtures("unchecked")
def test_states_of_different_shapes_and_unknown_targets_are_refused():
    long, weight, targets = normal(4, 3), normal(5, 3), torch.tensor([0, 1, 2, 9])
    with pytest.raises(ValueError, match=r"\[4, 3\] and \[3, 3\]"):
        linear_divergence(long, long[1:], weight, targets, Dense())
    with pytest.raises(ValueError, match="target 9 in row 3"):
        linear_divergence(long, long, weight, targets, Dense())


def test_no_gradient_flows_through_the_weights():
    hidden, weight = normal(2, 7, 4).requires_grad_(), normal(9, 4).requires_grad_()
    targets = torch.randint(9, (2, 7), generator=torch.Generator().manual_seed(0))
    mask = torch.ones(2, 7, dtype=torch.bool)
    mask[:, 0] = False
    targets[~mask] = -100
    short = normal(14, 4, seed=5)
    *_, divergence = linear_divergence(hidden.flatten(0, 1), short, weight, targets.flatten(), Dense())
    assert not divergence.requires_grad
    found = weighted_loss(
        hidden, Head(weight), targets, mask, Expected(Dense(0.3)), None, {"divergence": divergence.view(2, 7)}
    )
    with torch.no_grad():
        probabilities = written_out(Dense(), (hidden @ weight.T).flatten(0, 1), short @ weight.T).view(2, 7)
        weights = Dense(0.3).weights(probabilities, mask).where(mask, 0)
    nll = -log_softmax(hidden @ weight.T, dim=-1).gather(2, targets.clamp(min=0)[..., None])[..., 0]
    expected = torch.autograd.grad((weights * nll).sum(), [hidden, weight])
    for one, other in zip(torch.autograd.grad(found.loss, [hidden, weight]), expected):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-12)


def optimum(weights_of, p):
    """What a model of one context learns, by its logits, where the target y has probability p[y] and its weight."""
    logits = torch.zeros(2, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS([logits], lr=1.0, max_iter=200, tolerance_grad=1e-12, tolerance_change=1e-14)

    def closure():
        optimizer.zero_grad()
        value = (p * weights_of() * -logits.log_softmax(dim=0)).sum()
        value.backward()
        return value

    optimizer.step(closure)
    return logits.detach().softmax(dim=0)


@pytest.mark.parametrize("weighting", [Dense(0.0), Gain(0.0), LongCE(1.5)], ids=str)
def test_in_a_world_of_two_tokens_a_weight_of_the_target_biases_what_is_learned_and_its_expectation_does_not(weighting):
    p, q = torch.tensor([0.9, 0.1], dtype=torch.float64), torch.tensor([0.6, 0.4], dtype=torch.float64)
    of_targets = weighting.score(-p.log(), -q.log()).clamp(min=0)
    expected = (p * of_targets / (p * of_targets).sum()).double()
    biased = optimum(lambda: of_targets, p)
    torch.testing.assert_close(biased, expected, rtol=1e-4, atol=1e-5)
    assert (biased - p).abs().max() > 0.02
    divergence = Expected(weighting).of_logits(p.log()[None], q.log()[None])
    torch.testing.assert_close(optimum(lambda: divergence, p), p, rtol=1e-4, atol=1e-5)


def learned(weighting, counts, long, short, divergence):
    """What a head learns for one context by `weighted_loss`, from a row with so many of each of two tokens."""
    targets = torch.cat([torch.full((1, n), token) for token, n in enumerate(counts)], dim=1)
    hidden = torch.ones(1, targets.shape[1], 1, dtype=torch.float64)
    mask, weight = (
        torch.ones_like(targets, dtype=torch.bool),
        torch.zeros(2, 1, dtype=torch.float64, requires_grad=True),
    )
    optimizer = torch.optim.LBFGS([weight], max_iter=200, tolerance_grad=1e-10, tolerance_change=1e-14)

    def closure():
        optimizer.zero_grad()
        given = {"divergence": divergence.expand(targets.shape)}
        found = weighted_loss(
            hidden, Head(weight), targets, mask, weighting, ShortLosses(short[targets]), given, long=long[targets]
        )
        found.loss.backward()
        return found.loss.detach()

    optimizer.step(closure)
    return weight.detach()[:, 0].softmax(dim=0)


@pytest.mark.parametrize("interpolation", [0.0, 0.5])
def test_training_with_dense_converges_to_the_biased_distribution_and_with_its_expectation_to_the_true_one(
    interpolation,
):
    p, q = torch.tensor([0.9, 0.1], dtype=torch.float64), torch.tensor([0.6, 0.4], dtype=torch.float64)
    long, short, dense = -p.log(), -q.log(), Dense(interpolation)
    scores = (long - short).abs()
    weights = interpolation + (1 - interpolation) * scores / (p * scores).sum()
    found = learned(dense, [18, 2], long, short, torch.zeros(1))
    torch.testing.assert_close(found, p * weights / (p * weights).sum(), rtol=1e-5, atol=1e-6)
    assert (found - p).abs().max() > 0.05
    divergence = Expected(dense).of_logits(p.log()[None], q.log()[None])
    torch.testing.assert_close(divergence, (p * scores).sum()[None].to(divergence.dtype))
    torch.testing.assert_close(learned(Expected(dense), [18, 2], long, short, divergence), p, rtol=1e-5, atol=1e-6)
