"""Matrix products summed in float32, and the chunk sizes of logits and of the head."""

import functools

import torch
from torch import Tensor

BUFFER_BYTES = 256 << 20
"""Logits held at a time. Smaller chunks re-read the head too often; larger ones gain nothing (benchmarks/loss.py)."""
MOST_ROWS = 1536
"""Most rows of a chunk on a GPU. Each chunk adds a full gradient of the head in float32, which takes longer than its
product if it has fewer rows than about this; more gain nothing (`tokenweight.plan.loss_floor`)."""
CAST_BYTES = 32 << 20
"""Bytes cast to another dtype at a time: a 16-bit head to float32, the gradient of the logits to 16 bits."""
INTO_FLOAT32 = frozenset({"cuda"})
"""Devices on which torch multiplies 16-bit matrices into a float32 result: `torch.mm(..., out_dtype=)`."""


def multiplied_in(device: str, dtype: torch.dtype) -> torch.dtype:
    """The dtype in which products with the head are computed on a type of device, for inputs of `dtype`."""
    if device in INTO_FLOAT32 and torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
    if device in INTO_FLOAT32 and dtype != torch.float16:
        return dtype
    # Logits rounded to bfloat16 are off by up to 0.06 nats: more than the differences we are after. And in float16
    # their gradients, often below 1e-7, underflow before a loss scaler could scale them up.
    return torch.promote_types(dtype, torch.float32)


def rows_at_once(num_rows: int, vocabulary: int, itemsize: int, *, on_gpu: bool) -> int:
    """Number of rows of logits to hold: as many as fit the buffer; on a GPU, if that is more, a sixtieth of all, up to
    `MOST_ROWS`."""
    fitting = max(16, BUFFER_BYTES // (itemsize * vocabulary))
    return max(fitting, min(num_rows // 60, MOST_ROWS)) if on_gpu else fitting


def fit_at_once(num_rows: int, vocabulary: int, dtype: torch.dtype = torch.float32) -> bool:
    """Whether the logits of all rows, from states of `dtype`, fit one chunk on any device."""
    itemsize = torch.promote_types(dtype, torch.float32).itemsize
    return num_rows <= rows_at_once(num_rows, vocabulary, itemsize, on_gpu=False)


def parts(vocabulary: int, copied: int) -> list[slice]:
    """Even parts of the vocabulary, so that a copy of one, `copied` bytes per entry, fits; one part if none is made."""
    num = -(-vocabulary * copied // CAST_BYTES) if copied else 1
    width = -(-vocabulary // num)
    return [slice(i, min(i + width, vocabulary)) for i in range(0, vocabulary, width)]


def multiply_into(out: Tensor, a: Tensor, b: Tensor) -> None:
    """out = a @ b, summed and returned in the dtype of `out` even where a and b have 16 bits."""
    if out.dtype == a.dtype:
        torch.mm(a, b, out=out)
    else:
        torch.mm(a, b, out_dtype=out.dtype, out=out)


def add_product(out: Tensor, a: Tensor, b: Tensor) -> None:
    """out += a @ b, summed in the dtype of `out` even where a and b have 16 bits."""
    if out.dtype == a.dtype:
        out.addmm_(a, b)
    elif _adds_into(out.dtype, a.dtype, a.device):
        torch.addmm(out, a, b, out_dtype=out.dtype, out=out)
    else:
        out += torch.mm(a, b, out_dtype=out.dtype)


@functools.cache
def _adds_into(wide: torch.dtype, narrow: torch.dtype, device: torch.device) -> bool:
    """Whether torch can add a 16-bit product to a float32 matrix on this device without a temporary of that size.

    Source: pull request 167931 of pytorch, which made `addmm(out_dtype=)` accept it.
    """
    out, one = torch.zeros(8, 8, dtype=wide, device=device), torch.ones(8, 8, dtype=narrow, device=device)
    try:
        torch.addmm(out, one, one, out_dtype=wide, out=out)
    except RuntimeError:
        return False
    return True
