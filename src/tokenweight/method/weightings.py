"""From the two losses of every token to its weight. Each weighting is a frozen dataclass: settings and behavior."""

import dataclasses
import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import ClassVar

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


def check_finite(losses: Mapping[str, Float[Tensor, "batch seq"]], mask: Bool[Tensor, "batch seq"]) -> None:
    """Raise `NonFinite` for the first non-finite value under `mask`, with its name, row and position."""
    bad = torch.stack([mask & ~torch.isfinite(values) for values in losses.values()])
    if bad.any():  # the one host-device synchronization
        number, row, position = bad.nonzero()[0].tolist()
        name, value = list(losses)[number], list(losses.values())[number][row, position].item()
        raise NonFinite(name, row, position, value)


class Weighting(ABC):
    """How much each token counts: `weigh` is the formula, a call checks what goes in and comes out.

    A function of the same three tensors is a weighting too: `as_weighting` wraps it."""

    uses_short: ClassVar[bool] = True
    """False if the weights do not depend on the short loss: then nothing needs to be scored."""
    pointwise: ClassVar[bool] = False
    """True if a token's weight depends on its own two losses only: then the loss needs no second pass."""
    formula: ClassVar[str] = ""
    """One line in `long` and `short`, the losses of a token with the long and the short context; for model cards."""
    knob: ClassVar[tuple[str, tuple[float, ...]] | None] = None
    """The setting worth trying out, and the values to try, its default among them; `tokenweight report` shows each."""

    @abstractmethod
    def weigh(
        self, long: Float[Tensor, "batch seq"], short: Float[Tensor, "batch seq"], mask: Bool[Tensor, "batch seq"]
    ) -> Float[Tensor, "batch seq"]:
        """The formula: both losses are finite, and 0 outside `mask`; what is returned outside `mask` is ignored."""

    @torch.no_grad()
    def __call__(
        self, long: Float[Tensor, "batch seq"], short: Float[Tensor, "batch seq"], mask: Bool[Tensor, "batch seq"]
    ) -> Float[Tensor, "batch seq"]:
        """The weight of every token, each row by itself.

        Args:
            long: loss of each token with the whole context, in nats; column t speaks of token t.
            short: its loss with the short context.
            mask: True where a token is predicted and counts. Nothing outside it is read.

        Returns:
            Float32 (float64 from float64 losses), 0 outside `mask`, without gradient.

        Raises:
            NonFinite: for a loss or a weight under `mask`; a ValueError if shapes differ.
        """
        if not long.shape == short.shape == mask.shape:
            shapes = ", ".join(str(list(tensor.shape)) for tensor in (long, short, mask))
            raise ValueError(f"long, short and mask have shapes {shapes}: expected one shape, [batch, seq]")
        dtype = torch.promote_types(torch.promote_types(long.dtype, short.dtype), torch.float32)
        zero = torch.zeros((), dtype=dtype, device=long.device)
        finite = mask & long.isfinite() & short.isfinite()  # what is not is refused below, in one wait for all three
        clean = [torch.where(finite, losses.to(dtype), zero) for losses in (long, short)]
        weights = self.weigh(clean[0], clean[1], mask.clone())  # it may write into what it is given
        if weights.shape != mask.shape:
            raise ValueError(f"{self} returned weights of shape {list(weights.shape)}: expected {list(mask.shape)}")
        check_finite({"the long loss": long, "the short loss": short, f"the weight by {self}": weights}, mask)
        return torch.where(mask, weights.to(dtype), zero)

    def __str__(self) -> str:
        fields: tuple[dataclasses.Field, ...] = dataclasses.fields(self) if dataclasses.is_dataclass(self) else ()
        settings = ",".join(f"{field.name}={getattr(self, field.name)}" for field in fields)
        kind, ours = type(self), type(self).__module__.startswith(f"{__package__}.")
        name = kind.__name__.lower() if ours else f"{kind.__module__}.{kind.__qualname__}"
        return f"{name}:{settings}" if settings else name


@dataclasses.dataclass(frozen=True)
class Uniform(Weighting):
    """Weight 1 for every token: plain next-token cross-entropy, the baseline."""

    formula = "w = 1"
    uses_short: ClassVar[bool] = False
    pointwise: ClassVar[bool] = True

    def weigh(self, long: Tensor, short: Tensor, mask: Tensor) -> Tensor:
        """All ones."""
        return torch.ones_like(long)


@dataclasses.dataclass(frozen=True)
class Dense(Weighting):
    """Weight in proportion to |long - short|, mixed with a uniform weight; the mean weight of a row is 1.

        w = interpolation + (1 - interpolation) * T * s / sum(s),   s = |long - short|,   T tokens under the mask

    In a row where all scores are 0, no token stands out and every token weighs 1.

    Args:
        interpolation: the uniform share, 0 to 1; 1 is plain cross-entropy.

    Source: Helm et al. 2025, Eq. 8 and README of the reference code (lambda is `interpolation`; 0.75 in its config).
    """

    formula = "w = interpolation + (1 - interpolation) · s / mean(s), s = |long - short|"
    knob = ("interpolation", (0.0, 0.25, 0.5, 0.75, 0.9))
    interpolation: float = 0.75

    def __post_init__(self) -> None:
        _require(self, "interpolation", 0 <= self.interpolation <= 1, "a number from 0 to 1")

    def weigh(self, long: Tensor, short: Tensor, mask: Tensor) -> Tensor:
        """The formula of the class."""
        weights = normalize((long - short).abs(), mask)
        return self.interpolation + (1 - self.interpolation) * weights


