"""Numbers of tokens as people type them: 4096, 32k, 8M, 1_000."""

import re
from typing import Annotated, Any

from tyro.constructors import PrimitiveConstructorSpec

_UNITS = {"": 1, "k": 2**10, "K": 2**10, "M": 2**20}
EXPECTED = "a number of tokens, as in 4096, 32k or 8M"


def token_count(text: Any) -> int:
    """The number of tokens in 4096, "32k", "8M" or "1_000": k is 1024 and M is 1024 squared, as in names of models.

    Raises:
        ValueError: if it is not a whole number of at least 1. The message does not name the parameter.
    """
    word = str(text).strip()
    found = re.fullmatch(r"([0-9]+(?:_[0-9]+)*)([kKM]?)", word)
    number = 0 if found is None or isinstance(text, bool) else int(found[1]) * _UNITS[found[2]]
    if number < 1:
        raise ValueError(f"expected {EXPECTED}, found {text!r}")
    return number


def counted(number: int, name: str) -> str:
    """A number of things in words, as in "1 step" and "1,024 steps"."""
    return f"{number:,} {name}" if number == 1 else f"{number:,} {name}s"


def _constructor(*, optional: bool) -> PrimitiveConstructorSpec[Any]:
    """A constructor of an option. An optional one is no union with None, which tyro would show in help and errors."""

    def is_instance(value: Any) -> bool:
        return (optional and value is None) or (isinstance(value, int) and not isinstance(value, bool))

    return PrimitiveConstructorSpec(
        nargs=1,
        metavar="TOKENS",
        instance_from_str=lambda words: None if optional and words == ["None"] else token_count(words[0]),
        is_instance=is_instance,
        str_from_instance=lambda number: [str(number)],
    )


Tokens = Annotated[int, _constructor(optional=False)]
"""The type of an option, or of a setting, that is a number of tokens."""
OptionalTokens = Annotated[int | None, _constructor(optional=True)]
"""The same, for one that may be left out."""
