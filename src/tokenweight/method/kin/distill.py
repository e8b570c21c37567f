"""Distillation: the weighted loss mixed with the divergence from a teacher's most likely tokens, in the same pass."""

from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from tokenweight.method.device.rows import active_rows
from tokenweight.method.loss import Head, Logits, WeightsOfChunk, _WeightedLoss

TOP_K = 16
"""Tokens kept of a teacher's prediction, by default. Our choice: we have not seen how many the paper keeps."""
LEAST_REST = 1e-30
"""Lower bound of the student's probability beyond the top k, relative to that of its likeliest token."""


class TopK(NamedTuple):
    """The k likeliest tokens of each prediction of a teacher, and their log-probabilities in its whole vocabulary."""

    ids: Int[Tensor, "*rows k"]
    logprobs: Float[Tensor, "*rows k"]

    def checked(self, chosen: Tensor, vocabulary: int) -> "TopK":
        """Itself. ValueError if chosen rows hold ids outside the student's vocabulary, or no log-probabilities."""
        ids, logprobs = self.ids[chosen], self.logprobs[chosen]
        wrong = torch.stack([((ids < 0) | (ids >= vocabulary)).any(), ~(logprobs <= 1e-3).all()])
        of_ids, of_logprobs = wrong.tolist()  # one wait for the device
        if of_ids:
            found = f"from {int(ids.min())} to {int(ids.max())}"
            raise ValueError(f"teacher_ids: found {found}: expected tokens of the model, 0 to {vocabulary - 1}")
        if of_logprobs:
            raise ValueError("teacher_logprobs: found a value above 0, or not a number: expected log-probabilities")
        return self


def linear_top_k(
    hidden: Float[Tensor, "N D"], head: Head, targets: Int[Tensor, " N"], k: int, *, chunk_size: int | None = None
) -> tuple[TopK, Float[Tensor, " N"]]:
    """The k likeliest tokens that each state predicts, and the loss of its target, without gradient: one head product.

    Args:
        hidden: states of the teacher; the state in row i predicts `targets[i]`.
        head: the teacher's.
        targets: token ids; rows with -100 cost nothing, and hold token 0 with probability 0.
        chunk_size: rows whose logits are held at a time; by default as many as fit a buffer.

    Returns:
        Ids in int32, likeliest first; log-probabilities and losses in nats, float32 (float64 from float64 states).
    """
    vocabulary = len(head.weight)
    if not 1 <= k <= vocabulary:
        raise ValueError(f"top_k {k}: expected 1 to {vocabulary}, the tokens that the teacher knows")
    logits = Logits(hidden, head.weight, **head.after)
    with torch.no_grad(), torch.autocast(hidden.device.type, enabled=False):
        ids = torch.zeros(len(hidden), k, dtype=torch.int32, device=hidden.device)
        logprobs = torch.full((len(hidden), k), -torch.inf, dtype=logits.dtype, device=hidden.device)
        nll = torch.zeros(len(hidden), dtype=logits.dtype, device=hidden.device)
        for rows in logits.chunks(active_rows(targets, vocabulary), chunk_size):
            z = logits.fill(hidden[rows])
            largest, found = z.topk(k, dim=1)
            of_target = z.gather(1, targets[rows][:, None])
            log_total = z.sub_(largest[:, :1]).exp_().sum(dim=1, keepdim=True).log_()
            ids[rows], logprobs[rows] = found.int(), (largest - largest[:, :1]) - log_total
            nll[rows] = (log_total + (largest[:, :1] - of_target)).squeeze(1)
    return TopK(ids, logprobs), nll


class DistillingHead(Head):
    """A head whose loss is mixed with the divergence from a teacher: `weighted_loss` takes it in place of a `Head`.

        loss = sum over tokens of weight * ((1 - share) * nll + share * KL(teacher || student))

    The teacher's top k tokens stand for its distribution, and all others are one further outcome, for which the teacher
    has r = 1 - sum of q, the student R = 1 - sum of p:

        KL = sum over the top k of q * log(q / p) + r * log(r / R)

    which is at most the divergence of the whole distributions, and equal to it for k = V, or where the student spreads
    R in the teacher's proportions. Its gradient w.r.t. the logits is p - q in the top k, p * (1 - r / R) beyond: as for
    a teacher that spreads r as the student does, so that nothing is learned about the order of tokens beyond the top k.
    """

    teacher: TopK
    share: float

    def __new__(cls, head: Head, teacher: TopK, share: float) -> "DistillingHead":
        """Attach a teacher to a head.

        Args:
            head: the student's.
            teacher: the teacher's top k for each state, in the order of the states.
            share: w, from 0 (the weighted loss alone) to 1 (distillation alone).
        """
        found = super().__new__(cls, *head)
        found.teacher, found.share = teacher, share
        return found

    def loss(
        self,
        hidden: Float[Tensor, "N D"],
        targets: Int[Tensor, " N"],
        weights: Tensor | WeightsOfChunk,
        active: Tensor | None = None,
    ) -> Float[Tensor, ""]:
        """Like `weighted_linear_cross_entropy`, with as many head products."""
        return distilled_linear_cross_entropy(hidden, self, targets, weights, self.teacher, self.share, active=active)


