"""Binds a weighting, and where the short losses come from, to the `forward` of a model."""

import types
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int, Shaped
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from transformers import PreTrainedModel
from transformers.modeling_outputs import ModelOutput

from tokenweight.method import (
    ShortLosses,
    Weighting,
    as_weighting,
    check_finite,
    prediction_mask,
    weighted_loss,
)
from tokenweight.models.causal import CausalParts, causal_parts
from tokenweight.models.context_parallel import sequence_shard
from tokenweight.models.scorer import Scorer


@dataclass
class WeightedLossOutput(ModelOutput):
    """The output of a bound model that is given labels. It has no logits: they are never materialized.

    All but `loss` is token-aligned, `[batch, seq]`, float32 (or float64), without gradient, and 0 where no token is
    predicted (`mask`); under context parallelism, of whole sequences, on every rank.
    """

    loss: Any = None
    weights: Tensor | None = None
    long_nll: Tensor | None = None
    short_nll: Tensor | None = None
    mask: Tensor | None = None
    position_ids: Tensor | None = None
    """As they were given, unless ranks split the sequences."""


@dataclass(frozen=True)
class _Binding:
    """The state that `with_weighted_loss` leaves on the model. A deep copy of the model copies it along."""

    weighting: Weighting
    scorer: Scorer | None
    parts: CausalParts
    forward: Callable[..., Any]
    context: DeviceMesh | None  # rather than a process group, which cannot be copied


def with_weighted_loss(
    model: PreTrainedModel,
    weighting: Callable[[Tensor, Tensor, Tensor], Tensor],
    scorer: Scorer | None = None,
    context: DeviceMesh | None = None,
) -> PreTrainedModel:
    """Make `model(input_ids, labels, ...).loss` the weighted loss. The model is changed in place and returned.

        model(input_ids, labels, short_nll=None, num_items_in_batch=None, position_ids=None, attention_mask=None)

    The loss is the sum over predicted tokens of weight times negative log-likelihood, divided by `num_items_in_batch`
    (which a `transformers.Trainer` passes: all predicted tokens of the optimizer step, on all ranks), else by the
    predicted tokens of this batch; never by the sum of the weights. Without labels the model answers as before.

    Short losses come from the column `short_nll` (`[batch, seq]`, nats, precomputed by `tokenweight score`), or from
    `scorer`: with `Scorer(model, ...)` the model scores itself (online), with another model that one does. A weighting
    that needs short losses and gets none raises: no token silently weighs 1.

    Args:
        model: any causal language model of transformers with a decoder and an output head.
        weighting: an instance such as `Dense()`, or any function of (long, short, mask).
        scorer: scores sequences that come without a `short_nll` column.
        context: the ranks over which sequences are split, `tokenweight.models.context_mesh(accelerator)`. The model
            then takes `shift_labels` and `position_ids` of this rank's tokens, and `short_nll` of these or of whole
            sequences. Without `num_items_in_batch`, the *mean* of the ranks' losses is the loss.

    Raises:
        ValueError: if the model is not supported, or the weighting is not one; if there are a scorer and a context.

    Example:
        >>> model = AutoModelForCausalLM.from_pretrained("HuggingFaceTB/SmolLM2-135M")
        >>> model = with_weighted_loss(model, Dense(), Scorer(model, size=1024))  # scores itself
        >>> model(input_ids=tokens, labels=tokens).loss.backward()
    """
    if scorer is not None and context is not None:
        raise ValueError(
            "a scorer reads whole sequences, but context parallelism splits them: score them beforehand "
            "(`tokenweight score`), and give no scorer"
        )
    bound = getattr(model, "_token_weighting", None)  # of an earlier call: replaced, once nothing can fail
    forward = model.forward if bound is None else bound.forward
    model._token_weighting = _Binding(as_weighting(weighting), scorer, causal_parts(model), forward, context)
    if bound is None:
        model.register_forward_pre_hook(_check_fused_head, with_kwargs=True)
    # A method rather than a closure: a deep copy, and the autocast wrapper of Accelerate, then rebind it to their own
    # model.
    model.forward = types.MethodType(_forward, model)
    model.accepts_loss_kwargs = True  # some models deny it, and the Trainer would divide by accumulation steps instead
    return model


def without_weighted_loss(model: PreTrainedModel) -> PreTrainedModel:
    """Undo `with_weighted_loss`: the model, changed in place and returned, is an ordinary one of transformers again.

    Raises:
        ValueError: if the model is not bound to a weighted loss.
    """
    bound = getattr(model, "_token_weighting", None)
    if bound is None:
        raise ValueError(f"model: a {type(model).__name__} without a weighted loss: expected a bound model")
    del model._token_weighting, model.forward, model.accepts_loss_kwargs
    if getattr(bound.forward, "__func__", None) is not type(model).forward:  # a wrapper, as of autocast, was there
        model.forward = bound.forward
    for key, hook in [*model._forward_pre_hooks.items()]:
        if hook is _check_fused_head:
            del model._forward_pre_hooks[key], model._forward_pre_hooks_with_kwargs[key]
    return model


def pack_bits(values: Float[Tensor, "..."]) -> Int[Tensor, "..."]:
    """The bits of float32 values as int32: DeepSpeed and FSDP2 cast float columns of a batch to 16 bits."""
    return values.to(torch.float32).view(torch.int32)


def unpack_bits(values: Shaped[Tensor, "..."]) -> Shaped[Tensor, "..."]:
    """The inverse of `pack_bits`; values that are not integers of 32 bits are returned as they are."""
    return values.view(torch.float32) if values.dtype == torch.int32 else values


