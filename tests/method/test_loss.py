"""The joined loss against plain logits in float64, and its promises about memory, dtypes and rows without weight."""

import itertools
import weakref
from types import SimpleNamespace

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.functional import cross_entropy
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from tokenweight import linear_nll, weighted_linear_cross_entropy
from tokenweight.method import loss as module
from tokenweight.method.device import products

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


@pytest.mark.parametrize("size", [23.0, 44.0])
def test_large_logits_take_no_digit_from_the_loss(size):
    generator = torch.Generator().manual_seed(0)
    logits = size - 3 * torch.rand(200, 64, generator=generator)
    targets = torch.randint(64, (200,), generator=generator)
    expected, stock = (cross_entropy(one, targets, reduction="none").double() for one in (logits.double(), logits))
    error = (linear_nll(logits, torch.eye(64), targets).double() - expected).abs().max()
    assert error <= 1.5 * (stock - expected).abs().max()  # 3 times that, were logits added before they cancel


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
    monkeypatch.setattr(products, "BUFFER_BYTES", 4 * v * chunk_size)
    options = {**options, "bias": bias, "chunk_size": None if default_size else chunk_size}
    with LargestTensor() as largest:
        linear_nll(hidden, head, targets, **options)
        weighted_linear_cross_entropy(hidden, head, targets, weights, **options).backward()
    assert largest.numel == max(v * chunk_size, v * d, n * d) == n * v / 32


class Live(TorchDispatchMode):
    """Counts the bytes of the tensors that are made while it is active, and exist at once at most."""

    live = most = 0

    def __init__(self, *inputs):
        super().__init__()
        self.known = {tensor.untyped_storage()._cdata for tensor in inputs}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for storage in [leaf.untyped_storage() for leaf in tree_leaves(result) if isinstance(leaf, torch.Tensor)]:
            if storage._cdata not in self.known:
                self.known.add(storage._cdata)
                self.live += storage.nbytes()
                weakref.finalize(storage, self.remove, storage._cdata, storage.nbytes())
        self.most = max(self.most, self.live)
        return result

    def remove(self, key, size):
        self.known.discard(key)
        self.live -= size


@pytest.mark.parametrize("vocabulary", [128_256, 256_000])
def test_on_a_gpu_at_most_a_fiftieth_of_the_logits_is_held_beside_the_gradients(vocabulary, monkeypatch):
    n, d = 32_768, 2048
    rows = products.rows_at_once(n, vocabulary, 4, on_gpu=True)
    monkeypatch.setattr(products, "INTO_FLOAT32", {"cpu"})  # fake tensors multiply into float32 there, too
    context = SimpleNamespace(needs_input_grad=(True, True, False))
    with FakeTensorMode():
        hidden, head = (torch.empty(num, d, dtype=torch.bfloat16) for num in (n, vocabulary))
        targets, weights = torch.empty(n, dtype=torch.long), torch.empty(n)
        settings = (torch.arange(2 * rows), 1.0, None, rows, True)  # the other chunks hold no more
        with Live(hidden, head, targets, weights) as found:
            module._WeightedLoss.forward(context, hidden, head, None, targets, weights, settings)
    gradients = sum(one.nbytes for one in context.grads[:2])
    assert gradients == 4 * d * (n + vocabulary)
    assert 4 * n * vocabulary / 70 <= found.most - gradients <= 4 * n * vocabulary / 50


