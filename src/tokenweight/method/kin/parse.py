"""Parse weightings from text: "sparse:keep=0.2", as on a command line or in a recipe, is `Sparse(keep=0.2)`."""

import ast
import dataclasses
import difflib
import importlib
import inspect
from collections.abc import Sequence
from typing import Any

from tokenweight.method.kin.combine import FirstWindow, Floor, Mix, Normalized, Warmup
from tokenweight.method.kin.custom import as_weighting
from tokenweight.method.kin.exact import EXACT
from tokenweight.method.kin.expected import DIVERGENCES, Expected
from tokenweight.method.kin.gain import BoundedGain, Gain, KeyTokens, LongFilter
from tokenweight.method.kin.longce import LongCE
from tokenweight.method.kin.pmi import NPMI, PPMI
from tokenweight.method.kin.selection import ESLM, Rho1
from tokenweight.method.weightings import Dense, ScoreWeighting, Sparse, Uniform, Weighting

WEIGHTINGS: tuple[type[Weighting], ...] = (
    *(Uniform, Dense, Sparse, LongCE, PPMI, NPMI, Gain, BoundedGain, LongFilter, KeyTokens, EXACT, Rho1, ESLM),
    *(Expected, Mix, Floor, Normalized, Warmup, FirstWindow),
)
"""The weightings with a name of their own: that of the class in lower case."""


def parse_weighting(text: str) -> Weighting:
    """Read a weighting from a command line or a recipe.

        dense        sparse:keep=0.2        ppmi:shift=2,keep=0.1        my_package.my_module.my_function
        sparse(keep=0.2)        mix(dense(interpolation=0.5), uniform, share=0.25)

    Anything unknown, or an invalid value, is a ValueError that lists what is known.
    """
    if "(" in text:
        return _of_call(_call(text))
    name, settings = _short(text)
    return _build(name, [], settings, text)


def parse_divergence(text: str) -> ScoreWeighting:
    """The weighting whose expected score is a divergence, given as kl, tv or absolute, or as that weighting."""
    if text in DIVERGENCES:
        return DIVERGENCES[text]
    expected = f"expected one of {', '.join(DIVERGENCES)}, or a weighting whose weights follow from a score"
    try:
        weighting = parse_weighting(text)
    except ValueError as error:
        raise ValueError(f"divergence {text!r}: {expected}: {error}") from None
    if not isinstance(weighting, ScoreWeighting):
        raise ValueError(f"divergence {text!r}: {expected}")
    return weighting


def weighting_names(text: str) -> list[str]:
    """The names of all weightings in a text, without importing those with a dot or looking any up.

    A text that is no valid call is a ValueError; `parse_weighting` reports wrong names and settings.
    """
    if "(" not in text:
        name, settings = _short(text)
        names = [name, *(found for _, value in settings for found in weighting_names(value))]
        return [name for name in names if _is_path(name)]
    found = []
    for node in ast.walk(_call(text)):
        if isinstance(node, ast.Name | ast.Attribute):
            found.append(ast.unparse(node))
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            found += weighting_names(node.value)
    return found


def _short(text: str) -> tuple[str, list[tuple[str, str]]]:
    """The name and the settings of a text such as sparse:keep=0.2."""
    name, _, settings = text.partition(":")
    items = [item.partition("=") for item in settings.split(",") if item.strip()]
    return name.strip(), [(key.strip(), value.strip()) for key, _, value in items]


def _call(text: str) -> ast.expr:
    """The syntax tree of a text with parentheses."""
    try:
        return ast.parse(text.strip(), mode="eval").body
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        why = getattr(error, "msg", None) or type(error).__name__
        raise ValueError(f"weighting {text!r}: {why}: expected a call such as floor(dense, minimum=0.5)") from None


def _of_call(node: ast.expr) -> Weighting:
    """The weighting of a call, or of a name alone; a setting is a number, a word or a weighting."""
    call = node if isinstance(node, ast.Call) else ast.Call(node, [], [])
    if not isinstance(call.func, ast.Name | ast.Attribute):
        raise ValueError(f"found {ast.unparse(node)!r}: expected a weighting, as in mix(dense, uniform, share=0.25)")
    settings = [(keyword.arg or "**", _value(keyword.value)) for keyword in call.keywords]
    return _build(ast.unparse(call.func), [_value(one) for one in call.args], settings, ast.unparse(node))


