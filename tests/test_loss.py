"""The joined loss against plain logits in float64, and its promises about memory, dtypes and rows without weight."""

import itertools

import pytest
import torch
from torch.nn.functional import cross_entropy
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from tokenweight import linear_nll, weighted_linear_cross_entropy
from tokenweight import loss as module

N, D, V = 11, 5, 17
OPTIONS = [
    {},
    {"scale": 0.3},
    {"softcap": 2.0},
    {"bias": True},
    {"bias": True, "scale": 3.0},
    {"bias": True, "scale": 0.7, "softcap": 1.5},
]
CHUNK_SIZES = [1, 3, N, None]


def problem(n=N, d=D, v=V, dtype=torch.float64, seed=0):
    """States, head, bias (all with gradient), targets (two of them -100), weights (non-uniform, the first 0)."""
    random = torch.Generator().manual_seed(seed)
    hidden, head, bias = (
        torch.randn(shape, generator=random, dtype=torch.float64).to(dtype).requires_grad_()
        for shape in [(n, d), (v, d), (v,)]
    )
    targets = torch.randint(v, (n,), generator=random)
    targets[[2, 7]] = -100
    weights = 2 * torch.rand(n, generator=random, dtype=torch.float64)
    weights[[0, 5]] = 0
    return hidden, head, bias, targets, weights


def plain_nll(hidden, head, targets, bias=None, scale=1.0, softcap=None):
    logits = hidden @ head.T
    if bias is not None:
        logits = logits + bias
    logits = logits * scale
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    return cross_entropy(logits.to(torch.promote_types(logits.dtype, torch.float32)), targets, reduction="none")


def results(loss, *inputs):
    """The loss and its gradients; a gradient that does not exist is zero."""
    gradients = torch.autograd.grad(loss, inputs, materialize_grads=True)
    return [loss.detach(), *gradients]


def assert_equal_in_float64(actual, expected):
    # Sums of at most 17 numbers below 100 in another order: 17 * 100 * 2**-53 = 2e-13.
    for one, other in zip(actual, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("chunk_size", CHUNK_SIZES)
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_losses_equal_plain_cross_entropy(options, chunk_size):
    hidden, head, bias, targets, _ = problem()
    options = {**options, "bias": bias if options.get("bias") else None}
    actual = linear_nll(hidden, head, targets, chunk_size=chunk_size, **options)
    assert not actual.requires_grad
    assert actual[targets == -100].tolist() == [0, 0]
    assert_equal_in_float64([actual], [plain_nll(hidden, head, targets, **options).detach()])


@pytest.mark.parametrize("chunk_size", CHUNK_SIZES)
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_the_weighted_loss_and_all_gradients_equal_plain_autograd(options, chunk_size):
    *inputs, targets, weights = problem()
    hidden, head, bias = inputs
    options = {**options, "bias": bias if options.get("bias") else None}
    ours = weighted_linear_cross_entropy(hidden, head, targets, weights, chunk_size=chunk_size, **options) / 7
    plain = weights @ plain_nll(hidden, head, targets, **options) / 7
    assert_equal_in_float64(results(ours, *inputs), results(plain, *inputs))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_large_logits_do_not_overflow(dtype):
    *inputs, targets, weights = problem(dtype=dtype)
    hidden, head, bias = inputs
    targets[3] = (hidden[3] @ head.T + bias).argmax()
    ours = weighted_linear_cross_entropy(hidden, head, targets, weights, bias=bias, scale=1e4)
    plain = weights.to(dtype) @ plain_nll(hidden, head, targets, bias, scale=1e4)
    # Logits of up to 1e5, each with a relative error of a few roundings; `exp` alone would overflow at 89 or 710.
    for one, other in zip(results(ours, *inputs), results(plain, *inputs), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12 if dtype == torch.float64 else 1e-5, atol=1e-6)


@pytest.mark.parametrize("trained", [c for n in (1, 2) for c in itertools.combinations(range(3), n)])
def test_what_is_frozen_gets_no_gradient_and_the_rest_the_same(trained):
    *inputs, targets, weights = problem()
    hidden, head, bias = inputs
    expected = results(weights @ plain_nll(hidden, head, targets, bias), *inputs)
    for i, tensor in enumerate(inputs):
        tensor.requires_grad_(i in trained)
    loss = weighted_linear_cross_entropy(hidden, head, targets, weights, bias=bias, chunk_size=4)
    loss.backward()
    assert_equal_in_float64([inputs[i].grad for i in trained], [expected[1 + i] for i in trained])
    assert all(inputs[i].grad is None for i in range(3) if i not in trained)


def test_nothing_is_differentiated_under_no_grad():
    hidden, head, _, targets, weights = problem()
    with torch.no_grad():
        loss = weighted_linear_cross_entropy(hidden, head, targets, weights)
    assert not loss.requires_grad
    assert_equal_in_float64([loss], [weights @ plain_nll(hidden, head, targets).detach()])


@pytest.mark.parametrize("chunk_size", CHUNK_SIZES)
def test_weights_as_a_function_of_the_losses_equal_the_same_weights_as_a_tensor(chunk_size):
    *inputs, targets, weights = problem()
    hidden, head, bias = inputs
    seen = []

    def weigh(losses, rows):
        assert not torch.is_grad_enabled()
        seen.extend(rows.tolist())
        return weights[rows] * losses.clamp(max=3)

    nll = plain_nll(hidden, head, targets, bias)
    plain = (weights * nll.detach().clamp(max=3)) @ nll
    ours = weighted_linear_cross_entropy(hidden, head, targets, weigh, bias=bias, chunk_size=chunk_size)
    assert_equal_in_float64(results(ours, *inputs), results(plain, *inputs))
    assert seen == (targets != -100).nonzero().flatten().tolist()


@pytest.mark.parametrize("case", ["no rows", "no targets", "no weights"])
def test_without_anything_to_learn_loss_and_gradients_are_zero(case):
    *inputs, targets, weights = problem(n=8)
    if case == "no rows":
        inputs[0], targets, weights = inputs[0].detach()[:0].requires_grad_(), targets[:0], weights[:0]
    elif case == "no targets":
        targets = torch.full_like(targets, -100)
    else:
        weights = torch.zeros_like(weights)
    loss = weighted_linear_cross_entropy(inputs[0], inputs[1], targets, weights, bias=inputs[2])
    assert_equal_in_float64(results(loss, *inputs), [torch.zeros_like(tensor) for tensor in (loss, *inputs)])
    if case != "no weights":
        assert linear_nll(inputs[0], inputs[1], targets).count_nonzero() == 0


def test_rows_without_weight_or_target_are_not_read():
    *inputs, targets, weights = problem()
    hidden, head, bias = inputs
    expected = results(weights @ plain_nll(hidden, head, targets, bias), *inputs)
    unread = (weights == 0) | (targets == -100)
    poisoned = hidden.detach().masked_fill(unread[:, None], torch.nan).requires_grad_()
    loss = weighted_linear_cross_entropy(poisoned, head, targets, weights, bias=bias, chunk_size=3)
    assert_equal_in_float64(results(loss, poisoned, head, bias), expected)
    losses = linear_nll(poisoned, head, targets.where(weights != 0, -100), bias=bias)
    assert losses.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_weights_divided_by_64_divide_every_gradient_by_exactly_64(dtype):
    *inputs, targets, weights = problem(dtype=dtype)
    hidden, head, bias = inputs
    whole = results(weighted_linear_cross_entropy(hidden, head, targets, weights, bias=bias), *inputs)
    part = results(weighted_linear_cross_entropy(hidden, head, targets, weights / 64, bias=bias), *inputs)
    assert all(torch.equal(one / 64, other) for one, other in zip(whole, part))
    assert all(one.count_nonzero() for one in whole)


def test_a_second_backward_is_refused():
    hidden, head, _, targets, weights = problem()
    loss = weighted_linear_cross_entropy(hidden, head, targets, weights)
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="backward ran before"):
        loss.backward()


