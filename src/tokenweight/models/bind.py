"""Binds a weighting, and where the short losses come from, to the `forward` of a model."""

import types
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float, Int, Shaped
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from transformers import PreTrainedModel
from transformers.modeling_outputs import ModelOutput

from tokenweight.method import (
    Weighting,
    as_weighting,
    check_finite,
    linear_nll,
    prediction_mask,
    weighted_linear_cross_entropy,
)
from tokenweight.models.causal import CausalParts, causal_parts
from tokenweight.models.context_parallel import RowShare, share_of_rows
from tokenweight.models.scorer import Scorer


@dataclass
class WeightedLossOutput(ModelOutput):
    """What a bound model returns when it is given labels. There are no logits: they are never made.

    All but `loss` is token-aligned, `[batch, seq]`, float32 (or float64), without gradient, and 0 where no token is
    predicted (`mask`); of whole rows, on every rank, where rows are split over a context.
    """

    loss: Any = None
    weights: Tensor | None = None
    long_nll: Tensor | None = None
    short_nll: Tensor | None = None
    mask: Tensor | None = None


@dataclass(frozen=True)
class _Binding:
    """What `with_weighted_loss` leaves on the model. A deep copy of the model copies it along."""

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

    Short losses come from the column `short_nll` (`[batch, seq]`, nats, written by `tokenweight score`): a frozen
    scorer; or from `scorer`: with `Scorer(model, ...)` the model scores itself, with another model that one scores. A
    weighting that needs short losses and gets none raises: no token silently weighs 1.

    Args:
        model: any causal language model of transformers with a decoder and an output head.
        weighting: one of `tokenweight`, or any function of (long, short, mask).
        scorer: scores rows that come without a `short_nll` column.
        context: the ranks over which the tokens of a row are split, `tokenweight.models.context_mesh(accelerator)`.
            The model then takes `shift_labels` and `position_ids` of this rank's tokens, and `short_nll` of these or of
            whole rows. Without `num_items_in_batch`, the *mean* of the ranks' losses is the loss.

    Raises:
        ValueError: if the model is not supported, or the weighting is not one; if there are a scorer and a context.
    """
    if scorer is not None and context is not None:
        raise ValueError(
            "a scorer reads whole rows, but context parallelism splits them: score the rows beforehand "
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
                "a model with a weighted loss was asked for a loss but got no labels: label_smoothing_factor and "
                "compute_loss_func of a Trainer take the labels away, and with them the weights"
            )
        return bound.forward(input_ids=input_ids, position_ids=position_ids, attention_mask=attention_mask, **kwargs)
    short_nll = None if short_nll is None else unpack_bits(short_nll)
    share = None
    if bound.context is not None:
        share = share_of_rows(position_ids, bound.context)
        labels = share.labels(shift_labels)
        short_nll = None if short_nll is None else share.rows("short_nll", short_nll)
    _check(self, input_ids, labels, shift_labels, short_nll, kwargs)
    kwargs.pop("return_dict", None)
    kwargs.pop("use_cache", None)  # never used: with labels there is nothing to continue
    mask = prediction_mask(labels, position_ids if share is None else None)
    targets = labels.where(mask, -100)
    decode = bound.parts.states if share is None else bound.parts.decoded
    states = decode(input_ids, position_ids, attention_mask, **kwargs)

    def score(long_nll: Tensor) -> Tensor:
        """The short losses; of a model that scores itself, the long ones wherever the contexts are the same."""
        if short_nll is not None:
            return short_nll
        if bound.scorer is None or not bound.weighting.uses_short:
            return long_nll
        return bound.scorer(
            input_ids, position_ids=position_ids, long_nll=long_nll if bound.scorer.model is self else None
        )

    weighted_loss = _in_one_pass if bound.weighting.pointwise else _in_two_passes
    output = weighted_loss(bound, states, targets, mask, score, share)
    num_ranks = 1 if bound.context is None else bound.context.size()
    output.loss /= mask.sum().clamp(min=1) / num_ranks if num_items_in_batch is None else num_items_in_batch
    return output


def _in_two_passes(
    bound: _Binding,
    states: Float[Tensor, "batch share dim"],
    targets: Int[Tensor, "batch seq"],
    mask: Bool[Tensor, "batch seq"],
    score: Callable[[Tensor], Tensor],
    share: RowShare | None,
) -> WeightedLossOutput:
    """For weights that need all losses of a row first: 1 head product for those, 3 for the rows with a weight."""
    own, whole = _to_and_from(share)
    states, targets = states.flatten(0, 1), own(targets, -100).flatten()
    long_nll = whole(linear_nll(states.detach(), targets=targets, **bound.parts.head).view(len(mask), -1))
    short_nll = score(long_nll)
    weights = bound.weighting(long_nll, short_nll, mask)
    own_weights = own(weights).flatten()
    loss = weighted_linear_cross_entropy(states, targets=targets, weights=own_weights, **bound.parts.head)
    return WeightedLossOutput(loss, weights, long_nll, short_nll.where(mask, 0.0), mask)


def _in_one_pass(
    bound: _Binding,
    states: Float[Tensor, "batch share dim"],
    targets: Int[Tensor, "batch seq"],
    mask: Bool[Tensor, "batch seq"],
    score: Callable[[Tensor], Tensor],
    share: RowShare | None,
) -> WeightedLossOutput:
    """For a weight that depends on its own token's losses only: 3 head products."""
    own, whole = _to_and_from(share)
    states, targets = states.flatten(0, 1), own(targets, -100).flatten()
    dtype = torch.promote_types(states.dtype, torch.float32)
    # Not known yet, so NaN; a model that scores itself hands it on for the tokens whose short context is the whole one.
    long_nll = torch.full(mask.shape, torch.nan, dtype=dtype, device=mask.device)
    short_nll = own(score(long_nll)).to(dtype, copy=True)
    long_nll = own(long_nll)
    weights = torch.zeros_like(long_nll)
    long_flat, short_flat, weights_flat = long_nll.view(-1), short_nll.view(-1), weights.view(-1)

    def weigh(losses: Tensor, rows: Tensor) -> Tensor:
        long_flat[rows] = losses
        short_flat[rows] = torch.where(short_flat[rows].isnan(), losses, short_flat[rows])
        present = torch.ones_like(rows, dtype=torch.bool)
        weights_flat[rows] = bound.weighting.weigh(losses[None], short_flat[rows][None], present[None])[0].to(dtype)
        return weights_flat[rows]

    loss = weighted_linear_cross_entropy(states, targets=targets, weights=weigh, **bound.parts.head)
    long_nll, short_nll, weights = whole(long_nll), whole(short_nll), whole(weights)
    check_finite({"the long loss": long_nll, f"the weight by {bound.weighting}": weights}, mask)
    return WeightedLossOutput(loss, weights, long_nll.where(mask, 0.0), short_nll.where(mask, 0.0), mask)


def _to_and_from(share: RowShare | None) -> tuple[Callable[..., Tensor], Callable[[Tensor], Tensor]]:
    """From whole rows, aligned with tokens, to what this rank has at its states, and back; in one process the same."""
    if share is None:
        return lambda of_tokens, fill=0: of_tokens, lambda of_states: of_states
    return share.own, share.whole


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
            "a model with a weighted loss found shift_labels, as of rows that are split over a context: expected "
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