def _value(node: ast.expr) -> "str | ast.expr":
    """The text of a number or of a word in quotes; anything else as it is."""
    if isinstance(node, ast.Constant):
        return str(node.value)
    return node


def _build(
    name: str, parts: "Sequence[str | ast.expr]", settings: "Sequence[tuple[str, str | ast.expr]]", text: str
) -> Weighting:
    """The weighting of that name: parts are weightings, given in the order of its fields of that type."""
    kinds: dict[str, Any] = {kind.__name__.lower(): kind for kind in WEIGHTINGS}
    kind = kinds.get(name.lower()) or ("." in name and _is_path(name) and _import(name))
    if not kind:
        known = f"expected one of {', '.join(kinds)}, or package.module.function"
        raise ValueError(f"unknown weighting {name!r}{_hint(name, kinds)}: {known}")
    if not isinstance(kind, type):
        if parts or settings:
            raise ValueError(f"weighting {name!r}: a function takes no settings, found {text!r}")
        return as_weighting(kind)
    if not issubclass(kind, Weighting) or inspect.isabstract(kind):
        raise ValueError(f"weighting {name!r} is a class that cannot weigh: expected a subclass of Weighting")
    return kind(**_settings(kind, parts, settings))


def _settings(
    kind: Any, parts: "Sequence[str | ast.expr]", settings: "Sequence[tuple[str, str | ast.expr]]"
) -> dict[str, Any]:
    """The settings of a kind of weighting, by name, each of the type of its field."""
    name = f"weighting {kind.__name__.lower()!r}"
    fields = dataclasses.fields(kind) if dataclasses.is_dataclass(kind) else ()
    known: dict[str, Any] = {field.name: field.type for field in fields}
    of_parts = [key for key, of in known.items() if _is_part(of)]
    if len(parts) > len(of_parts):
        numbers = "" if len(known) == len(of_parts) else ", and its settings by name, as in keep=0.2"
        raise ValueError(f"{name}: found {len(parts)} values: expected {len(of_parts)} weightings{numbers}")
    read: dict[str, Any] = {}
    for key, value in [*zip(of_parts, parts), *settings]:
        if key not in known:
            expected = f"expected one of {', '.join(known)}" if known else "it has none"
            raise ValueError(f"unknown setting {key!r} of {name}{_hint(key, known)}: {expected}")
        if key in read:
            raise ValueError(f"{name}: {key} is set twice")
        read[key] = _setting(f"{name}: {key}", known[key], value)
    needed = [field.name for field in fields if field.default is dataclasses.MISSING]
    if missing := [key for key in needed if key not in read]:
        raise ValueError(f"{name} needs {', '.join(missing)}: expected {_example(kind, fields)}")
    return read


def _setting(what: str, of: Any, value: "str | ast.expr") -> Any:
    """The value of one setting, of the type of its field."""
    if _is_part(of):
        return parse_weighting(value) if isinstance(value, str) else _of_call(value)
    value, kind = value if isinstance(value, str) else ast.unparse(value), getattr(of, "__name__", str(of))
    if kind == "str" or "Literal" in str(of):
        return value
    if kind == "bool":
        if value.lower() not in ("true", "false"):
            raise ValueError(f"{what}={value!r} is not true or false")
        return value.lower() == "true"
    try:
        return int(value) if kind == "int" else float(value)
    except ValueError:
        raise ValueError(f"{what}={value!r} is not a number") from None


def _is_path(name: str) -> bool:
    """Whether a text can be the name of a weighting, rather than a number."""
    return all(part.isidentifier() for part in name.split("."))


def _is_part(of: Any) -> bool:
    return isinstance(of, type) and issubclass(of, Weighting)


def _example(kind: Any, fields: Sequence[dataclasses.Field]) -> str:
    """An example call of a type of weighting, with all of its settings."""
    parts = [field.name for field in fields if _is_part(field.type)]
    return f"{kind.__name__.lower()}({', '.join([*parts, *(f'{f.name}=...' for f in fields if f.name not in parts)])})"


def _import(path: str) -> Any:
    try:
        return getattr(importlib.import_module(path.rpartition(".")[0]), path.rpartition(".")[2])
    except (ImportError, AttributeError, TypeError, ValueError) as error:
        raise ValueError(f"weighting {path!r} cannot be imported: {error}") from None


def _hint(word: str, known: dict) -> str:
    close = difflib.get_close_matches(word.lower(), known, n=1)
    return f" (did you mean {close[0]!r}?)" if close else ""
