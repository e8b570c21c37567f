"""The loss of every token when the model sees only a short context."""

from dataclasses import dataclass

from tokenweight.method.windows import check_window_setting


@dataclass(frozen=True)
class ShortContext:
    """The short context: windows of `size` tokens, of which the last `stride` are scored.

    A token then sees `size - stride` to `size - 1` tokens before it (`windows` has the picture). The paper's 8192 and
    6144 cost one extra forward pass over a row of 32768; in general `stride = (1 - size / length) * size` does.
    """

    size: int
    stride: int

    def __post_init__(self) -> None:
        check_window_setting(self.size, self.stride)
