"""Time and memory per token of a training step, forward and backward, as rows get longer.

    python benchmarks/growth.py                              some 12 minutes on two cores
    python benchmarks/growth.py --quick                      half a minute, on a short row: says nothing
    python benchmarks/growth.py --draw docs/growth           the figure of what results.csv holds, as SVG and PNG

A random model, so small that rows of 32k tokens are read on a CPU. What grows with the row is attention, whose share is
larger the smaller the model: only the lines of one model can be compared. The windows keep their size, so that scoring
costs the same per token at every length. The steps, and what a frozen scorer costs (nothing here), are those of
`training.py`; the stored scores are random numbers. Memory is what the peak of a step adds to a model with gradients,
in a process of its own where the C library gives back at once what is freed, divided by the tokens of the row.
"""

import functools
from pathlib import Path

import torch
import tyro
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullLocator

from common import GIVEN_BACK, RESULTS, Report, alternately, in_fresh_process, peak_bytes_over_now, tiny_llama
from results import Results, by_length
from tokenweight import Scorer, ShortContext, with_weighted_loss
from tokenweight.view import add_head, line_looks, new_panels, styled, write_figure
from training import STEPS, UNIFORM, run_step

KINDS = (UNIFORM, "frozen dense", "frozen sparse", "self-scored dense")
TIME, MEMORY = "time per token", f"peak memory over model and gradients per token, {GIVEN_BACK}"
Sizes = dict[str, int]
Lines = dict[str, list[tuple[int, float]]]
"""(tokens of a row, what was measured) by the name of the step."""


class Bench:
    """A model, a row, and the steps on them."""

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
        run_step(self.model, self.tokens, self.short_nll if STEPS[kind].reads_stored else None, autocast=False)


def measure_memory(kind: str, sizes: Sizes, length: int, context: ShortContext) -> float:
    """Bytes. A step on a short row goes first: it loads code, and makes the gradients."""
    bench = Bench(sizes, length, context)
    row, scores = bench.tokens, bench.short_nll
    bench.tokens, bench.short_nll = row[:, : context.size + 8], scores[:, : context.size + 8]
    bench.bind(kind)
    bench.run(kind)
    bench.tokens, bench.short_nll = row, scores
    bench.bind(kind)
    return peak_bytes_over_now(lambda: bench.run(kind))


def report_length(
    report: Report, sizes: Sizes, length: int, context: ShortContext, rounds: int, weighed: tuple[str, ...]
) -> None:
    """Rows of the time of every kind, and of the memory of those `weighed`."""
    bench = Bench(sizes, length, context)
    seconds = alternately({kind: functools.partial(bench.run, kind) for kind in KINDS}, rounds, bench.bind)
    del bench
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


def growth_figure(times: Lines, memory: Lines) -> Figure:
    """Time (microseconds per token; equal distances are equal ratios) and peak memory (KiB per token) by length."""
    lengths = sorted({length for points in times.values() for length, _ in points})
    with styled("screen"):
        figure, panels = new_panels("screen", [0.5, 0.3])
        for axes, found in zip(panels, (times, memory)):
            for (name, points), look in zip(found.items(), line_looks(len(found))):
                axes.plot(*zip(*points), marker="o", markersize=3, label=name, **look)
        panels[0].set(xscale="log", yscale="log", ylabel="µs per token")
        panels[0].yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        panels[0].yaxis.set_major_formatter("{x:g}")
        panels[0].yaxis.set_minor_locator(NullLocator())
        panels[1].set(ylabel="KiB per token", xlabel="tokens of a row; 1k is 1024")
        panels[1].set_ylim(bottom=0)
        panels[1].set_xticks(lengths, [f"{length / 1024:g}k" for length in lengths])
        panels[1].xaxis.set_minor_locator(NullLocator())
        add_head(figure, panels[0], "screen", "Time and memory of a training step")
    return figure


def draw_figure(results: Path, path: Path) -> None:
    times, memory = (
        {kind: list(points.items()) for kind, points in by_length(Results(results), metric).items()}
        for metric in (TIME, MEMORY)
    )
    if not times:
        raise SystemExit(f"{results} holds no rows of growth: run benchmarks/growth.py first")
    write_figure(growth_figure(times, memory), path)


def main(
    *,
    lengths: tuple[int, ...] = (1024, 2048, 4096, 8192, 16384, 32768),
    size: int = 512,
    stride: int = 384,
    layers: int = 2,
    width: int = 128,
    words: int = 8192,
    rounds: int = 2,
    draw: Path | None = None,
    quick: bool = False,
    csv: Path | None = None,
) -> None:
    """Time and memory per token as rows get longer.

    Args:
        lengths: tokens of the rows.
        size: tokens that a window reads.
        stride: tokens that a window scores.
        layers: of the model.
        width: of its states; a multiple of 8.
        words: of its vocabulary.
        rounds: of timings, after one that is not counted.
        draw: draw what the table of results holds to this path, as SVG and PNG, and measure nothing.
        quick: a short row, one round, memory of the first and the last kind, to see that the benchmark runs; writes no
            file unless `csv` is given.
        csv: file to append rows to (or to draw); by default results.csv beside this script.
    """
    if draw is not None:
        draw_figure(csv or RESULTS, draw)
        return
    if quick:
        lengths, size, stride, width, words, rounds = (256,), 32, 24, 32, 256, 1
    sizes = {"num_hidden_layers": layers, "hidden_size": width, "intermediate_size": 3 * width, "vocab_size": words}
    report = Report("growth", csv if quick or csv else RESULTS)
    for length in lengths:
        report_length(report, sizes, length, ShortContext(size, stride), rounds, KINDS[::3] if quick else KINDS)
        report.finish()


if __name__ == "__main__":
    tyro.cli(main)