def test_gradients_of_two_calls_add_up():
    *inputs, targets, weights = problem()
    hidden, head, bias = inputs
    for scale in (weights, weights.flip(0)):
        (weighted_linear_cross_entropy(hidden, head, targets, scale, bias=bias) / 3).backward()
    plain = (weights + weights.flip(0)) @ plain_nll(hidden, head, targets, bias) / 3
    assert_equal_in_float64([tensor.grad for tensor in inputs], results(plain, *inputs)[1:])


@pytest.mark.parametrize("target", [V, -1, -101])
@pytest.mark.parametrize("call", [linear_nll, lambda *a: weighted_linear_cross_entropy(*a, torch.zeros(N))])
def test_a_target_outside_the_vocabulary_is_refused_by_value_and_row(call, target):
    hidden, head, _, targets, _ = problem()
    targets[4] = target
    with pytest.raises(ValueError, match=f"target {target} in row 4: expected -100 or a token id from 0 to {V - 1}"):
        call(hidden, head, targets)


class LargestTensor(TorchDispatchMode):
    """Records the number of elements of the largest tensor that any operation returns."""

    numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        sizes = [leaf.numel() for leaf in tree_leaves(result) if isinstance(leaf, torch.Tensor)]
        self.numel = max([self.numel, *sizes])
        return result


@pytest.mark.parametrize("default_size", [False, True])
@pytest.mark.parametrize("options", [{}, {"scale": 2.0, "softcap": 3.0}], ids=str)
def test_no_array_of_all_logits_comes_into_being(options, default_size, monkeypatch):
    n, d, v, chunk_size = 512, 8, 500, 16
    hidden, head, bias, targets, weights = problem(n, d, v, dtype=torch.float32)
    monkeypatch.setattr(module, "BUFFER_BYTES", 4 * v * chunk_size)
    options = {**options, "bias": bias, "chunk_size": None if default_size else chunk_size}
    with LargestTensor() as largest:
        linear_nll(hidden, head, targets, **options)
        weighted_linear_cross_entropy(hidden, head, targets, weights, **options).backward()
    assert largest.numel == max(v * chunk_size, v * d, n * d) == n * v / 32
