"""Bind a weighting, and the source of its short losses, to the `forward` of a model."""

import dataclasses
import functools
import inspect
import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from transformers import PreTrainedModel
from transformers.modeling_outputs import ModelOutput

from tokenweight.method import (
    Uniform,
    Weighting,
    aligned_with_tokens,
    as_weighting,
    parse_weighting,
    weighted_loss,
)
from tokenweight.models.causal import causal_parts
from tokenweight.models.inputs import OF_THE_LOSS, Batch, check_names, read_batch
from tokenweight.models.own_loss import OwnTerms, asks_for_terms, own_terms, verify_loss
from tokenweight.models.scorers.scorer import Scorer
from tokenweight.models.scorers.teacher import Distillation
from tokenweight.models.values import (
    Binding,
    Past,
    Values,
    can_weigh,
    find_noise,
    score_columns,
    values_of,
    with_divergence,
)

logger = logging.getLogger(__name__)


class _Told(type):
    """Type of absent logits, whose repr Accelerate prints in its error when it gathers predictions for a Trainer."""

    def __repr__(cls) -> str:
        return (
            "no logits: a model with a weighted loss makes none where labels are given: expected an evaluation of the "
            "loss alone, without compute_metrics and predict, or a call without labels"
        )


class _NoLogits(metaclass=_Told):
    """Placeholder for logits, which are never materialized: reading them raises an error that says so."""

    def __getattr__(self, name: str) -> Any:
        raise AttributeError(f"logits.{name}: {type(self)!r}")


@dataclass
class WeightedLossOutput(ModelOutput):
    """The output of a bound model that is given labels. It has no logits: they are never materialized.

    Weights, losses of tokens and `mask` are token-aligned, `[batch, seq]`, float32 (or float64), without gradient, and
    0 where no token is predicted (`mask`); under context parallelism, of whole sequences, on every rank.
    """

    loss: Any = None
    """Where gradients are recorded, the weighted loss; without (`torch.no_grad()`, an evaluation), the unweighted one.
    Includes what the model adds to its own cross-entropy, such as the load-balancing loss of experts."""
    logits: Any = None
    weighted_loss: Tensor | None = None
    """The weighted loss alone, without gradient; None where an evaluation has no short losses."""
    aux_loss: Tensor | None = None
    """The load-balancing loss of experts, before its coefficient, if the model computes one."""
    weights: Tensor | None = None
    long_nll: Tensor | None = None
    short_nll: Tensor | None = None
    mask: Tensor | None = None
    position_ids: Tensor | None = None
    """As given, unless ranks split the sequences."""


def with_weighted_loss(
    model: PreTrainedModel,
    weighting: Callable[[Tensor, Tensor, Tensor], Tensor] | str,
    scorer: Scorer | None = None,
    context: DeviceMesh | None = None,
    contrast: str = "trained",
    distillation: Distillation | None = None,
) -> PreTrainedModel:
    """Make `model(input_ids=..., labels=...).loss` the weighted loss. The model is changed in place and returned.

    It takes the same inputs as before, and by name the columns of `SCORES` and `num_items_in_batch`. The loss is
    the sum over predicted tokens of weight times negative log-likelihood, divided by `num_items_in_batch` (in a
    Trainer: all tokens predicted in the optimizer step, on all ranks), else by those of this batch; never by the sum of
    the weights. The model's own terms, such as the load-balancing loss of experts, are added. Without labels the model
    behaves as before. Under `torch.no_grad()` (`Trainer.evaluate()`), `loss` is unweighted, beside `weighted_loss`.

    Scores come from columns (`[batch, seq]`, of `tokenweight score`), or from `scorer`: with `Scorer(model, ...)` the
    model scores itself (online). A weighting that needs a column and does not get it raises: no token silently weighs
    1. Dropout and noise on embeddings never enter weights: with them, weights cost one more forward pass.

    Args:
        model: any causal language model of transformers with a decoder and an output head.
        weighting: such as `Dense()`, its text ("sparse:keep=0.1"), or a function of (long, short, mask).
        scorer: scores sequences that come without columns of scores; the ranks of a context share its windows.
        context: the ranks that split sequences (`context_mesh`). The model then takes `shift_labels`, positions and
            columns of this rank's tokens; without `num_items_in_batch`, the *mean* of the ranks' losses is the loss.
        contrast: the long loss that weights compare: "trained", this model's (the paper), or "scorer", the column
            `long_nll`, else that of `scorer`: then weights are known before the loss, which costs less.
        distillation: mixes the loss with the divergence from a teacher, in training only.

    Raises:
        ValueError: if the weighting or the contrast is invalid, or a context does not fit the attention, teacher or
            divergence; if with equal weights, loss and gradient are not the model's own (verified on a few tokens).

    Example:
        >>> model = with_weighted_loss(model, Dense(), Scorer(model, size=1024))  # scores itself
        >>> model(input_ids=tokens, labels=tokens).loss.backward()
    """
    _check_bindable(model, distillation, context)
    weighting = parse_weighting(weighting) if isinstance(weighting, str) else as_weighting(weighting)
    bound = getattr(model, "_token_weighting", None)  # of an earlier call: replaced, once nothing can fail
    replaced = vars(model).get("forward") if bound is None else bound.replaced
    found = _binding(model, weighting, scorer, context, contrast, replaced)
    model._token_weighting = dataclasses.replace(found, distillation=distillation)
    if model._token_weighting.reads_trained_pass and (noise := find_noise(model)):
        logger.warning("%s: weights are made without this noise, at a forward pass more in each step", noise)
    if bound is None:
        vars(model).pop("forward", None)
        model.__class__ = _bound_class(cast(Any, type(model)))
    return model


