"""Shapes of the models in the recipes, to plan for gated models, or without network access."""

import json
from pathlib import Path

from transformers import AutoConfig, PreTrainedConfig

from tokenweight.models import load_config

_SHAPES = Path(__file__).with_name("shapes.json")
"""Shape and positions from the published config.json of each model, by hub id."""


def find_config(name: str, revision: str | None = None) -> tuple[PreTrainedConfig, bool]:
    """Find the config of a folder, hub id or `.gguf` file; and whether it is a fallback to a shape stored here.

    Raises:
        ValueError: one line that says what was not found or could not be read, if no shape is stored by this name.
    """
    try:
        return load_config(name, revision=revision), False
    except ValueError:
        shapes = json.loads(_SHAPES.read_text(encoding="utf-8"))
        if revision is not None or name not in shapes or Path(name).exists():
            raise
        return AutoConfig.for_model(**shapes[name]), True
