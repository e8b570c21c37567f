"""Shapes of the models that the recipes name, for a plan of a gated model, or without a network."""

import json
from pathlib import Path

from transformers import AutoConfig, PreTrainedConfig

from tokenweight.models import load_config

_SHAPES = Path(__file__).with_name("shapes.json")
"""By hub id, what a published config.json says of the model's shape and positions."""


def find_config(name: str, revision: str | None = None) -> tuple[PreTrainedConfig, bool]:
    """The config of a folder, a hub id or a `.gguf` file; and whether it is a shape kept here, as that was not found.

    Raises:
        ValueError: one line that says what was not found or could not be read, if no shape is kept under this name.
    """
    try:
        return load_config(name, revision=revision), False
    except ValueError:
        shapes = json.loads(_SHAPES.read_text(encoding="utf-8"))
        if revision is not None or name not in shapes or Path(name).exists():
            raise
        return AutoConfig.for_model(**shapes[name]), True
