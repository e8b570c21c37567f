"""The weighted loss of a batch equals, in float64, the one that is written out token by token."""

import pytest
import torch
from torch.nn.functional import cross_entropy, softplus
from torch.utils.flop_counter import FlopCounterMode

from tokenweight import NPMI, PPMI, Dense, LongCE, Sparse, Uniform
from tokenweight.method import Custom, Head, NonFinite, ShortLosses, Weighting, weighted_loss
from tokenweight.method.alignment import aligned_with_states, aligned_with_tokens
from tokenweight.method.device import products

ROWS, LENGTH, DIM, VOCABULARY = 2, 13, 6, 17
HEADS = {"plain": {}, "biased": {"bias": True}, "scaled and capped": {"scale": 0.3, "softcap": 2.0}}


def some_batch(**head):
    draw = torch.Generator().manual_seed(0)

    def normal(*shape):
        return torch.randn(*shape, generator=draw, dtype=torch.float64)

    hidden, weight = normal(ROWS, LENGTH, DIM).requires_grad_(), normal(VOCABULARY, DIM).requires_grad_()
    bias = normal(VOCABULARY).requires_grad_() if head.pop("bias", False) else None
    mask = torch.rand(ROWS, LENGTH, generator=draw) < 0.8
    mask[:, 0] = False
    targets = torch.randint(VOCABULARY, (ROWS, LENGTH), generator=draw).where(mask, -100)
    short = softplus(normal(ROWS, LENGTH))
    same = torch.arange(LENGTH).expand(ROWS, LENGTH) < 4
    return hidden, Head(weight, bias, **head), targets, mask, short, same


def written_out(hidden, head, targets, mask, weighting, short, same):
    logits = head.scale * (hidden @ head.weight.T + (0 if head.bias is None else head.bias))
    if head.softcap is not None:
        logits = head.softcap * torch.tanh(logits / head.softcap)
    nll = cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none", ignore_index=-100).view(mask.shape)
    shorts = torch.where(same, nll.detach(), short)
    weights = weighting(nll.detach(), shorts, mask)
    return (weights * nll).sum(), weights, nll.detach(), shorts.where(mask, 0.0)


@pytest.fixture(params=[256 << 20, 1], ids=["all logits fit", "chunks"])
def buffer(request, monkeypatch):
    monkeypatch.setattr(products, "BUFFER_BYTES", request.param)


@pytest.mark.usefixtures("buffer")
@pytest.mark.parametrize("head", HEADS.values(), ids=HEADS)
@pytest.mark.parametrize("weighting", [Uniform(), Dense(), Sparse(0.3), LongCE(), PPMI(), NPMI()], ids=str)
def test_loss_weights_and_gradients_are_those_written_out_token_by_token(weighting, head):
    hidden, parts, targets, mask, short, same = some_batch(**head)
    leaves = [hidden, parts.weight, *([] if parts.bias is None else [parts.bias])]
    loss, weights, long_nll, short_nll = written_out(hidden, parts, targets, mask, weighting, short, same)
    expected = torch.autograd.grad(loss, leaves)
    ours = weighted_loss(hidden, parts, targets, mask, weighting, ShortLosses(short, same))
    found = torch.autograd.grad(ours.loss, leaves)
    for one, other in ((ours.loss, loss), (ours.weights, weights), (ours.long_nll, long_nll), *zip(found, expected)):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(ours.short_nll, short_nll, rtol=1e-12, atol=1e-12)
    assert not ours.weights[:, 0].any()
    assert torch.equal(ours.mask, mask)


@pytest.mark.parametrize("weighting", [Dense(), Uniform(), Sparse(0.25)], ids=str)
def test_products_with_the_head_are_three_where_all_logits_fit_and_else_as_few_as_weights_allow(weighting, buffer):
    hidden, head, targets, mask, short, same = some_batch()
    added = {torch.ops.aten.addmm_: lambda out, a, b, **_: 2 * a[0] * a[1] * b[1]}  # which torch does not count
    with FlopCounterMode(display=False, custom_mapping=added) as counter:
        weighted_loss(hidden, head, targets, mask, weighting, ShortLosses(short, same))
    num, fit = int(mask.sum()), products.fit_at_once(mask.numel(), VOCABULARY)
    kept = sum(int(0.25 * of_row.sum()) for of_row in mask) / num
    expected = {"dense": 3 if fit else 4, "uniform": 3, "sparse": 1 + 3 * kept}[type(weighting).__name__.lower()]
    assert counter.get_total_flops() == round(expected * 2 * num * DIM * VOCABULARY)


@pytest.mark.usefixtures("buffer")
def test_a_batch_in_which_nothing_is_predicted_has_no_loss():
    hidden, head, targets, mask, short, same = some_batch()
    nothing = torch.zeros_like(mask)
    found = weighted_loss(hidden, head, torch.full_like(targets, -100), nothing, Dense(), ShortLosses(short, same))
    assert not torch.autograd.grad(found.loss, hidden)[0].any()
    assert not found.loss
    assert not found.weights.any()


