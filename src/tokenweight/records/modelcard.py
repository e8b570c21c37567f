"""The model card (README.md) of a trained folder: what its records say, and nothing else."""

import logging
import re
from collections.abc import Callable
from pathlib import Path

from huggingface_hub import ModelCard

from tokenweight.records.files import replaced

logger = logging.getLogger(__name__)
NAME = "README.md"


def _edit(folder: Path, edit: Callable[[ModelCard], None]) -> bool:
    path = folder / NAME
    try:
        card = ModelCard.load(path) if path.exists() else ModelCard("---\n{}\n---\n")
        edit(card)
        with replaced(path) as part:
            card.save(part)
    except Exception as error:  # whatever it is, what the card speaks of must not be lost with it
        logger.warning("%s was not written: %s: %s", path, type(error).__name__, " ".join(str(error).split()))
        return False
    return True


def _marks(section: str) -> tuple[str, str]:
    return f"<!-- begin: tokenweight {section} -->", f"<!-- end: tokenweight {section} -->"


def _with_section(text: str, section: str, content: str) -> str:
    """The text with our section in place of the one that is there, else at its end."""
    begin, end = _marks(section)
    whole = f"{begin}\n\n{content.strip()}\n\n{end}"
    if begin not in text:
        return f"{text.rstrip()}\n\n{whole}\n"
    if text.count(begin) > 1 or text.count(end) != 1 or text.index(end) < text.index(begin):
        raise ValueError(f"expected {begin} once, and {end} once below it")
    return text[: text.index(begin)] + whole + text[text.index(end) + len(end) :]


def _cell(text: str) -> str:
    return " ".join(re.sub(r"(?<!\\)\|", r"\\|", text).split())
