"""Windows of a short context: the tokens that each reads and those that it scores. Integers only."""

from typing import NamedTuple


class Window(NamedTuple):
    """One pass of a short-context model: it reads tokens `[start, stop)` and scores `[first, stop)`."""

    start: int
    first: int
    stop: int


def check_window_setting(size: int, stride: int) -> None:
    """Raise a ValueError unless `1 <= stride < size` (tokens): else some token would have no context."""
    if not 1 <= stride < size:
        raise ValueError(
            f"stride={stride} does not fit size={size}: expected 1 <= stride < size "
            "(every scored token needs at least size - stride >= 1 tokens of context)"
        )


def sliding_windows(length: int, size: int, stride: int) -> list[Window]:
    """Cover the tokens of a document whose full context does not fit `size` tokens.

    The scored parts tile `[size, length)` exactly once. Tokens before `size` have the same context in a short and in a
    long model, so no window scores them. The context of token t is `size - stride + (t - size) % stride` tokens: it
    depends on t alone, not on the length of the document, and lies between `size - stride` and `size - 1`.

        length 10, size 4, stride 2        . read   # read and scored
        token  0 1 2 3 4 5 6 7 8 9
               ~ ~ ~ ~                     the first window: short and long context are the same
                   . . # #
                       . . # #
                           . . # #

    If `stride` does not divide `length - size`, the last window is shorter.

    Args:
        length: tokens of the document.
        size: tokens that one window reads.
        stride: tokens that one window scores.

    Raises:
        ValueError: unless `1 <= stride < size`.

    Source: Helm et al. 2025, `base_length` and `base_stride` of the reference code, which rejects other lengths.
    """
    check_window_setting(size, stride)
    return [
        Window(start=first - (size - stride), first=first, stop=min(first + stride, length))
        for first in range(size, length, stride)
    ]
