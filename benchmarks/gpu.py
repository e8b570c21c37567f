"""A training step in bfloat16 on one GPU, forward and backward without optimizer: speed, memory, longest sequence.

    python benchmarks/gpu.py                 one GPU of 80 GB; --shapes, --lengths and --steps choose a part
    python benchmarks/gpu.py --longest       the longest sequence that fits
    python benchmarks/gpu.py --quick         half a minute, on a tiny model, also without a GPU: says nothing

Without a GPU it has been run by its tests; on one, and with liger-kernel or cut-cross-entropy, never. The models have
random weights and the shapes of SmolLM2-135M and Llama-3.2-1B; activations are recomputed. Steps, windows and
arithmetic are those of `training.py`, plus one forward pass of the decoder that recomputes; the stored scores are
random numbers. Beside them stand uniform losses of others on the same decoder's states: transformers' own, with all
logits, and those of liger-kernel, cut-cross-entropy (which leaves out small gradients, as it does by default) and TRL
(its fused head), where they are installed.

Model FLOPs utilization is what a uniform step has to compute (3 B + 3 H: neither recomputation nor scoring), over time,
over the peak of the GPU. Memory is that of all tensors at the peak of a step, weights and gradients among them; all
steps take turns in one process. What does not fit has no row.
"""

import contextlib
import functools
import gc
import importlib.metadata
import importlib.util
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import tyro

from bench.measure import GIB, alternately
from bench.models import plain_loss
from bench.report import Bench, Report
from tokenweight import Scorer, ShortContext, with_weighted_loss
from tokenweight.plan import Hardware
from training import STEPS, UNIFORM, flops_of, run_step

SIZES = (
    "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "vocab_size",
)  # fmt: skip
SHAPES = {
    "SmolLM2-135M": (576, 1536, 30, 9, 3, 49152),
    "Llama-3.2-1B": (2048, 8192, 16, 32, 8, 128256),
    "tiny": (32, 64, 2, 4, 2, 256),
}
OURS = (UNIFORM, "frozen dense", "frozen sparse", "self-scored dense")


def of_liger(model: Any, tokens: torch.Tensor) -> torch.Tensor:
    from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

    return LigerFusedLinearCrossEntropyLoss()(model.lm_head.weight, *states_and_targets(model, tokens))


def of_cce(model: Any, tokens: torch.Tensor) -> torch.Tensor:
    from cut_cross_entropy import linear_cross_entropy

    states, targets = states_and_targets(model, tokens)
    return linear_cross_entropy(states, model.lm_head.weight, targets)


def of_trl(model: Any, tokens: torch.Tensor) -> torch.Tensor:
    from trl.trainer.utils import add_fused_lm_head

    forward = model.forward
    add_fused_lm_head(model)  # it puts a forward of its own over the bound one
    try:
        return model.forward(input_ids=tokens, labels=tokens, fused_lm_head=True).loss
    finally:
        model.forward = forward


