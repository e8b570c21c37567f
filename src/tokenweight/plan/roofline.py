"""Roofline of the loss: lower bound of its time on a GPU, each kernel by its FLOPs or the bytes that it moves."""

from typing import NamedTuple

from tokenweight.method import rows_at_once
from tokenweight.plan.hardware import find_gpu

BANDWIDTH = {"A100 80GB": 2.039e12, "H100 SXM 80GB": 3.35e12, "H200 SXM 141GB": 4.8e12}
"""Memory bandwidth (HBM) in bytes per second, from the documents that `GPUS` names; for the A100, that of SXM."""


class LossFloor(NamedTuple):
    """Seconds of a loss with known weights, forward and backward, in 16 bits, without launches or synchronization."""

    logits: float
    """The matmul that computes the logits, into float32."""
    softmax: float
    """From logits to losses, and to `exp(logits - max)`: 24 bytes per logit."""
    gradient: float
    """The gradient of the logits, with a copy in 16 bits: 14 bytes per logit."""
    states: float
    """The matmul for the gradient of the hidden states."""
    head: float
    """The matmuls that accumulate the gradient of the head, in float32."""

    @property
    def total(self) -> float:
        """Their sum."""
        return float(sum(self))


def loss_floor(
    gpu: str, num_rows: int, vocabulary: int, hidden_size: int, *, chunk_size: int | None = None, adds: bool = True
) -> LossFloor:
    """Time of `weighted_linear_cross_entropy` on one GPU, if every kernel reaches the peak of what bounds it.

    Args:
        gpu: name of a GPU of `BANDWIDTH`.
        num_rows: number of rows with a target and a weight.
        chunk_size: rows of a chunk; by default that of the loss.
        adds: whether torch adds products to a float32 matrix in place (2.9 allocates one per chunk).

    Raises:
        ValueError: for a GPU whose bandwidth is not known.
    """
    found = find_gpu(gpu)
    if found.name not in BANDWIDTH:
        raise ValueError(f"gpu {gpu}: its bandwidth is not known: expected one of {', '.join(BANDWIDTH)}")
    flops, per_second = found.tflops * 1e12, BANDWIDTH[found.name]
    rows = rows_at_once(num_rows, vocabulary, 4, on_gpu=True) if chunk_size is None else chunk_size
    num_chunks = -(-num_rows // rows)
    logits, head, states = num_rows * vocabulary, vocabulary * hidden_size, num_rows * hidden_size

    def product(num_bytes: float) -> float:
        return max(2.0 * logits * hidden_size / flops, num_bytes / per_second)

    return LossFloor(
        product(2.0 * states + 2.0 * head * num_chunks + 4.0 * logits),
        24.0 * logits / per_second,
        14.0 * logits / per_second,
        product(2.0 * logits + 2.0 * head * num_chunks + 4.0 * states),
        product(2.0 * logits + 2.0 * states + (8.0 if adds else 16.0) * head * num_chunks),
    )
