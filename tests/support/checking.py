"""Check the shapes and types in the signatures of the package."""

import functools
import inspect
from collections.abc import Callable
from typing import Any

import beartype
import jaxtyping

_with_shapes = jaxtyping.jaxtyped


def check_package() -> None:
    """Check every call of the package from now on: all shapes of a call together, types one by one.

    Where a signature has no shapes, jaxtyping would check types twice and bind arguments once more in each call: it is
    left out there. Functions within functions are not checked: they come into being anew with each call of the outer
    one, and making the check would cost more than all that is checked.
    """
    jaxtyping.jaxtyped = _decorator
    jaxtyping.install_import_hook("tokenweight", "checking.checked")


def checked(function: Callable[..., Any]) -> Callable[..., Any]:
    return function if "<locals>" in function.__qualname__ else beartype.beartype(function)


def _decorator(*, typechecker: Any) -> Callable[[Any], Any]:
    shapes = _with_shapes(typechecker=typechecker)

    def decorate(target: Any) -> Any:
        if not inspect.isfunction(target) or any(_has_shape(one) for one in target.__annotations__.values()):
            return shapes(target)
        return _with_types(target)

    return decorate


def _has_shape(annotation: Any) -> bool:
    return isinstance(annotation, str) or "jaxtyping" in repr(annotation)


def _with_types(function: Callable[..., Any]) -> Callable[..., Any]:
    check = checked(function)
    if check is function:
        return function

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        __tracebackhide__ = True
        return (function if jaxtyping.config.jaxtyping_disable else check)(*args, **kwargs)

    return call