def states_and_targets(model: Any, tokens: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    states = model.base_model(input_ids=tokens, use_cache=False).last_hidden_state
    return states[:, :-1].flatten(0, 1), tokens[:, 1:].flatten()


OTHERS: dict[str, tuple[str, Callable[[Any, torch.Tensor], torch.Tensor]]] = {
    "uniform, transformers": ("transformers", plain_loss),
    "uniform, liger-kernel": ("liger_kernel", of_liger),
    "uniform, cut-cross-entropy": ("cut_cross_entropy", of_cce),
    "uniform, trl": ("trl", of_trl),
}
"""(package, loss)"""


class Steps:
    """A model of a shape, and the steps on sequences of any length."""

    def __init__(self, shape: str, longest: int, device: torch.device) -> None:
        from transformers import LlamaConfig, LlamaForCausalLM

        torch.manual_seed(0)
        config = LlamaConfig(
            **dict(zip(SIZES, SHAPES[shape])), max_position_embeddings=longest, tie_word_embeddings=True
        )
        with device:
            self.model = LlamaForCausalLM(config).to(torch.bfloat16).train()
        self.model.activation_checkpointing_enable({"use_reentrant": False})
        self.set_length(longest)

    def set_length(self, length: int) -> None:
        """Another sequence, and windows that read a quarter of it."""
        self.context = ShortContext(length // 4, 3 * length // 16)
        self.tokens = torch.randint(self.model.config.vocab_size, (1, length), device=self.model.device)
        self.short_nll = 10 * torch.rand(1, length, device=self.model.device)

    def prepare(self, name: str) -> None:
        """Gradients of 0, so that they are there and do not grow, and the weighting."""
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        for parameter in self.model.parameters():
            parameter.grad = torch.zeros_like(parameter)
        if name in STEPS:
            scorer = Scorer(self.model, self.context) if STEPS[name].self_scored else None
            with_weighted_loss(self.model, STEPS[name].weighting, scorer)

    def run(self, name: str) -> None:
        if name in OTHERS:
            OTHERS[name][1](self.model, self.tokens).backward()
        else:
            run_step(self.model, self.tokens, dict.fromkeys(STEPS[name].columns, self.short_nll), autocast=False)

    def peak_bytes(self, name: str) -> int | None:
        """Peak of all tensors in a step, 0 without a GPU; None, with a line on standard error, if it does not run."""
        try:
            self.prepare(name)
            if torch.cuda.is_available():
                torch.cuda.reset_peak_memory_stats()
            self.run(name)
        except (ImportError, RuntimeError) as error:  # running out of memory is a RuntimeError of several kinds
            print(f"{self.tokens.shape[1]} tokens, {name}: {str(error).splitlines()[0]}", file=sys.stderr)
            return None
        return torch.cuda.max_memory_allocated()

    def flops(self, name: str, *, recompute: bool = True) -> float:
        """FLOPs of a step of ours, with the forward pass that recomputes."""
        length = self.tokens.shape[1]
        return flops_of(self.model, STEPS[name], length, self.context, checkpointing=recompute)


def peak_flops() -> float | None:
    """Peak FLOP/s of the GPU, by its name; None if it is not known."""
    with contextlib.suppress(ValueError):
        return Hardware(torch.cuda.get_device_name()).peak_flops if torch.cuda.is_available() else None
    return None


def report_length(report: Report, steps: Steps, shape: str, length: int, names: list[str], rounds: int) -> None:
    steps.set_length(length)
    peaks = {name: steps.peak_bytes(name) for name in names}
    runs = {name: functools.partial(steps.run, name) for name, peak in peaks.items() if peak is not None}
    seconds = alternately(runs, rounds, steps.prepare)
    x = f"{shape} shape, 1 x {length} tokens, windows {steps.context.size}/{steps.context.stride}, "
    x += "bfloat16, activations recomputed"
    needed = steps.flops(UNIFORM, recompute=False)
    for name, values in seconds.items():
        setting = {"what": "training step, forward and backward", "x": x, "implementation": name}
        report.add(**setting, metric="tokens per second", unit="1/s", values=[length / value for value in values])
        if UNIFORM in seconds:
            report.add_ratio(**setting, metric=f"time / {UNIFORM}", over=values, under=seconds[UNIFORM])
        if name in STEPS:
            ratio = steps.flops(name) / steps.flops(UNIFORM)
            report.add(**setting, metric=f"arithmetic / {UNIFORM}", unit="1", values=[ratio])
        if peak := peak_flops():
            used = [needed / value / peak for value in values]
            report.add(**setting, metric="model FLOPs utilization", unit="1", values=used)
        if peaks[name]:
            report.add(**setting, metric="peak memory", unit="GiB", values=[peaks[name] / GIB])
    report.finish()


def longest_that_fits(steps: Steps, name: str, limit: int) -> int:
    """Tokens, to a sixteenth, 0 if not even 8,192 fit: by doubling, then by halving what is left, four times."""

    def fits(length: int) -> bool:
        steps.set_length(length)
        return steps.peak_bytes(name) is not None

    low, high = 0, min(8192, limit)
    while fits(high):
        if high == limit:
            return limit
        low, high = high, min(2 * high, limit)
    for _ in range(4 if low else 0):
        middle = (low + high) // 32 * 16
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


def report_longest(report: Report, steps: Steps, shape: str, names: list[str], limit: int) -> None:
    x = f"{shape} shape, 1 row, windows of a quarter, bfloat16, activations recomputed, up to {limit} tokens"
    for name in names:
        length = longest_that_fits(steps, name, limit)
        if length:
            setting = {"what": "longest row, to a sixteenth", "x": x, "implementation": name}
            report.add(**setting, metric="longest row that fits", unit="tokens", values=[length])
    report.finish()


def check_known(option: str, given: tuple[str, ...], known: tuple[str, ...]) -> None:
    for name in given:
        if name not in known:
            raise SystemExit(f"--{option} {name}: expected one of {', '.join(map(repr, known))}")


def installed(steps: tuple[str, ...]) -> list[str]:
    """Those that can run; the others are named on standard error."""
    absent = [name for name in steps if name in OTHERS and importlib.util.find_spec(OTHERS[name][0]) is None]
    if absent:
        print(f"not installed, and left out: {'; '.join(absent)}", file=sys.stderr)
    return [name for name in steps if name not in absent]


@dataclass
class Gpu(Bench):
    """Speed, utilization and memory of a training step on one GPU.

    A quick run takes a tiny model on a short sequence, on a CPU where there is no GPU.
    """

    rounds: int = 3
    shapes: tuple[str, ...] = ("SmolLM2-135M", "Llama-3.2-1B")
    """Shapes of the models."""
    lengths: tuple[int, ...] = (8192, 32768, 131072)
    """Tokens of the sequences, multiples of 16."""
    steps: tuple[str, ...] = (*OURS, *OTHERS)
    """Steps to measure; without "uniform" there are no ratios of time. What is not installed is left out."""
    longest: bool = False
    """Find the longest sequence that fits, and measure nothing else."""
    limit: int = 2**19
    """Tokens of the longest sequence to try."""

    def run(self) -> None:
        check_known("steps", self.steps, (*STEPS, *OTHERS))
        check_known("shapes", self.shapes, tuple(SHAPES))
        if not (torch.cuda.is_available() or self.quick):
            print("gpu.py: no GPU that torch can use: nothing is measured", file=sys.stderr)
            return
        if self.quick:
            self.shapes, self.lengths, self.limit = ("tiny",), (256,), 2048
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        report, names = self.report("gpu"), installed(self.steps)
        others = sorted({OTHERS[name][0].replace("_", "-") for name in names if name in OTHERS} - {"transformers"})
        versions = [f"{name} {importlib.metadata.version(name)}" for name in others]
        report.conditions["versions"] = ", ".join([report.conditions["versions"], *versions])
        for shape in self.shapes:
            steps = Steps(shape, self.limit if self.longest else max(self.lengths), device)
            if self.longest:
                report_longest(report, steps, shape, names, self.limit)
            for length in () if self.longest else self.lengths:
                report_length(report, steps, shape, length, names, self.rounds)
            del steps  # before the next one is made


if __name__ == "__main__":
    tyro.cli(Gpu).run()
