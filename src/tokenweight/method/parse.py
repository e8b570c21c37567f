"""Weightings by name and settings, as on a command line or in a recipe: "sparse:keep=0.2" is `Sparse(keep=0.2)`."""

import dataclasses
import difflib
import importlib
import inspect
from typing import Any

from tokenweight.method.kin.longce import LongCE
from tokenweight.method.weightings import NPMI, PPMI, Dense, Sparse, Uniform, Weighting, as_weighting

WEIGHTINGS: tuple[type[Weighting], ...] = (Uniform, Dense, Sparse, LongCE, PPMI, NPMI)
"""The weightings that have a name of their own, which is that of the class in lower case."""


def parse_weighting(text: str) -> Weighting:
    """Read a weighting from a command line or a recipe.

        dense        sparse:keep=0.2        ppmi:shift=2,keep=0.1        my_package.my_module.my_function

    Anything unknown, or a value that a weighting refuses, is a ValueError that lists what is known.
    """
    name, _, settings_text = (part.strip() for part in text.partition(":"))
    kinds: dict[str, Any] = {kind.__name__.lower(): kind for kind in WEIGHTINGS}
    if name.lower() in kinds:
        kind = kinds[name.lower()]
    elif "." in name:
        kind = _import(name)
    else:
        known = f"expected one of {', '.join(kinds)}, or package.module.function"
        raise ValueError(f"unknown weighting {name!r}{_hint(name, kinds)}: {known}")
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
