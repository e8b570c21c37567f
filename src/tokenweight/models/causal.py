"""A causal language model of transformers as two parts, decoder and output head, verified on eight tokens."""

import contextlib
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int, Shaped
from torch import Tensor, nn
from transformers import PreTrainedModel

from tokenweight.method import Head, aligned_with_tokens, linear_nll, prediction_mask


@dataclass(frozen=True)
class CausalParts:
    """A causal model as the loss reads it: `logits = cap(scale * head(decoder(tokens)))`.

    Made and verified by `causal_parts`. It holds modules, not tensors, and so follows the model when it moves.
    """

    decoder: nn.Module
    output: nn.Module
    scale: float
    softcap: float | None
    max_packed_rows: float
    """Rows of a batch that may hold packed documents without these seeing each other: 0, 1, or any number."""

    @property
    def packs_without_mask(self) -> bool:
        """Whether attention itself separates packed documents, rather than a mask, whose hidden pairs cost time.

        Assumed where documents are separated only in a batch of one row, as with flash kernels: a mask separates them
        in any batch. If the assumption were wrong, packing would be slow but correct.
        """
        return self.max_packed_rows == 1

    def check_head(self, model: PreTrainedModel) -> None:
        """Raise ValueError if the output head of the model is no longer the one that was found here."""
        if model.get_output_embeddings() is not self.output:
            raise ValueError(
                "the output head was replaced after with_weighted_loss or Scorer had found it, as by modules_to_save "
                "of an adapter or by resize_token_embeddings: call them after that"
            )

    @property
    def num_tokens(self) -> int:
        """Vocabulary size of the head; under ZeRO-3 the head itself is empty between passes."""
        weight: Any = self.output.weight
        return int(getattr(weight, "ds_shape", weight.shape)[0])

    @property
    def head(self) -> Head:
        """The output head as the losses take it."""
        weight: Any = self.output.weight
        return Head(weight, getattr(self.output, "bias", None), self.scale, self.softcap)

    def states(
        self,
        tokens: Int[Tensor, "batch seq"],
        position_ids: Int[Tensor, "batch seq"] | None = None,
        attention_mask: Tensor | None = None,
        **kwargs: Any,
    ) -> Float[Tensor, "batch seq dim"]:
        """The hidden state that predicts each token: column t is the decoder's output at t - 1, column 0 is zero.

        No KV cache is used: with one, transformers would let packed documents see each other.

        Args:
            position_ids: rising by one, except that 0 begins a new document, and larger jumps skip positions (PoSE).

        Raises:
            ValueError: if the positions do not allow documents to be separated.
        """
        return aligned_with_tokens(self.decoded(tokens, position_ids, attention_mask, **kwargs))

    def decoded(
        self,
        tokens: Int[Tensor, "batch seq"],
        position_ids: Int[Tensor, "batch seq"] | None = None,
        attention_mask: Tensor | None = None,
        **kwargs: Any,
    ) -> Float[Tensor, "batch seq dim"]:
        """The decoder's output at each token, not shifted; arguments and errors are those of `states`."""
        inputs = self.inputs(tokens, position_ids, attention_mask)
        return self.decoder(**inputs, **kwargs).last_hidden_state

    def inputs(
        self,
        tokens: Int[Tensor, "batch seq"],
        position_ids: Int[Tensor, "batch seq"] | None,
        attention_mask: Tensor | None,
    ) -> dict[str, Any]:
        """Inputs of the decoder, or the model, with which packed documents do not see each other."""
        if position_ids is not None:
            attention_mask = _separating_mask(position_ids, attention_mask, self.max_packed_rows)
        return {
            "input_ids": tokens,
            "position_ids": position_ids,
            "attention_mask": attention_mask,
            "use_cache": False,
        }

    @torch.no_grad()
    def nll(
        self,
        tokens: Int[Tensor, "batch seq"],
        position_ids: Int[Tensor, "batch seq"] | None = None,
        attention_mask: Shaped[Tensor, "batch seq"] | None = None,
    ) -> Float[Tensor, "batch seq"]:
        """The loss of every token given all tokens before it in its row or document: `model.token_nll`."""
        with evaluating(self.decoder):
            hidden = self.states(tokens, position_ids, attention_mask)
        return self.nll_of(hidden, tokens, position_ids)

    @torch.no_grad()
    def nll_of(
        self,
        states: Float[Tensor, "batch seq dim"],
        tokens: Int[Tensor, "batch seq"],
        position_ids: Int[Tensor, "batch seq"] | None = None,
    ) -> Float[Tensor, "batch seq"]:
        """The loss of every token, given the `states` that predict it; 0 for the first of a document."""
        targets = tokens.where(prediction_mask(tokens, position_ids), -100).flatten()
        return linear_nll(states.flatten(0, 1), self.head.weight, targets, **self.head.after).view_as(tokens)


