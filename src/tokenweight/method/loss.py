"""Cross-entropy fused with the output projection, weighted per token.

No `[tokens, vocabulary]` array exists: a chunk of rows at a time, the logits are made in float32 in one buffer, and
overwritten in place by the softmax and then by its gradient, which two matrix products consume immediately. Per chunk
and product this is one matrix multiplication; a loss with known weights takes three (logits, gradient of the hidden
states, gradient of the head).
"""

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.autograd.function import once_differentiable

from tokenweight.method.device.products import add_product, multiplied_in, multiply_into, parts, rows_at_once
from tokenweight.method.device.rows import active_rows

WeightsOfChunk = Callable[[Float[Tensor, " n"], Int[Tensor, " n"]], Float[Tensor, " n"]]
"""(losses of a chunk, their row numbers) -> weights of the chunk."""


class Head(NamedTuple):
    """The output head of a model: `logits = cap(scale * (hidden @ weight.T + bias))`; fields as in `linear_nll`."""

    weight: Float[Tensor, "V D"]
    bias: Float[Tensor, " V"] | None = None
    scale: float = 1.0
    softcap: float | None = None

    @property
    def after(self) -> dict[str, Any]:
        """The operations after `hidden @ weight.T`, as keywords of both losses."""
        return {"bias": self.bias, "scale": self.scale, "softcap": self.softcap}

    def loss(
        self, hidden: Tensor, targets: Tensor, weights: "Tensor | WeightsOfChunk", active: Tensor | None = None
    ) -> Float[Tensor, ""]:
        """`weighted_linear_cross_entropy` of this head."""
        return weighted_linear_cross_entropy(hidden, self.weight, targets, weights, active=active, **self.after)


def linear_nll(
    hidden: Float[Tensor, "N D"],
    head: Float[Tensor, "V D"],
    targets: Int[Tensor, " N"],
    *,
    bias: Float[Tensor, " V"] | None = None,
    scale: float = 1.0,
    softcap: float | None = None,
    chunk_size: int | None = None,
    active: Int[Tensor, " n"] | None = None,
) -> Float[Tensor, " N"]:
    """Negative log-likelihood of each target under `softmax(logits)`, without gradient.

    The logits are `z = scale * (hidden @ head.T + bias)`, with a soft-cap `softcap * tanh(z / softcap)`.

    Args:
        hidden: states, one per row; the state in row i predicts `targets[i]`.
        head: the output projection.
        targets: token ids; rows with -100 get loss 0 and cost nothing.
        bias: of the output projection.
        scale: multiplies the logits (Cohere's `logit_scale`, 1 / Granite's `logits_scaling`).
        softcap: bound of the logits (Gemma's `final_logit_softcapping`).
        chunk_size: rows whose logits are held at a time; by default as many as fit a buffer.
        active: numbers of the rows to read, with valid targets; found by default, which synchronizes with a GPU.

    Returns:
        Nats in float32 (float64 from float64 states), whatever the dtype of the states.

    Raises:
        ValueError: if a target is neither -100 nor a row of `head`.
    """
    logits = Logits(hidden, head, bias, scale, softcap)
    with torch.no_grad(), torch.autocast(hidden.device.type, enabled=False):
        losses = torch.zeros(len(hidden), dtype=logits.dtype, device=hidden.device)
        active = active_rows(targets, len(head)) if active is None else active
        for rows in logits.chunks(active, chunk_size):
            losses[rows] = logits.losses(hidden[rows], targets[rows])
    return losses


def weighted_linear_cross_entropy(
    hidden: Float[Tensor, "N D"],
    head: Float[Tensor, "V D"],
    targets: Int[Tensor, " N"],
    weights: Float[Tensor, " N"] | WeightsOfChunk,
    *,
    bias: Float[Tensor, " V"] | None = None,
    scale: float = 1.0,
    softcap: float | None = None,
    chunk_size: int | None = None,
    active: Int[Tensor, " n"] | None = None,
) -> Float[Tensor, ""]:
    """Sum over all rows of weight times negative log-likelihood; not divided, since only the caller knows by what.

    Weights are constants. Rows of weight 0 are not read: a share k of non-zero rows costs 3k head products (losses,
    gradient of the states, gradient of the head), or k where no gradient is needed. The gradients are computed in
    the forward pass, so `backward` can run only once.

    Args:
        weights: one per row; or, where a weight depends on nothing but the row's own loss, a function of the losses of
            a chunk and its row numbers, called under `no_grad` on every row with a target: then one pass serves both.

    The other arguments, dtypes and errors are those of `linear_nll`; a second `backward` is a RuntimeError.
    """
    if isinstance(weights, Tensor) and len(weights) != len(hidden):
        raise ValueError(f"found {len(weights)} weights for {len(hidden)} rows: expected one per row")
    weights = weights.detach() if isinstance(weights, Tensor) else weights
    settings = (active, scale, softcap, chunk_size, torch.is_grad_enabled())
    return _WeightedLoss.apply(hidden, head, bias, targets, weights, settings)


