"""FLOPs of a training step, counted from a config: matmuls of any decoder, attention by its query-key pairs.

The model is built from its config alone, of fake tensors, which have shapes but no values. Its attention is replaced
by one that computes nothing and keeps what a flash kernel keeps for the backward pass, its experts by one that reads as
many tokens. A product of [m, k] and [k, n] counts 2 m k n.
"""

import contextlib
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode
from transformers import AttentionInterface, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.integrations.moe import ExpertsInterface

from tokenweight.method import Expected, Weighting, Window
from tokenweight.models import CausalParts, with_adapter

_COUNTED_TOKENS = 64
_NAME = "tokenweight_blank"


class Attention(NamedTuple):
    """Attention of one layer: `width` is heads x (dimensions of key + value); a query sees `window` keys, or all."""

    width: int
    window: int | None


class Backward(NamedTuple):
    """FLOPs of a backward pass through frozen weights and a trained adapter."""

    linear: float
    """FLOPs of the decoder's matmuls, per token."""
    attention: tuple[Attention, ...]
    """Layers with trained parameters in them or before them."""
    trains_head: bool
    num_trained: int
    """Number of trained parameters."""


class Forward(NamedTuple):
    """FLOPs of a forward pass: of the decoder's matmuls, and of one product with the head, both per token."""

    linear: float
    head: float
    attention: tuple[Attention, ...]
    adapted: Backward | None = None
    """The backward pass if an adapter is trained; with all weights trained, it is twice the forward pass."""

    def attended(self, length: int, layers: tuple[Attention, ...] | None = None) -> float:
        """FLOPs of attention over a sequence: 2 x width for each query and visible key."""
        layers = self.attention if layers is None else layers
        return sum((2.0 * layer.width * _pairs(length, layer.window) for layer in layers), 0.0)

    def decoder(self, length: int) -> float:
        """FLOPs of the decoder over a sequence, without the head."""
        return self.linear * length + self.attended(length)

    def attended_backward(self, length: int) -> float:
        """FLOPs of the backward pass of attention: twice the forward pass, in layers that have one."""
        return 2 * self.attended(length, None if self.adapted is None else self.adapted.attention)

    def decoder_backward(self, length: int) -> float:
        """FLOPs of the backward pass of the decoder."""
        linear = 2 * self.linear if self.adapted is None else self.adapted.linear
        return linear * length + self.attended_backward(length)


class Step(NamedTuple):
    """FLOPs of one optimizer step, by component."""

    forward: float
    """The decoder over the sequences: the long context."""
    scoring: float
    """Scoring: windows of the short context, with their losses."""
    backward: float
    """Backward pass of the decoder: twice its forward pass, or less if an adapter is trained."""
    head: float
    """The loss: products with the output head, forward and backward."""
    recompute: float
    """The decoder's second forward pass, under activation checkpointing."""
    attention: float
    """The part of the above that is attention."""

    @property
    def total(self) -> float:
        """Their sum (`attention` is a part of the others)."""
        return self.forward + self.scoring + self.backward + self.head + self.recompute


