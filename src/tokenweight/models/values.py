"""The inputs of the weights of a batch: its columns, the results of a scorer, and the training so far."""

import contextlib
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from tokenweight.method import (
    SCORES,
    ShortLosses,
    Weighting,
    aligned_with_tokens,
    document_positions,
    linear_nll,
    vanishes,
)
from tokenweight.models.causal import CausalParts, evaluating
from tokenweight.models.context_parallel import attention_within_rank
from tokenweight.models.inputs import SCORE_OPTIONS, Batch, documents_of
from tokenweight.models.processes import sum_over_processes
from tokenweight.models.scorers.scorer import Scorer, ShortStates
from tokenweight.models.scorers.teacher import Distillation

CONTRASTS = ("trained", "scorer")
"""The losses that weights compare: the long one of the trained model with a short one, or both of the scorer."""
_NEEDED = {
    "short_nll": "the short loss",
    "long_nll": "the scorer's long loss (contrast scorer)",
    "ref_nll": "the loss by a reference model",
    "divergence": "the divergence by the scorer",
}
"""The contents of each column."""
_NOISE = re.compile("drop|jitter|neftune_noise")
"""Names of module attributes that set the amount of noise in training."""


class Past:
    """A weighting's history of all batches trained on, in all processes, as its `observe` sums them up."""

    def __init__(self, weighting: Weighting) -> None:
        self.sum = torch.zeros(weighting.history, dtype=torch.float64)
        self._remembered = torch.tensor(weighting.remembered, dtype=torch.bool)

    def read(self, observed: Tensor) -> Tensor:
        """The history before this batch; or that of the batch, where it counts alone."""
        return self._to(observed.device).sum.where(self._remembered, observed)

    def add(self, observed: Tensor, copies: int) -> Tensor:
        """The history with this batch, which `copies` processes read alike."""
        before = self._to(observed.device).sum.where(self._remembered, 0)
        self.sum = before + sum_over_processes(observed) / copies
        return self.sum

    def _to(self, device: torch.device) -> "Past":
        self.sum, self._remembered = self.sum.to(device), self._remembered.to(device)
        return self


@dataclass(frozen=True)
class Binding:
    """The state that `with_weighted_loss` leaves on the model. A deep copy of the model copies it along."""

    weighting: Weighting
    scorer: Scorer | None
    """Without its model, if that is the bound one: a model that held itself would outlive its last use."""
    self_scored: bool
    parts: CausalParts
    context: DeviceMesh | None  # rather than a process group, which cannot be copied
    replaced: Callable[..., Any] | None
    """A forward that had replaced that of the model's class before."""
    names: frozenset[str]
    """The names of its inputs."""
    adds_terms: bool
    """Whether the model adds terms to its cross-entropy unasked."""
    contrast: str
    history: Past
    distillation: Distillation | None = None

    @property
    def columns(self) -> frozenset[str]:
        """The columns that its weights are computed from."""
        return score_columns(self.weighting, self.contrast)

    @property
    def compares(self) -> bool:
        """Whether weights depend on the trained model's loss."""
        return self.weighting.of_losses and self.contrast == "trained"

    @property
    def reads_trained_pass(self) -> bool:
        """Whether weights depend on the trained model's predictions, and need a pass of their own if it is noisy."""
        return self.compares or (self.self_scored and self.weighting.divergence_of is not None)


def score_columns(weighting: Weighting, contrast: str = "trained") -> frozenset[str]:
    """The columns of `SCORES` that weights are computed from.

    Raises:
        ValueError: if the contrast is none of `CONTRASTS`.
    """
    if contrast not in CONTRASTS:
        raise ValueError(f"contrast {contrast!r}: expected one of {', '.join(CONTRASTS)}")
    long = {"long_nll"} if contrast == "scorer" and weighting.of_losses else set()
    return (weighting.uses & {*SCORES}) | long


def can_weigh(bound: Binding, batch: Batch) -> bool:
    """Whether weights can be computed; without them an evaluation has the unweighted loss only.

    Raises:
        ValueError: if they cannot, and gradients are recorded.
    """
    scored = set() if bound.scorer is None else {"short_nll", "long_nll"}
    if scored and bound.weighting.divergence_of is not None:
        scored.add("divergence")
    missing = [name for name in SCORES if name in bound.columns - batch.scores.keys() - scored]
    if missing and torch.is_grad_enabled():
        name = missing[0]
        other = "" if name == "ref_nll" else ", or bind the model with a Scorer"
        raise ValueError(
            f"weighting {bound.weighting} needs {_NEEDED[name]} of every token, but no {name} column reached the model"
            f"{' and it has no scorer' if other else ''}: a collator, packing or remove_unused_columns dropped it, or "
            f"the data was never scored (`tokenweight score{SCORE_OPTIONS[name]}`): use "
            f"tokenweight.train.DataCollatorWithScores{other}"
        )
    return not missing