def distilled_linear_cross_entropy(
    hidden: Float[Tensor, "N D"],
    head: Head,
    targets: Int[Tensor, " N"],
    weights: Float[Tensor, " N"] | WeightsOfChunk,
    teacher: TopK,
    share: float,
    *,
    chunk_size: int | None = None,
    active: Int[Tensor, " n"] | None = None,
) -> Float[Tensor, ""]:
    """Sum over all rows of weight times the mixture of `DistillingHead`; not divided by anything.

    Args, Raises: as for `weighted_linear_cross_entropy`, with `head` and what follows it in one; weights that are a
    function are given the negative log-likelihoods. A ValueError if `teacher` does not have a row for each of `hidden`.
    """
    if len(teacher.ids) != len(hidden) or teacher.ids.shape != teacher.logprobs.shape:
        found = f"{list(teacher.ids.shape)} and {list(teacher.logprobs.shape)}"
        raise ValueError(f"teacher_ids and teacher_logprobs have shapes {found}: expected [{len(hidden)}, k]")
    if isinstance(weights, Tensor):
        weights = weights.detach()
    settings = (active, head.scale, head.softcap, teacher, share, chunk_size, torch.is_grad_enabled())
    return _DistilledLoss.apply(hidden, head.weight, head.bias, targets, weights, settings)


class _DistilledLoss(_WeightedLoss):
    @staticmethod
    def forward(ctx, hidden, head, bias, targets, weights, settings):
        active, scale, softcap, teacher, share, chunk_size, needs_grad = settings
        logits, inputs = _Mixed(hidden, head, bias, scale, softcap, share), (hidden, head, bias)
        if active is None:
            active = active_rows(targets, len(head), weights if isinstance(weights, Tensor) else None)
        wanted = [tensor if needs_grad and ctx.needs_input_grad[i] else None for i, tensor in enumerate(inputs)]
        grads = [None if tensor is None else torch.zeros_like(tensor, dtype=logits.dtype) for tensor in wanted]
        loss = torch.zeros((), dtype=logits.dtype, device=hidden.device)
        with torch.autocast(hidden.device.type, enabled=False):
            for rows in logits.chunks(active, chunk_size):
                logits.ids, logits.logprobs = teacher.ids[rows].long(), teacher.logprobs[rows].to(logits.dtype)
                losses = logits.losses(hidden[rows], targets[rows])
                chosen = (weights[rows] if isinstance(weights, Tensor) else weights(losses, rows)).to(logits.dtype)
                loss += chosen @ ((1 - share) * losses + share * logits.divergences)
                if any(grad is not None for grad in grads):
                    logits.add_gradients(grads, rows, hidden[rows], targets[rows], chosen)
        ctx.grads, ctx.dtypes = grads, [None if tensor is None else tensor.dtype for tensor in inputs]
        return loss


class _Mixed(Logits):
    """The logits of a chunk, with the top k of a teacher."""

    ids: Tensor
    logprobs: Tensor

    def __init__(self, hidden, head, bias, scale, softcap, share: float):
        super().__init__(hidden, head, bias, scale, softcap)
        self.share = share

    def losses(self, states: Tensor, targets: Tensor) -> Tensor:
        """Like the parent's, leaving `exp(logits - max)` in the buffer; also sets `divergences` and the rests."""
        z = self.fill(states)
        largest = z.amax(dim=1, keepdim=True)
        of_target, of_top = z.gather(1, targets[:, None]), z.gather(1, self.ids) - largest
        z.sub_(largest).exp_()
        # The rest is summed without the top k: as a difference, it would cancel to nothing.
        self.top = z.gather(1, self.ids)
        z.scatter_(1, self.ids, 0)
        self.rest = z.sum(dim=1, keepdim=True)
        z.scatter_(1, self.ids, self.top)
        self.total = self.rest + self.top.sum(dim=1, keepdim=True)
        self.rest, log_total = self.rest.clamp(min=LEAST_REST), self.total.log()
        self.q = self.logprobs.exp()
        whole = self.ids.shape[1] == z.shape[1]
        self.r = (1 - self.q.sum(dim=1, keepdim=True)).clamp(min=0) * (0 if whole else 1)
        of_top = torch.where(self.q > 0, self.q * (self.logprobs - (of_top - log_total)), 0)
        of_rest = torch.xlogy(self.r, self.r) - self.r * (self.rest.log() - log_total)
        self.divergences = of_top.sum(dim=1) + of_rest.squeeze(1)
        return (log_total + (largest - of_target)).squeeze(1)

    def add_gradients(self, grads, rows, states, targets, weights):
        """Adjust the buffer so that the parent's subtraction of the target leaves the gradient of the mixture.

        The top k is set rather than added to: beyond them, 1 - r / R may be as large as 1 / R.
        """
        z = self.logits
        z *= 1 - self.share * self.r / self.rest * self.total
        z.scatter_(1, self.ids, self.top - self.share * self.q * self.total)
        z.scatter_add_(1, targets[:, None], self.share * self.total)
        super().add_gradients(grads, rows, states, targets, weights)
