"""Time and memory per token of a training step, forward and backward, as sequences get longer.

    python benchmarks/growth.py                              some 12 minutes on two cores
    python benchmarks/growth.py --quick                      half a minute, on a short sequence: says nothing
    python benchmarks/growth.py --draw docs/growth           the figure of what results.csv holds, as SVG and PNG

A random model, so small that a CPU reads 32k tokens. What grows with the length is attention, whose share is
larger the smaller the model: only the lines of one model can be compared. The windows keep their size, so that scoring
costs the same per token at every length. The steps, and what a frozen scorer costs (nothing here), are those of
`training.py`; the stored scores are random numbers. Memory is what the peak of a step adds to a model with gradients,
in a process of its own where the C library gives back at once what is freed, divided by the tokens of the sequence.
"""

import functools
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import tyro

from bench.measure import GIVEN_BACK, alternately, in_fresh_process, peak_bytes_over_now
from bench.models import tiny_llama
from bench.report import RESULTS, Bench, Report
from bench.results import Results, by_length
from tokenweight import Scorer, ShortContext, with_weighted_loss
from training import STEPS, UNIFORM, run_step

KINDS = (UNIFORM, "frozen dense", "frozen sparse", "self-scored dense")
TIME, MEMORY = "time per token", f"peak memory over model and gradients per token, {GIVEN_BACK}"
Sizes = dict[str, int]
Lines = dict[str, list[tuple[int, float]]]
"""Kind of step -> (tokens of a sequence, value)."""


class Steps:
    """A model, a sequence, and the steps on them."""

    def __init__(self, sizes: Sizes, length: int, context: ShortContext) -> None:
        self.model = tiny_llama(**sizes, max_position_embeddings=length).train()
        self.context = context
        self.tokens = torch.randint(self.model.config.vocab_size, (1, length))
        self.short_nll = 10 * torch.rand(1, length)

    def bind(self, kind: str) -> None:
        """Gradients of 0, and the weighting."""
        self.model.zero_grad(set_to_none=False)
        scorer = Scorer(self.model, self.context) if STEPS[kind].self_scored else None
        with_weighted_loss(self.model, STEPS[kind].weighting, scorer)

    def run(self, kind: str) -> None:
        run_step(self.model, self.tokens, dict.fromkeys(STEPS[kind].columns, self.short_nll), autocast=False)


def measure_memory(kind: str, sizes: Sizes, length: int, context: ShortContext) -> float:
    """Bytes. A step on a short sequence goes first: it loads code, and makes the gradients."""
    steps = Steps(sizes, length, context)
    row, scores = steps.tokens, steps.short_nll
    steps.tokens, steps.short_nll = row[:, : context.size + 8], scores[:, : context.size + 8]
    steps.bind(kind)
    steps.run(kind)
    steps.tokens, steps.short_nll = row, scores
    steps.bind(kind)
    return peak_bytes_over_now(lambda: steps.run(kind))


def report_length(
    report: Report, sizes: Sizes, length: int, context: ShortContext, rounds: int, weighed: tuple[str, ...]
) -> None:
    """Rows of the time of every kind, and of the memory of those `weighed`."""
    steps = Steps(sizes, length, context)
    seconds = alternately({kind: functools.partial(steps.run, kind) for kind in KINDS}, rounds, steps.bind)
    del steps
    model = (
        f"random Llama ({sizes['num_hidden_layers']} layers, {sizes['hidden_size']} wide, {sizes['vocab_size']} words)"
    )
    x = f"{model}, 1 x {length} tokens, windows {context.size}/{context.stride}, float32"
    for kind, values in seconds.items():
        setting = {"what": "training step, forward and backward", "x": x, "implementation": kind}
        report.add(**setting, metric=TIME, unit="µs", values=[1e6 * value / length for value in values])
        report.add_ratio(**setting, metric=f"time / {UNIFORM}", over=values, under=seconds[UNIFORM])
        if kind not in weighed:
            continue
        peak = in_fresh_process(measure_memory, kind, sizes, length, context, keep_freed=False)
        report.add(**setting, metric=MEMORY, unit="KiB", values=[peak / 1024 / length])


def growth_figure(times: Lines, memory: Lines) -> Any:
    """A figure of matplotlib: time per token, of which equal distances are equal ratios, and memory per token."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogLocator, NullFormatter

    lengths = sorted({length for points in times.values() for length, _ in points})
    figure = Figure(figsize=(7, 6), layout="constrained")
    panels = figure.subplots(2, 1, sharex=True, height_ratios=[5, 3])
    styles = zip(("-", "--", "-.", ":"), ("#1f5a92", "#f59132", "#333333", "#69a8de"))
    looks = {kind: {"linestyle": line, "color": color} for kind, (line, color) in zip(times, styles)}
    for panel, found in zip(panels, (times, memory)):
        for kind, points in found.items():
            panel.plot(*zip(*points), marker="o", markersize=3, label=kind, **looks[kind])
        panel.spines[["top", "right"]].set_visible(False)
    panels[0].set(xscale="log", yscale="log", ylabel="µs per token", title="Time and memory of a training step")
    panels[0].yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    panels[0].yaxis.set_major_formatter("{x:g}")
    panels[0].yaxis.set_minor_formatter(NullFormatter())
    panels[0].legend(frameon=False)
    panels[1].set(ylabel="KiB per token", xlabel="tokens of a sequence (k: 1,024 tokens)", ylim=(0, None))
    panels[1].set_xticks(lengths, [f"{length / 1024:g}k" for length in lengths])
    panels[1].minorticks_off()
    return figure


def draw_figure(results: Path, path: Path) -> None:
    """Draw what the table of results holds: `path`.svg and `path`.png."""
    from tokenweight.view import write_figure

    found = [by_length(Results(results), metric) for metric in (TIME, MEMORY)]
    if not all(found):
        raise SystemExit(f"{results} holds no results of growth: run benchmarks/growth.py first")
    write_figure(growth_figure(*({kind: [*points.items()] for kind, points in one.items()} for one in found)), path)


@dataclass
class Growth(Bench):
    """Time and memory per token as sequences get longer."""

    rounds: int = 2
    lengths: tuple[int, ...] = (1024, 2048, 4096, 8192, 16384, 32768)
    """Tokens of the sequences."""
    size: int = 512
    """Tokens that a window reads."""
    stride: int = 384
    """Tokens that a window scores."""
    layers: int = 2
    """Layers of the model."""
    width: int = 128
    """Hidden size of the model; a multiple of 8."""
    words: int = 8192
    """Vocabulary size of the model."""
    draw: Path | None = None
    """Draw what the table of results (--csv) holds to this path, as SVG and PNG, and measure nothing."""

    def run(self) -> None:
        if self.draw is not None:
            draw_figure(self.csv or RESULTS, self.draw)
            return
        if self.quick:
            self.lengths, self.size, self.stride, self.width, self.words = (256,), 32, 24, 32, 256
        sizes = {"hidden_size": self.width, "intermediate_size": 3 * self.width, "vocab_size": self.words}
        sizes |= {"num_hidden_layers": self.layers}
        report, context = self.report("growth"), ShortContext(self.size, self.stride)
        for length in self.lengths:
            report_length(report, sizes, length, context, self.rounds, KINDS[::3] if self.quick else KINDS)
            report.finish()


if __name__ == "__main__":
    tyro.cli(Growth).run()
