"""Load a causal language model and its tokenizer from a folder, the hub or a .gguf file; the loss of every token."""

import contextlib
import hashlib
import json
import logging
import os
import shutil
import tempfile
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int, Shaped
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import find_adapter_config_file

from tokenweight.models.causal import causal_parts
from tokenweight.models.folder import (
    broken_file,
    check_loaded,
    files_of,
    has_tokenizer_files,
    is_pointer,
    one_line,
    warn_of_left_out_heads,
)
from tokenweight.models.rope import extend_context
from tokenweight.models.rope_check import verify_rope

logger = logging.getLogger(__name__)
_WEIGHTS = (".safetensors", ".bin")


def token_nll(
    model: PreTrainedModel,
    tokens: Int[Tensor, "batch seq"],
    position_ids: Int[Tensor, "batch seq"] | None = None,
    attention_mask: Shaped[Tensor, "batch seq"] | None = None,
) -> Float[Tensor, "batch seq"]:
    """Loss of every token given all tokens before it in its row (in its document, where `position_ids` restart).

    In evaluation mode, without KV cache and without logits of the whole row.

    Returns:
        Nats, float32. Column t belongs to token t; 0 for the first token of a row or document, which nothing predicts.
    """
    return causal_parts(model).nll(tokens, position_ids, attention_mask)


def load_model(
    name: str | os.PathLike[str],
    *,
    dtype: torch.dtype | str = "auto",
    revision: str | None = None,
    extend: Mapping[str, Any] | None = None,
    **kwargs: Any,
) -> PreTrainedModel:
    """Load a causal language model: a plain transformers model that can be trained and saved.

    Args:
        name: a folder, a hub id, a `.gguf` file, or a `.json` file with the config of a model, whose weights are then
            drawn at random, with a warning, to train it from scratch. A `.gguf` file is de-quantized once and kept as
            an ordinary folder in the user's cache (`$XDG_CACHE_HOME/tokenweight`), so that the second start takes a
            second. An adapter (of PEFT) is added to the weights of its base, in their dtype, and all of them can be
            trained.
        dtype: of the weights; "auto" takes that of the file. Train in float32 (with autocast), or small updates are
            rounded away.
        revision: revision of a hub model.
        extend: arguments of `extend_context`, such as `{"length": 32768, "method": "yarn"}`; verified after loading.
        kwargs: for `AutoModelForCausalLM.from_pretrained`, such as `config` or `attn_implementation`. Code that comes
            with a model runs only with `trust_remote_code=True`.

    Raises:
        ValueError: one line that says what was not found or could not be read, or which weights the files lack.
    """
    trusted = {"trust_remote_code": kwargs.pop("trust_remote_code", False)}
    base = adapter_base(str(name), revision)
    if base is not None:
        try:
            model = load_model(base, dtype=dtype, extend=extend, **kwargs, **trusted)
        except ValueError as error:
            raise ValueError(f"the base of the adapter {str(name)!r}: {error}") from error
        return _reported("model", name, lambda path: _merged(model, path, revision))
    if not extend:
        return _load(_Model, "model", name, dtype=dtype, revision=revision, **kwargs, **trusted)
    config = extend_context(_load(AutoConfig, "model", name, revision=revision, **trusted), **extend)
    model = _load(_Model, "model", name, dtype=dtype, revision=revision, **{**kwargs, "config": config}, **trusted)
    verify_rope(model, config)
    return model


def load_config(name: str | os.PathLike[str], *, revision: str | None = None) -> PreTrainedConfig:
    """Load the config of a folder, a hub id or a `.gguf` file, as `load_model` does."""
    base = adapter_base(str(name), revision)
    return _load(AutoConfig, "model", name, revision=revision) if base is None else load_config(base)


def load_tokenizer(name: str | os.PathLike[str], *, revision: str | None = None) -> PreTrainedTokenizerBase:
    """Load the tokenizer of a folder, a hub id or a `.gguf` file, as `load_model` does.

    Raises:
        ValueError: one line that says what was not found or could not be read.
    """
    tokenizer = _load(AutoTokenizer, "tokenizer", name, revision=revision)
    # Without its files, transformers makes some tokenizers of special tokens alone.
    if tokenizer.get_vocab().keys() <= {str(token) for token in tokenizer.added_tokens_decoder.values()}:
        raise ValueError(f"tokenizer {str(name)!r}: found only special tokens: expected files of a vocabulary")
    return tokenizer