def _separating_mask(position_ids: Tensor, attention_mask: Tensor | None, max_packed_rows: float) -> Tensor | None:
    """The attention mask with which transformers separates documents where positions restart at 0, and only there.

    Without a mask it takes *every* step other than +1 for a new document; with a mask it separates nothing.
    """
    jumps = position_ids.diff(dim=1) != 1
    restarts = jumps & (position_ids[:, 1:] == 0)
    padded = jumps.new_zeros(()) if attention_mask is None else ~attention_mask.all()
    # One host-device synchronization in place of four.
    found = torch.stack([jumps.any(), restarts.any(), (jumps != restarts).any(), padded]).tolist()
    any_jump, any_restart, any_skip, any_padding = found
    if not any_jump:
        return attention_mask
    if not any_restart:
        return torch.ones_like(position_ids) if attention_mask is None else attention_mask
    if len(position_ids) > max_packed_rows:
        remedy = "give each document a row" if max_packed_rows == 0 else "use batches of one row"
        raise ValueError(
            f"position_ids hold packed documents, but in a batch of {len(position_ids)} rows this model, with its "
            f"attention, lets a document see those before it: {remedy}"
        )
    if any_skip:
        row, column = (jumps & ~restarts).nonzero()[0].tolist()
        raise ValueError(
            f"position_ids of row {row} jump to {position_ids[row, column + 1].item()} at token {column + 1}, in a "
            "batch with packed documents: transformers would take the jump for a document border. "
            "Skip positions, or pack documents, not both"
        )
    if any_padding:
        raise ValueError(
            "position_ids hold packed documents, and attention_mask holds padding: transformers would then let the "
            "documents see each other. Drop attention_mask, and give the padding labels of -100 and positions from 0"
        )
    return None


@contextlib.contextmanager
def in_mode(model: nn.Module, *, training: bool) -> Iterator[None]:
    """Put every submodule into training or evaluation mode temporarily, and restore each one's own mode afterwards."""
    changed = [module for module in model.modules() if module.training != training]
    try:
        for module in changed:
            module.training = training
        yield
    finally:
        for module in changed:
            module.training = not training


def evaluating(model: nn.Module) -> contextlib.AbstractContextManager[None]:
    """Switch dropout off temporarily."""
    return in_mode(model, training=False)


@contextlib.contextmanager
def without_adapters(model: nn.Module) -> Iterator[None]:
    """Switch PEFT adapters off temporarily: the model is its base. Nothing else changes, while
    `PeftModel.disable_adapter` would change `requires_grad` in the middle of a step.

    Raises:
        ValueError: if the model has none.

    Source: `BaseTunerLayer.enable_adapters` and `AuxiliaryTrainingWrapper.enable_adapters` of peft 0.21.2.
    """
    layers = _adapted_layers(model)
    were_off = [layer._disable_adapters for layer in layers]
    try:
        for layer in layers:
            layer._disable_adapters = True
        yield
    finally:
        for layer, off in zip(layers, were_off):
            layer._disable_adapters = off


def _adapted_layers(model: nn.Module) -> list[Any]:
    layers = [module for module in model.modules() if hasattr(module, "_disable_adapters")]
    if not layers:
        raise ValueError("adapters=False: the model has no adapter: expected one, as of peft.get_peft_model")
    return layers


def check_base_is_frozen(model: nn.Module) -> None:
    """Raise a ValueError if parameters are trained that remain when adapters are off, as biases of the base are."""
    own: set[int] = set()
    for layer in _adapted_layers(model):
        for name in (
            *getattr(layer, "adapter_layer_names", ()),
            *getattr(layer, "other_param_names", ()),
            "modules_to_save",
        ):
            part = getattr(layer, name, None)
            own |= {id(one) for one in part.parameters()} if isinstance(part, nn.Module) else set()
            own |= {id(one) for one in part.values()} if isinstance(part, nn.ParameterDict) else set()
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and id(parameter) not in own:
            raise ValueError(f"adapters=False: {name} of the base is trained: expected a base that stays as it is")