def _check_bindable(model: PreTrainedModel, distillation: Distillation | None, context: DeviceMesh | None) -> None:
    """Raise a ValueError if a model is bound too late, or its attention or a teacher would read parts of sequences."""
    if not hasattr(model, "_token_weighting") and "_original_forward" in vars(model):
        raise ValueError("model: Accelerator.prepare has wrapped its forward: expected with_weighted_loss before it")
    if context is not None and (attention := model.config._attn_implementation) != "sdpa":
        raise ValueError(
            f"attn_implementation {attention}: context parallelism puts its ring in place of sdpa alone, and any other "
            "attention would see this process's tokens only: expected sdpa"
        )
    if distillation is not None and context is not None:
        raise ValueError(
            "distillation: a teacher reads whole sequences, but context parallelism splits them: expected one of both"
        )
    if distillation is not None and distillation.teacher is not None and distillation.teacher.model is model:
        raise ValueError("distillation: the teacher is the model that is trained: expected another one")


def _binding(
    model: PreTrainedModel,
    weighting: Weighting,
    scorer: Scorer | None,
    context: DeviceMesh | None,
    contrast: str,
    replaced: Callable[..., Any] | None,
) -> Binding:
    """The verified binding of a model."""
    score_columns(weighting, contrast)  # raises for an unknown contrast
    if scorer is not None and not isinstance(scorer, Scorer):
        raise ValueError(
            f"scorer {scorer}: expected a Scorer; what gives both losses itself scores sequences as they are read: "
            "tokenweight.train.DataCollatorWithScores(scorer, context)"
        )
    if scorer is not None and context is not None and weighting.divergence_of is not None:
        raise ValueError(
            f"weighting {weighting}: where context parallelism splits sequences, no process has the hidden states of "
            "both contexts: expected the column divergence (`tokenweight score --divergence kl`), and no scorer"
        )
    parts = causal_parts(model)
    taken = [inspect.signature(part.forward).parameters for part in (type(model), parts.decoder)]
    names = frozenset().union(*taken, OF_THE_LOSS, ("labels", "shift_labels", "use_cache", "return_dict"))
    binding = Binding(weighting, None, False, parts, context, replaced, names, False, contrast, Past(weighting))
    binding = dataclasses.replace(binding, adds_terms=_adds_terms(model, binding))
    if scorer is None:
        return binding
    own = scorer.model is model
    return dataclasses.replace(binding, scorer=scorer.of(None) if own else scorer, self_scored=own and scorer.adapters)


def without_weighted_loss(model: PreTrainedModel) -> PreTrainedModel:
    """Undo `with_weighted_loss`: the model, changed in place and returned, is an ordinary one of transformers again.

    Raises:
        ValueError: if the model is not bound to a weighted loss.
    """
    bound = _bound(model)
    del model._token_weighting
    if "_without_weighted_loss" in vars(type(model)):  # FSDP may have put a class of its own over it, which may stay
        model.__class__ = type(model)._without_weighted_loss
    if bound.replaced is not None:
        model.forward = bound.replaced
    return model


def verify_again(model: PreTrainedModel) -> None:
    """Verify a bound model again, after its kernels were replaced.

    Raises:
        ValueError: if it is not bound, or the loss with equal weights is no longer the model's own.
    """
    bound = _bound(model)
    for name in ("_causal_parts", "_verified_loss"):
        vars(model).pop(name, None)
    found = dataclasses.replace(bound, parts=causal_parts(model))
    model._token_weighting = dataclasses.replace(found, adds_terms=_adds_terms(model, found))


def without_distillation(model: PreTrainedModel) -> PreTrainedModel:
    """End the distillation of a bound model, whose loss is the weighted loss alone from now on, and return it.

    Raises:
        ValueError: if the model is not bound to a weighted loss.
    """
    model._token_weighting = dataclasses.replace(_bound(model), distillation=None)
    return model


