"""Model folders: broken files, unexpected weights, and rotary settings that transformers 4 reads, too."""

import json
import logging
import math
import os
import re
import tempfile
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from tokenizers import Tokenizer
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.utils import cached_file

from tokenweight.models.rope import _layers
from tokenweight.records import write_json

logger = logging.getLogger(__name__)

_TOKENIZERS = ("token", "vocab", "merges", "spm", "bpe", "spiece", "tiktoken", "tekken", ".model")
"""Parts of the names of files that tokenizers are made from."""
_OLD_BUFFERS = ("bias", "masked_bias", "causal_mask")
"""Masks that attention kept among its weights in earlier versions; a module that has a bias has a weight too."""


def check_loaded(model: nn.Module, info: dict[str, Any], allow_mismatched: bool = False) -> None:
    """Raise a ValueError if weights of a model are not those of its files: missing, of other shapes, or left over.

    Leftover weights raise inside layers that the model has, where they would have computed something (a bias, a
    norm, an adapter). Whole modules that the model does not have, such as a vision tower, are left out, as transformers
    warns; so are heads that predict several tokens ahead, of which `warn_of_left_out_heads` warns.

    Args:
        model: as loaded.
        info: returned by `from_pretrained` for `output_loading_info=True`.
        allow_mismatched: whether weights of other shapes may be reinitialized, as requested.
    """
    if info["missing_keys"]:
        raise ValueError(
            f"the files lack {_listed(info['missing_keys'])}, which the model would begin with at random: "
            "expected all weights of a causal language model"
        )
    if info["mismatched_keys"] and not allow_mismatched:
        name, found, expected = min(info["mismatched_keys"])
        more = len(info["mismatched_keys"]) - 1
        raise ValueError(
            f"{name} has shape {list(found)} in the files{f', and {more} more have others' if more else ''}: the "
            f"config expects {list(expected)}"
        )
    foreign = [key for key in info["unexpected_keys"] if _is_foreign(model, key)]
    if foreign:
        raise ValueError(
            f"the files hold {_listed(foreign)}, which a {type(model).__name__} does not have and would leave out: "
            "expected weights and config of one model"
        )


def warn_of_left_out_heads(model: PreTrainedModel, name: str, revision: str | None = None) -> None:
    """Warn if the files hold heads that predict further tokens: transformers loads none, often silently.

    It keeps them for `generate(use_mtp=True)`, which reads them from the files again; no loss of a model holds them.
    """
    layers = getattr(model.config.get_text_config(), "num_hidden_layers", math.inf)
    kept, heads = model.state_dict().keys(), []
    for key in _weight_names(name, revision):
        beyond = _LAYER.match(key)
        if key not in kept and (_FURTHER.search(key) or (beyond and int(beyond[1]) >= layers)):
            heads.append(key)
    if heads:
        logger.warning(
            "%s: the files hold heads that predict several tokens ahead (%s): transformers leaves them out, so that "
            "they are neither trained nor saved with the model",
            name,
            _listed(heads),
        )


_FURTHER = re.compile(r"(^|[._])(mtp|nextn|medusa)")
"""Matches the names of such heads in most models."""
_LAYER = re.compile(r"(?:(?:model|language_model|text_model|transformer|backbone)\.)*layers\.(\d+)\.")
"""A layer of the decoder, not of a tower for pictures or sound; those beyond the last are heads (DeepSeek, GLM)."""


def _weight_names(name: str, revision: str | None) -> list[str]:
    """The names of all weights in the files of a folder, or of a hub id that was loaded before."""
    options: dict[str, Any] = {"revision": revision, "local_files_only": True}
    options["_raise_exceptions_for_missing_entries"] = False
    for index in ("model.safetensors.index.json", "pytorch_model.bin.index.json"):
        if (path := cached_file(name, index, **options)) is not None:
            return [*json.loads(Path(path).read_text(encoding="utf-8"))["weight_map"]]
    if (path := cached_file(name, "model.safetensors", **options)) is None:
        return []
    with safe_open(path, "pt") as weights:
        return [*weights.keys()]


