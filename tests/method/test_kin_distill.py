"""Distillation in one pass with the weighted loss, against full logits and autograd in float64."""

import pytest
import torch
from torch.nn.functional import kl_div, log_softmax

from tokenweight.method import DistillingHead, Head, TopK, linear_nll, linear_top_k, weighted_linear_cross_entropy

VOCABULARY, DIM, ROWS = 23, 6, 9


def problem(seed=0, dtype=torch.float64, **after):
    """States, head and targets of a student and of a teacher, which is wider, and weights whose first is 0."""
    torch.manual_seed(seed)
    hidden, weight = torch.randn(ROWS, DIM, dtype=dtype), torch.randn(VOCABULARY, DIM, dtype=dtype)
    of_teacher = Head(2 * torch.randn(VOCABULARY, 8, dtype=dtype), torch.randn(VOCABULARY, dtype=dtype))
    states, targets = torch.randn(ROWS, 8, dtype=dtype), torch.randint(VOCABULARY, (ROWS,))
    weights = torch.rand(ROWS, dtype=dtype) * 3
    targets[4], weights[0] = -100, 0
    return hidden, Head(weight, torch.randn(VOCABULARY, dtype=dtype), **after), targets, weights, states, of_teacher


def logits_of(hidden, head):
    z = (hidden @ head.weight.T + head.bias) * head.scale
    return z if head.softcap is None else head.softcap * torch.tanh(z / head.softcap)


def reference(hidden, head, targets, weights, teacher, share):
    """The mixture by full logits, token by token; the rest beyond the top k as one outcome."""
    loss = 0
    for row in range(ROWS):
        if targets[row] == -100:
            continue
        log_p, log_q = log_softmax(logits_of(hidden[row], head), 0), log_softmax(teacher[row], 0)
        kept = log_q.topk(K).indices
        rest = torch.ones(VOCABULARY, dtype=torch.bool).index_fill(0, kept, False)
        divergence = (log_q[kept].exp() * (log_q[kept] - log_p[kept])).sum()
        if rest.any():
            of_teacher, of_student = log_q[rest].exp().sum(), log_p[rest].exp().sum()
            divergence = divergence + of_teacher * (of_teacher / of_student).log()
        loss = loss + weights[row] * (share * divergence - (1 - share) * log_p[targets[row]])
    return loss


K = 4


@pytest.mark.parametrize("after", [{}, {"scale": 0.5, "softcap": 2.0}])
@pytest.mark.parametrize("chunk_size", [None, 2])
@pytest.mark.parametrize("k", [1, 4, VOCABULARY])
@pytest.mark.parametrize("share", [0.0, 0.6, 1.0])
def test_loss_and_gradients_are_those_of_full_logits(share, k, chunk_size, after, monkeypatch):
    monkeypatch.setitem(globals(), "K", k)
    hidden, head, targets, weights, states, of_teacher = problem(**after)
    inputs = [tensor.requires_grad_() for tensor in (hidden, head.weight, head.bias)]
    teacher, nll = linear_top_k(states, of_teacher, targets, k, chunk_size=chunk_size)
    torch.testing.assert_close(nll, linear_nll(states, of_teacher.weight, targets, bias=of_teacher.bias))
    expected = reference(hidden, head, targets, weights, logits_of(states, of_teacher), share)
    of_full = torch.autograd.grad(expected, inputs)
    loss = DistillingHead(head, teacher, share).loss(hidden, targets, weights)
    torch.testing.assert_close(loss, expected.detach())
    for found, right in zip(torch.autograd.grad(loss, inputs), of_full, strict=True):
        torch.testing.assert_close(found, right)
    assert (of_full[0][0] == 0).all()  # a weight of 0


def test_the_divergence_is_at_most_that_of_the_whole_distributions():
    hidden, head, targets, _, states, of_teacher = problem(1)
    whole = kl_div(
        logits_of(hidden, head).log_softmax(1),
        logits_of(states, of_teacher).log_softmax(1),
        log_target=True,
        reduction="none",
    ).sum(1)
    below = []
    for k in range(1, VOCABULARY + 1):
        teacher, _ = linear_top_k(states, of_teacher, targets, k)
        of_rows = torch.eye(ROWS, dtype=torch.float64)
        below.append(torch.stack([DistillingHead(head, teacher, 1.0).loss(hidden, targets, row) for row in of_rows]))
    below = torch.stack(below)
    assert (below.diff(dim=0) > -1e-12).all()
    torch.testing.assert_close(below[-1], whole.where(targets != -100, 0))