def weighting_state(model: PreTrainedModel) -> dict[str, Any]:
    """The state that a bound model's weighting keeps of the batches trained on: for a checkpoint, as JSON.

    Raises:
        ValueError: if the model is not bound to a weighted loss.
    """
    bound = _bound(model)
    return {"weighting": str(bound.weighting), "history": bound.history.sum.tolist()}


def load_weighting_state(model: PreTrainedModel, state: Mapping[str, Any]) -> None:
    """Restore the weighting of a bound model from a state of `weighting_state`.

    Raises:
        ValueError: if the model is not bound to a weighted loss, or the state is that of another weighting.
    """
    bound = _bound(model)
    if state["weighting"] != str(bound.weighting) or len(state["history"]) != bound.weighting.history:
        raise ValueError(f"found the history of {state['weighting']}: expected that of {bound.weighting}")
    bound.history.sum = torch.tensor(state["history"], dtype=torch.float64)


def _bound(model: Any) -> Binding:
    bound = getattr(model, "_token_weighting", None)
    if bound is None:
        raise ValueError(f"model: a {type(model).__name__} without a weighted loss: expected a bound model")
    return bound


@functools.cache
def _bound_class(kind: Any) -> Any:
    """The class of a bound model: its own, under its own name, except for `forward`.

    A class rather than an attribute of the model: deep copies, pickles, FSDP and the wrappers of Accelerate treat it
    correctly, and the model holds no reference to itself.
    """
    signature = inspect.signature(kind.forward)
    positional = [name for name, one in signature.parameters.items() if one.kind is one.POSITIONAL_OR_KEYWORD][1:]

    def forward(self: Any, *arguments: Any, **named: Any) -> Any:
        bound = getattr(self, "_token_weighting", None)
        own = _own_forward(self, None if bound is None else bound.replaced)
        given = {**dict(zip(positional, arguments)), **named}
        labels = given.get("labels") if given.get("labels") is not None else given.get("shift_labels")
        if bound is not None and labels is not None:
            signature.bind(self, *arguments)  # raises for too many
            return _loss(self, bound, own, given)
        if bound is not None and any(given.get(name) is not None for name in OF_THE_LOSS):
            raise ValueError(
                "labels are missing: expected a collator that makes them, as "
                "data_collator=tokenweight.train.DataCollatorWithScores(), and neither label_smoothing_factor nor "
                "compute_loss_func, for which a Trainer takes them away"
            )
        own_names = {name: value for name, value in named.items() if name in signature.parameters or value is not None}
        return own(*arguments, **own_names)

    def call(self: Any, *arguments: Any, **named: Any) -> Any:
        output = kind.__call__(self, *arguments, **named)
        _check_answered(self, named, output)
        return output

    forward.__signature__ = _with_names_of_the_loss(signature)  # type: ignore[attr-defined]
    forward.__doc__ = kind.forward.__doc__
    members = {
        "forward": forward,
        "__call__": call,
        "__reduce_ex__": lambda self, protocol: (_revive, (kind,), self.__dict__),
        "__module__": kind.__module__,
        "__qualname__": kind.__qualname__,
        "accepts_loss_kwargs": True,  # some models deny it: the Trainer would divide by accumulation steps instead
        "_without_weighted_loss": kind,
    }
    return type(kind.__name__, (kind,), members)


def _revive(kind: Any) -> PreTrainedModel:
    """A bound model of that class, still empty: what a copy or a pickle begins with."""
    bound = _bound_class(kind)
    return bound.__new__(bound)


def _with_names_of_the_loss(signature: inspect.Signature) -> inspect.Signature:
    """The signature of a bound model: a Trainer keeps the columns that it names."""
    rest = [one for one in signature.parameters.values() if one.kind is one.VAR_KEYWORD]
    named = [one for one in signature.parameters.values() if one not in rest and one.name not in OF_THE_LOSS]
    added = [inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None) for name in OF_THE_LOSS]
    return signature.replace(parameters=[*named, *added, *rest])


def _own_forward(model: PreTrainedModel, replaced: Callable[..., Any] | None) -> Callable[..., Any]:
    """The forward of a model without a weighted loss."""
    kind: Any = getattr(type(model), "_without_weighted_loss", type(model))
    return functools.partial(kind.forward, model) if replaced is None else replaced


def _adds_terms(model: PreTrainedModel, binding: Binding) -> bool:
    """Whether the model adds terms to its cross-entropy unasked. Verified once, and cached on the model."""
    known = vars(model).get("_verified_loss")
    if known is None or known[0] is not binding.parts:
        own = _own_forward(model, binding.replaced)
        uniform = dataclasses.replace(binding, weighting=Uniform(), context=None, contrast="trained")

        def ours(adds: bool, **inputs: Any) -> Tensor:
            return _loss(model, dataclasses.replace(uniform, adds_terms=adds), own, inputs).loss

        known = model._verified_loss = binding.parts, verify_loss(model, binding.parts, own, ours)
    return known[1]