class Values(NamedTuple):
    """The inputs of weights, for whole sequences."""

    short: ShortLosses | None = None
    long: Tensor | None = None
    """None: the losses of the trained pass."""
    used: Mapping[str, Tensor] = MappingProxyType({})
    """The other inputs of the weighting, by name."""
    scored: tuple[Scorer, Tensor | None, ShortStates] | None = None
    """The scorer, and its states with the long and the short context, from which a divergence is yet to be computed;
    None in place of the long ones: those of the trained pass."""


def values_of(model: Any, bound: Binding, batch: Batch) -> Values:
    """The inputs of weights: columns of the batch; else, results of the bound scorer."""
    used = {name: values for name, values in batch.scores.items() if name not in ("short_nll", "long_nll")}
    if "positions" in bound.weighting.uses:
        positions = batch.position_ids if batch.share is None else None
        if batch.share is None and batch.real is not None:
            positions = documents_of(positions, batch.attention_mask)
        used["positions"] = document_positions(batch.labels, positions)
    stored, long = batch.scores.get("short_nll"), batch.scores.get("long_nll")
    values = Values(None if stored is None else ShortLosses(stored), long, used)
    if not bound.columns <= batch.scores.keys():
        values = _scored(model, bound, batch, values)
    if values.long is None and bound.compares and find_noise(model, now=True):
        values = values._replace(long=_long_without_noise(model, bound, batch))
    return values


def _scored(model: Any, bound: Binding, batch: Batch, values: Values) -> Values:
    """The values with the results of the bound scorer; with both of its losses, if weights compare these."""
    assert bound.scorer is not None
    own = model if bound.scorer.model is None else bound.scorer.model
    scorer = bound.scorer.of(own, checked=True).among(bound.context)
    tokens, given = batch.read_by_scorer
    # Whether the long losses that short ones are compared with, if any are, come from the same model.
    of_both = {**given, "self_scored": bound.self_scored or bound.contrast == "scorer"}
    long_states = None
    with contextlib.nullcontext() if batch.share is None else attention_within_rank():
        if (of := bound.weighting.divergence_of) is not None:
            of_both["self_scored"] = (of_both["self_scored"] or not bound.weighting.uses_short) and vanishes(of)
            if not bound.self_scored or find_noise(model, now=True):
                long_states = scorer.long_states(tokens, **given)
            values = values._replace(scored=(scorer, long_states, scorer.short_states(tokens, **of_both)))
        elif bound.weighting.uses_short:
            values = values._replace(short=scorer.short_losses(tokens, **of_both))
        if "long_nll" in bound.columns or (bound.self_scored and bound.compares and long_states is not None):
            values = values._replace(long=scorer.long_nll(tokens, **given, states=long_states))
    bound.scorer.max_tokens = scorer.max_tokens  # less than before, if memory did not suffice
    return values


def with_divergence(bound: Binding, batch: Batch, values: Values, hidden: Tensor) -> Values:
    """The values with the divergence of a scorer's states, and the short losses that are computed on the way.

    Args:
        hidden: the states of the trained pass.
    """
    if values.scored is None:
        return values
    scorer, long, short = values.scored
    assert bound.weighting.divergence_of is not None
    long = hidden if long is None else long
    divergence, short_losses = scorer.divergence(batch.tokens, bound.weighting.divergence_of, long, short)
    return values._replace(
        short=short_losses if bound.weighting.uses_short else None, used={**values.used, "divergence": divergence}
    )


def find_noise(model: nn.Module, *, now: bool = False) -> str | None:
    """The source of noise that makes two passes of a model in training differ: dropout, noise on embeddings or in a
    router; None if there is none.

    Args:
        now: look only at modules in training mode.
    """
    for where, part in model.named_modules():
        of_dropout = isinstance(part, nn.modules.dropout._DropoutNd)
        for name, value in vars(part).items() if part.training or not now else ():
            if isinstance(value, float) and value > 0 and ((of_dropout and name == "p") or _NOISE.search(name)):
                return f"{where}.{name} {value:g}".removeprefix(".")
    return None


@torch.no_grad()
def _long_without_noise(model: Any, bound: Binding, batch: Batch) -> Tensor:
    """The long losses of the trained model as an evaluation finds them."""
    inputs = {**bound.parts.inputs(batch.tokens, batch.position_ids, batch.attention_mask), **batch.rest}
    with evaluating(model):
        hidden = bound.parts.decoder(**inputs).last_hidden_state
    targets, head, share = batch.labels.where(batch.mask, -100), bound.parts.head, batch.share
    if share is None:
        hidden = aligned_with_tokens(hidden)
    own_targets = targets if share is None else share.own(targets, -100)
    nll = linear_nll(hidden.flatten(0, 1), head.weight, own_targets.flatten(), **head.after).view(own_targets.shape)
    return nll if share is None else share.whole(nll)
