"""Check the shapes and types in the signatures of the package."""

from collections.abc import Callable
from typing import Any

import beartype


def checked(function: Callable[..., Any]) -> Callable[..., Any]:
    """Check every call, but for functions within functions: they come into being anew with each call of the outer one,
    and making the check would cost more than all that is checked."""
    return function if "<locals>" in function.__qualname__ else beartype.beartype(function)
