"""Token weights from the two losses of each token. Each weighting is a frozen dataclass: settings and behavior."""

import dataclasses
import functools
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from tokenweight.method.device.finite import check_finite
from tokenweight.method.device.rows import tie_order

History = Callable[[Tensor], Tensor]
"""Maps what rows add to the history of a weighting to the history that they are weighed with."""
SCORES = ("short_nll", "long_nll", "ref_nll", "divergence")
"""Columns of a batch that hold a value for each token; those that a weighting does not use can be left out."""


class Weighting(ABC):
    """The weight of each token: `weigh` is the formula, a call checks its inputs and its result.

    A function of long, short and mask is a weighting too: `as_weighting` wraps it. Combinations of weightings set the
    attributes of an instance: read them there, rather than from the class."""

    uses: ClassVar[frozenset[str]] = frozenset({"short_nll"})
    """The inputs of `weigh` beside the long loss: "short_nll", which is `short`; and as keywords "positions" (tokens of
    its own document before each token), "ref_nll" (its loss under a reference model) and "divergence" (of the
    predictions with the short context from those with the long one)."""
    pointwise: ClassVar[bool] = False
    """True if a token's weight depends on its own values only: then the loss needs no second pass."""
    selects: ClassVar[bool] = True
    """False if hardly a weight is 0: then zeros are not looked up, which would make the host wait for the device."""
    of_losses: ClassVar[bool] = True
    """False if neither the long nor the short loss is read: then the weights are known before the long loss is."""
    divergence_of: "ClassVar[ScoreWeighting | None]" = None
    divergence: ClassVar[str | None] = None
    """Where a divergence is used, the weighting whose expected score it is, and its identifier (`divergence_kind`)."""
    history: ClassVar[int] = 0
    """Length of the vector that sums up the training so far, a keyword of `weigh` where it is not 0."""
    remembers: ClassVar[bool] = True
    """False if that sum covers one batch alone, in all processes."""
    formula: ClassVar[str] = ""
    """One line in `long` and `short`, the losses of a token with the long and the short context; for model cards."""
    knob: ClassVar[tuple[str, tuple[float, ...]] | None] = None
    """The setting worth trying out, and the values to try, its default among them; `tokenweight report` shows each."""

    @property
    def remembered(self) -> list[bool]:
        """For each number of the history, whether it covers all batches so far, rather than one."""
        return [self.remembers] * self.history

    @property
    def uses_short(self) -> bool:
        """False if the weights do not depend on the short loss: then nothing needs to be scored for it."""
        return "short_nll" in self.uses

    @abstractmethod
    def weigh(
        self,
        long: Float[Tensor, "batch seq"],
        short: Float[Tensor, "batch seq"],
        mask: Bool[Tensor, "batch seq"],
        *args: Any,
        **used: Any,
    ) -> Float[Tensor, "batch seq"]:
        """The formula: all inputs are finite, and 0 outside `mask`; what is returned outside `mask` is ignored.

        Args:
            long: as in a call, and so is `mask`.
            short: the long loss, if short losses are not used.
            used: the inputs that `uses` names beyond "short_nll", and `history` if there is one.
        """

    def observe(self, long: Tensor, short: Tensor, mask: Tensor, *args: Any, **used: Any) -> Float[Tensor, " history"]:
        """The contribution of a batch to the history, in float64; a pointwise weighting must not read the losses."""
        raise NotImplementedError(f"{type(self).__name__} has a history and no method observe")

    @torch.no_grad()
    def __call__(
        self,
        long: Float[Tensor, "batch seq"],
        short: Float[Tensor, "batch seq"],
        mask: Bool[Tensor, "batch seq"],
        *,
        history: Tensor | History = lambda observed: observed,
        **used: Any,
    ) -> Float[Tensor, "batch seq"]:
        """The weight of every token, each row by itself.

        Args:
            long: loss of each token with the whole context, in nats; column t belongs to token t.
            short: its loss with the short context.
            mask: True where a token is predicted and counts. Nothing outside it is read.
            history: that of the weighting, or a function to it from what these rows add; by default what they add.
            used: the inputs that `uses` names, each `[batch, seq]`; others are ignored.

        Returns:
            Float32 (float64 from float64 losses), 0 outside `mask`, without gradient.

        Raises:
            NonFinite: for a loss or a weight under `mask`; a ValueError if shapes differ, or something is missing.
        """
        values = {"long": long, "short": short, **self.asked(used)}
        if not all(value.shape == mask.shape for value in values.values()):
            shapes = ", ".join(str(list(tensor.shape)) for tensor in (*values.values(), mask))
            raise ValueError(f"{', '.join(values)} and mask have shapes {shapes}: expected one shape, [batch, seq]")
        dtype = torch.promote_types(torch.promote_types(long.dtype, short.dtype), torch.float32)
        finite = mask.clone()  # the others raise below, with one synchronization for all
        for value in values.values():
            finite &= value.isfinite()
        used = {
            name: value.to(dtype if value.is_floating_point() else value.dtype).masked_fill(~finite, 0)
            for name, value in values.items()
        }
        clean_long, clean_short = used.pop("long"), used.pop("short")  # copies, which `weigh` may write into
        if self.history:
            observe = functools.partial(self.observe, clean_long, clean_short, mask, **used)
            used["history"] = history(observe()) if callable(history) else history
        weights = self.weigh(clean_long, clean_short, mask.clone(), **used)
        if weights.shape != mask.shape:
            raise ValueError(f"{self} returned weights of shape {list(weights.shape)}: expected {list(mask.shape)}")
        named = {"the long loss": values.pop("long"), "the short loss": values.pop("short"), **values}
        check_finite({**named, f"the weight by {self}": weights}, mask)
        return weights.to(dtype).masked_fill(~mask, 0)

    def asked(self, given: Mapping[str, Tensor | None]) -> dict[str, Tensor]:
        """Select the given values that `uses` names beyond "short_nll"; a ValueError names what is missing."""
        found = {name: value for name in sorted(self.uses - {"short_nll"}) if (value := given.get(name)) is not None}
        if missing := self.uses - {"short_nll"} - found.keys():
            raise ValueError(f"weighting {self} needs {', '.join(sorted(missing))} of every token: found none")
        return found

    def __str__(self) -> str:
        fields: tuple[dataclasses.Field, ...] = dataclasses.fields(self) if dataclasses.is_dataclass(self) else ()
        values = {field.name: getattr(self, field.name) for field in fields}
        parts = [_as_call(str(value)) for value in values.values() if isinstance(value, Weighting)]
        settings = [f"{name}={value}" for name, value in values.items() if not isinstance(value, Weighting)]
        kind, ours = type(self), type(self).__module__.startswith(f"{__package__}.")
        name = kind.__name__.lower() if ours else f"{kind.__module__}.{kind.__qualname__}"
        text = f"{name}:{','.join([*parts, *settings])}".removesuffix(":")
        return _as_call(text) if parts else text