@dataclasses.dataclass(frozen=True)
class Sparse(Weighting):
    """Train only the tokens with the largest |long - short|, all with the same weight; the mean weight of a row is 1.

    Of T tokens under the mask, n = max(1, floor(keep * T)) are kept and weigh T / n. Tokens with equal scores are taken
    in the order of a permutation of the positions that `seed` alone decides, on every device and in every batch. In a
    row where all scores are 0, no token stands out and every token weighs 1.

    Args:
        keep: share of tokens kept, above 0 and up to 1; 1 is plain cross-entropy.
        seed: of the order among equal scores.

    Source: Helm et al. 2025, README of the reference code (kappa is `keep`).
    """

    formula = "w = 1 / keep for the top share `keep` by |long - short|, else 0"
    knob = ("keep", (0.02, 0.05, 0.1, 0.2, 0.5))
    keep: float = 0.2
    seed: int = 0

    def __post_init__(self) -> None:
        _require(self, "keep", 0 < self.keep <= 1, "a share above 0, up to 1")

    def score(self, long: Tensor, short: Tensor) -> Tensor:
        """What the largest are kept of."""
        return (long - short).abs()

    def weigh(self, long: Tensor, short: Tensor, mask: Tensor) -> Tensor:
        """The formula of the class."""
        return keep_top(self.score(long, short), mask, self.keep, self.seed)


@dataclasses.dataclass(frozen=True)
class PPMI(Sparse):
    """Sparse, by positive pointwise mutual information: tokens that the LONG context predicts better.

    The score is max(log(p_long / p_short) - log(shift), 0). Where fewer tokens than `keep` asks for have a positive
    one, tokens of score 0 fill up in the order that `seed` gives.

    Args:
        keep: as in `Sparse`, and so is `seed`.
        shift: ratio p_long / p_short above which a score is positive; above 0.

    Source: Helm et al. 2025, README of the reference code (`[minus, shift s, max]`).
    """

    formula = "w = 1 / keep for the top share `keep` by max(short - long - log(shift), 0), else 0"
    shift: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        _require(self, "shift", 0 < self.shift < math.inf, "a finite number above 0")

    def score(self, long: Tensor, short: Tensor) -> Tensor:
        """What the largest are kept of."""
        return (short - long - math.log(self.shift)).clamp(min=0)


@dataclasses.dataclass(frozen=True)
class NPMI(PPMI):
    """Sparse, by *negative* pointwise mutual information: tokens that the SHORT context predicts better.

    `PPMI` with the roles of the two losses exchanged. The N does not stand for "normalized".

    Source: Helm et al. 2025, README of the reference code (`[shift s, max]`).
    """

    formula = "w = 1 / keep for the top share `keep` by max(long - short - log(shift), 0), else 0"

    def score(self, long: Tensor, short: Tensor) -> Tensor:
        """What the largest are kept of."""
        return super().score(short, long)


def _require(weighting: Weighting, name: str, holds: bool, expected: str) -> None:
    if not holds:
        raise ValueError(f"{type(weighting).__name__}: {name}={getattr(weighting, name)} is not {expected}")


def normalize(scores: Float[Tensor, "batch seq"], mask: Bool[Tensor, "batch seq"]) -> Float[Tensor, "batch seq"]:
    """Scale the scores of each row (>= 0, and 0 outside the mask) to mean 1 over the mask; only zeros become ones."""
    num_tokens, total = mask.sum(dim=1, keepdim=True), scores.sum(dim=1, keepdim=True)
    return torch.where(total > 0, scores / total * num_tokens, 1.0)  # T / total could overflow


def keep_top(
    scores: Float[Tensor, "batch seq"], mask: Bool[Tensor, "batch seq"], keep: float, seed: int
) -> Float[Tensor, "batch seq"]:
    """Keep the max(1, floor(keep * T)) largest scores (>= 0) of each row, and normalize; only zeros become ones."""
    num_tokens = mask.sum(dim=1, keepdim=True)
    num_kept = (num_tokens.double() * keep).floor().long().clamp(min=1)
    scores = scores.masked_fill(~mask, -1)
    most = max(1, math.floor(keep * scores.shape[1]))  # static, so that no device has to be asked
    threshold = scores.topk(most, dim=1).values.gather(1, num_kept - 1)
    above, equal = scores > threshold, (scores == threshold) & mask
    order = _tie_order(scores.shape[1], seed, scores.device)
    rank = torch.empty_like(num_kept.expand_as(scores))
    rank[:, order] = equal[:, order].long().cumsum(dim=1)
    kept = above | (equal & (rank <= num_kept - above.sum(dim=1, keepdim=True)))
    no_score = (scores <= 0).all(dim=1, keepdim=True)
    return normalize(torch.where(no_score, mask, kept).to(scores.dtype), mask)


def _tie_order(length: int, seed: int, device: torch.device) -> Tensor:
    """A permutation of the positions by a hash of (seed, position): the same on every device, and for every length a
    prefix-consistent order, so that padding does not change it. The constants are those of splitmix64, in 63 bits."""
    top = (1 << 63) - 1
    begin = seed * 0x9E3779B97F4A7C15 % (1 << 62) + 1
    x = (torch.arange(length, device=device) + begin) * 0x1E3779B97F4A7C15 & top
    x = (x ^ (x >> 30)) * 0x3F58476D1CE4E5B9 & top
    x = (x ^ (x >> 27)) * 0x14D049BB133111EB & top
    return (x ^ (x >> 31)).argsort(stable=True)