def _check_fused_head(model: Any, arguments: Any, named: dict[str, Any]) -> None:
    """TRL puts a forward of its own over the bound one, and asks it for a loss without weights."""
    if named.get("fused_lm_head"):
        raise ValueError(
            "TRL asks a model with a weighted loss for a loss of its own (fused_lm_head), without weights: expected "
            "tokenweight.train.trl.TokenWeightedSFTTrainer in place of SFTTrainer"
        )


def _forward(
    self: Any,
    input_ids: Any = None,
    labels: Tensor | None = None,
    short_nll: Tensor | None = None,
    num_items_in_batch: Tensor | int | None = None,
    position_ids: Tensor | None = None,
    attention_mask: Tensor | None = None,
    shift_labels: Tensor | None = None,
    **kwargs: Any,
) -> Any:
    bound: _Binding = self._token_weighting
    labels = shift_labels if labels is None else labels
    if labels is None:
        if short_nll is not None or num_items_in_batch is not None:
            raise ValueError(
                "labels are missing: Trainer removes them when label_smoothing_factor or compute_loss_func is set; "
                "unset both to use a weighted loss"
            )
        return bound.forward(input_ids=input_ids, position_ids=position_ids, attention_mask=attention_mask, **kwargs)
    short_nll = None if short_nll is None else unpack_bits(short_nll)
    share = None
    if bound.context is not None:
        share = sequence_shard(position_ids, bound.context)
        labels = share.labels(shift_labels)
        short_nll = None if short_nll is None else share.rows("short_nll", short_nll)
    _check(self, input_ids, labels, shift_labels, short_nll, kwargs)
    kwargs.pop("return_dict", None)
    kwargs.pop("use_cache", None)  # never used: with labels there is nothing to continue
    mask = prediction_mask(labels, position_ids if share is None else None)
    # Before the pass that keeps activations, so that both are not in memory at once.
    short = _short_losses(self, input_ids, position_ids, short_nll)
    decode = bound.parts.states if share is None else bound.parts.decoded
    hidden = decode(input_ids, position_ids, attention_mask, **kwargs)
    split: dict[str, Any] = {} if share is None else {"own": share.own, "whole": share.whole}
    found = weighted_loss(hidden, bound.parts.head, labels.where(mask, -100), mask, bound.weighting, short, **split)
    num_ranks = 1 if bound.context is None else bound.context.size()
    divisor = mask.sum().clamp(min=1) / num_ranks if num_items_in_batch is None else num_items_in_batch
    positions = position_ids if share is None else None
    return WeightedLossOutput(**{**found._asdict(), "loss": found.loss / divisor}, position_ids=positions)


def _short_losses(
    model: Any, input_ids: Tensor, position_ids: Tensor | None, short_nll: Tensor | None
) -> ShortLosses | None:
    """Stored short losses, else those of the scorer; None if the weighting uses none."""
    bound: _Binding = model._token_weighting
    if short_nll is not None:
        return ShortLosses(short_nll)
    if bound.scorer is None or not bound.weighting.uses_short:
        return None
    return bound.scorer.short_losses(input_ids, position_ids=position_ids, self_scored=bound.scorer.model is model)


def _check(
    model: Any,
    input_ids: Tensor | None,
    labels: Tensor,
    shift_labels: Tensor | None,
    short_nll: Tensor | None,
    kwargs: dict[str, Any],
) -> None:
    """Refuse what would make the weights silently wrong or absent."""
    bound: _Binding = model._token_weighting
    bound.parts.check_head(model)
    if shift_labels is not None and bound.context is None:
        raise ValueError(
            "a model with a weighted loss found shift_labels, as of sequences that are split over ranks: expected "
            "with_weighted_loss(..., context=tokenweight.models.context_mesh(accelerator))"
        )
    unwanted = ("inputs_embeds", "loss_weights", "logits_to_keep", "return_dict")
    unknown = [name for name in unwanted if kwargs.get(name) is not None and kwargs[name] is not True]
    if unknown or input_ids is None:
        raise ValueError(
            "a model with a weighted loss takes input_ids, labels and short_nll: "
            f"found {', '.join(unknown) or 'no input_ids'}"
        )
    if bound.context is None and labels.shape != input_ids.shape:
        raise ValueError(f"labels have shape {list(labels.shape)}: expected that of input_ids, {list(input_ids.shape)}")
    if short_nll is not None:
        if short_nll.shape != labels.shape:
            raise ValueError(
                f"short_nll has shape {list(short_nll.shape)}: expected that of labels, {list(labels.shape)}"
            )
        if short_nll.dtype not in (torch.float32, torch.float64):
            raise ValueError(
                f"short_nll came as {short_nll.dtype}, in which a loss of 8 nats is off by 0.03 or worse: expected "
                "float32. DeepSpeed, and FSDP2 in 16 bits, cast what a batch holds: use "
                "tokenweight.train.DataCollatorWithScores"
            )
        check_finite({"short_nll": short_nll}, prediction_mask(labels))
    elif bound.weighting.uses_short and bound.scorer is None:
        raise ValueError(
            f"weighting {bound.weighting} needs the short loss of every token, but no short_nll column reached the "
            "model and it has no scorer: a collator, packing or remove_unused_columns dropped the column, or the data "
            "was never scored. Use tokenweight.train.DataCollatorWithScores, or bind the model with a Scorer"
        )
