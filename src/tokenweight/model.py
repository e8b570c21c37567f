"""A causal language model as two parts, decoder and output head, and the one place where losses are shifted by one."""

import contextlib
import hashlib
import json
import logging
import os
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from tokenweight.loss import linear_nll

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class CausalParts:
    """What a loss needs of a causal model: `logits = cap(scale * head(decoder(tokens)))`.

    Made and verified by `causal_parts`. It holds modules, not tensors, and so follows the model when it moves.
    """

    decoder: nn.Module
    output: nn.Module
    scale: float
    softcap: float | None
    separates: bool
    """Whether documents that are packed into one row do not see each other."""

    @property
    def head(self) -> dict[str, Any]:
        """The arguments of `linear_nll` and `weighted_linear_cross_entropy` that describe the output head."""
        bias = getattr(self.output, "bias", None)
        return {"head": self.output.weight, "bias": bias, "scale": self.scale, "softcap": self.softcap}

    def states(
        self,
        tokens: Int[Tensor, "batch seq"],
        position_ids: Int[Tensor, "batch seq"] | None = None,
        attention_mask: Tensor | None = None,
        **kwargs: Any,
    ) -> Float[Tensor, "batch seq dim"]:
        """The state that predicts each token: column t is the decoder's output at t - 1, column 0 is zero.

        This is the only shift by one in this library; everything else is aligned with the tokens. No KV cache is used:
        with one, transformers would let packed documents see each other.

        Args:
            position_ids: rising by one, except that 0 begins a new document, and larger jumps skip positions (PoSE).

        Raises:
            ValueError: if the positions do not allow to keep documents apart.
        """
        if position_ids is not None:
            attention_mask = _separating_mask(position_ids, attention_mask, separates=self.separates)
        outputs = self.decoder(
            input_ids=tokens, position_ids=position_ids, attention_mask=attention_mask, use_cache=False, **kwargs
        )
        return nn.functional.pad(outputs.last_hidden_state[:, :-1], (0, 0, 1, 0))


def _separating_mask(position_ids: Tensor, attention_mask: Tensor | None, *, separates: bool) -> Tensor | None:
    """The attention mask with which transformers separates documents where positions restart at 0, and only there.

    Without a mask it takes *every* step other than +1 for a new document; with a mask it separates nothing.
    """
    jumps = position_ids.diff(dim=1) != 1
    if not jumps.any():
        return attention_mask
    restarts = jumps & (position_ids[:, 1:] == 0)
    if not restarts.any():
        return torch.ones_like(position_ids) if attention_mask is None else attention_mask
    if not separates:
        raise ValueError(
            "position_ids hold packed documents, but this model lets a document see those before it: give each a row"
        )
    if not torch.equal(jumps, restarts):
        row, column = (jumps & ~restarts).nonzero()[0].tolist()
        raise ValueError(
            f"position_ids of row {row} jump to {position_ids[row, column + 1].item()} at token {column + 1}, in a "
            "batch with packed documents: transformers would take the jump for a document border. "
            "Skip positions, or pack documents, not both"
        )
    if attention_mask is not None and not attention_mask.all():
        raise ValueError(
            "position_ids hold packed documents, and attention_mask holds padding: transformers would then let the "
            "documents see each other. Drop attention_mask, and give the padding labels of -100 and positions from 0"
        )
    return None


def prediction_mask(
    labels: Int[Tensor, "batch seq"], position_ids: Int[Tensor, "batch seq"] | None = None
) -> Bool[Tensor, "batch seq"]:
    """True where a token is predicted and counts: a label other than -100 that does not begin a row or a document."""
    mask = labels != -100
    if position_ids is not None:
        mask &= position_ids != 0
    mask[:, 0] = False
    return mask