def find_tokenizer(name: str | os.PathLike[str], *, revision: str | None = None) -> PreTrainedTokenizerBase | None:
    """The tokenizer of a model; None if it is a folder that holds no tokenizer. Of an adapter without one, its base's;
    of a config (`.json`), that in its folder.

    Raises:
        ValueError: if there are files of a tokenizer that cannot be loaded.
    """
    folder = Path(name).parent if is_config(name) else Path(name)
    if folder.is_dir() and not has_tokenizer_files(folder):
        base = adapter_base(str(name))
        return None if base is None else find_tokenizer(base)
    return load_tokenizer(folder if is_config(name) else name, revision=revision)


def is_config(name: str | os.PathLike[str]) -> bool:
    """Whether the name of a model is that of a config alone, whose weights are drawn at random."""
    return Path(name).suffix == ".json"


def adapter_base(name: str, revision: str | None = None) -> str | None:
    """The model that an adapter (a folder or hub id with adapter_config.json) was made for; None for a model.

    Raises:
        ValueError: if the base is not named, or if there is a model beside the adapter.
    """
    try:
        found = find_adapter_config_file(name, revision=revision)
    except Exception:  # not an adapter; whoever loads it says what else is wrong
        return None
    if found is None:
        return None
    base = json.loads(Path(found).read_text(encoding="utf-8")).get("base_model_name_or_path")
    if not isinstance(base, str) or not base:
        raise ValueError(f"{found}: base_model_name_or_path is {base!r}: expected the model that the adapter is for")
    weights = [path.name for path in files_of(Path(name)) if path.suffix in _WEIGHTS and "adapter" not in path.name]
    if any(one.startswith(("model", "pytorch_model")) for one in weights):
        raise ValueError(f"{name} holds {weights[0]} beside adapter_config.json: expected a model or an adapter")
    return base


def _merged(base: PreTrainedModel, name: str, revision: str | None = None) -> PreTrainedModel:
    """The base with the adapter of a folder or hub id added to its weights, all of which can be trained."""
    try:
        from peft import PeftModel
    except ImportError as error:
        raise ValueError(f"{name} is an adapter, which needs a package that is missing: pip install peft") from error
    with warnings.catch_warnings():
        warnings.filterwarnings("error", "Found missing adapter keys")
        model: Any = PeftModel.from_pretrained(base, name, revision=revision)
    if not hasattr(model, "merge_and_unload"):
        raise ValueError(f"its adapter ({model.active_peft_config.peft_type}) cannot be merged into the weights")
    return model.merge_and_unload().requires_grad_(True)


def with_adapter(model: PreTrainedModel, lora: dict[str, Any]) -> Any:
    """The model, wrapped in a `PeftModel` if an adapter is to be trained in place of its weights.

    Raises:
        ValueError: for settings that are invalid for an adapter of this model.
    """
    if not lora:
        return model
    from peft import LoraConfig, get_peft_model

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # PEFT asks transformers by an older name
            return get_peft_model(model, LoraConfig(**lora))
    except (ValueError, TypeError, KeyError, ImportError) as error:
        raise ValueError(f"lora: {' '.join(str(error).split())}") from error


def is_emulated(dtype: torch.dtype) -> bool:
    """Whether this machine has no accelerator, and a CPU without native products in a 16-bit dtype: they then take tens
    of times as long as in float32."""
    known = {torch.bfloat16: "_is_mkldnn_bf16_supported", torch.float16: "_is_mkldnn_fp16_supported"}
    if dtype not in known or torch.accelerator.is_available():
        return False
    return not getattr(torch.ops.mkldnn, known[dtype])()


def own_device() -> torch.device:
    """The GPU of this process, where torchrun starts several the one of its rank; without a GPU, the CPU."""
    local = int(os.environ.get("LOCAL_RANK", "0"))
    return torch.device("cuda", local) if torch.cuda.is_available() else torch.device("cpu")


def _load(kind: Any, what: str, name: str | os.PathLike[str], **kwargs: Any) -> Any:
    dtype = kwargs.get("dtype", "auto")
    if isinstance(dtype, str) and dtype != "auto" and not isinstance(getattr(torch, dtype, None), torch.dtype):
        raise ValueError(f"dtype {dtype!r}: expected auto, float32, bfloat16, float16 or float64")
    kwargs.setdefault("trust_remote_code", False)  # rather than a question on standard output
    return _reported(what, name, lambda path: kind.from_pretrained(path, **kwargs))


