"""Rotary settings of a saved model in the names of transformers 4, beside those of transformers 5."""

import json
import logging
import os
import tempfile
from pathlib import Path
from typing import Any

from transformers import PreTrainedConfig

from tokenweight.models.rope import _layers
from tokenweight.records import write_json

logger = logging.getLogger(__name__)

_OTHER_NAMES = {"gpt_neox": {"rope_theta": "rotary_emb_base", "partial_rotary_factor": "rotary_pct"}}
"""Models for which transformers 4 has other names than for most."""
_OWN_BASE_OF_SLIDING = ("gemma3_text", "gemma3n_text")
"""Models whose layers with sliding attention have a base of their own in transformers 4, `rope_local_base_freq`."""
_ONLY_A_BASE = ("nemotron",)
"""Models whose scaling transformers 4 does not read."""


def add_older_rope(folder: str | os.PathLike[str], config: PreTrainedConfig) -> None:
    """Write `rope_theta` and `rope_scaling` into the config.json of a saved model.

    transformers 5 writes `rope_parameters` only. transformers 4, and what is built on it, ignores these, and silently
    takes the base that its model was first released with. A warning says if it has no words for the settings.

    Args:
        folder: as `save_pretrained` leaves it. It means the same to transformers 5 afterwards.
        config: of the saved model.
    """
    path, text = Path(folder) / "config.json", config.get_text_config()
    if not path.is_file() or not getattr(text, "rope_parameters", None):
        return
    saved, older = json.loads(path.read_text(encoding="utf-8")), _older(text)
    if older is not None:
        part = saved if text is config else saved[_name_of_text(config)]
        part.update(older)
        with tempfile.TemporaryDirectory() as scratch:
            write_json(Path(scratch) / "config.json", saved)
            again = type(config).from_pretrained(scratch).get_text_config()
        if again.rope_parameters == text.rope_parameters:
            write_json(path, saved)
            return
    logger.warning("%s: transformers 4 cannot be told of its rotary settings; load it with transformers 5", folder)


def _older(config: PreTrainedConfig) -> dict[str, Any] | None:
    """The settings in the names of transformers 4; None if it has none for them."""
    try:
        layers = _layers(config)
    except ValueError:
        return None
    full = layers.get("full_attention") or layers[None]
    sliding = layers.get("sliding_attention", full)
    own_base = config.model_type in _OWN_BASE_OF_SLIDING
    if full["rope_type"] == "proportional" or sliding["rope_type"] not in ("default", full["rope_type"]):
        return None
    if not own_base and sliding["rope_theta"] != full["rope_theta"]:
        return None
    names = _OTHER_NAMES.get(config.model_type, {})
    top = {names.get(name, name): full[name] for name in ("rope_theta", "partial_rotary_factor") if name in full}
    scaling = {name: value for name, value in full.items() if name not in ("rope_theta", "partial_rotary_factor")}
    if full["rope_type"] == "longrope":  # of which transformers 4 takes it from here only
        top["original_max_position_embeddings"] = full["original_max_position_embeddings"]
    if config.model_type in _ONLY_A_BASE and full["rope_type"] != "default":
        return None
    if own_base:
        top["rope_local_base_freq"] = sliding["rope_theta"]
    return {**top, "rope_scaling": None if scaling == {"rope_type": "default"} else scaling}


def _name_of_text(config: PreTrainedConfig) -> str:
    return next(name for name in config.sub_configs if getattr(config, name, None) is config.get_text_config())
