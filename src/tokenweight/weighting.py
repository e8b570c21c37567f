"""Two losses of every token -> one weight per token. Each weighting is a frozen dataclass: setting and behavior."""

import dataclasses
import difflib
import importlib
import inspect
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from tokenweight.selection import keep_top, normalize


def refuse_nonfinite(
    losses: Mapping[str, Float[Tensor, "batch seq"]], mask: Bool[Tensor, "batch seq"], first_row: int = 0
) -> None:
    """Raise a ValueError for the first non-finite loss under `mask`, with its name, its row and its position."""
    bad = torch.stack([mask & ~torch.isfinite(values) for values in losses.values()])
    if bad.any():  # the one wait for the device
        number, row, position = bad.nonzero()[0].tolist()
        name, value = list(losses)[number], list(losses.values())[number][row, position].item()
        raise ValueError(f"{name} of row {first_row + row}, position {position} is {value}: expected a finite number")


class Weighting(ABC):
    """How much each token counts in the loss: `weigh` gives the formula, a call checks what goes in and comes out.

    Any function of the same three tensors is a weighting too: `with_weighted_loss` wraps it in `Custom`.
    """

    uses_short: ClassVar[bool] = True
    """False if the weights do not depend on the short loss: then nothing needs to be scored."""
    pointwise: ClassVar[bool] = False
    """True if a token's weight depends on its own two losses only: then the loss needs no second pass."""

    @abstractmethod
    def weigh(
        self, long: Float[Tensor, "batch seq"], short: Float[Tensor, "batch seq"], mask: Bool[Tensor, "batch seq"]
    ) -> Float[Tensor, "batch seq"]:
        """The formula: both losses are finite, and 0 outside `mask`; what is returned outside `mask` is ignored."""

    @torch.no_grad()
    def __call__(
        self, long: Float[Tensor, "batch seq"], short: Float[Tensor, "batch seq"], mask: Bool[Tensor, "batch seq"]
    ) -> Float[Tensor, "batch seq"]:
        """Weigh every token of every row by itself.

        Args:
            long: loss of each token with the whole context, in nats; column t speaks of token t.
            short: its loss with the short context, aligned the same way.
            mask: True where a token is predicted and counts. Nothing outside it is read.

        Returns:
            The weights: float32 (float64 from float64 losses), 0 outside `mask`, without gradient.

        Raises:
            ValueError: if a loss or a weight is not finite under `mask`, by row and position; if shapes differ.
        """
        if not long.shape == short.shape == mask.shape:
            raise ValueError(
                f"long, short and mask have shapes {list(long.shape)}, {list(short.shape)} and {list(mask.shape)}: "
                "expected one shape, [batch, seq]"
            )
        dtype = torch.promote_types(torch.promote_types(long.dtype, short.dtype), torch.float32)
        zero = torch.zeros((), dtype=dtype, device=long.device)
        finite = mask & long.isfinite() & short.isfinite()  # what is not is refused below, in one wait for all three
        weights = self.weigh(
            torch.where(finite, long.to(dtype), zero), torch.where(finite, short.to(dtype), zero), mask
        )
        if weights.shape != mask.shape:
            raise ValueError(f"{self} returned weights of shape {list(weights.shape)}: expected {list(mask.shape)}")
        refuse_nonfinite({"the long loss": long, "the short loss": short, f"the weight by {self}": weights}, mask)
        return torch.where(mask, weights.to(dtype), zero)

    def __str__(self) -> str:
        fields: tuple[dataclasses.Field, ...] = dataclasses.fields(self) if dataclasses.is_dataclass(self) else ()
        settings = ",".join(f"{field.name}={getattr(self, field.name)}" for field in fields)
        kind = type(self)
        name = kind.__name__.lower() if kind.__module__ == __name__ else f"{kind.__module__}.{kind.__qualname__}"
        return f"{name}:{settings}" if settings else name