class _WeightedLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, head, bias, targets, weights, settings):
        active, scale, softcap, chunk_size, needs_grad = settings
        logits = Logits(hidden, head, bias, scale, softcap)
        if active is None:
            active = active_rows(targets, len(head), weights if isinstance(weights, Tensor) else None)
        inputs = (hidden, head, bias)
        wanted = [tensor if needs_grad and ctx.needs_input_grad[i] else None for i, tensor in enumerate(inputs)]
        grads = [None if tensor is None else torch.zeros_like(tensor, dtype=logits.dtype) for tensor in wanted]
        loss = torch.zeros((), dtype=logits.dtype, device=hidden.device)
        # Autocast would round the sum of the losses to 16 bits; `Logits` itself decides what to compute in 16 bits.
        with torch.autocast(hidden.device.type, enabled=False):
            for rows in logits.chunks(active, chunk_size):
                states = hidden[rows]
                losses = logits.losses(states, targets[rows])
                chosen = (weights[rows] if isinstance(weights, Tensor) else weights(losses, rows)).to(logits.dtype)
                loss += chosen @ losses
                if any(grad is not None for grad in grads):
                    logits.add_gradients(grads, rows, states, targets[rows], chosen)
        ctx.grads, ctx.dtypes = grads, [None if tensor is None else tensor.dtype for tensor in inputs]
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_output):
        if ctx.grads is None:
            raise RuntimeError("weighted_linear_cross_entropy: backward ran before, and its gradients were given away")
        # Scaled in place and given away, so that no second array of the size of the head is allocated.
        grads, ctx.grads = ctx.grads, None
        scaled = [None if grad is None else grad.mul_(grad_output).to(dtype) for grad, dtype in zip(grads, ctx.dtypes)]
        return *scaled, None, None, None


class Logits:
    """The logits of a chunk of rows, and what is computed from them in place."""

    def __init__(self, hidden: Tensor, head: Tensor, bias: Tensor | None, scale: float, softcap: float | None):
        self.head, self.bias, self.scale, self.softcap = head, bias, scale, softcap
        self.compute_dtype = multiplied_in(hidden.device.type, torch.promote_types(hidden.dtype, head.dtype))
        self.dtype = torch.promote_types(self.compute_dtype, torch.float32)
        self.blocks = parts(len(head), 0 if head.dtype == self.compute_dtype else 4 * head.shape[1])

    def chunks(self, rows: Tensor, chunk_size: int | None) -> Iterator[Tensor]:
        """Split row numbers evenly into chunks of at most `chunk_size`, by default as many rows as fit the buffer."""
        if not len(rows):
            return
        if chunk_size is not None and chunk_size < 1:
            raise ValueError(f"chunk_size={chunk_size}: expected at least 1")
        if chunk_size is None:
            on_gpu = self.dtype != self.compute_dtype
            chunk_size = rows_at_once(len(rows), len(self.head), self.dtype.itemsize, on_gpu=on_gpu)
        chunk_size = -(-len(rows) // -(-len(rows) // chunk_size))
        # One buffer for all chunks: fresh memory pages for each would cost a third of a head product.
        self.buffer = torch.empty(chunk_size, len(self.head), dtype=self.dtype, device=rows.device)
        yield from rows.split(chunk_size)

    def fill(self, states: Float[Tensor, "n D"]) -> Float[Tensor, "n V"]:
        """The logits of a chunk, in the buffer."""
        z = self.logits = self.buffer[: len(states)]
        states = states.to(self.compute_dtype)
        for block in self.blocks:
            multiply_into(z[:, block], states, self.head[block].to(self.compute_dtype).t())
        if self.bias is not None:
            z += self.bias
        if self.scale != 1:
            z *= self.scale
        self.tanh = None
        if self.softcap is not None:
            self.tanh = z.div_(self.softcap).tanh_().clone()
            z *= self.softcap
        return z

    def losses(self, states: Float[Tensor, "n D"], targets: Int[Tensor, " n"]) -> Float[Tensor, " n"]:
        """Fill the buffer, read the losses from it, and leave `exp(logits - max)` in it."""
        z = self.fill(states)
        largest = z.amax(dim=1, keepdim=True)
        of_target = z.gather(1, targets[:, None])
        z.sub_(largest).exp_()
        self.total = z.sum(dim=1, keepdim=True)
        return (self.total.log() + (largest - of_target)).squeeze(1)  # large logits cancel before anything is rounded

    def add_gradients(
        self, grads: list[Tensor | None], rows: Tensor, states: Tensor, targets: Tensor, weights: Tensor
    ) -> None:
        """Turn the buffer into the gradient of the weighted losses w.r.t. the logits, and add its products to `grads`.

        The weights are applied with the division by the total, at no cost. They must be inside the sum over rows:
        scaling the finished gradient of the head by one number is right for equal weights only. And in the array that
        is rounded to 16 bits anyway: weighted states would be rounded once more.
        """
        z = self.logits
        row_scale = (weights * self.scale)[:, None]
        z *= row_scale / self.total
        z.scatter_add_(1, targets[:, None], -row_scale)
        if self.tanh is not None:
            z *= self.tanh.square_().neg_().add_(1)
        of_hidden, of_head, of_bias = grads
        states = states.to(self.compute_dtype)
        of_states = torch.zeros_like(states, dtype=self.dtype)
        copied = 0 if z.dtype == self.compute_dtype else len(z) * self.compute_dtype.itemsize
        for block in self.blocks if len(self.blocks) > 1 else parts(z.shape[1], copied):
            of_logits = z[:, block].to(self.compute_dtype)
            if of_hidden is not None:
                add_product(of_states, of_logits, self.head[block].to(self.compute_dtype))
            if of_head is not None:
                add_product(of_head[block], of_logits.t(), states)
            del of_logits  # before the next copy is made
        if of_hidden is not None:
            of_hidden[rows] = of_states
        if of_bias is not None:
            of_bias += z.sum(dim=0)
