"""One self-scored training step, forward and backward without optimizer, beside the published implementation.

    python benchmarks/reference.py            some 45 minutes on two cores, 8 GiB of memory
    python benchmarks/reference.py --quick    half a minute, on a tiny model: a smoke test

"as published" reimplements what the paper's code (UKPLab/naacl2025-token-weighting, commit 0b24454) was found to do in
a step of one sequence:

    - Full logits of all tokens, in the long and in each short pass, and a contiguous copy of them; then the
      cross-entropy of the transposed copy.
    - Windows one after the other, and logits for the whole window, although only the last `stride` tokens are scored.
    - In each short pass also the entropy of every prediction, over the vocabulary, which is never used.
    - A stable sort of all scores, where only the largest are needed; gradients for tokens of weight 0 as for others.

What costs nothing on a CPU (host-device synchronization) and what is not part of the step (logging) is left out. At the
first token after the first window the published code replaces an available short loss by the long one; here the short
one stays, as in tokenweight, so that weights and loss of both are equal, which a test verifies.

"uniform, transformers" is the unweighted `model(labels=...).loss`. "decoder alone" is the part common to every
self-scored step: hidden states of the sequence and of the windows, and the backward pass from a sum of the former; no
logits. All recompute activations in the backward pass, as the published configuration does, unless --no-checkpointing
is given; none keeps a KV cache. Memory is what the peak of a step adds to a model with gradients, each in a fresh
process: resident memory, and resident memory where the C library returns freed memory at once.
"""

import functools
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
import tyro

from bench.measure import GIB, GIVEN_BACK, alternately, in_fresh_process, peak_bytes_over_now
from bench.models import model_and_row, plain_loss
from bench.report import Bench
from tokenweight import Dense, Scorer, ShortContext, Sparse, with_weighted_loss
from tokenweight.method import sliding_windows

WEIGHTINGS = {"dense": Dense(interpolation=0.75), "sparse": Sparse(keep=0.2)}
UNIFORM, DECODER, PUBLISHED, OURS = "uniform, transformers", "decoder alone", "as published", "tokenweight"
NAMES = (UNIFORM, DECODER, *(f"{kind}, {who}" for kind in WEIGHTINGS for who in (PUBLISHED, OURS)))
MEMORY = "peak memory over model and gradients"
HELD = f"{MEMORY}, {GIVEN_BACK}"