def _check_answered(model: Any, named: dict[str, Any], output: Any) -> None:
    """Raise a ValueError if a forward patched over ours later returned a loss of its own for labels."""
    asked = named.get("labels") is not None or named.get("shift_labels") is not None
    if not asked or isinstance(output, WeightedLossOutput) or getattr(model, "_token_weighting", None) is None:
        return
    function: Any = getattr(model.forward, "__func__", model.forward)
    name = type(function).__name__
    if hasattr(function, "__code__"):  # rather than its names, which functools.wraps takes over from ours
        name = f"{function.__globals__['__name__']}.{function.__code__.co_qualname}"
    raise ValueError(
        f"a model with a weighted loss returned an unweighted one: {name} replaces its forward, as after "
        "use_liger_kernel, or in TRL's SFTTrainer: expected the forward that was bound, or "
        "tokenweight.train.trl.TokenWeightedSFTTrainer"
    )


def _loss(model: Any, bound: Binding, own: Callable[..., Any], given: dict[str, Any]) -> WeightedLossOutput:
    """The output of a bound model for labels: the weighted loss and its parts."""
    if getattr(model, "_is_replica", False):
        raise ValueError(
            "torch.nn.DataParallel, as a Trainer uses it for several GPUs in one process, would mix up the weights of "
            "its replicas: expected torchrun --nproc-per-node N, or one GPU"
        )
    bound.parts.check_head(model)
    check_names(given, bound.names, scored=bool(bound.columns))
    batch = read_batch(given, bound.context, bound.columns)
    weighted = can_weigh(bound, batch)
    weighting = bound.weighting if weighted else Uniform()
    scores = weighted and not bound.columns <= batch.scores.keys()
    reader = bound.parts if bound.scorer is None else bound.scorer.parts
    known: dict[str, Any] = {"scorer": reader.num_tokens if scores else None, "vocabulary": bound.parts.num_tokens}
    batch, rows = batch.check(scored=weighted and bool(bound.columns), **known)
    # Before the pass that keeps activations, so that both are not in memory at once.
    values = values_of(model, bound, batch) if weighted else Values()
    distillation = bound.distillation if weighted and torch.is_grad_enabled() else None
    if distillation is not None:
        given_masks = {"position_ids": batch.position_ids, "attention_mask": batch.attention_mask}
        top = distillation.top_k(batch.teacher, batch.tokens, batch.mask, **given_masks)
    terms = _states(model, bound, own, batch, given)
    head = bound.parts.head  # after the pass, in which FSDP2 gathers it
    head = head if distillation is None else distillation.head(head, top, batch.mask)
    values = with_divergence(bound, batch, values, terms.hidden)
    mask, share = batch.mask, batch.share
    split: dict[str, Any] = {} if share is None else {"own": share.own, "whole": share.whole}
    targets = batch.labels.where(mask, -100)
    num_ranks = 1 if bound.context is None else bound.context.size()
    history = functools.partial(bound.history.add, copies=num_ranks) if torch.is_grad_enabled() else bound.history.read
    given_losses: dict[str, Any] = {"long": values.long, "history": history, "rows": rows}
    found = weighted_loss(
        terms.hidden, head, targets, mask, weighting, values.short, values.used, **given_losses, **split
    )
    num_items = mask.sum() / num_ranks if batch.num_items is None else batch.num_items
    divisor = num_items.clamp(min=1) if isinstance(num_items, Tensor) else max(num_items, 1)
    loss = found.loss if torch.is_grad_enabled() else found.long_nll.sum() / num_ranks
    return WeightedLossOutput(
        loss=loss / divisor + terms.added,
        logits=_NoLogits(),
        weighted_loss=(found.loss / divisor).detach() if weighted else None,
        aux_loss=terms.aux_loss,
        weights=found.weights if weighted else None,
        long_nll=found.long_nll,
        short_nll=found.short_nll if weighted else None,
        mask=mask,
        position_ids=batch.position_ids if share is None else None,
    )


def _states(model: Any, bound: Binding, own: Callable[..., Any], batch: Batch, given: dict[str, Any]) -> OwnTerms:
    """The hidden states that predict tokens, and what the model adds to its cross-entropy."""
    inputs = {**bound.parts.inputs(batch.tokens, batch.position_ids, batch.attention_mask), **batch.rest}
    if bound.adds_terms or asks_for_terms(model, given):
        terms = own_terms(own, model, bound.parts, {**inputs, "labels": batch.labels})
    else:
        terms = OwnTerms(bound.parts.decoder(**inputs).last_hidden_state)
    return terms if batch.share is not None else terms._replace(hidden=aligned_with_tokens(terms.hidden))
