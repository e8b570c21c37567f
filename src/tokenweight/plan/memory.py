"""Memory of a training step, measured by running it on fake tensors, which have no values, and counting bytes."""

import contextlib
import weakref
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import PreTrainedConfig, PreTrainedModel

from tokenweight.method import ShortContext, rows_at_once, sliding_windows
from tokenweight.plan.flops import blank_model, explained, parts_of

_SCORED_AT_ONCE = 32768
"""Tokens that `Scorer` reads in one pass by default."""


class Held(NamedTuple):
    """Peak bytes of a step's forward and backward pass beyond weights and optimizer states, by phase."""

    forward: float
    kept: float
    """Activations that the forward pass keeps for the backward pass: held when the loss begins."""
    scoring: float
    """Peak of self-scoring, before the forward pass."""
    loss: float
    """Peak of the loss, beyond `kept`."""
    backward: float
    """Peak of the backward pass, including gradients of weights that exist at that moment."""
    gradients: float
    """Gradients of weights at the peak of the backward pass."""


class _Live(TorchDispatchMode):
    """Counts the bytes of all live tensors that were created while it is active."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.live, self.peak, self.at_peak = 0, 0, 0
        self.beside: Callable[[], int] = lambda: 0
        self.known = {parameter.untyped_storage()._cdata for parameter in [*model.parameters(), *model.buffers()]}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor):
                self._add(tensor.untyped_storage())
        return result

    def _add(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key in self.known:
            return
        self.known.add(key)
        self.live += size
        weakref.finalize(storage, self._remove, key, size)
        if self.live > self.peak:
            self.peak, self.at_peak = self.live, self.beside()

    def _remove(self, key: int, size: int) -> None:
        self.known.discard(key)
        self.live -= size

    def restart(self) -> int:
        """Return the peak since the last call, and restart it from what is live now."""
        before, self.peak = self.peak, self.live
        return before


class _Loss(torch.autograd.Function):
    """A loss that computes nothing, but holds what `loss.weighted_linear_cross_entropy` holds."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, head: Tensor, bias: Tensor | None, num_rows: int, capped: bool) -> Tensor:
        # None for a head that an adapter leaves frozen.
        wanted = [tensor if needed else None for tensor, needed in zip((hidden, head, bias), ctx.needs_input_grad)]
        ctx.grads = [None if tensor is None else torch.zeros_like(tensor, dtype=torch.float32) for tensor in wanted]
        ctx.dtypes = [None if tensor is None else tensor.dtype for tensor in wanted]
        buffers = _logits(hidden, head, num_rows, capped)
        buffers.append(hidden.new_empty(len(buffers[0]), hidden.shape[1], dtype=torch.float32))
        return hidden.new_zeros((), dtype=torch.float32)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        made, ctx.grads = ctx.grads, None
        return *(None if grad is None else grad.to(dtype) for grad, dtype in zip(made, ctx.dtypes)), None, None


def _logits(hidden: Tensor, head: Tensor, num_rows: int, capped: bool) -> list[Tensor]:
    """The chunk of logits held at a time, and its copy where a soft-cap is undone."""
    narrow = head.dtype.itemsize == 2 or torch.is_autocast_enabled("cpu")
    most = rows_at_once(num_rows, len(head), 4, on_gpu=narrow)
    chunk = -(-num_rows // -(-num_rows // most))
    return [hidden.new_empty(chunk, len(head), dtype=torch.float32) for _ in range(2 if capped else 1)]


def hold(
    config: PreTrainedConfig,
    length: int,
    *,
    lora: dict[str, Any] | None = None,
    dtype: torch.dtype = torch.float32,
    autocast: torch.dtype | None = None,
    checkpointing: dict[str, Any] | None = None,
    batch: int = 1,
    context: ShortContext | None = None,
    new_gradients: bool = True,
) -> Held:
    """Run one forward and backward pass on fake tensors, and count the memory held.

    Attention is a flash kernel: nothing of length x length is held. A sequence is one document.

    Args:
        length: tokens of a sequence.
        lora: arguments of peft.LoraConfig, if an adapter is trained in place of the weights.
        dtype: dtype of the weights.
        autocast: dtype of the decoder's computation, if it is another.
        checkpointing: arguments of gradient checkpointing; None keeps all activations.
        batch: sequences in one pass.
        context: the short context of a model that scores itself.
        new_gradients: count the gradients that the pass leaves; False where they are added to those of an earlier pass,
            or reduced as soon as each is made.

    Raises:
        ValueError: for a model that does not run on fake tensors.
    """
    with blank_model(config, dtype, lora) as model, explained(config):
        model.train()
        if checkpointing is not None:
            _checkpoint(model, checkpointing)
        tokens = torch.zeros(batch, length, dtype=torch.long)
        with _Live(model) as live:
            live.beside = _count_gradients(model, new_gradients)
            with contextlib.nullcontext() if autocast is None else torch.autocast("cpu", autocast):
                parts = parts_of(model)
                if context is not None:
                    _score(model, batch, length, context)
                scoring = live.restart()
                states = parts.states(tokens).flatten(0, 1)
                forward, before = live.restart(), live.live
                head, num_rows = parts.head, batch * (length - 1)
                loss = _Loss.apply(states, head.weight, head.bias, num_rows, parts.softcap is not None)
            held = live.restart() - before
            del states
            loss.backward()
            return Held(*map(float, (forward, before, scoring, held, live.peak, live.at_peak)))


def _checkpoint(model: PreTrainedModel, given: dict[str, Any]) -> None:
    # Before transformers 5.23 only the older name exists. Fake tensors have no random state to restore.
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable({**given, "preserve_rng_state": False})


def _count_gradients(model: PreTrainedModel, new_gradients: bool) -> Callable[[], int]:
    """Return a function for the bytes of gradients that this pass has made and kept so far."""
    total = 0

    def made(parameter: Tensor) -> None:
        nonlocal total
        if new_gradients:
            total += parameter.nbytes
        else:
            parameter.grad = None

    for parameter in filter(lambda one: one.requires_grad, model.parameters()):
        parameter.register_post_accumulate_grad_hook(made)
    return lambda: total


@torch.no_grad()
def _score(model: PreTrainedModel, batch: int, length: int, context: ShortContext) -> None:
    """Read the windows of a batch, as many as fit one pass, and hold the logits of one chunk of their scored tokens."""
    scored = sliding_windows(length, context.size, context.stride) * batch
    num = min(len(scored), max(1, _SCORED_AT_ONCE // context.size))
    parts = parts_of(model)
    model.eval()
    states = parts.states(torch.zeros(num, context.size, dtype=torch.long)).flatten(0, 1)[: num * context.stride]
    model.train()
    capped = getattr(model.config.get_text_config(), "final_logit_softcapping", None) is not None
    _logits(states, parts.head.weight, len(states), capped)