def causal_parts(model: PreTrainedModel) -> CausalParts:
    """Decoder, head and the operations on its logits, verified once per model and cached on it.

    They are verified again if the head was replaced or the attention switched, which decides whether packed documents
    see each other. The trained parameters of the head are checked every time.

    Raises:
        ValueError: if the model's logits are not its head times its decoder's hidden states, scaled and soft-capped; or
            if it was loaded in parts.
    """
    if not isinstance(model, PreTrainedModel):
        inner = ": use model.get_base_model(), which it wraps" if hasattr(model, "get_base_model") else ""
        raise ValueError(f"{type(model).__name__} is not a model of transformers{inner}")
    _check_complete(model)
    output = _output_head(model)
    verified_with = (output, model.config._attn_implementation)
    known = model.__dict__.get("_causal_parts")
    if known is None or known[0] != verified_with:
        known = model._causal_parts = verified_with, _verified_parts(model, output)
    return known[1]


def _check_complete(model: PreTrainedModel) -> None:
    """Raise a ValueError for a model that transformers has split over processes as it loaded it."""
    config = getattr(model.config, "distributed_config", None)
    names = ("tp_size", "ep_size", "pp_size", "fsdp_size", "dp_replicate_size")
    sizes = {name: getattr(config, name, None) or 1 for name in names}
    sizes["tp_size"] = max(sizes["tp_size"], getattr(model, "tp_size", None) or 1)
    found = [f"{name} {size}" for name, size in sizes.items() if size > 1]
    if found:
        raise ValueError(
            f"model: loaded in parts ({', '.join(found)}), as by tp_plan or distributed_config, so that no process has "
            "its head: expected a complete model, which FSDP2 of a Trainer shards later"
        )


def _verified_parts(model: PreTrainedModel, output: Any) -> CausalParts:
    """Find the parts, and verify on eight tokens that nothing is missing, and that no token is read ahead."""
    name, config = type(model).__name__, model.config.get_text_config()
    # They differ in OPT; Llama 4 names one that it does not have.
    named = (model.base_model, model.get_decoder(), *model.children())
    candidates = [part for part in named if part is not model and isinstance(part, nn.Module)]
    caps = (getattr(config, name, None) for name in ("final_logit_softcapping", "logits_soft_cap"))
    softcap = next((cap for cap in caps if cap is not None), None)
    tokens = torch.arange(8, device=output.weight.device).remainder(config.vocab_size)[None]
    seen: dict[Any, Any] = {}
    plain: dict[Any, Tensor] = {}
    read: list[int] = []

    def at_head(head: Any, arguments: tuple[Tensor, ...], result: Tensor) -> None:
        read.append(arguments[0].shape[:-1].numel())
        # Here rather than later: under the autocast of a trained model, if it has one.
        for part, decoded in seen.items():
            state = getattr(decoded, "last_hidden_state", None)
            if state is not None and state.shape == arguments[0].shape:
                plain[part] = nn.functional.linear(state, head.weight, getattr(head, "bias", None))

    hooks = [part.register_forward_hook(lambda part, given, result: seen.update({part: result})) for part in candidates]
    hooks.append(output.register_forward_hook(at_head))
    try:
        with torch.no_grad(), evaluating(model):
            expected = model(input_ids=tokens, use_cache=False).logits
    finally:
        for hook in hooks:
            hook.remove()
    if max(read, default=0) > tokens.numel():
        raise ValueError(
            f"{name} is not supported: its output head reads {max(read) / tokens.numel():g} states of each token, as "
            "to predict several tokens ahead, and only the next one would be weighted: expected one"
        )
    if not plain:
        raise ValueError(f"{name} is not supported: its output head does not read the last state of its decoder")
    scales = ((part, _find_scale(config, logits, expected, softcap)) for part, logits in plain.items())
    decoder, scale = next(((part, scale) for part, scale in scales if scale is not None), (None, None))
    if decoder is None or scale is None:
        raise ValueError(
            f"{name} is not supported: its logits are not its output head times its decoder's states, nor that scaled "
            "or soft-capped as its configuration says"
        )
    if _reads_ahead(decoder, tokens):
        raise ValueError(
            f"{name} is not supported: its attention is not causal: the states of tokens depend on those after them"
        )
    # Flash attention knows packed documents in a batch of one row only.
    packed = (most for rows, most in ((2, math.inf), (1, 1.0)) if _separates(decoder, tokens, rows))
    return CausalParts(decoder, output, scale, softcap, next(packed, 0.0))


