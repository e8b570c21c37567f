"""Weightings of texts and functions: "sparse:keep=0.2", as on a command line or in a recipe, is `Sparse(keep=0.2)`."""

import dataclasses
import difflib
import importlib
import inspect
from collections.abc import Callable
from typing import Any

from torch import Tensor

from tokenweight.method.kin.longce import LongCE
from tokenweight.method.kin.pmi import NPMI, PPMI
from tokenweight.method.weightings import Dense, Sparse, Uniform, Weighting

WEIGHTINGS: tuple[type[Weighting], ...] = (Uniform, Dense, Sparse, LongCE, PPMI, NPMI)
"""The weightings that have a name of their own, which is that of the class in lower case."""


def parse_weighting(text: str) -> Weighting:
    """Read a weighting from a command line or a recipe.

        dense        sparse:keep=0.2        ppmi:shift=2,keep=0.1        my_package.my_module.my_function

    Anything unknown, or a value that a weighting refuses, is a ValueError that lists what is known.
    """
    name, _, settings_text = (part.strip() for part in text.partition(":"))
    kinds: dict[str, Any] = {kind.__name__.lower(): kind for kind in WEIGHTINGS}
    kind = kinds.get(name.lower()) or ("." in name and _import(name))
    if not kind:
        known = f"expected one of {', '.join(kinds)}, or package.module.function"
        raise ValueError(f"unknown weighting {name!r}{_hint(name, kinds)}: {known}")
    if not isinstance(kind, type):
        if settings_text:
            raise ValueError(f"weighting {text!r}: a function takes no settings, found {settings_text!r}")
        return as_weighting(kind)
    if not issubclass(kind, Weighting) or inspect.isabstract(kind):
        raise ValueError(f"weighting {text!r} is a class that cannot weigh: expected a subclass of Weighting")
    return kind(**_parse_settings(kind, settings_text))


@dataclasses.dataclass(frozen=True)
class Custom(Weighting):
    """A function of (long, short, mask), all `[batch, seq]`, as a weighting, with the checks of the others."""

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