def _is_foreign(model: nn.Module, key: str) -> bool:
    """Whether a weight belongs to a module with weights of its own, or to a layer, that the model has."""
    *path, last = key.split(".")
    module, depth = model, 0
    for name in path:
        inner = module._modules.get(name)
        if inner is None:
            break
        module, depth = inner, depth + 1
    holds = next(module.parameters(recurse=False), None) is not None
    if not holds and depth == len(path) and last in _OLD_BUFFERS:
        return False
    return holds or any(name.isdigit() for name in path[:depth])


def _listed(keys: Any) -> str:
    names = sorted(keys)
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def has_tokenizer_files(folder: Path) -> bool:
    """Whether a folder holds a file from which some tokenizer could be made."""
    return any(part in path.name for path in files_of(folder) for part in _TOKENIZERS if path.suffix != ".py")


def broken_file(folder: Path) -> str | None:
    """The file that cannot be read in a folder that could not be loaded, and why; None if each can."""
    for path in files_of(folder):
        if is_pointer(path):
            return f"{path.name} is a Git LFS pointer, not the file: run `git lfs pull`"
        try:
            _read(path)
        except Exception as error:
            return f"{path.name} cannot be read, it may be cut off: {one_line(error)}"
    return None


def is_pointer(path: Path) -> bool:
    """Whether a file is the pointer that Git leaves in place of a large one when git-lfs is not installed."""
    with path.open("rb") as file:
        return file.read(40).startswith(b"version https://git-lfs")


def _read(path: Path) -> None:
    """Read a file as the loaders of transformers do, without keeping what it holds."""
    if path.suffix == ".safetensors":
        with safe_open(path, "pt") as weights:
            weights.keys()
    elif path.suffix == ".bin" and path.stem.startswith(("pytorch_model", "adapter_model")):
        torch.load(path, map_location="meta", weights_only=True)
    elif path.suffix == ".json":
        json.loads(path.read_text(encoding="utf-8"))
        if path.name == "tokenizer.json":
            Tokenizer.from_file(str(path))


def files_of(folder: Path) -> list[Path]:
    """The files of a folder, or the one file that was named."""
    return (
        sorted(path for path in folder.glob("*") if path.is_file()) if folder.is_dir() else [folder][: folder.is_file()]
    )


def one_line(error: BaseException) -> str:
    """The message of an error, on one line of at most 300 characters; its type, if it has none."""
    return " ".join(str(error).split())[:300] or type(error).__name__


_OTHER_NAMES = {"gpt_neox": {"rope_theta": "rotary_emb_base", "partial_rotary_factor": "rotary_pct"}}
"""Models whose settings have other names in transformers 4 than those of most."""
_OWN_BASE_OF_SLIDING = ("gemma3_text", "gemma3n_text")
"""Models whose layers with sliding attention have a base of their own in transformers 4, `rope_local_base_freq`."""
_ONLY_A_BASE = ("nemotron",)
"""Models whose scaling transformers 4 does not read."""


def add_older_rope(folder: str | os.PathLike[str], config: PreTrainedConfig) -> None:
    """Write `rope_theta` and `rope_scaling` into the config.json of a saved model.

    transformers 5 writes `rope_parameters` only. transformers 4, and what is built on it, ignores these, and silently
    uses the base that its model was first released with. Warns if it cannot express the settings.

    Args:
        folder: as `save_pretrained` leaves it. It means the same to transformers 5 afterwards.
        config: the saved model's.
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
    logger.warning("%s: transformers 4 cannot express its rotary settings; load it with transformers 5", folder)


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
    if full["rope_type"] == "longrope":  # which transformers 4 reads from here only
        top["original_max_position_embeddings"] = full["original_max_position_embeddings"]
    if config.model_type in _ONLY_A_BASE and full["rope_type"] != "default":
        return None
    if own_base:
        top["rope_local_base_freq"] = sliding["rope_theta"]
    return {**top, "rope_scaling": None if scaling == {"rope_type": "default"} else scaling}


def _name_of_text(config: PreTrainedConfig) -> str:
    return next(name for name in config.sub_configs if getattr(config, name, None) is config.get_text_config())
