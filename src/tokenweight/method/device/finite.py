"""Check that losses and weights are finite: at once, or later, where the host may wait for the device."""

from collections.abc import Callable, Mapping
from contextvars import ContextVar

import torch
from jaxtyping import Bool, Float
from torch import Tensor


class NonFinite(ValueError):
    """A loss or a weight that is not finite, by its name and its place in the batch."""

    def __init__(self, name: str, row: int, position: int, value: float) -> None:
        super().__init__(name, row, position, value)
        self.name, self.row, self.position, self.value = name, row, position, value

    def __str__(self) -> str:
        return f"{self.name} of row {self.row}, position {self.position} is {self.value}: expected a finite number"


LATER: ContextVar[Callable[[Mapping[str, Tensor], Tensor], None] | None] = ContextVar("LATER", default=None)
"""Where set, is called with losses and which are not finite, in place of an error, which would make the host wait."""


def check_finite(losses: Mapping[str, Float[Tensor, "batch seq"]], mask: Bool[Tensor, "batch seq"]) -> None:
    """Raise `NonFinite` for the first non-finite value under `mask`, with its name, row and position."""
    bad = torch.stack([mask & ~torch.isfinite(values) for values in losses.values()])
    if (later := LATER.get()) is not None:
        later(losses, bad)
    elif bad.any():
        number, row, position = bad.nonzero()[0].tolist()
        name, value = list(losses)[number], list(losses.values())[number][row, position].item()
        raise NonFinite(name, row, position, value)