def test_a_share_of_0_is_the_weighted_loss_and_weights_may_be_made_of_losses():
    hidden, head, targets, _, states, of_teacher = problem(2)
    teacher, _ = linear_top_k(states, of_teacher, targets, 3)

    def by_losses(losses, rows):
        return losses.detach().clamp(max=2) * (rows != 1)

    found = DistillingHead(head, teacher, 0.0).loss(hidden, targets, by_losses)
    torch.testing.assert_close(
        found, weighted_linear_cross_entropy(hidden, head.weight, targets, by_losses, bias=head.bias)
    )


@pytest.mark.parametrize("gap", [40.0, 80.0, 200.0])
def test_a_student_that_is_surer_than_its_teacher_has_finite_gradients_in_float32(gap):
    """Its rest beyond the top k is lost in float32, and 1 - r / R with it; the exact gradients are in float64."""
    hidden, weight = torch.eye(3)[:1], torch.zeros(50, 3)
    weight[0, 0], weight[1, 0] = gap, gap - 1
    targets, weights = torch.tensor([1]), torch.tensor([2.0])
    teacher = TopK(torch.tensor([[0, 1]]), torch.tensor([[0.6, 0.3]]).log())
    found = []
    for dtype in (torch.float32, torch.float64):
        states = hidden.to(dtype).requires_grad_()
        head = weight.to(dtype).requires_grad_()
        loss = DistillingHead(Head(head), teacher, 0.5).loss(states, targets, weights.to(dtype))
        found.append([loss.detach(), *torch.autograd.grad(loss, (states, head))])
    assert all(tensor.isfinite().all() for tensor in found[0])
    if gap < 60:
        for single, double in zip(*found, strict=True):
            torch.testing.assert_close(single.double(), double, rtol=2e-5, atol=1e-5)


def test_what_is_no_top_k_is_refused():
    hidden, head, targets, weights, states, of_teacher = problem()
    teacher, _ = linear_top_k(states, of_teacher, targets, 3)
    with pytest.raises(ValueError, match=r"top_k 24: expected 1 to 23"):
        linear_top_k(states, of_teacher, targets, 24)
    with pytest.raises(ValueError, match=r"have shapes \[8, 3\] and \[9, 3\]: expected \[9, k\]"):
        DistillingHead(head, teacher._replace(ids=teacher.ids[1:]), 0.5).loss(hidden, targets, weights)
    chosen = targets != -100
    assert teacher.checked(chosen, VOCABULARY) is teacher
    with pytest.raises(ValueError, match=r"teacher_ids: found from 0 to \d+: expected tokens of the model, 0 to 5"):
        teacher.checked(chosen, 6)
    for wrong in (torch.nan, 1.0):
        with pytest.raises(ValueError, match="teacher_logprobs: found a value above 0, or not a number"):
            teacher._replace(logprobs=teacher.logprobs.index_fill(0, torch.tensor([2]), wrong)).checked(
                chosen, VOCABULARY
            )


def test_no_array_as_large_as_all_logits_is_made():
    hidden, head, targets, weights, states, of_teacher = problem()
    teacher, _ = linear_top_k(states, of_teacher, targets, 3)
    sizes = []

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            out = function(*args, **(kwargs or {}))
            sizes.extend(one.numel() for one in torch.utils._pytree.tree_leaves(out) if isinstance(one, torch.Tensor))
            return out

    inputs = hidden.requires_grad_()
    from tokenweight.method import distilled_linear_cross_entropy

    with Watch():
        distilled_linear_cross_entropy(inputs, head, targets, weights, teacher, 0.5, chunk_size=1).backward()
    assert max(sizes) <= max(VOCABULARY * DIM, ROWS * DIM)
    assert VOCABULARY * DIM < VOCABULARY * ROWS
