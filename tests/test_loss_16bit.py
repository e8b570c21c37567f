"""The joined loss in 16 bits: under autocast, with a head that is cast in blocks, and with the products of a GPU."""

import pytest
import torch

from test_loss import OPTIONS, D, plain_nll, problem, results
from tokenweight import linear_nll, weighted_linear_cross_entropy
from tokenweight import loss as module


@pytest.fixture
def as_on_a_gpu(monkeypatch):
    """torch's product of 16-bit matrices into float32, which CPUs lack, made in float32; counts its calls."""
    plain, calls = torch.mm, []

    def multiply(a, b, *, out_dtype=None, **options):
        if out_dtype is None:
            return plain(a, b, **options)
        calls.append(a.dtype)
        torch.ops.aten.mm.dtype(a.to("meta"), b.to("meta"), out_dtype)  # refuses what a GPU would refuse
        return plain(a.to(out_dtype), b.to(out_dtype), **options)

    monkeypatch.setattr(module, "INTO_FLOAT32", {"cpu"})
    monkeypatch.setattr(torch, "mm", multiply)
    return calls


@pytest.mark.parametrize("device", ["cpu", "as_on_a_gpu"])
def test_in_bfloat16_nothing_is_further_from_the_truth_than_the_naive_computation(device, request):
    calls = [] if device == "cpu" else request.getfixturevalue(device)
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
    assert len(calls) == (0 if device == "cpu" else 4)  # losses; then losses and the gradients of states and head


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
    monkeypatch.setattr(module, "CAST_BYTES", 4 * D * 3)  # 3 of the 17 rows
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