@pytest.fixture(params=[True, False], ids=["adds", "refuses to add"])
def as_on_a_gpu(monkeypatch, request):
    """torch's products of 16-bit matrices into float32, which CPUs lack, made in float32; counts its calls.

    Older versions refuse to add them to a float32 matrix."""
    calls = []

    def wide(name, plain):
        def multiply(*given, out_dtype=None, **options):
            if given[-1].is_meta or out_dtype is None:
                return plain(*given, **options, **({} if out_dtype is None else {"out_dtype": out_dtype}))
            if name == "addmm" and not request.param:
                raise RuntimeError("self and mat2 must have the same dtype, but got Float and BFloat16")
            calls.append(given[-1].dtype)
            # Refuses what a GPU would refuse.
            getattr(torch.ops.aten, name).dtype(*(one.to("meta") for one in given), out_dtype)
            return plain(*given[:-2], *(one.to(out_dtype) for one in given[-2:]), **options)

        monkeypatch.setattr(torch, name, multiply)

    monkeypatch.setattr(products, "INTO_FLOAT32", {"cpu"})
    for name in ("mm", "addmm"):
        wide(name, getattr(torch, name))
    products._adds_into.cache_clear()
    for dtype in (torch.bfloat16, torch.float16):
        assert products._adds_into(torch.float32, dtype, torch.device("cpu")) is request.param
    calls.clear()
    yield calls
    products._adds_into.cache_clear()


def test_in_bfloat16_nothing_is_further_from_the_truth_than_the_naive_computation():
    assert_nearer_than_naive(calls=[], expected=0)


def test_in_bfloat16_on_a_gpu_nothing_is_further_from_the_truth_than_the_naive_computation(as_on_a_gpu):
    assert_nearer_than_naive(as_on_a_gpu, expected=4)  # losses; then losses and the gradients of states and head