def shifted_nll(logits: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    """Losses [batch, seq - 1]: column i is that of token i + 1."""
    predictions = logits[:, :-1].contiguous()
    return F.cross_entropy(predictions.transpose(1, 2), tokens[:, 1:], reduction="none")


def unused_entropy(logits: torch.Tensor) -> torch.Tensor:
    predictions = logits[:, :-1].contiguous().transpose(1, 2)
    return F.cross_entropy(predictions, predictions.softmax(dim=1), reduction="none")


@torch.no_grad()
def published_short_nll(
    model: Any, tokens: torch.Tensor, long_nll: torch.Tensor, context: ShortContext
) -> torch.Tensor:
    """Short losses [batch, seq - 1] of a model that scores itself, so that the first window is not read."""
    short_nll = long_nll.clone()
    for start, first, stop in sliding_windows(tokens.shape[1], context.size, context.stride):
        logits = model(input_ids=tokens[:, start:stop], use_cache=False).logits
        losses = shifted_nll(logits, tokens[:, start:stop])
        unused_entropy(logits)
        short_nll[:, first - 1 : stop - 1] = losses[:, first - stop :]
    return short_nll


def published_weights(kind: str, scores: torch.Tensor) -> torch.Tensor:
    """Weights of mean 1 over each sequence; "sparse" needs enough scores above 0."""
    num_tokens = scores.shape[1]
    if kind == "dense":
        interpolation = WEIGHTINGS["dense"].interpolation
        return interpolation + (1 - interpolation) * num_tokens * scores / scores.sum(dim=1, keepdim=True)
    kept = torch.zeros_like(scores)
    for row, mask in zip(scores, kept):
        order = row.sort(stable=True).indices
        mask[order[-int(WEIGHTINGS["sparse"].keep * num_tokens) :]] = 1
    return num_tokens * kept / kept.sum(dim=1, keepdim=True)


def published_loss(
    model: Any, tokens: torch.Tensor, kind: str, context: ShortContext
) -> tuple[torch.Tensor, torch.Tensor]:
    """Loss and weights [batch, seq - 1]."""
    long_nll = shifted_nll(model(input_ids=tokens, use_cache=False).logits, tokens)
    short_nll = published_short_nll(model, tokens, long_nll.detach(), context)
    weights = published_weights(kind, (long_nll.detach() - short_nll).abs())
    return (long_nll * weights).mean(), weights


def decoder_alone(model: Any, tokens: torch.Tensor, context: ShortContext) -> torch.Tensor:
    states = model.base_model(input_ids=tokens, use_cache=False).last_hidden_state
    with torch.no_grad():
        for start, _, stop in sliding_windows(tokens.shape[1], context.size, context.stride):
            model.base_model(input_ids=tokens[:, start:stop], use_cache=False)
    return states.sum()


def prepare(model: Any, context: ShortContext, name: str) -> None:
    """Zero the gradients, and for tokenweight bind the model. Without labels, a bound model behaves as before."""
    model.zero_grad(set_to_none=False)
    kind, _, who = name.partition(", ")
    if who == OURS:
        with_weighted_loss(model, WEIGHTINGS[kind], Scorer(model, context))


def run_step(model: Any, tokens: torch.Tensor, context: ShortContext, name: str) -> None:
    kind, _, who = name.partition(", ")
    if who == PUBLISHED:
        loss, _ = published_loss(model, tokens, kind, context)
    elif who == OURS:
        loss = model(input_ids=tokens, labels=tokens).loss
    elif name == DECODER:
        loss = decoder_alone(model, tokens, context)
    else:
        loss = plain_loss(model, tokens)
    loss.backward()


def training_model(length: int, *, checkpointing: bool, quick: bool) -> tuple[str, Any, torch.Tensor]:
    """Name, model, and a sequence."""
    name, model, tokens = model_and_row(length, quick=quick)
    model.train()
    if checkpointing:
        model.activation_checkpointing_enable({"use_reentrant": False})
    return name, model, tokens


def measure_memory(name: str, length: int, context: ShortContext, checkpointing: bool, quick: bool) -> float:
    """Peak GiB of a step, after a small warm-up step, which loads code and allocates the gradients."""
    _, model, tokens = training_model(length, checkpointing=checkpointing, quick=quick)
    few, small = tokens[:, :64], ShortContext(16, 12)
    prepare(model, small, name)
    run_step(model, few, small, name)
    prepare(model, context, name)
    return peak_bytes_over_now(lambda: run_step(model, tokens, context, name)) / GIB


@dataclass
class Reference(Bench):
    """Time and peak memory of a self-scored training step, beside the published implementation."""

    rounds: int = 3
    length: int = 4096
    """Tokens of the sequence, a multiple of 16."""
    size: int = 1024
    """Tokens that a window reads."""
    stride: int = 768
    """Tokens that a window scores."""
    checkpointing: bool = True
    """Recompute the activations in the backward pass."""
    memory_rounds: int = 1
    """Number of processes that measure the peak memory of each implementation."""

    def run(self) -> None:
        few, memory_rounds = (16, 1) if self.quick else (1, self.memory_rounds)
        length, context = self.length // few, ShortContext(self.size // few, self.stride // few)
        names = [name for name in NAMES if not (self.quick and (name.startswith("dense") or name == DECODER))]
        report = self.report("reference")
        model_name, model, tokens = training_model(length, checkpointing=self.checkpointing, quick=self.quick)
        runs = {name: functools.partial(run_step, model, tokens, context, name) for name in names}
        measured = {("time", "s"): alternately(runs, self.rounds, functools.partial(prepare, model, context))}
        del model, runs
        arguments = (length, context, self.checkpointing, self.quick)
        for metric, keep_freed in ((MEMORY, True), (HELD, False)):
            measured[metric, "GiB"] = {
                name: [
                    in_fresh_process(measure_memory, name, *arguments, keep_freed=keep_freed)
                    for _ in range(memory_rounds)
                ]
                for name in names
            }
        x = f"{model_name}, 1 x {length} tokens, windows {context.size}/{context.stride}, float32, "
        x += "activations recomputed" if self.checkpointing else "activations kept"
        for name in names:
            setting = {"what": "self-scored training step, forward and backward", "x": x, "implementation": name}
            for (metric, unit), values in measured.items():
                report.add(**setting, metric=metric, unit=unit, values=values[name])
                for label, other in ((UNIFORM, UNIFORM), (PUBLISHED, name.replace(OURS, PUBLISHED))):
                    if other != name:
                        over, under = values[name], values[other]
                        report.add_ratio(**setting, metric=f"{metric} / {label}", over=over, under=under)
        report.finish()


if __name__ == "__main__":
    tyro.cli(Reference).run()