class ScoreWeighting(Weighting):
    """A weighting whose weights are a function of one score per token, computed from its two losses."""

    @abstractmethod
    def score(self, long: Float[Tensor, "*shape"], short: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
        """The score of each token, or of each entry of a vocabulary, from its two losses, in nats."""

    @abstractmethod
    def weights(
        self, scores: Float[Tensor, "batch seq"], mask: Bool[Tensor, "batch seq"]
    ) -> Float[Tensor, "batch seq"]:
        """The weights of each row; outside `mask`, scores are anything finite and weights are ignored."""

    def weigh(self, long: Tensor, short: Tensor, mask: Tensor) -> Tensor:
        """The weights of the scores."""
        return self.weights(self.score(long, short), mask)


@dataclasses.dataclass(frozen=True)
class Uniform(Weighting):
    """Weight 1 for every token: plain next-token cross-entropy, the baseline."""

    formula = "w = 1"
    uses: ClassVar[frozenset[str]] = frozenset()
    pointwise: ClassVar[bool] = True
    of_losses: ClassVar[bool] = False

    def weigh(self, long: Tensor, short: Tensor, mask: Tensor) -> Tensor:
        """All ones."""
        return torch.ones_like(long)


@dataclasses.dataclass(frozen=True)
class Dense(ScoreWeighting):
    """Weight in proportion to |long - short|, mixed with a uniform weight; the mean weight of a row is 1.

        w = interpolation + (1 - interpolation) * T * s / sum(s),   s = |long - short|,   T tokens under the mask

    In a row where all scores are 0, no token stands out and every token weighs 1.

    Args:
        interpolation: the uniform share, 0 to 1; 1 is plain cross-entropy.

    Source: Helm et al. 2025, Eq. 8 and README of the reference code (lambda is `interpolation`; 0.75 in its config).
    """

    formula = "w = interpolation + (1 - interpolation) · s / mean(s), s = |long - short|"
    knob: ClassVar[tuple[str, tuple[float, ...]] | None] = ("interpolation", (0.0, 0.25, 0.5, 0.75, 0.9))
    interpolation: float = 0.75

    def __post_init__(self) -> None:
        require(self, "interpolation", 0 <= self.interpolation <= 1, "a number from 0 to 1")
        vars(self)["selects"] = self.interpolation == 0

    def score(self, long: Tensor, short: Tensor) -> Tensor:
        """What the weight is in proportion to, where it is above 0."""
        return (long - short).abs()

    def weights(self, scores: Tensor, mask: Tensor) -> Tensor:
        """The formula of the class."""
        return self.interpolation + (1 - self.interpolation) * normalize(scores, mask)


@dataclasses.dataclass(frozen=True)
class Sparse(ScoreWeighting):
    """Train only the tokens with the largest |long - short|, all with the same weight; the mean weight of a row is 1.

    Of T tokens under the mask, n = max(1, floor(keep * T)) are kept and weigh T / n. Tokens with equal scores are taken
    in the order of a permutation of the positions that `seed` alone decides, on every device and in every batch. In a
    row where all scores are 0, no token stands out and every token weighs 1.

    Args:
        keep: share of tokens kept, above 0 and up to 1; 1 is plain cross-entropy.
        seed: decides the order among equal scores.

    Source: Helm et al. 2025, README of the reference code (kappa is `keep`).
    """

    formula = "w = 1 / keep for the top share `keep` by |long - short|, else 0"
    knob = ("keep", (0.02, 0.05, 0.1, 0.2, 0.5))
    keep: float = 0.2
    seed: int = 0

    def __post_init__(self) -> None:
        require(self, "keep", 0 < self.keep <= 1, "a share above 0, up to 1")

    def score(self, long: Tensor, short: Tensor) -> Tensor:
        """The score whose largest values are kept."""
        return (long - short).abs()

    def weights(self, scores: Tensor, mask: Tensor) -> Tensor:
        """The formula of the class."""
        scored = ((scores > 0) & mask).any(dim=1, keepdim=True)
        return torch.where(scored, keep_top(scores, mask, self.keep, self.seed), 1.0)


def _as_call(text: str) -> str:
    """The text of a weighting nested in that of another: dense(interpolation=0.5)."""
    name, colon, settings = text.partition(":")
    return f"{name}({settings})" if colon else name


def require(weighting: Weighting, name: str, holds: bool, expected: str) -> None:
    """Raise a ValueError that names a setting and what is `expected`, unless it `holds`."""
    if not holds:
        raise ValueError(f"{type(weighting).__name__}: {name}={getattr(weighting, name)} is not {expected}")


def normalize(scores: Float[Tensor, "batch seq"], mask: Bool[Tensor, "batch seq"]) -> Float[Tensor, "batch seq"]:
    """Scale the scores of each row, clamped at 0, to mean 1 over the mask; a row of zeros becomes ones."""
    scores = scores.clamp(min=0).masked_fill(~mask, 0)
    num_tokens, total = mask.sum(dim=1, keepdim=True), scores.sum(dim=1, keepdim=True)
    return torch.where(total > 0, scores / total * num_tokens, 1.0)  # T / total could overflow


def keep_top(
    scores: Float[Tensor, "batch seq"], mask: Bool[Tensor, "batch seq"], keep: float, seed: int
) -> Float[Tensor, "batch seq"]:
    """Keep the max(1, floor(keep * T)) largest scores of each row, with equal weights of mean 1."""
    num_kept = (mask.sum(dim=1, keepdim=True).double() * keep).floor().long().clamp(min=1)
    scores = scores.masked_fill(~mask, -math.inf)
    most = max(1, math.floor(keep * scores.shape[1]))  # static, which needs no synchronization
    threshold = scores.topk(most, dim=1).values.gather(1, num_kept - 1)
    above, equal = scores > threshold, (scores == threshold) & mask
    order = tie_order(scores.shape[1], seed, scores.device)
    rank = torch.empty_like(num_kept.expand_as(scores))
    rank[:, order] = equal[:, order].long().cumsum(dim=1)
    kept = above | (equal & (rank <= num_kept - above.sum(dim=1, keepdim=True)))
    return normalize(kept.to(scores.dtype), mask)
