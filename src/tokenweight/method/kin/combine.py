"""Combinations of weightings, whatever inputs these use."""

import dataclasses
import math
from collections.abc import Iterator
from typing import Any, ClassVar

import torch
from torch import Tensor

from tokenweight.method.weightings import Weighting, normalize, require


class Combination(Weighting):
    """A frozen dataclass with weightings among its fields: it uses what they use, and its history holds theirs."""

    own_history: ClassVar[int] = 0
    """Length of the combination's own history, in front of the histories of its parts."""

    @property
    def remembered(self) -> list[bool]:
        """The flags of its own history, then those of its parts."""
        return [True] * self.own_history + [one for part in self.parts for one in part.remembered]

    @property
    def parts(self) -> list[Weighting]:
        """The weightings that it combines."""
        values = [getattr(self, field.name) for field in dataclasses.fields(self)]  # type: ignore[arg-type]
        return [value for value in values if isinstance(value, Weighting)]

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):  # type: ignore[arg-type]
            if field.type is Weighting:
                require(self, field.name, isinstance(getattr(self, field.name), Weighting), "a weighting")
        using = [part for part in self.parts if part.divergence is not None]
        if len({part.divergence for part in using}) > 1:  # all parts read one column
            found = " and ".join(str(part.divergence_of) for part in using)
            raise ValueError(f"{type(self).__name__}: found the divergences of {found}: expected one and the same")
        vars(self).update(
            uses=frozenset().union(*(part.uses for part in self.parts)),
            pointwise=type(self).pointwise and all(part.pointwise for part in self.parts),
            of_losses=any(part.of_losses for part in self.parts),
            history=self.own_history + sum(part.history for part in self.parts),
            divergence_of=using[0].divergence_of if using else None,
            divergence=using[0].divergence if using else None,
        )

    def weights_of_parts(self, long: Tensor, short: Tensor, mask: Tensor, **used: Tensor) -> Iterator[Tensor]:
        """The weights of each part, which may write into its inputs: they are copies."""
        begin = self.own_history
        for part in self.parts:
            own = part.asked(used)
            if part.history:
                own["history"] = used["history"][begin : begin + part.history]
                begin += part.history
            own = {name: value.clone() for name, value in own.items()}
            yield part.weigh(long.clone(), short.clone(), mask.clone(), **own)

    def observe(self, long: Tensor, short: Tensor, mask: Tensor, **used: Any) -> Tensor:
        """The observations of its parts, concatenated."""
        parts = [part for part in self.parts if part.history]
        return torch.cat([part.observe(long, short, mask, **part.asked(used)) for part in parts])


@dataclasses.dataclass(frozen=True)
class Mix(Combination):
    """Two weightings at once: share * first + (1 - share) * second.

    Args:
        share: that of the first, 0 to 1.
    """

    formula = "w = share · first + (1 - share) · second"
    pointwise: ClassVar[bool] = True
    first: Weighting
    second: Weighting
    share: float = 0.5

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self, "share", 0 <= self.share <= 1, "a number from 0 to 1")

    def weigh(self, long: Tensor, short: Tensor, mask: Tensor, **used: Any) -> Tensor:
        """The formula of the class."""
        first, second = self.weights_of_parts(long, short, mask, **used)
        return self.share * first + (1 - self.share) * second


@dataclasses.dataclass(frozen=True)
class Floor(Combination):
    """A weighting in which no token weighs less than a minimum: the mean weight grows by what that adds.

    Args:
        minimum: the smallest weight, 0 or more.
    """

    formula = "w = max(weighting, minimum)"
    pointwise: ClassVar[bool] = True
    weighting: Weighting
    minimum: float

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self, "minimum", 0 <= self.minimum < math.inf, "a finite number, 0 or more")

    def weigh(self, long: Tensor, short: Tensor, mask: Tensor, **used: Any) -> Tensor:
        """The formula of the class."""
        (weights,) = self.weights_of_parts(long, short, mask, **used)
        return weights.clamp(min=self.minimum)


@dataclasses.dataclass(frozen=True)
class Normalized(Combination):
    """A weighting scaled to the mean weight 1 in each row; a row where all weights are 0 weighs 1 everywhere."""

    formula = "w = weighting / mean(weighting)"
    weighting: Weighting

    def weigh(self, long: Tensor, short: Tensor, mask: Tensor, **used: Any) -> Tensor:
        """The formula of the class."""
        (weights,) = self.weights_of_parts(long, short, mask, **used)
        return normalize(weights, mask)


@dataclasses.dataclass(frozen=True)
class Warmup(Combination):
    """A linear ramp from uniform to a weighting over the targets trained on so far, on all ranks, this batch included.

    Tokens rather than steps: independent of the number of ranks and of accumulated batches.

    Args:
        tokens: targets after which the weighting has its full effect, above 0.
    """

    formula = "w = 1 + min(targets so far / tokens, 1) · (weighting - 1)"
    pointwise: ClassVar[bool] = True
    own_history: ClassVar[int] = 1
    weighting: Weighting
    tokens: float

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self, "tokens", 0 < self.tokens < math.inf, "a finite number above 0")

    def weigh(self, long: Tensor, short: Tensor, mask: Tensor, **used: Any) -> Tensor:
        """The formula of the class."""
        (weights,) = self.weights_of_parts(long, short, mask, **used)
        return 1 + (used["history"][0] / self.tokens).clamp(max=1).to(weights.dtype) * (weights - 1)

    def observe(self, long: Tensor, short: Tensor, mask: Tensor, **used: Any) -> Tensor:
        """The number of targets, and what the weighting observes."""
        own = mask.sum().double()[None]
        return torch.cat([own, super().observe(long, short, mask, **used)]) if self.weighting.history else own


@dataclasses.dataclass(frozen=True)
class FirstWindow(Combination):
    """One weight for all tokens of a document's first window, where self-scoring yields no difference.

    The rest are weighed as if they alone were the row. With `weight` 1 and a weighting of mean 1 the mean remains 1.

    Args:
        size: tokens of the window, from the start of each document.
        weight: the weight of these tokens, 0 or more.
    """

    formula = "w = weight in the first `size` tokens of a document, else weighting"
    pointwise: ClassVar[bool] = True
    weighting: Weighting
    size: int
    weight: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self, "size", self.size >= 0, "a number of tokens, 0 or more")
        require(self, "weight", 0 <= self.weight < math.inf, "a finite number, 0 or more")
        vars(self)["uses"] = self.weighting.uses | {"positions"}

    def weigh(self, long: Tensor, short: Tensor, mask: Tensor, **used: Any) -> Tensor:
        """The formula of the class."""
        first = used["positions"] < self.size
        # The weighting must not read the losses of tokens that it does not weigh; its weights of them are replaced.
        long, short = long.masked_fill(first, 0), short.masked_fill(first, 0)
        (weights,) = self.weights_of_parts(long, short, mask & ~first, **used)
        return weights.masked_fill(first, self.weight)

    def observe(self, long: Tensor, short: Tensor, mask: Tensor, **used: Any) -> Tensor:
        """The observation of the weighting for the other tokens."""
        return super().observe(long, short, mask & (used["positions"] >= self.size), **used)
