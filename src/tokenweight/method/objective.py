"""From hidden states to the weighted loss. Read this file first: all else prepares its arguments or uses its result."""

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int, Shaped
from torch import Tensor

from tokenweight.method.device.finite import check_finite
from tokenweight.method.device.products import fit_at_once
from tokenweight.method.device.rows import active_rows, split_rows
from tokenweight.method.loss import Head, linear_nll
from tokenweight.method.weightings import History, Weighting


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
        """Apply `function` to each field."""
        return ShortLosses(function(self.nll), None if self.same_as_long is None else function(self.same_as_long))


class WeightedLoss(NamedTuple):
    """The loss, and for whole sequences its parts, token-aligned, without gradient, and 0 outside `mask`."""

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
    """The weighted loss of a batch. Products with the head: 3 if weights are pointwise or known beforehand, or if the
    logits of all states fit the buffer; else at most 4.

    Args:
        hidden: the state that predicts each token; `rows` are the numbers of those with a target, if they are known.
        targets: token ids, -100 outside `mask`, which is True where a token is predicted and counts.
        short: None only if the weighting does not use short losses; the long ones then stand in for them.
        used: the other inputs of the weighting by name, for whole sequences and aligned with tokens.
        long: the long losses that weights are computed from, if not those of the trained model.
        history: maps what these rows add to the history of the weighting to the one that they are weighed with.
        own: maps whole sequences to values at this rank's states, where ranks split them; `whole` is its inverse.

    Raises:
        NonFinite: if a loss or a weight under `mask` is not finite; ValueError if the weighting lacks an input.
    """
    used, own_targets = weighting.asked(used), own(targets, -100).flatten()
    batch = _Batch(
        hidden.flatten(0, 1), head, own_targets, mask, weighting, short, used, rows, long, history, own, whole
    )
    if long is not None or (used and not weighting.of_losses):
        loss, weights, long_nll, short_nll = batch.weights_first()
        check_finite({"the long loss": long_nll}, mask)
    elif weighting.pointwise:
        loss, weights, long_nll, short_nll = batch.together()
        check_finite({"the long loss": long_nll, **used, f"the weight by {weighting}": weights}, mask)
    else:
        loss, weights, long_nll, short_nll = batch.losses_first()
    return WeightedLoss(loss, weights.where(mask, 0.0), long_nll.where(mask, 0.0), short_nll.where(mask, 0.0), mask)


class _Batch(NamedTuple):
    """The arguments of `weighted_loss`, states and targets flat. Each method returns the loss and, for whole
    sequences, weights, long and short losses."""

    hidden: Float[Tensor, "N dim"]
    head: Head
    targets: Int[Tensor, " N"]
    mask: Bool[Tensor, "batch seq"]
    weighting: Weighting
    short: ShortLosses | None
    used: Mapping[str, Shaped[Tensor, "batch seq"]]
    rows: Int[Tensor, " n"] | None
    long: Float[Tensor, "batch seq"] | None
    history: History
    own: Callable[..., Tensor]
    whole: Callable[..., Tensor]

    def weights_first(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Weights that need no losses of the trained pass are computed first."""
        dtype, device = self.hidden.dtype, self.hidden.device
        long = torch.zeros(self.mask.shape, dtype=dtype, device=device) if self.long is None else self.long
        of_sequences, short = self._weigh(long)
        weights = self.own(of_sequences).flatten()
        rows = active_rows(self.targets, len(self.head.weight)) if self.rows is None else self.rows
        chosen, others = split_rows(rows, weights[rows] != 0) if self.weighting.selects else (rows, rows[:0])
        nll = self._losses(others)  # so that losses of tokens of weight 0 are known, too

        def weigh(losses: Float[Tensor, " n"], rows: Int[Tensor, " n"]) -> Float[Tensor, " n"]:
            nll[rows] = losses
            return weights[rows]

        loss, long = self.head.loss(self.hidden, self.targets, weigh, chosen), self._of_sequences(nll)
        return loss, of_sequences, long, long if self.short is None else short

    def together(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """One pass, where a weight depends on its own token's losses only."""
        dtype = torch.promote_types(self.hidden.dtype, torch.float32)
        weights, long, short = torch.zeros(3, len(self.hidden), dtype=dtype, device=self.hidden.device)
        of_short = None if self.short is None else self.short.map(self._of_states)
        of_rows = {name: self._of_states(values) for name, values in self.used.items()}
        past = {}
        if self.weighting.history:  # what a pointwise weighting adds to it does not depend on losses
            nothing = torch.zeros(self.mask.shape, device=self.mask.device)
            past["history"] = self.history(self.weighting.observe(nothing, nothing, self.mask, **self.used))

        def weigh(losses: Float[Tensor, " n"], rows: Int[Tensor, " n"]) -> Float[Tensor, " n"]:
            long[rows] = short[rows] = losses
            if of_short is not None:
                short[rows] = of_short.map(lambda of_states: of_states[rows]).filled(losses).to(dtype)
            present = torch.ones_like(rows, dtype=torch.bool)
            chosen = {name: values[rows][None] for name, values in of_rows.items()}
            found = self.weighting.weigh(losses[None], short[rows][None], present[None], **chosen, **past)
            weights[rows] = found[0].to(dtype)
            return weights[rows]

        loss = self.head.loss(self.hidden, self.targets, weigh, self.rows)
        return loss, self._of_sequences(weights), self._of_sequences(long), self._of_sequences(short)

    def losses_first(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Two passes, or one that keeps all probabilities, where a weight depends on the losses of other tokens."""
        if self.weighting.selects or not fit_at_once(len(self.hidden), len(self.head.weight), self.hidden.dtype):
            long = self._of_sequences(self._losses(self.rows))
            weights, short = self._weigh(long)
            rows = None if self.weighting.selects else self.rows
            return self.head.loss(self.hidden, self.targets, self._of_states(weights), rows), weights, long, short
        found: list[Tensor] = []

        def weigh(losses: Float[Tensor, " n"], rows: Int[Tensor, " n"]) -> Float[Tensor, " n"]:
            long = self._of_sequences(losses.new_zeros(len(self.hidden)).index_put((rows,), losses))
            weights, short = self._weigh(long)
            found.extend((weights, long, short))
            return self._of_states(weights)[rows]

        loss = self.head.loss(self.hidden, self.targets, weigh, self.rows)  # of one chunk
        if not found:  # no token is predicted
            weigh(loss.new_zeros(0), self.targets[:0])
        weights, long, short = found
        return loss, weights, long, short

    def _weigh(self, long: Tensor) -> tuple[Tensor, Tensor]:
        """Weights and short losses, given the long losses."""
        short = long if self.short is None else self.short.filled(long)
        return self.weighting(long, short, self.mask, history=self.history, **self.used), short

    def _losses(self, rows: Tensor | None) -> Float[Tensor, " N"]:
        return linear_nll(self.hidden.detach(), self.head.weight, self.targets, active=rows, **self.head.after)

    def _of_states(self, of_tokens: Shaped[Tensor, "batch seq"]) -> Shaped[Tensor, " N"]:
        return self.own(of_tokens).flatten()

    def _of_sequences(self, of_states: Shaped[Tensor, " N"]) -> Shaped[Tensor, "batch seq"]:
        return self.whole(of_states.view(len(self.mask), -1))
