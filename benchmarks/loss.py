"""The weighted loss, forward and backward: peak memory and time, beside full logits and torch's own chunked loss.

    python benchmarks/loss.py            about 40 minutes on two cores, 12 GiB of memory
    python benchmarks/loss.py --quick    seconds, on tiny sizes: a smoke test

Memory: hidden states [N, D], head [V, D], targets and weights exist, and so do `hidden.grad` and `head.grad`, to which
`backward` adds, as in a step that accumulates gradients. "Over inputs" is the peak resident memory of forward and
backward beyond these, in a fresh process. It includes one more array for each gradient, which any autograd function
has to return; "over inputs and gradients" excludes the bytes of these two.

Time is in seconds, relative to full logits, and relative to a floor: the three float32 matmuls of hidden states, logits
and head that any implementation with gradients of both needs, into preallocated arrays.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
import tyro

from bench.measure import GIB, alternately, in_fresh_process, peak_bytes_over_now
from bench.report import Bench, Report
from tokenweight.method import BUFFER_BYTES, weighted_linear_cross_entropy

OURS = {
    "tokenweight, uniform weights": "uniform",
    "tokenweight, dense weights": "dense",
    "tokenweight, sparse weights (0.2 kept)": "sparse",
}
DENSE = "tokenweight, dense weights"
FULL = "full logits"
TORCH = "torch linear_cross_entropy"
FLOOR = "3 head products"
OVER_INPUTS = "peak memory over inputs"
OVER_GRADIENTS = "peak memory over inputs and gradients"
ALL = (*OURS, FULL, *([TORCH] if hasattr(torch.nn, "LinearCrossEntropyOptions") else []))


@dataclass(frozen=True)
class Case:
    """Sizes, and the implementations whose time and peak memory are measured on them."""

    num_tokens: int
    vocabulary: int
    dim: int
    dtype: torch.dtype = torch.float32
    timed: tuple[str, ...] = ALL
    memory: tuple[str, ...] = ALL

    def __str__(self) -> str:
        return f"N={self.num_tokens} V={self.vocabulary} D={self.dim} {str(self.dtype).removeprefix('torch.')}"


CASES = [
    Case(4096, 32000, 512),
    Case(4096, 128256, 512),
    Case(4096, 32000, 512, torch.bfloat16),
    Case(32768, 128256, 512, timed=(), memory=(DENSE,)),
]
QUICK_CASES = [Case(1024, 8192, 32, timed=(*OURS, FULL), memory=(DENSE, FULL))]


def full_logits(hidden: torch.Tensor, head: torch.Tensor, targets: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    # One expression, so that nothing but autograd keeps the logits.
    return (F.cross_entropy(F.linear(hidden, head), targets, reduction="none") * weights).sum()


def torch_chunked(
    hidden: torch.Tensor, head: torch.Tensor, targets: torch.Tensor, weights: torch.Tensor
) -> torch.Tensor:
    """Torch's chunked loss, with chunks as long as ours; its default is far shorter, and slower."""
    chunk_size = max(16, BUFFER_BYTES // (4 * len(head)))
    options = torch.nn.LinearCrossEntropyOptions(batch_chunk_size=chunk_size, chunking_method=None)
    return (F.linear_cross_entropy(hidden, head, targets, reduction="none", options=options) * weights).sum()


IMPLEMENTATIONS: dict[str, Callable[..., torch.Tensor]] = {
    **dict.fromkeys(OURS, weighted_linear_cross_entropy),
    FULL: full_logits,
    TORCH: torch_chunked,
}


def weights_of(kind: str, num_tokens: int) -> torch.Tensor:
    """Weights of mean about 1: "dense" as from `Dense()`, distinct, none 0; "sparse" as of `Sparse()`, 80 % 0."""
    if kind == "uniform":
        return torch.ones(num_tokens)
    if kind == "sparse":
        return torch.zeros(num_tokens).index_fill_(0, torch.randperm(num_tokens)[: num_tokens // 5], 5.0)
    return 0.75 + 0.25 * torch.empty(num_tokens).exponential_()


def inputs(case: Case) -> dict[str, torch.Tensor]:
    """Random states, head and targets, with gradients that exist already and are resident."""
    torch.manual_seed(0)
    hidden = torch.randn(case.num_tokens, case.dim).to(case.dtype).requires_grad_()
    head = (torch.randn(case.vocabulary, case.dim) / case.dim**0.5).to(case.dtype).requires_grad_()
    for leaf in (hidden, head):
        leaf.grad = torch.empty_like(leaf).fill_(0)  # torch.zeros may return pages that are not resident yet
    return {"hidden": hidden, "head": head, "targets": torch.randint(case.vocabulary, (case.num_tokens,))}


def step(implementation: Callable[..., torch.Tensor], tensors: dict[str, torch.Tensor], weights: torch.Tensor) -> Any:
    implementation(**tensors, weights=weights).backward()


def measure_memory(case: Case, name: str) -> tuple[float, float]:
    """Peak GiB over inputs, and over inputs and gradients."""
    implementation, kind = IMPLEMENTATIONS[name], OURS.get(name, "dense")
    warm_up = Case(32, 64, 16, case.dtype)  # loads code and starts threads
    step(implementation, inputs(warm_up), weights_of(kind, warm_up.num_tokens))
    tensors, weights = inputs(case), weights_of(kind, case.num_tokens)
    over_inputs = peak_bytes_over_now(lambda: step(implementation, tensors, weights))
    gradients = sum(tensors[leaf].grad.nbytes for leaf in ("hidden", "head"))
    return over_inputs / GIB, (over_inputs - gradients) / GIB


def floor(case: Case, tensors: dict[str, torch.Tensor]) -> Callable[[], Any]:
    hidden, head = (tensors[name].detach().float() for name in ("hidden", "head"))
    logits = torch.empty(case.num_tokens, case.vocabulary)
    of_hidden, of_head = torch.empty_like(hidden), torch.empty_like(head)

    def products() -> None:
        torch.mm(hidden, head.t(), out=logits)
        torch.mm(logits, head, out=of_hidden)
        torch.mm(logits.t(), hidden, out=of_head)

    return products


def measure_time(case: Case, rounds: int) -> dict[str, list[float]]:
    tensors = inputs(case)
    runs: dict[str, Callable[[], Any]] = {FLOOR: floor(case, tensors)}
    for name in case.timed:
        weights = weights_of(OURS.get(name, "dense"), case.num_tokens)
        runs[name] = functools.partial(step, IMPLEMENTATIONS[name], tensors, weights)
    return alternately(runs, rounds)


def report_case(report: Report, case: Case, rounds: int, memory_rounds: int) -> None:
    setting = {"what": "weighted loss, forward and backward", "x": str(case)}
    seconds = measure_time(case, rounds) if case.timed else {}
    for name, values in seconds.items():
        report.add(**setting, implementation=name, metric="time", unit="s", values=values)
        for other in (FLOOR, FULL):
            ratio = {"metric": f"time / {other}", "over": values, "under": seconds[other]}
            report.add_ratio(**setting, implementation=name, **ratio)
    peaks: dict[str, list[float]] = {}
    for name in case.memory:
        values = [in_fresh_process(measure_memory, case, name) for _ in range(memory_rounds if case.timed else 1)]
        peaks[name] = [over_gradients for _, over_gradients in values]
        added = {"implementation": name, "unit": "GiB"}
        report.add(**setting, **added, metric=OVER_INPUTS, values=[over_inputs for over_inputs, _ in values])
        report.add(**setting, **added, metric=OVER_GRADIENTS, values=peaks[name])
    for name in peaks if FULL in peaks else ():
        ratio = {"metric": f"{OVER_GRADIENTS} / {FULL}", "over": peaks[name], "under": peaks[FULL]}
        report.add_ratio(**setting, implementation=name, **ratio)


@dataclass
class Loss(Bench):
    """Time and peak memory of the weighted loss."""

    memory_rounds: int = 3
    """Processes that measure the peak memory of one implementation; 1 for the longest sequence."""

    def run(self) -> None:
        report = self.report("loss")
        for case in QUICK_CASES if self.quick else CASES:
            report_case(report, case, self.rounds, 1 if self.quick else self.memory_rounds)
            report.finish()


if __name__ == "__main__":
    tyro.cli(Loss).run()