def step_flops(
    forward: Forward,
    length: int,
    weighting: Weighting,
    scored: Sequence[Window] = (),
    *,
    contrast: str = "trained",
    checkpointing: bool = False,
    at_once: bool = False,
    num_sequences: int = 1,
) -> Step:
    """FLOPs of the forward and backward passes over sequences that are one document each.

    With B the decoder's forward pass, H one product of all predicted tokens with the head, S the windows:
    3 B + h H + S, and one more B with checkpointing. h is 3 where a token's weight depends on its own losses only
    (uniform, LongCE); else the losses come first, then gradients for the fraction k of tokens with a weight: 1 + 3 k,
    or 3 if all logits fit at once and all tokens have a weight.
    Where weights are known before the losses (contrast scorer, a divergence), tokens without weight cost one product
    and the others three: 1 + 2 k. With an adapter, h is one less for each gradient of the head, and the backward pass
    is as torch counts it. A self-scored divergence takes a second product of the tokens of the windows.

    Args:
        scored: windows that the model reads to score itself; empty where short losses are stored or not needed.
        contrast: source of the long losses in the weights (`with_weighted_loss`).
        at_once: whether all logits of a micro-batch fit the buffer (`fit_at_once`).
        num_sequences: of the step, on all GPUs.
    """
    num_predicted, products = length - 1, 3.0 if forward.adapted is None or forward.adapted.trains_head else 2.0
    selection = weighting.weighting if isinstance(weighting, Expected) else weighting
    kept = max(1, int(getattr(selection, "keep", 1) * num_predicted)) / num_predicted
    known = contrast == "scorer" if weighting.of_losses else bool(weighting.uses)
    if known:
        products = 1 - kept + products * kept
    elif not weighting.pointwise and (weighting.selects or not at_once):
        products = 1 + products * kept
    if weighting.divergence_of is not None:
        products += sum(window.stop - window.first for window in scored) / num_predicted
    long, scoring, passes = forward.decoder(length), window_flops(forward, scored), 2 if checkpointing else 1
    attended = passes * forward.attended(length) + forward.attended_backward(length)
    attended += sum(forward.attended(window.stop - window.start) for window in scored)
    head, recompute = products * forward.head * num_predicted, long if checkpointing else 0.0
    backward = forward.decoder_backward(length)
    return Step(*(num_sequences * part for part in (long, scoring, backward, head, recompute, attended)))


def window_flops(forward: Forward, scored: Sequence[Window]) -> float:
    """FLOPs of reading windows and computing the losses of the tokens that they score."""
    read = sum(forward.decoder(window.stop - window.start) for window in scored)
    return read + forward.head * sum(window.stop - window.first for window in scored)


def count_forward(config: PreTrainedConfig, lora: dict[str, Any] | None = None) -> Forward:
    """Count the FLOPs of a causal model of transformers, from its config alone.

    Args:
        lora: arguments of peft.LoraConfig, if an adapter is trained in place of the weights.

    Raises:
        ValueError: if it has no attention layers, or some that bypass the attention interface of transformers.
    """
    tokens = _COUNTED_TOKENS
    found: list[Attention] = []
    passed: list[Attention] = []
    with blank_model(config, torch.bfloat16, lora, seen=found.append, passed=passed.append) as model:
        with torch.set_grad_enabled(bool(lora)), explained(config):
            with FlopCounterMode(display=False) as counter:
                states = parts_of(model).states(torch.zeros(1, tokens, dtype=torch.long))
            with FlopCounterMode(display=False) as backward:
                if lora:
                    states.sum().backward()
        head = model.get_output_embeddings().weight
        num_layers = config.get_text_config().num_hidden_layers
        if len(found) != num_layers:
            raise ValueError(
                f"model: {config.model_type} has {num_layers} layers, {len(found)} with the attention of "
                "transformers: what the others compute cannot be counted"
            )
        adapted = None
        if lora:
            num = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
            adapted = Backward(backward.get_total_flops() / tokens, tuple(passed), head.requires_grad, num)
        return Forward(counter.get_total_flops() / tokens, 2.0 * head.numel(), tuple(found), adapted)


def parts_of(model: PreTrainedModel) -> CausalParts:
    """Decoder and head of a model of fake tensors; without values they cannot be verified, which `train` does."""
    decoder = model.base_model if model.base_model is not model else model.get_decoder()
    softcap = getattr(model.config.get_text_config(), "final_logit_softcapping", None)
    return CausalParts(decoder, model.get_output_embeddings(), 1.0, softcap, 0.0)


@contextlib.contextmanager
def blank_model(
    config: PreTrainedConfig,
    dtype: torch.dtype,
    lora: dict[str, Any] | None = None,
    *,
    seen: Callable[[Attention], None] = lambda layer: None,
    passed: Callable[[Attention], None] = lambda layer: None,
) -> Iterator[PreTrainedModel]:
    """Build the model of a config from fake tensors on a CPU, for the duration of the context.

    Args:
        lora: arguments of peft.LoraConfig: an adapter is added to the model, and its weights are frozen.
        seen: called with each attention layer that runs.
        passed: called with each attention layer whose backward pass runs.

    Raises:
        ValueError: if transformers has no causal language model of that config.
    """
    config = type(config).from_dict(config.to_dict())
    _straighten(config)
    # Under a name without a mask function in transformers: no mask is made; a sliding window is an argument.
    AttentionInterface.register(_NAME, functools.partial(_attention, seen, passed))
    ExpertsInterface.register(_NAME, _experts)
    names = {"attn_implementation": _NAME}
    if hasattr(config, "_experts_implementation"):
        names["experts_implementation"] = _NAME
    mode = FakeTensorMode()
    # PEFT converts what it adds, which works on the meta device but not with fake tensors.
    with torch.device("meta") if lora else mode, explained(config):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype, **names)
    if lora:
        with torch.device("meta"):
            with_adapter(model, lora)
        with mode:
            _replace_tensors(model)
    with mode:
        yield model