def assert_nearer_than_naive(calls, expected):
    *inputs, targets, weights = problem(n=64, d=128, v=256, dtype=torch.bfloat16)
    inputs[1].data /= 8
    exact_inputs = [tensor.detach().double().requires_grad_() for tensor in inputs]
    truth_nll = plain_nll(*exact_inputs[:2], targets, exact_inputs[2])
    truth = results(weights @ truth_nll, *exact_inputs)
    naive_nll = plain_nll(*inputs[:2], targets, inputs[2])
    naive = results(weights.float() @ naive_nll, *inputs)
    ours_nll = linear_nll(*inputs[:2], targets, bias=inputs[2])
    ours = results(weighted_linear_cross_entropy(*inputs[:2], targets, weights, bias=inputs[2]), *inputs)
    assert ours_nll.dtype == ours[0].dtype == torch.float32
    assert [gradient.dtype for gradient in ours[1:]] == [torch.bfloat16] * 3
    for one, other, exact in zip([ours_nll, *ours], [naive_nll, *naive], [truth_nll, *truth]):
        epsilon = 4 * torch.finfo(torch.float32).eps * exact.abs().max()
        assert (one - exact).abs().max() <= (other - exact).abs().max() + epsilon
        assert (one - exact).norm() <= (other - exact).norm() + epsilon
    # Sums of 128 products in float32, of logits up to 20: at worst 128 * 20 * 2**-24. The naive losses are off by .02.
    assert (ours_nll - truth_nll).abs().max() < 2e-4 < 1e-2 < (naive_nll - truth_nll).abs().max()
    assert len(calls) == expected


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_products_of_16_bits_into_float32_make_the_same_loss_and_gradients(options, autocast, as_on_a_gpu):
    *inputs, targets, weights = problem(dtype=torch.float32 if autocast else torch.bfloat16)
    hidden, head, bias = [tensor.data.bfloat16().to(tensor.dtype).requires_grad_() for tensor in inputs]
    exact = [tensor.detach().double().requires_grad_() for tensor in (hidden, head, bias)]
    exact_nll = plain_nll(*exact[:2], targets, **{**options, "bias": exact[2] if "bias" in options else None})
    options = {**options, "bias": bias if "bias" in options else None}
    expected = results(weights @ exact_nll, *exact)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        nll = linear_nll(hidden, head, targets, **options)
        loss = weighted_linear_cross_entropy(hidden, head, targets, weights, **options)
    actual = results(loss, hidden, head, bias)
    # The inputs have 8 bits each, so that the losses are those of float32: sums of 17 products below 20.
    torch.testing.assert_close(nll.double(), exact_nll, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(actual[0].double(), expected[0], rtol=1e-5, atol=1e-5)
    # The gradient of the logits, and those made of it where they are bfloat16, are rounded by 2**-9 each.
    for one, other in zip(actual[1:], expected[1:], strict=True):
        assert (one - other).norm() <= 2 * 2**-9 * other.norm()
    assert set(as_on_a_gpu) == {torch.bfloat16}


@pytest.mark.parametrize("frozen", [0, 1])
def test_with_products_of_16_bits_what_is_frozen_gets_no_gradient_and_the_rest_the_same(frozen, as_on_a_gpu):
    *inputs, targets, weights = problem(dtype=torch.bfloat16)
    whole = results(weighted_linear_cross_entropy(*inputs[:2], targets, weights, bias=inputs[2]), *inputs)
    inputs[frozen].requires_grad_(False)
    weighted_linear_cross_entropy(*inputs[:2], targets, weights, bias=inputs[2]).backward()
    assert inputs[frozen].grad is None
    assert all(torch.equal(inputs[i].grad, whole[1 + i]) for i in range(3) if i != frozen)
    assert len(as_on_a_gpu) == 3 + 2


def test_small_weights_do_not_vanish_in_float16(as_on_a_gpu):
    *inputs, targets, weights = problem(dtype=torch.float16)
    weights *= 2**-20  # as if they had been divided by a million tokens
    scaler = 2.0**20  # of the loss, so that the gradients can be held in float16
    exact = [tensor.detach().double().requires_grad_() for tensor in inputs]
    expected = results(scaler * (weights @ plain_nll(*exact[:2], targets, exact[2])), *exact)
    loss = weighted_linear_cross_entropy(*inputs[:2], targets, weights, bias=inputs[2])
    for one, other in zip(results(scaler * loss, *inputs), expected, strict=True):
        assert (one - other).norm() <= 2**-11 * other.norm()
    assert not as_on_a_gpu


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_16_bit_head_cast_in_blocks_gives_what_it_gives_cast_at_once(dtype, monkeypatch):
    *inputs, targets, weights = problem(dtype=dtype)
    hidden, head, bias = inputs

    def computed():
        losses = linear_nll(hidden, head, targets, bias=bias, softcap=4.0)
        return losses, *results(weighted_linear_cross_entropy(hidden, head, targets, weights, bias=bias), *inputs)

    whole = computed()
    monkeypatch.setattr(products, "CAST_BYTES", 4 * D * 3)  # 3 of the 17 rows
    # Sums over 17 columns in another order, in float32, rounded to 16 bits where they are gradients.
    for one, other in zip(computed(), whole, strict=True):
        rounding = torch.finfo(one.dtype).eps + 17 * torch.finfo(torch.float32).eps
        torch.testing.assert_close(one, other, rtol=rounding, atol=rounding)


@pytest.mark.parametrize("weights_of_chunk", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_autocast_takes_no_digit_from_loss_or_gradients(dtype, weights_of_chunk):
    *inputs, targets, weights = problem(n=64, d=32, v=100, dtype=dtype)
    hidden, head, bias = inputs
    weigh = (lambda losses, rows: weights[rows]) if weights_of_chunk else weights
    expected = results(weighted_linear_cross_entropy(hidden, head, targets, weigh, bias=bias), *inputs)
    expected_nll = linear_nll(hidden, head, targets, bias=bias)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = weighted_linear_cross_entropy(hidden, head, targets, weigh, bias=bias)
        nll = linear_nll(hidden, head, targets, bias=bias)
    for one, other in zip([nll, *results(loss, *inputs)], [expected_nll, *expected], strict=True):
        assert one.dtype == other.dtype
        # The same operations in the same order; a bfloat16 product anywhere would be off by 2**-9 or so.
        torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-6)