def _output_head(model: PreTrainedModel) -> Any:
    """The module that turns hidden states into logits; its weight and bias must be all that it trains."""
    name, output = type(model).__name__, model.get_output_embeddings()
    if output is None or model.config.is_encoder_decoder:
        raise ValueError(f"{name} is not supported: expected a causal language model with a decoder and an output head")
    if not output.weight.is_floating_point():
        raise ValueError(f"{name} is not supported: its output head is quantized ({output.weight.dtype})")
    besides = _trained_besides_weight_and_bias(output)
    if besides:
        raise ValueError(
            f"{name} is not supported: its output head trains {besides[0]} besides weight and bias: take the head out "
            "of the target_modules of the adapter, or train all of it (modules_to_save)"
        )
    return output


def _trained_besides_weight_and_bias(output: Any) -> list[str]:
    """Trained parameters that neither weight nor bias depends on: an adapter starting at 0 changes no logits yet."""
    trained = {name: parameter for name, parameter in output.named_parameters() if parameter.requires_grad}
    with torch.enable_grad():
        read = sum(tensor.sum() for tensor in (output.weight, getattr(output, "bias", None)) if tensor is not None)
    if not (trained and read.requires_grad):
        return list(trained)
    gradients = torch.autograd.grad(read, list(trained.values()), allow_unused=True)
    return [name for name, gradient in zip(trained, gradients) if gradient is None]


def _reads_ahead(decoder: nn.Module, tokens: Int[Tensor, "1 seq"]) -> bool:
    """Whether the states of tokens change when the last token does."""
    changed = torch.cat([tokens[:, :-1], tokens[:, :1]], dim=1)
    change = _change(decoder, tokens, changed)
    return _matters(change[:, :-1], change[:, -1:])


def _separates(decoder: nn.Module, tokens: Int[Tensor, "1 seq"], num_rows: int) -> bool:
    """Whether the second of two packed documents stays the same when the first one changes.

    Not to the bit: sums in experts, and in some kernels, are rounded differently when other tokens of the batch
    change. The change is compared with the one where nothing separates the documents.
    """
    tokens, half = tokens.expand(num_rows, -1), tokens.shape[1] // 2
    columns = torch.arange(tokens.shape[1], device=tokens.device).expand(num_rows, -1)
    changed = torch.cat([tokens[:, :half].flip(1), tokens[:, half:]], dim=1)
    try:
        packed = _change(decoder, tokens, changed, position_ids=columns.remainder(half))
        joined = _change(decoder, tokens, changed, position_ids=columns)
    except TypeError:  # it takes no positions
        return False
    return not _matters(packed[:, half:], joined[:, half:])


@torch.no_grad()
def _change(decoder: nn.Module, *batches: Tensor, **inputs: Tensor) -> Tensor:
    """The difference of the states of two batches."""
    with evaluating(decoder):
        first, second = (decoder(input_ids=tokens, use_cache=False, **inputs).last_hidden_state for tokens in batches)
    return first - second


def _matters(change: Tensor, whole: Tensor) -> bool:
    """Whether a change exceeds rounding, relative to a full change."""
    return bool(change.abs().max() > math.sqrt(torch.finfo(whole.dtype).eps) * whole.abs().max())


def _find_scale(config: Any, plain: Tensor, expected: Tensor, softcap: float | None) -> float | None:
    """The factor from states times head to logits, among those the config may mean; None if none fits."""
    eps = max(torch.finfo(tensor.dtype).eps for tensor in (plain, expected))
    wide = torch.promote_types(plain.dtype, torch.float32)
    plain, expected = plain.to(wide), expected.to(wide)
    values = [getattr(config, name, None) for name in ("logit_scale", "logits_scaling", "lm_head_multiplier")]
    given = [float(value) for value in values if value]
    errors = {}
    for scale in [factor for value in given for factor in (value, 1 / value)] + [1.0]:
        logits = plain * scale if softcap is None else softcap * torch.tanh(plain * scale / softcap)
        errors[scale] = (logits - expected).abs().max().item()
    best = min(errors, key=lambda scale: errors[scale])
    # Both come from the same product: they may differ by a rounding or two of scale and cap in the model's dtype.
    return best if errors[best] <= 8 * eps * expected.abs().max().item() else None