def _replace_tensors(model: nn.Module) -> None:
    """Replace tensors on the meta device by new ones of the active mode; tied ones stay tied."""
    known: dict[int, Tensor] = {}

    def new(tensor: Tensor) -> Any:
        if id(tensor) not in known:
            made = torch.empty(tensor.shape, dtype=tensor.dtype)
            known[id(tensor)] = nn.Parameter(made, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else made
        return known[id(tensor)]

    for module in model.modules():
        for tensors in (module._parameters, module._buffers):
            tensors.update({name: new(tensor) for name, tensor in tensors.items() if tensor is not None})


@contextlib.contextmanager
def explained(config: PreTrainedConfig) -> Iterator[None]:
    """Turn any error of a model that runs on fake tensors into one line that names the model."""
    try:
        yield
    except (RuntimeError, ValueError, TypeError, LookupError, AssertionError, AttributeError) as error:
        reason = " ".join(str(error).split())[:200]
        if isinstance(error, DataDependentOutputException):  # which names only an operation
            reason = "what it computes depends on the values of its inputs"
        raise ValueError(f"model: {config.model_type} cannot be counted from its config: {reason}") from error


def _straighten(config: PreTrainedConfig) -> None:
    """Remove length-dependent rotary frequencies: they need values, and cost next to nothing."""
    found = getattr(config.get_text_config(), "rope_parameters", None) or {}
    for parameters in [value for value in found.values() if isinstance(value, dict)] or [found]:
        if parameters.get("rope_type") in ("dynamic", "longrope"):
            parameters["rope_type"] = "default"


def _pairs(length: int, window: int | None) -> float:
    """Number of query-key pairs: each token sees itself and those before it, `window` in total."""
    if window is None or window >= length:
        return length * (length + 1) / 2
    return window * (window + 1) / 2 + (length - window) * window


class _Flash(torch.autograd.Function):
    """Computes nothing; keeps what a flash kernel keeps: queries, keys, values, output, a number per head and token."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, passed: Callable[[], None]) -> Tensor:
        ctx.passed = passed
        batch, heads, length, _ = query.shape
        out = query.new_empty(batch, length, heads, value.shape[-1])
        ctx.save_for_backward(query, key, value, out, query.new_empty(batch, heads, length, dtype=torch.float32))
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        ctx.passed()
        return *(torch.empty_like(tensor) for tensor in ctx.saved_tensors[:3]), None


def _attention(
    seen: Callable[[Attention], None],
    passed: Callable[[Attention], None],
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *args: Any,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    layer = Attention(query.shape[1] * (query.shape[3] + value.shape[3]), kwargs.get("sliding_window"))
    seen(layer)
    return _Flash.apply(query, key, value, functools.partial(passed, layer)), None


def _experts(self: Any, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """Experts that multiply all routed tokens with the first expert: the products cost the same."""

    def product(rows: Tensor, weight: Tensor) -> Tensor:
        one = weight.to(rows.dtype)[0]
        return rows @ (one if self.is_transposed else one.t())

    rows = hidden_states.repeat_interleave(top_k_index.shape[-1], dim=0)
    rows = product(rows, self.gate_up_proj if self.has_gate else self.up_proj)
    rows = product(self._apply_gate(rows) if self.has_gate else self.act_fn(rows), self.down_proj)
    weighted = rows * top_k_weights.reshape(-1, 1)
    return weighted.view(len(hidden_states), -1, hidden_states.shape[-1]).sum(dim=1).to(hidden_states.dtype)
