"""A model's own loss: the terms that it adds to cross-entropy, and the verification that our loss equals it."""

import contextlib
import inspect
import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor
from transformers import PreTrainedModel

from tokenweight.models.causal import CausalParts, in_mode

_ASKED = {"logits_to_keep": 1, "output_router_logits": True}


class OwnTerms(NamedTuple):
    """The decoder's hidden states, and the model's added terms, such as the load-balancing loss of experts."""

    hidden: Float[Tensor, "batch seq dim"]
    added: Float[Tensor, ""] | float = 0.0
    aux_loss: Float[Tensor, ""] | None = None
    """The added term before its coefficient, where the model returns it."""


def asks_for_terms(model: PreTrainedModel, inputs: dict[str, Any]) -> bool:
    """Whether inputs, else the config, request the load-balancing loss of a mixture of experts."""
    asked = inputs.get("output_router_logits")
    configs = (model.config, model.config.get_text_config())
    return any(getattr(one, "output_router_logits", False) for one in configs) if asked is None else bool(asked)


def own_terms(
    forward: Callable[..., Any], model: PreTrainedModel, parts: CausalParts, inputs: dict[str, Any]
) -> OwnTerms:
    """Run the model's own forward with a cross-entropy of 0, which leaves the added terms, and logits of one token.

    Args:
        forward: the model's, without a weighted loss.
        inputs: its inputs, labels included.
    """
    seen: dict[str, Any] = {}
    hook = parts.decoder.register_forward_hook(lambda decoder, given, result: seen.update(result=result))
    try:
        with _cross_entropy(model, lambda *_, **__: torch.zeros((), device=inputs["labels"].device)):
            known = inspect.signature(forward).parameters
            asked = {name: value for name, value in _ASKED.items() if name in known}
            output = forward(**{**asked, **inputs})
    finally:
        hook.remove()
    return OwnTerms(seen["result"].last_hidden_state, output.loss, getattr(output, "aux_loss", None))


def verify_loss(model: PreTrainedModel, parts: CausalParts, own: Callable[..., Any], ours: Callable[..., Any]) -> bool:
    """Verify on a few tokens that the loss with equal weights, and its gradient, are those of the model itself.

    In training mode, where losses may have terms of their own, and with the same random numbers for both. The gradient
    is w.r.t. the embeddings of the tokens: it passes through all layers, and takes no memory per parameter.

    Args:
        own: the model's own forward.
        ours: our loss of the same inputs, given whether the model adds terms to its cross-entropy.

    Returns:
        Whether the model adds terms to its cross-entropy, even unasked.

    Raises:
        ValueError: if losses or gradients differ, or the model computes several cross-entropies.
    """
    config, device = model.config.get_text_config(), parts.head.weight.device
    tokens = torch.arange(16, device=device).remainder(config.vocab_size).view(2, 8)
    inputs = {"input_ids": tokens, "labels": tokens, "use_cache": False}
    cross_entropy, plain = model.loss_function, []

    def noted(*arguments: Any, **named: Any) -> Tensor:
        plain.append(cross_entropy(*arguments, **named))
        return plain[-1] * 1  # the model adds to it in place

    with _cross_entropy(model, noted):
        theirs = _loss_and_gradient(model, lambda: own(**inputs).loss)
    adds = bool(plain) and not torch.equal(plain[0].detach(), theirs[0].to(plain[0].dtype))
    if len(plain) > 1:
        raise ValueError(
            f"{type(model).__name__} is not supported: its loss holds {len(plain)} cross-entropies, as of heads that "
            "predict several tokens ahead, and only that of the next token would be weighted: expected one"
        )
    found = _loss_and_gradient(model, lambda: ours(adds, **inputs))
    eps = torch.finfo(torch.promote_types(torch.bfloat16, parts.head.weight.dtype)).eps
    eps = max(eps, torch.finfo(torch.float32).eps)  # in which transformers computes its loss
    for name, tolerance, (value, expected) in zip(("loss", "gradient"), (8 * eps, math.sqrt(eps)), zip(found, theirs)):
        off = (value.float() - expected.float()).norm().item()
        size = expected.float().norm().item()
        if not off <= tolerance * max(size, 1.0 if name == "loss" else 0.0):
            raise ValueError(
                f"{type(model).__name__} is not supported: with equal weights the {name} would not be that of the "
                f"model itself (off by {off:.3g} of {size:.3g}): its forward computes more than the cross-entropy of "
                "its logits"
            )
    return adds


def _loss_and_gradient(model: PreTrainedModel, loss_of: Callable[[], Tensor]) -> tuple[Tensor, Tensor]:
    """A loss, and its gradient w.r.t. the embeddings of the tokens; nothing else gets a gradient."""
    leaves: list[Tensor] = []

    def cut(embeddings: Any, given: Any, states: Tensor) -> Tensor:
        leaves.append(states.detach().requires_grad_())
        return leaves[-1] * 1  # a model may write into what it is given here

    hook = model.get_input_embeddings().register_forward_hook(cut)
    device = model.device
    devices = [device] if device.type == "cuda" else []
    try:
        with in_mode(model, training=True), torch.enable_grad(), torch.random.fork_rng(devices):
            torch.manual_seed(0)
            loss = loss_of()
            (gradient,) = torch.autograd.grad(loss, leaves[:1])
    finally:
        hook.remove()
    return loss.detach(), gradient


@contextlib.contextmanager
def _cross_entropy(model: PreTrainedModel, function: Callable[..., Tensor]) -> Iterator[None]:
    """Let the model's forward use another function for its cross-entropy."""
    before = model.__dict__.get("_loss_function")
    model._loss_function = function
    try:
        yield
    finally:
        del model._loss_function
        if before is not None:
            model._loss_function = before