@pytest.mark.usefixtures("buffer")
def test_what_ranks_hold_of_sequences_has_the_loss_of_whole_ones():
    hidden, head, targets, mask, short, same = some_batch()
    order = torch.randperm(LENGTH, generator=torch.Generator().manual_seed(1))

    # What stands at the state that predicts a token, whose last state predicts none; in another order of columns.
    def own(of_tokens, fill=0):
        return aligned_with_states(of_tokens, fill)[:, order]

    def whole(of_states):
        return aligned_with_tokens(of_states[:, order.argsort()])

    for weighting in (Uniform(), Dense(), LongCE()):
        expected = weighted_loss(hidden, head, targets, mask, weighting, ShortLosses(short, same))
        states = hidden.roll(-1, dims=1)[:, order]
        found = weighted_loss(states, head, targets, mask, weighting, ShortLosses(short, same), own=own, whole=whole)
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


class Reading(Weighting):
    """Reads a column, positions and a history."""

    uses = frozenset({"ref_nll", "positions"})
    history = 1

    def weigh(self, long, short, mask, *, ref_nll, positions, history):
        return ref_nll + 2 * positions + history

    def observe(self, long, short, mask, *, positions, **used):
        return positions.where(mask, 0).sum().double()[None]


class ReadingPointwise(Reading):
    pointwise = True


@pytest.mark.usefixtures("buffer")
@pytest.mark.parametrize("weighting", [Reading(), ReadingPointwise()], ids=["whole", "pointwise"])
@pytest.mark.parametrize("split", [False, True])
def test_a_weighting_reads_what_it_uses_in_one_pass_or_two_and_where_ranks_split_sequences(weighting, split):
    hidden, head, targets, mask, short, _ = some_batch()
    order = torch.randperm(LENGTH, generator=torch.Generator().manual_seed(1)) if split else torch.arange(LENGTH)
    ranks = {
        "own": lambda of_tokens, fill=0: aligned_with_states(of_tokens, fill)[:, order],
        "whole": lambda of_states: aligned_with_tokens(of_states[:, order.argsort()]),
    }
    states = hidden.roll(-1, dims=1)[:, order] if split else hidden
    used = {"positions": torch.arange(LENGTH).expand(mask.shape), "ref_nll": short.masked_fill(~mask, torch.nan)}
    past = []

    def remember(observed):
        past.append(observed)
        return observed + 5

    ranks = ranks if split else {}
    found = weighted_loss(states, head, targets, mask, weighting, None, used, history=remember, **ranks)
    observed = used["positions"][mask].sum()
    assert [one.tolist() for one in past] == [[observed]]
    expected = (short + 2 * used["positions"] + observed + 5).where(mask, 0)
    torch.testing.assert_close(found.weights, expected)
    torch.testing.assert_close(found.loss.detach(), (expected * found.long_nll).sum())
    with pytest.raises(ValueError, match="ref_nll"):
        weighted_loss(states, head, targets, mask, weighting, None, {"positions": used["positions"]})
    used["ref_nll"][0, 5], mask[0, 5], targets[0, 5] = torch.inf, True, 1
    with pytest.raises(NonFinite, match="ref_nll of row 0, position 5"):
        weighted_loss(hidden, head, targets, mask, weighting, None, used)


@pytest.mark.usefixtures("buffer")
@pytest.mark.parametrize("weighting", [Uniform(), Dense(), LongCE()], ids=str)
def test_a_hidden_state_that_is_not_finite_is_named_by_row_and_position(weighting):
    hidden, head, targets, mask, short, same = some_batch()
    mask[1, 7], targets[1, 7] = True, 3
    hidden = hidden.detach().clone()
    hidden[1, 7] = torch.nan
    with pytest.raises(NonFinite) as caught:
        weighted_loss(hidden, head, targets, mask, weighting, ShortLosses(short, same))
    assert (caught.value.name, caught.value.row, caught.value.position) == ("the long loss", 1, 7)
    assert caught.value.value != caught.value.value


def test_a_weighting_that_uses_no_short_losses_needs_none():
    hidden, head, targets, mask, *_ = some_batch()
    found = weighted_loss(hidden, head, targets, mask, Uniform(), None)
    assert torch.equal(found.short_nll, found.long_nll)
    assert torch.equal(found.weights, mask.to(found.weights.dtype))


def test_a_function_is_a_weighting_of_whole_sequences():
    hidden, head, targets, mask, short, _ = some_batch()

    def later(long, short, mask):
        return torch.arange(mask.shape[1], dtype=long.dtype).expand(mask.shape)

    found = weighted_loss(hidden, head, targets, mask, Custom(later), ShortLosses(short))
    assert found.weights.tolist() == [[t * counts for t, counts in enumerate(row)] for row in mask.tolist()]
