"""From hidden states to the weighted loss. Read this page first: all else prepares its arguments or uses its result."""

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int, Shaped
from torch import Tensor

from tokenweight.method.device.rows import active_rows, split_rows
from tokenweight.method.loss import Head, linear_nll
from tokenweight.method.weightings import History, Weighting, check_finite


class ShortLosses(NamedTuple):
    """The losses of tokens with the short context, in nats."""

    nll: Float[Tensor, "*batch seq"]
    same_as_long: Bool[Tensor, "*batch seq"] | None = None
    """True where the short context is the long one, and the loss the long loss: the first window of a document that the
    trained model scores itself. None: nowhere."""

    def filled(self, long_nll: Float[Tensor, "*batch seq"]) -> Float[Tensor, "*batch seq"]:
        """The short losses, given the long ones of the same tokens."""
        return self.nll if self.same_as_long is None else torch.where(self.same_as_long, long_nll, self.nll)

    def map(self, function: Callable[[Tensor], Tensor]) -> "ShortLosses":
        """What `function` makes of each."""
        return ShortLosses(function(self.nll), None if self.same_as_long is None else function(self.same_as_long))


class WeightedLoss(NamedTuple):
    """All but `loss` is aligned with tokens, of whole sequences, without gradient, and 0 outside `mask`."""

    loss: Float[Tensor, ""]
    """The sum over tokens of weight times negative log-likelihood; the caller divides it."""
    weights: Float[Tensor, "batch seq"]
    long_nll: Float[Tensor, "batch seq"]
    short_nll: Float[Tensor, "batch seq"]
    mask: Bool[Tensor, "batch seq"]


def weighted_loss(
    hidden: Float[Tensor, "batch part dim"],
    head: Head,
    targets: Int[Tensor, "batch seq"],
    mask: Bool[Tensor, "batch seq"],
    weighting: Weighting,
    short: ShortLosses | None,
    used: Mapping[str, Shaped[Tensor, "batch seq"]] = MappingProxyType({}),
    *,
    rows: Int[Tensor, " n"] | None = None,
    long: Float[Tensor, "batch seq"] | None = None,
    history: History = lambda observed: observed,
    own: Callable[..., Tensor] = lambda of_tokens, fill=0: of_tokens,
    whole: Callable[..., Tensor] = lambda of_states: of_states,
) -> WeightedLoss:
    """The weighted loss of a batch. Products with the head: 3 if weights are pointwise or known before, else at most 4.

    Args:
        hidden: the state that predicts each token; `rows` are the numbers of those with a target, if they are known.
        targets: token ids, -100 outside `mask`, which is True where a token is predicted and counts.
        short: None only if the weighting does not use short losses; the long ones then stand in for them.
        used: what else the weighting uses, by name, of whole sequences and aligned with tokens.
        long: the long losses that weights are made of, if not those of the trained model.
        history: from what these rows add to the history of the weighting to the one that they are weighed with.
        own: from whole sequences to what stands at this rank's states, where ranks split them; `whole` is its inverse.

    Raises:
        NonFinite: if a loss or a weight under `mask` is not finite; ValueError if the weighting lacks what it uses.
    """
    hidden, own_targets, used = hidden.flatten(0, 1), own(targets, -100).flatten(), weighting.asked(used)
    if long is not None or (used and not weighting.of_losses):  # weights are known before the losses
        weights, of_short = _known_weights(hidden.dtype, mask, weighting, short, used, long, history)
        loss, nll = _with_weights(hidden, head, own_targets, own(weights).flatten(), rows, weighting)
        long_nll = whole(nll.view(len(mask), -1))
        short_nll = long_nll if of_short is None else of_short
        check_finite({"the long loss": long_nll}, mask)
    elif weighting.pointwise:
        known = None if short is None else short.map(lambda of_tokens: own(of_tokens).flatten())
        of_rows = {name: own(values).flatten() for name, values in used.items()}
        past = _past(weighting, mask, used, history)
        loss, *of_states = _in_one_pass(hidden, head, own_targets, rows, weighting, known, of_rows, past)
        weights, long_nll, short_nll = (whole(values.view(len(mask), -1)) for values in of_states)
        check_finite({"the long loss": long_nll, **used, f"the weight by {weighting}": weights}, mask)
    else:  # all losses of a sequence come first
        nll = linear_nll(hidden.detach(), head.weight, own_targets, active=rows, **head.after)
        long_nll = whole(nll.view(len(mask), -1))
        short_nll = long_nll if short is None else short.filled(long_nll)
        weights = weighting(long_nll, short_nll, mask, history=history, **used)
        loss = head.loss(hidden, own_targets, own(weights).flatten(), None if weighting.selects else rows)
    return WeightedLoss(loss, weights.where(mask, 0.0), long_nll.where(mask, 0.0), short_nll.where(mask, 0.0), mask)


