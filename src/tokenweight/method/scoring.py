"""The windows of a short context: what each reads, and where its scored losses go. Index arithmetic only."""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from jaxtyping import Int
from torch import Tensor

from tokenweight.method.windows import Window, check_window_setting, sliding_windows


@dataclass(frozen=True, init=False)
class ShortContext:
    """The short context: windows of `size` tokens, of which the last `stride` are scored.

    A token then sees `size - stride` to `size - 1` tokens before it (`sliding_windows` has the picture). `stride` is
    three quarters of `size` by default: the paper's 8192 and 6144 cost one extra forward pass over a sequence of 32768;
    in general `stride = (1 - size / length) * size` does.
    """

    size: int
    stride: int

    def __init__(self, size: int, stride: int | None = None) -> None:
        stride = max(1, size * 3 // 4) if stride is None else stride
        check_window_setting(size, stride)
        object.__setattr__(self, "size", size)
        object.__setattr__(self, "stride", stride)

    @classmethod
    def of(cls, length: int, size: int | None = None, stride: int | None = None) -> "ShortContext":
        """The context for `length` tokens: by default a quarter, as in the paper. ValueError unless it is less."""
        size = length // 4 if size is None else size
        if size >= length:
            raise ValueError(f"size {size}: sequences hold {length} tokens: no token would have a shorter context")
        return cls(size, stride)


class Pass(NamedTuple):
    """One window of one sequence of a batch, counted from `document`, the column where its document begins."""

    row: int
    document: int
    window: Window

    @property
    def num_tokens(self) -> int:
        """Tokens that the window reads."""
        return self.window.stop - self.window.start


def plan_passes(
    tokens: Int[Tensor, "batch seq"], position_ids: Tensor | None, context: ShortContext, *, skip_first: bool
) -> list[Pass]:
    """All windows of a batch; none crosses from one packed document into another.

    Args:
        position_ids: where they restart at 0, a document begins. By default each sequence is one document.
        skip_first: leave out the first window of each document, whose short and long context are the same.
    """
    length = tokens.shape[1]
    passes = []
    for row in range(len(tokens)):
        begins = [] if position_ids is None else (position_ids[row, 1:] == 0).nonzero()[:, 0].tolist()
        for start, stop in itertools.pairwise([0, *(t + 1 for t in begins), length]):
            num = stop - start
            first = [] if skip_first or num < 2 else [Window(0, 1, min(context.size, num))]
            found = first + sliding_windows(num, context.size, context.stride)
            passes += [Pass(row, start, window) for window in found]
    return passes


class Reading(NamedTuple):
    """The input of windows, one row each; and the index of each scored token in it (on the host) and in the batch."""

    tokens: Int[Tensor, "windows width"]
    position_ids: Int[Tensor, "windows width"] | None
    inside: Int[Tensor, " n"]
    target: Int[Tensor, " n"]


def read_passes(
    passes: Sequence[Pass], tokens: Int[Tensor, "batch seq"], position_ids: Tensor | None, prefix: Sequence[int]
) -> Reading:
    """One row per window. Shorter ones are padded with their last token, which causal attention hides from the others.

    Args:
        position_ids: given only if positions are skipped (PoSE); those of a window then begin at 0.
        prefix: replaces the first tokens of a window, in documents that begin with it.
    """
    device, length = tokens.device, tokens.shape[1]
    width = max(one.num_tokens for one in passes)
    # Index tensors are made on the host and copied asynchronously, so that nothing synchronizes with the device.
    read_at = [torch.arange(w.start, w.start + width).clamp(max=w.stop - 1) + document for _, document, w in passes]
    columns = torch.stack(read_at).to(device, non_blocking=True)
    rows = torch.tensor([[row] for row, _, _ in passes]).to(device, non_blocking=True)
    read = tokens[rows, columns]
    if prefix:
        first, num = torch.tensor(prefix).to(device, non_blocking=True), len(prefix)
        begins = torch.tensor([[document] for _, document, _ in passes]) + torch.arange(num)
        other = (tokens[rows, begins.clamp(max=length - 1).to(device, non_blocking=True)] != first).any(
            dim=1, keepdim=True
        )
        read[:, :num] = read[:, :num].where(other, first[:width])
    positions = None
    if position_ids is not None:
        positions = position_ids[rows, columns] - position_ids[rows, columns[:, :1]]
        positions[:, 1:].clamp_(min=1)  # padding may stay at one position: 0 would begin a document
    inside = [i * width + torch.arange(w.first - w.start, w.stop - w.start) for i, (_, _, w) in enumerate(passes)]
    target = [row * length + document + torch.arange(w.first, w.stop) for row, document, w in passes]
    return Reading(read, positions, torch.cat(inside), torch.cat(target).to(device, non_blocking=True))
