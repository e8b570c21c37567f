"""The loss alone on a GPU: gradients against float64, time against its floor and other libraries, synchronizations.

Inputs are random, in bfloat16: hidden states [N, D], head [V, D], weights that are all different. What does not run
gets no row; a line on stderr says why.
"""

import functools
import sys
import warnings
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F

from bench.measure import GIB, alternately
from bench.report import Report
from tokenweight.method import weighted_linear_cross_entropy
from tokenweight.plan import loss_floor

OURS, FULL = "tokenweight", "full logits"
Case = tuple[int, int, int]
"""Rows, vocabulary, hidden size."""
Loss = Callable[..., torch.Tensor]
"""(states, head, targets, weights) -> loss"""


def full_logits(hidden: torch.Tensor, head: torch.Tensor, targets: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    return (F.cross_entropy(F.linear(hidden, head).float(), targets, reduction="none") * weights).sum()


def of_torch(hidden: torch.Tensor, head: torch.Tensor, targets: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    return (F.linear_cross_entropy(hidden, head, targets, reduction="none").float() * weights).sum()


def of_liger(hidden: torch.Tensor, head: torch.Tensor, targets: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

    return LigerFusedLinearCrossEntropyLoss(reduction="sum")(head, hidden, targets)  # without weights


def of_cce(hidden: torch.Tensor, head: torch.Tensor, targets: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    from cut_cross_entropy import linear_cross_entropy

    return (linear_cross_entropy(hidden, head, targets, reduction="none").float() * weights).sum()


OTHERS: dict[str, Loss] = {
    "torch linear_cross_entropy": of_torch,
    "liger-kernel, uniform": of_liger,
    "cut-cross-entropy": of_cce,
    FULL: full_logits,
}


def tensors(case: Case, device: torch.device) -> tuple[torch.Tensor, ...]:
    """Hidden states, head, targets, weights."""
    num_rows, vocabulary, dim = case
    torch.manual_seed(0)
    hidden = torch.randn(num_rows, dim, device=device).bfloat16().requires_grad_()
    head = (torch.randn(vocabulary, dim, device=device) / dim**0.5).bfloat16().requires_grad_()
    targets = torch.randint(vocabulary, (num_rows,), device=device)
    return hidden, head, targets, 0.75 + 0.25 * torch.empty(num_rows, device=device).exponential_()


def named(case: Case) -> str:
    return "N={} V={} D={} bfloat16".format(*case)


def report_gradients(report: Report, case: Case, device: torch.device) -> None:
    """Error of loss and gradients against float64, beside that of full logits."""
    hidden, head, targets, weights = tensors(case, device)

    def found(loss: Loss, *inputs: torch.Tensor) -> list[torch.Tensor]:
        result = loss(*inputs, targets, weights.to(inputs[0].dtype) if inputs[0].dtype == torch.float64 else weights)
        return [result.detach().double(), *(one.double() for one in torch.autograd.grad(result, inputs))]

    def exactly(*inputs: torch.Tensor) -> torch.Tensor:
        return (F.cross_entropy(F.linear(*inputs[:2]), inputs[2], reduction="none") * inputs[3]).sum()

    exact = found(exactly, *(one.detach().double().requires_grad_() for one in (hidden, head)))
    setting = {"what": "loss alone", "x": f"distance from float64, {named(case)}"}
    for name, loss in {OURS: weighted_linear_cross_entropy, FULL: full_logits}.items():
        for part, one, other in zip(("loss", "states", "head"), found(loss, hidden, head), exact):
            error = float((one - other).norm() / other.norm())
            report.add(**setting, implementation=name, metric=f"error of the {part}", unit="1", values=[error])
    report.finish()


def report_losses(report: Report, case: Case, rounds: int, device: torch.device) -> None:
    """Time relative to the floor of the GPU, and peak memory beyond inputs and gradients."""
    timed(report, case, {OURS: weighted_linear_cross_entropy, **OTHERS}, rounds, device, "implementations")


def report_chunks(report: Report, case: Case, lengths: tuple[int, ...], rounds: int, device: torch.device) -> None:
    """Time of our loss with other chunk lengths."""
    losses: dict[str, Loss] = {"chunks by default": weighted_linear_cross_entropy}
    for length in lengths:
        losses[f"chunks of {length}"] = functools.partial(weighted_linear_cross_entropy, chunk_size=length)
    timed(report, case, losses, rounds, device, "lengths of chunks")


def timed(report: Report, case: Case, losses: dict[str, Loss], rounds: int, device: torch.device, what: str) -> None:
    given = tensors(case, device)
    runs: dict[str, Callable[[], Any]] = {}
    for name, loss in losses.items():
        for leaf in given[:2]:
            leaf.grad = torch.zeros_like(leaf)
        peak = peak_over_now(lambda loss=loss: loss(*given).backward(), f"{what}, {name}")
        if peak is not None:
            runs[name] = lambda loss=loss: loss(*given).backward()
            setting = {"what": "loss alone", "x": f"{what}, {named(case)}", "implementation": name}
            if peak:
                report.add(**setting, metric="peak memory over inputs", unit="GiB", values=[peak / GIB])
    floor = floor_of(case)
    for name, seconds in alternately(runs, rounds).items():
        setting = {"what": "loss alone", "x": f"{what}, {named(case)}", "implementation": name}
        report.add(**setting, metric="time", unit="s", values=seconds)
        if floor:
            report.add(**setting, metric="time / floor", unit="1", values=[one / floor for one in seconds])
    report.finish()


def peak_over_now(run: Callable[[], Any], name: str) -> int | None:
    """Peak tensor memory of a run beyond the current, in bytes; 0 without a GPU; None, with a line, if it fails."""
    on_gpu = torch.cuda.is_available()
    if on_gpu:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated() if on_gpu else 0
    try:
        run()
    except (ImportError, RuntimeError, TypeError) as error:
        print(f"{name}: {str(error).splitlines()[0]}", file=sys.stderr)
        return None
    return torch.cuda.max_memory_allocated() - before if on_gpu else 0


def floor_of(case: Case) -> float | None:
    """Seconds of `loss_floor`, if the bandwidth of the GPU is known."""
    try:
        return loss_floor(torch.cuda.get_device_name(), *case).total if torch.cuda.is_available() else None
    except ValueError:
        return None


def report_waits(report: Report, steps: Any, shape: str, names: list[str]) -> None:
    """Host-device synchronizations per step, as torch counts them."""
    for name in names:
        steps.prepare(name)
        steps.run(name)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            torch.cuda.set_sync_debug_mode("warn")
            try:
                steps.run(name)
            finally:
                torch.cuda.set_sync_debug_mode("default")
        waits = [str(one.message) for one in caught if "synchroniz" in str(one.message)]
        places = sorted({f"{one.filename.rpartition('/')[2]}:{one.lineno}" for one in caught})
        print(f"{name}: {len(waits)} waits, in {', '.join(places)}", file=sys.stderr)
        setting = {"what": "waits of a step", "x": f"{shape} shape, 1 x {steps.tokens.shape[1]} tokens"}
        report.add(**setting, implementation=name, metric="synchronizing calls", unit="1", values=[len(waits)])
    report.finish()
