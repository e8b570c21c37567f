"""What the weights of a batch are made of: its columns, what a scorer finds, and what was trained on before."""

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
"""Whose losses weights are made of: the long one of the trained model with a short one, or both of the scorer."""
_NEEDED = {
    "short_nll": "the short loss",
    "long_nll": "the scorer's long loss (contrast scorer)",
    "ref_nll": "the loss by a reference model",
    "divergence": "the divergence by the scorer",
}
"""What each column holds."""
_NOISE = re.compile("drop|jitter|neftune_noise")
"""Names of attributes of modules that say how much noise there is where they train."""


class Past:
    """What a weighting keeps of all batches that were trained on, in all processes, as its `observe` sums them up."""

    def __init__(self, weighting: Weighting) -> None:
        self.sum = torch.zeros(weighting.history, dtype=torch.float64)
        self._remembered = torch.tensor(weighting.remembered, dtype=torch.bool)

    def read(self, observed: Tensor) -> Tensor:
        """What was trained on before this batch; or the batch, where it counts alone."""
        return self._to(observed.device).sum.where(self._remembered, observed)

    def add(self, observed: Tensor, copies: int) -> Tensor:
        """What was trained on, this batch included, which `copies` processes read alike."""
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
    """A forward that somebody had put over that of the model's class before."""
    names: frozenset[str]
    """Those of its inputs."""
    adds_terms: bool
    """Whether the model adds terms to its cross-entropy that nothing has to ask for."""
    contrast: str
    history: Past
    distillation: Distillation | None = None

    @property
    def columns(self) -> frozenset[str]:
        """Those that its weights are made of."""
        return score_columns(self.weighting, self.contrast)

    @property
    def compares(self) -> bool:
        """Whether weights are made of the trained model's loss."""
        return self.weighting.of_losses and self.contrast == "trained"

    @property
    def reads_trained_pass(self) -> bool:
        """Whether weights are made of what the trained model predicts, and need a pass of their own if it is noisy."""
        return self.compares or (self.self_scored and self.weighting.divergence_of is not None)


def score_columns(weighting: Weighting, contrast: str = "trained") -> frozenset[str]:
    """Those of `SCORES` that weights are made of.

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
        ValueError: where gradients are recorded, and they cannot.
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
    """What weights are made of, of whole sequences."""

    short: ShortLosses | None = None
    long: Tensor | None = None
    """None: the losses of the pass that is trained."""
    used: Mapping[str, Tensor] = MappingProxyType({})
    """What else the weighting uses, by name."""
    scored: tuple[Scorer, Tensor | None, ShortStates] | None = None
    """States with the long and the short context, of which the divergence is still to be made, and who made them; in
    place of None, the long ones are those of the pass that is trained."""


def values_of(model: Any, bound: Binding, batch: Batch) -> Values:
    """What weights are made of: columns of the batch; else, what the bound scorer finds."""
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
    """The values with what the bound scorer finds; of both of its losses, if weights are made of these."""
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
    """The values with the divergence of the states that a scorer found, and the short losses that it gives on the way.

    Args:
        hidden: the states of the pass that is trained.
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
    """What makes a pass of the model differ from the next one where it trains: dropout, noise on embeddings or in a
    router; None if nothing does.

    Args:
        now: look at what is in training mode only.
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