@dataclasses.dataclass(frozen=True)
class Uniform(Weighting):
    """Weight 1 for every token: plain next-token cross-entropy, the baseline."""

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
    in the order of a pseudo-random permutation of the positions, which depends on `seed` and nothing else: not on the
    batch, its order, or the device. In a row where all scores are 0, no token stands out and every token weighs 1.

    Args:
        keep: share of tokens kept, above 0 and up to 1; 1 is plain cross-entropy.
        seed: of the order among equal scores.

    Source: Helm et al. 2025, README of the reference code (kappa is `keep`).
    """

    keep: float = 0.2
    seed: int = 0

    def __post_init__(self) -> None:
        _require(self, "keep", 0 < self.keep <= 1, "a share above 0, up to 1")

    def weigh(self, long: Tensor, short: Tensor, mask: Tensor) -> Tensor:
        """The formula of the class."""
        return keep_top((long - short).abs(), mask, self.keep, self.seed)


@dataclasses.dataclass(frozen=True)
class LongCE(Weighting):
    """Weight p_long / p_short, capped: w = min(exp(short - long), cap). Not normalized, so the mean weight is not 1.

    Args:
        cap: the largest weight, above 0.

    Source: Fang et al. 2025 (arXiv 2410.23771), `finetune/finetune.py` of PKU-ML/LongPPL (gamma is `cap`, 5 there).
    """

    cap: float = 5.0
    pointwise: ClassVar[bool] = True

    def __post_init__(self) -> None:
        _require(self, "cap", 0 < self.cap < math.inf, "a finite number above 0")

    def weigh(self, long: Tensor, short: Tensor, mask: Tensor) -> Tensor:
        """The formula of the class; clamped before `exp`, which would overflow above 88 nats."""
        return (short - long).clamp(max=math.log(self.cap)).exp()


@dataclasses.dataclass(frozen=True)
class PPMI(Weighting):
    """Sparse, by positive pointwise mutual information: tokens that the LONG context predicts better.

    The score is max(log(p_long / p_short) - log(shift), 0); selection and weights are those of `Sparse`. Where fewer
    tokens than `keep` asks for have a positive score, tokens of score 0 fill up in the order that `seed` gives.

    Args:
        shift: ratio p_long / p_short above which a score is positive; above 0.
        keep: share of tokens kept, above 0 and up to 1.
        seed: of the order among equal scores.

    Source: Helm et al. 2025, README of the reference code (`[minus, shift s, max]`).
    """

    shift: float = 1.0
    keep: float = 0.2
    seed: int = 0

    def __post_init__(self) -> None:
        _require(self, "shift", 0 < self.shift < math.inf, "a finite number above 0")
        _require(self, "keep", 0 < self.keep <= 1, "a share above 0, up to 1")

    def weigh(self, long: Tensor, short: Tensor, mask: Tensor) -> Tensor:
        """The formula of the class."""
        return keep_top((short - long - math.log(self.shift)).clamp(min=0), mask, self.keep, self.seed)


@dataclasses.dataclass(frozen=True)
class NPMI(PPMI):
    """Sparse, by *negative* pointwise mutual information: tokens that the SHORT context predicts better.

    `PPMI` with the roles of the two losses exchanged: the score is max(log(p_short / p_long) - log(shift), 0). The N
    does not stand for "normalized".

    Source: Helm et al. 2025, README of the reference code (`[shift s, max]`).
    """

    def weigh(self, long: Tensor, short: Tensor, mask: Tensor) -> Tensor:
        """The formula of the class."""
        return super().weigh(short, long, mask)


@dataclasses.dataclass(frozen=True)
class Custom(Weighting):
    """A function of (long, short, mask) as a weighting, with the checks of the others.

    Args:
        function: returns weights, all `[batch, seq]`.
    """

    function: Callable[[Tensor, Tensor, Tensor], Tensor]

    def weigh(self, long: Tensor, short: Tensor, mask: Tensor) -> Tensor:
        """What the function returns."""
        return self.function(long, short, mask)

    def __str__(self) -> str:
        return f"{self.function.__module__}.{getattr(self.function, '__qualname__', type(self.function).__name__)}"


def as_weighting(weighting: Callable[[Tensor, Tensor, Tensor], Tensor]) -> Weighting:
    """The weighting itself, or a function of (long, short, mask) made into one; anything else is a ValueError."""
    if isinstance(weighting, Weighting):
        return weighting
    if not callable(weighting) or isinstance(weighting, type):
        raise ValueError(f"weighting is {weighting!r}: expected an instance such as Dense(), or a function")
    return Custom(weighting)


def parse_weighting(text: str) -> Weighting:
    """Read a weighting from a command line or a recipe.

        dense        sparse:keep=0.2        ppmi:shift=2,keep=0.1        my_package.my_module.my_function

    Raises:
        ValueError: for an unknown weighting or setting, or a value that it refuses; the line lists what is known.
    """
    name, _, settings_text = (part.strip() for part in text.partition(":"))
    kinds: dict[str, Any] = {kind.__name__.lower(): kind for kind in (Uniform, Dense, Sparse, LongCE, PPMI, NPMI)}
    if name.lower() in kinds:
        kind = kinds[name.lower()]
    elif "." in name:
        kind = _import(name)
    else:
        known = f"{', '.join(kinds)}, or package.module.function"
        raise ValueError(f"unknown weighting {name!r}{_hint(name, kinds)}: expected one of {known}")
    if not isinstance(kind, type):
        if settings_text:
            raise ValueError(f"weighting {text!r}: a function takes no settings, found {settings_text!r}")
        return as_weighting(kind)
    if not issubclass(kind, Weighting) or inspect.isabstract(kind):
        raise ValueError(f"weighting {text!r} is a class that cannot weigh: expected a subclass of Weighting")
    return kind(**_parse_settings(kind, settings_text))


def _parse_settings(kind: Any, text: str) -> dict[str, float | int]:
    name = f"weighting {kind.__name__.lower()!r}"
    known = {field.name: field.type for field in dataclasses.fields(kind)} if dataclasses.is_dataclass(kind) else {}
    settings: dict[str, float | int] = {}
    for item in filter(None, text.split(",")):
        key, _, value = (part.strip() for part in item.partition("="))
        if key not in known:
            expected = f"expected one of {', '.join(known)}" if known else "it has none"
            raise ValueError(f"unknown setting {key!r} of {name}{_hint(key, known)}: {expected}")
        if key in settings:
            raise ValueError(f"{name}: {key} is set twice")
        try:
            settings[key] = int(value) if known[key] is int else float(value)
        except ValueError:
            raise ValueError(f"{name}: {key}={value!r} is not a number") from None
    return settings


def _import(path: str) -> Any:
    try:
        return getattr(importlib.import_module(path.rpartition(".")[0]), path.rpartition(".")[2])
    except (ImportError, AttributeError, TypeError, ValueError) as error:
        raise ValueError(f"weighting {path!r} cannot be imported: {error}") from None


def _hint(word: str, known: dict) -> str:
    close = difflib.get_close_matches(word.lower(), known, n=1)
    return f" (did you mean {close[0]!r}?)" if close else ""


def _require(weighting: Weighting, name: str, holds: bool, expected: str) -> None:
    if not holds:
        raise ValueError(f"{type(weighting).__name__}: {name}={getattr(weighting, name)} is not {expected}")
