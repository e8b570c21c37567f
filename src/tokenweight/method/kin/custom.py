"""A function as a weighting."""

import dataclasses
from collections.abc import Callable

from torch import Tensor

from tokenweight.method.weightings import Weighting


@dataclasses.dataclass(frozen=True)
class Custom(Weighting):
    """A function of (long, short, mask), all `[batch, seq]`, as a weighting, with the checks of the others."""

    function: Callable[[Tensor, Tensor, Tensor], Tensor]

    def weigh(self, long: Tensor, short: Tensor, mask: Tensor) -> Tensor:
        """The result of the function."""
        return self.function(long, short, mask)

    def __str__(self) -> str:
        return f"{self.function.__module__}.{getattr(self.function, '__qualname__', type(self.function).__name__)}"


def as_weighting(weighting: Callable[[Tensor, Tensor, Tensor], Tensor]) -> Weighting:
    """Return a weighting as it is, or wrap a function of (long, short, mask); anything else is a ValueError."""
    if isinstance(weighting, Weighting):
        return weighting
    if not callable(weighting) or isinstance(weighting, type):
        raise ValueError(f"weighting is {weighting!r}: expected an instance such as Dense(), or a function")
    return Custom(weighting)
