"""Matrix products summed in float32, and how many rows of logits, and parts of a head, are held at a time."""

import functools

import torch
from torch import Tensor

BUFFER_BYTES = 256 << 20
"""Logits held at a time. Smaller chunks re-read the head too often; larger ones gain nothing (benchmarks/loss.py)."""
MOST_ROWS = 1536
"""Of a chunk on a GPU. Each adds a whole gradient of the head in float32, which takes longer than its product if rows
are fewer than about this; more gain nothing (`tokenweight.plan.loss_floor`)."""
CAST_BYTES = 32 << 20
"""What is held in another dtype at a time: of a 16-bit head in float32, of the gradient of the logits in 16 bits."""
INTO_FLOAT32 = frozenset({"cuda"})
"""Devices on which torch multiplies 16-bit matrices into a float32 result: `torch.mm(..., out_dtype=)`."""


def multiplied_in(device: str, dtype: torch.dtype) -> torch.dtype:
    """The dtype that products with the head are made in, on a kind of device, of what has `dtype`."""
    if device in INTO_FLOAT32 and torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
    if device in INTO_FLOAT32 and dtype != torch.float16:
        return dtype
    # Logits rounded to bfloat16 are off by up to 0.06 nats: more than the differences we are after. And in float16
    # their gradients, often below 1e-7, vanish before a scaler of the loss could make them larger.
    return torch.promote_types(dtype, torch.float32)


def rows_at_once(num_rows: int, vocabulary: int, itemsize: int, *, on_gpu: bool) -> int:
    """How many rows of logits are held: as many as fit the buffer; on a GPU a sixtieth of all, if that is more."""
    fitting = max(16, BUFFER_BYTES // (itemsize * vocabulary))
    return max(fitting, min(num_rows // 60, MOST_ROWS)) if on_gpu else fitting


def fit_at_once(num_rows: int, vocabulary: int, dtype: torch.dtype = torch.float32) -> bool:
    """Whether the logits of all rows, made of states of `dtype`, are one chunk, on any device."""
    itemsize = torch.promote_types(dtype, torch.float32).itemsize
    return num_rows <= rows_at_once(num_rows, vocabulary, itemsize, on_gpu=False)


def parts(vocabulary: int, copied: int) -> list[slice]:
    """The vocabulary in even parts, of which a copy of `copied` bytes for each entry fits; in one if none is made."""
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
    """Whether torch adds a 16-bit product to a float32 matrix there, without a third one of that size.

    Source: pull request 167931 of pytorch, since which `addmm(out_dtype=)` does not refuse it.
    """
    out, one = torch.zeros(8, 8, dtype=wide, device=device), torch.ones(8, 8, dtype=narrow, device=device)
    try:
        torch.addmm(out, one, one, out_dtype=wide, out=out)
    except RuntimeError:
        return False
    return True
