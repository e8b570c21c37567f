"""Edits of the model card (README.md) of a trained folder: our sections only."""

import logging
import re
from collections.abc import Callable
from pathlib import Path

from huggingface_hub import ModelCard

from tokenweight.records.files import replaced

logger = logging.getLogger(__name__)
CARD_NAME = "README.md"


def edit_card(folder: Path, edit: Callable[[ModelCard], None]) -> bool:
    """Edit a card, or create one. A failure is logged, not raised: the model beside it is trained. True if written."""
    path = folder / CARD_NAME
    try:
        card = ModelCard.load(path) if path.exists() else ModelCard("---\n{}\n---\n")
        edit(card)
        with replaced(path) as part:
            card.save(part)
    except Exception as error:  # whatever it is, what the card describes must not be lost with it
        logger.warning("%s was not written: %s: %s", path, type(error).__name__, " ".join(str(error).split()))
        return False
    return True


def section_marks(section: str) -> tuple[str, str]:
    """The lines before and after one of our sections."""
    return f"<!-- begin: tokenweight {section} -->", f"<!-- end: tokenweight {section} -->"


def with_section(text: str, section: str, content: str) -> str:
    """The text with our section in place of the one that is there, else at its end."""
    begin, end = section_marks(section)
    whole = f"{begin}\n\n{content.strip()}\n\n{end}"
    if begin not in text:
        return f"{text.rstrip()}\n\n{whole}\n"
    if text.count(begin) > 1 or text.count(end) != 1 or text.index(end) < text.index(begin):
        raise ValueError(f"expected {begin} once, and {end} once below it")
    return text[: text.index(begin)] + whole + text[text.index(end) + len(end) :]


def table_cell(text: str) -> str:
    """A text as a cell of a Markdown table: on one line, with its bars escaped."""
    return " ".join(re.sub(r"(?<!\\)\|", r"\\|", text).split())
