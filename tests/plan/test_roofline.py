"""The least time of a loss on a GPU against sums on paper, and the length of its chunks against all others."""

import pytest

from tokenweight.method import rows_at_once
from tokenweight.method.device.products import BUFFER_BYTES, CAST_BYTES
from tokenweight.plan import loss_floor
from tokenweight.plan.roofline import BANDWIDTH

SHAPES = {"Llama-3.2-1B": (128_256, 2048), "Llama-3-8B": (128_256, 4096), "Gemma-2-2B": (256_000, 2304)}
SHAPES |= {"Qwen2.5-0.5B": (151_936, 896), "SmolLM2-135M": (49_152, 576), "Llama-2-7B": (32_000, 4096)}


def test_the_times_are_those_of_a_sum_on_paper():
    vocabulary, hidden_size = SHAPES["Llama-3.2-1B"]
    found = loss_floor("h100", 32_768, vocabulary, hidden_size, chunk_size=512)
    product = 2 * 32_768 * vocabulary * hidden_size / 989.4e12  # 17.4 ms: long chunks are bound by it
    assert found.logits == found.states == pytest.approx(product)
    # 64 chunks, each of which reads and writes 128,256 x 2,048 numbers of 4 bytes, beside what it multiplies.
    moved = 64 * (8 * vocabulary * hidden_size + 2 * 512 * (vocabulary + hidden_size))
    assert found.head == pytest.approx(moved / 3.35e12)
    assert found.softmax + found.gradient == pytest.approx(38 * 32_768 * vocabulary / 3.35e12)
    assert found.total == pytest.approx(sum(found))
    without = loss_floor("h100", 32_768, vocabulary, hidden_size, chunk_size=512, adds=False)
    assert without.head == pytest.approx((moved + 64 * 8 * vocabulary * hidden_size) / 3.35e12)


@pytest.mark.parametrize("gpu", BANDWIDTH)
@pytest.mark.parametrize("num_rows", [8192, 32_768, 131_072])
@pytest.mark.parametrize("shape", SHAPES)
def test_chunks_are_as_long_as_is_fastest_of_what_may_be_held(gpu, num_rows, shape):
    vocabulary, hidden_size = SHAPES[shape]
    may_hold = max(4 * num_rows * vocabulary / 50, BUFFER_BYTES + CAST_BYTES)

    def seconds(rows):
        return loss_floor(gpu, num_rows, vocabulary, hidden_size, chunk_size=rows).total

    lengths = [
        n for n in range(64, num_rows, 64) if 4 * n * vocabulary + min(CAST_BYTES, 2 * n * vocabulary) < may_hold
    ]
    chosen = rows_at_once(num_rows, vocabulary, 4, on_gpu=True)
    assert 4 * chosen * vocabulary + CAST_BYTES <= may_hold
    assert seconds(chosen) <= 1.05 * min(map(seconds, lengths))


def test_a_gpu_without_a_known_bandwidth_is_refused():
    with pytest.raises(ValueError, match="gpu l4: its bandwidth is not known: expected one of A100 80GB"):
        loss_floor("l4", 1, 1, 1)