def _known_weights(
    dtype: torch.dtype,
    mask: Bool[Tensor, "batch seq"],
    weighting: Weighting,
    short: ShortLosses | None,
    used: Mapping[str, Shaped[Tensor, "batch seq"]],
    long: Float[Tensor, "batch seq"] | None,
    history: History,
) -> tuple[Float[Tensor, "batch seq"], Float[Tensor, "batch seq"] | None]:
    """The weights without the losses of the trained pass, and the short losses that they are made of, if any."""
    given = torch.zeros(mask.shape, dtype=dtype, device=mask.device) if long is None else long
    of_short = None if short is None else short.filled(given)
    return weighting(given, given if of_short is None else of_short, mask, history=history, **used), of_short


def _past(
    weighting: Weighting, mask: Tensor, used: Mapping[str, Tensor], history: History
) -> dict[str, Float[Tensor, " history"]]:
    """The history of a pointwise weighting, which reads no losses, as its keyword; nothing if it has none."""
    nothing = torch.zeros(mask.shape, device=mask.device)
    return {"history": history(weighting.observe(nothing, nothing, mask, **used))} if weighting.history else {}


def _with_weights(
    hidden: Tensor, head: Head, targets: Tensor, weights: Tensor, rows: Tensor | None, weighting: Weighting
) -> tuple[Float[Tensor, ""], Float[Tensor, " N"]]:
    """The loss, and the losses of all rows, those of weight 0 too."""
    rows = active_rows(targets, len(head.weight)) if rows is None else rows
    chosen, others = split_rows(rows, weights[rows] != 0) if weighting.selects else (rows, rows[:0])
    nll = linear_nll(hidden.detach(), head.weight, targets, active=others, **head.after)

    def weigh(losses: Float[Tensor, " n"], rows: Int[Tensor, " n"]) -> Float[Tensor, " n"]:
        nll[rows] = losses
        return weights[rows]

    return head.loss(hidden, targets, weigh, chosen), nll


def _in_one_pass(
    hidden: Float[Tensor, "N dim"],
    head: Head,
    targets: Int[Tensor, " N"],
    active: Int[Tensor, " n"] | None,
    weighting: Weighting,
    short: ShortLosses | None,
    used: Mapping[str, Shaped[Tensor, " N"]],
    history: Mapping[str, Tensor],
) -> tuple[Float[Tensor, ""], Float[Tensor, " N"], Float[Tensor, " N"], Float[Tensor, " N"]]:
    """The loss, and the weights, long and short losses, where a weight depends on its own token's losses only."""
    dtype = torch.promote_types(hidden.dtype, torch.float32)
    weights, long_nll, short_nll = torch.zeros(3, len(hidden), dtype=dtype, device=hidden.device)

    def weigh(losses: Float[Tensor, " n"], rows: Int[Tensor, " n"]) -> Float[Tensor, " n"]:
        long_nll[rows] = short_nll[rows] = losses
        if short is not None:
            short_nll[rows] = short.map(lambda of_states: of_states[rows]).filled(losses).to(dtype)
        present = torch.ones_like(rows, dtype=torch.bool)
        chosen = {name: values[rows][None] for name, values in used.items()}
        of_rows = weighting.weigh(losses[None], short_nll[rows][None], present[None], **chosen, **history)
        weights[rows] = of_rows[0].to(dtype)
        return weights[rows]

    loss = head.loss(hidden, targets, weigh, active)
    return loss, weights, long_nll, short_nll
