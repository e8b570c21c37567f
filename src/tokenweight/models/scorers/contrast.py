"""Results and protocol of scorers that supply both sides of the contrast."""

from typing import Any, NamedTuple, Protocol, runtime_checkable

from jaxtyping import Float, Int
from torch import Tensor

from tokenweight.method import ShortContext


class Contrast(NamedTuple):
    """The losses of every token in nats, 0 for the first of a document; and how far its two distributions differ."""

    long_nll: Float[Tensor, "batch seq"]
    """Losses with the whole sequence, or packed document, as context."""
    short_nll: Float[Tensor, "batch seq"]
    """Losses with the short context."""
    divergence: Float[Tensor, "batch seq"] | None = None
    """Divergence of the two distributions of the next token, whichever it was."""


@runtime_checkable
class ContrastScorer(Protocol):
    """Scores tokens with the long context and with a short one."""

    @property
    def provenance(self) -> dict[str, Any]:
        """Provenance of the scores, for `scores.json`."""

    def __call__(
        self,
        tokens: Int[Tensor, "batch seq"],
        context: ShortContext,
        *,
        position_ids: Int[Tensor, "batch seq"] | None = None,
    ) -> Contrast:
        """Both losses of every token, windows never crossing from one packed document into another."""