@contextlib.contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Switch dropout off for a while, and give every submodule its own mode back afterwards."""
    training = [module for module in model.modules() if module.training]
    try:
        for module in training:
            module.training = False
        yield
    finally:
        for module in training:
            module.training = True


@torch.no_grad()
def token_nll(
    model: PreTrainedModel, tokens: Int[Tensor, "batch seq"], position_ids: Int[Tensor, "batch seq"] | None = None
) -> Float[Tensor, "batch seq"]:
    """Loss of every token given all tokens before it in its row (in its document, where `position_ids` restart).

    In evaluation mode, without KV cache and without logits of the whole row.

    Returns:
        Nats, float32. Column t speaks of token t; 0 for the first token of a row or document, which nothing predicts.
    """
    parts = causal_parts(model)
    mask = prediction_mask(tokens, position_ids)
    with evaluating(model):
        states = parts.states(tokens, position_ids)
        return linear_nll(states.flatten(0, 1), targets=tokens.where(mask, -100).flatten(), **parts.head).view_as(
            tokens
        )


def causal_parts(model: PreTrainedModel) -> CausalParts:
    """Find decoder, head, and what happens to the logits after it; and prove on eight tokens that nothing is missing.

    Raises:
        ValueError: if the model's logits are not its head times its decoder's states, scaled and soft-capped.
    """
    name = type(model).__name__
    if not isinstance(model, PreTrainedModel):
        inner = ": bind model.get_base_model(), which it wraps" if hasattr(model, "get_base_model") else ""
        raise ValueError(f"{name} is not a model of transformers{inner}")
    config, output = model.config, model.get_output_embeddings()
    if output is None or config.is_encoder_decoder:
        raise ValueError(f"{name} is not supported: expected a causal language model with a decoder and an output head")
    if not output.weight.is_floating_point():
        raise ValueError(f"{name} is not supported: its output head is quantized ({output.weight.dtype})")
    decoder = model.base_model if model.base_model is not model else model.get_decoder()
    softcap = getattr(config, "final_logit_softcapping", None)
    tokens = torch.arange(8, device=output.weight.device).remainder(config.vocab_size)[None]
    with torch.no_grad(), evaluating(model):
        expected = model(input_ids=tokens, use_cache=False).logits
        plain = output(decoder(input_ids=tokens, use_cache=False).last_hidden_state)
    eps = max(torch.finfo(tensor.dtype).eps for tensor in (expected, plain))
    wide = torch.promote_types(plain.dtype, torch.float32)
    expected, plain = expected.to(wide), plain.to(wide)
    errors = {}
    for scale in _scales(config):
        logits = plain * scale if softcap is None else softcap * torch.tanh(plain * scale / softcap)
        errors[scale] = (logits - expected).abs().max().item()
    scale = min(errors, key=lambda value: errors[value])
    # Both are made by the same operations, but for a rounding or two of scale and cap in the model's dtype.
    if not errors[scale] <= 8 * eps * expected.abs().max().item():
        raise ValueError(
            f"{name} is not supported: its logits are not its output head times its decoder's states, nor that scaled "
            f"or soft-capped as its configuration says (they differ by up to {errors[scale]:.3g})"
        )
    return CausalParts(decoder, output, scale, softcap, _separates(decoder, tokens))


@torch.no_grad()
def _separates(decoder: nn.Module, tokens: Int[Tensor, "1 seq"]) -> bool:
    """Whether the second of two packed documents stays the same, to the bit, when the first one changes."""
    half = tokens.shape[1] // 2
    positions = torch.arange(tokens.shape[1], device=tokens.device).remainder(half)[None]
    changed = torch.cat([tokens[:, :half].flip(1), tokens[:, half:]], dim=1)
    with evaluating(decoder):
        try:
            runs = [decoder(input_ids=t, position_ids=positions, use_cache=False) for t in (tokens, changed)]
        except TypeError:  # it takes no positions
            return False
    first, second = (run.last_hidden_state[:, half:] for run in runs)
    return torch.equal(first, second)


def _scales(config: Any) -> list[float]:
    """Factors by which a configuration may ask to multiply logits; which one is meant is found by trying."""
    values = [getattr(config, name, None) for name in ("logit_scale", "logits_scaling", "lm_head_multiplier")]
    given = [float(value) for value in values if value]
    return [scale for value in given for scale in (value, 1 / value)] + [1.0]


def load_model(
    name: str | os.PathLike[str], *, dtype: torch.dtype | str = "auto", revision: str | None = None, **kwargs: Any
) -> PreTrainedModel:
    """Load a causal language model: a plain transformers model that can be trained and saved.

    Args:
        name: a folder, a hub id, or a `.gguf` file. A `.gguf` file is de-quantized once and kept as an ordinary folder
            in the user's cache (`$XDG_CACHE_HOME/tokenweight`), so that the second start takes a second.
        dtype: of the weights; "auto" takes that of the file. Train in float32 (with autocast), or small updates are
            rounded away.
        revision: of a hub model.
        kwargs: for `AutoModelForCausalLM.from_pretrained`, such as `config` or `attn_implementation`.

    Raises:
        ValueError: one line that says what was not found or could not be read.
    """
    return _load(AutoModelForCausalLM, "model", name, dtype=dtype, revision=revision, **kwargs)


def load_tokenizer(name: str | os.PathLike[str], *, revision: str | None = None) -> PreTrainedTokenizerBase:
    """Load the tokenizer of a folder, a hub id or a `.gguf` file, as `load_model` does.

    Raises:
        ValueError: one line that says what was not found or could not be read.
    """
    return _load(AutoTokenizer, "tokenizer", name, revision=revision)


def find_tokenizer(name: str | os.PathLike[str]) -> PreTrainedTokenizerBase | None:
    """The tokenizer of a model; None if it is a folder that holds no tokenizer."""
    has_none = Path(name).is_dir() and not any(Path(name).glob("*token*"))
    return None if has_none else load_tokenizer(name)


def tokenizer_fingerprint(tokenizer: PreTrainedTokenizerBase) -> str:
    """16 hex digits that two tokenizers share if they give every token, special ones included, the same id."""
    vocabulary = sorted(tokenizer.get_vocab().items(), key=lambda item: item[1])
    return hashlib.sha256(json.dumps(vocabulary).encode()).hexdigest()[:16]


def refuse_tokenizer(
    tokenizer: PreTrainedTokenizerBase | None, name: str, provenance: dict[str, Any], folder: str | os.PathLike[str]
) -> None:
    """Raise a ValueError if rows, by their provenance, were made with another tokenizer than the model's."""
    theirs = provenance.get("tokenizer_fingerprint")
    if tokenizer is None or theirs is None or tokenizer_fingerprint(tokenizer) == theirs:
        return
    raise ValueError(
        f"{folder} was made with the tokenizer of {provenance.get('tokenizer')} ({theirs}), but {name} has another "
        f"({tokenizer_fingerprint(tokenizer)}): prepare the rows with the tokenizer of {name}"
    )


def refuse_length(config: Any, length: int, what: str) -> None:
    """Raise a ValueError if a model has fewer positions than `length` tokens need."""
    positions = getattr(config, "max_position_embeddings", None)
    if positions is not None and length > positions:
        raise ValueError(
            f"{what} of {length} tokens: the model has {positions} positions. Raise max_position_embeddings and the "
            "rotary base (rope_parameters) in its config.json first"
        )


def _load(kind: Any, what: str, name: str | os.PathLike[str], **kwargs: Any) -> Any:
    path = Path(name)
    if path.suffix == ".gguf":
        if not path.is_file():
            raise ValueError(f"{what} {str(name)!r}: no such file")
        path = _converted(path)
    elif path.exists() and not path.is_dir():
        raise ValueError(f"{what} {str(name)!r} is a file: expected a folder, a hub id or a .gguf file")
    try:
        return kind.from_pretrained(str(path), **kwargs)
    except (OSError, ValueError) as error:
        reason = " ".join(str(error).split())[:300]
        raise ValueError(f"{what} {str(name)!r} cannot be loaded from a folder or the hub: {reason}") from error


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