def _reported(what: str, name: str | os.PathLike[str], load: Callable[[str], Any]) -> Any:
    """The result of `load` for a folder or hub id; any error is raised as one line that names the file at fault.

    Loaders raise what the packages under them do: SafetensorError, UnpicklingError, EOFError, Exception itself.
    """
    path = Path(name)
    of_file = path.suffix == ".gguf" or (is_config(path) and what == "model")
    if of_file and not path.is_file():
        raise ValueError(f"{what} {str(name)!r}: no such file")
    if not of_file and path.exists() and not path.is_dir():
        raise ValueError(f"{what} {str(name)!r} is a file: expected a folder, a hub id or a .gguf file")
    try:
        for text in ("vocab.txt", "merges.txt"):  # as which a pointer would be read without an error
            if what == "tokenizer" and (path / text).is_file() and is_pointer(path / text):
                raise ValueError(f"{text} is a Git LFS pointer")
        return load(str(_converted(path) if path.suffix == ".gguf" else path))
    except Exception as error:
        reason = broken_file(path) or one_line(error)
        if "trust_remote_code" in str(error):
            reason = (
                "it needs code that comes with it: read that code, then load the model in Python, with "
                "trust_remote_code=True, and give it to with_weighted_loss and Scorer"
            )
        where = (
            "its folder" if path.is_dir() else "its file" if path.exists() else "the hub, and there is no such folder"
        )
        raise ValueError(f"{what} {str(name)!r} cannot be loaded from {where}: {reason}") from error


class _Model:
    """Like `AutoModelForCausalLM`, but rejects weights that are missing, of other shapes or left over."""

    @staticmethod
    def from_pretrained(path: str, **kwargs: Any) -> PreTrainedModel:
        """The model of a folder or hub id, or a random one of a config."""
        if is_config(path):
            return _of_config(path, **kwargs)
        allowed = kwargs.pop("ignore_mismatched_sizes", False)
        model, info = AutoModelForCausalLM.from_pretrained(
            path, output_loading_info=True, ignore_mismatched_sizes=True, **kwargs
        )
        check_loaded(model, info, allowed)
        warn_of_left_out_heads(model, path, kwargs.get("revision"))
        if is_emulated(model.dtype):
            name = str(model.dtype).removeprefix("torch.")
            logger.warning("%s: slow on this CPU, which has no products in %s: set dtype to float32", path, name)
        return model


def _of_config(path: str, *, config: PreTrainedConfig | None = None, dtype: Any = "auto", **kwargs: Any) -> Any:
    """A model with random weights."""
    logger.warning("%s: a config without weights, which are drawn at random", path)
    kwargs.pop("revision", None)
    config = AutoConfig.from_pretrained(path) if config is None else config
    dtype = getattr(torch, dtype, torch.float32) if isinstance(dtype, str) else dtype
    return AutoModelForCausalLM.from_config(config, dtype=dtype, **kwargs)


def _converted(path: Path) -> Path:
    """The folder in the user's cache that holds the model of a `.gguf` file, made if it is not there."""
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()[:16]
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "tokenweight"
    folder = cache / f"{path.stem}-{digest}"
    if folder.is_dir():
        return folder
    cache.mkdir(parents=True, exist_ok=True)
    logger.warning("converting %s; kept for the next time in %s", path.name, folder)
    try:
        quantized = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32)
        tokenizer = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    except ImportError as error:
        raise ValueError(
            f"{path.name} needs a package that is missing: pip install 'gguf>=0.10' accelerate ({error})"
        ) from error
    # transformers refuses to save a model that came from a .gguf file, so its weights move into one that did not.
    config = type(quantized.config).from_dict(
        {k: v for k, v in quantized.config.to_dict().items() if k != "quantization_config"}
    )
    plain = type(quantized)(config)
    plain.load_state_dict(quantized.state_dict())
    with tempfile.TemporaryDirectory(dir=cache) as scratch:
        unfinished = Path(scratch) / "model"
        plain.save_pretrained(unfinished)
        tokenizer.save_pretrained(unfinished)
        with contextlib.suppress(FileExistsError, OSError):  # another process was faster
            unfinished.rename(folder)
    if not folder.is_dir():
        shutil.rmtree(folder, ignore_errors=True)
        raise ValueError(f"cannot write the converted model to {folder}")
    return folder
