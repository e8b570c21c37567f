"""Time and memory per token of a training step, forward and backward, as sequences get longer.

    python benchmarks/growth.py                              some 12 minutes on two cores
    python benchmarks/growth.py --quick                      half a minute, on a short sequence: a smoke test
    python benchmarks/growth.py --draw docs/growth           the figure of results.csv, as SVG and PNG
    python benchmarks/growth.py --long                       up to 131,072 tokens, one step each
    python benchmarks/growth.py --long --draw docs/length    its figure

The model is random, and small enough for a CPU to read 32k tokens. What grows with the length is attention, whose
fraction is larger the smaller the model: only lines of one model can be compared. The windows keep their size, so
scoring costs the same per token at every length. The steps, and the cost of a frozen scorer (nothing here), are those
of `training.py`; the stored scores are random numbers. Memory is what the peak of a step adds to a model with
gradients, in a fresh process where the C library returns freed memory at once, divided by the tokens of the sequence.

With --long, each type is measured once at each length, after a step on a short sequence, and all types of one length in
one process. "counted" counts the sequence (`CountScorer`) and trains on that contrast; "evaluation" computes the long
and the short losses of all tokens, "dual-chunk losses" the long ones by Dual Chunk Attention in two chunks, "retrieval
heads" the score of every head for one fact. Memory is shown beside the estimate of `tokenweight plan`.
"""

import functools
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import tyro

from bench.measure import GIVEN_BACK, alternately, in_fresh_process, peak_bytes_over_now
from bench.models import tiny_llama
from bench.report import RESULTS, Bench, Report
from bench.results import Results, by_length
from tokenweight import Scorer, ShortContext, parse_weighting, token_nll, with_weighted_loss
from tokenweight.evaluate import retrieval_scores
from tokenweight.evaluate.heads import HeadSample
from tokenweight.models import CountScorer, with_dual_chunk
from tokenweight.plan.memory import hold
from training import STEPS, UNIFORM, Step, run_step

KINDS = (UNIFORM, "frozen dense", "frozen sparse", "self-scored dense")
TIME, MEMORY = "time per token", f"peak memory over model and gradients per token, {GIVEN_BACK}"
COUNTED, EVALUATION, DUAL_CHUNK, HEADS = "counted dense", "evaluation", "dual-chunk losses", "retrieval heads"
LONG_KINDS = ("frozen dense", "self-scored dense", COUNTED, EVALUATION, DUAL_CHUNK, HEADS)
SECONDS, PLANNED = "CPU time of a step", "peak memory over model and gradients per token, by plan"
Sizes = dict[str, int]
Lines = dict[str, list[tuple[int, float]]]
"""Type of step -> (tokens of a sequence, value)."""


class Steps:
    """A model, a sequence, and the steps on them, by name."""

    def __init__(self, sizes: Sizes, length: int, context: ShortContext) -> None:
        self.model = tiny_llama(**sizes, max_position_embeddings=length).train()
        self.context = context
        self.tokens = torch.randint(self.model.config.vocab_size, (1, length))
        self.short_nll = 10 * torch.rand(1, length)

    def bind(self, kind: str) -> None:
        """Zero the gradients, and bind the weighting."""
        self.model.zero_grad(set_to_none=False)
        scorer = Scorer(self.model, self.context) if STEPS[kind].self_scored else None
        with_weighted_loss(self.model, STEPS[kind].weighting, scorer)

    def run(self, kind: str) -> None:
        run_step(self.model, self.tokens, dict.fromkeys(STEPS[kind].columns, self.short_nll), autocast=False)


def measure_memory(kind: str, sizes: Sizes, length: int, context: ShortContext) -> float:
    """Peak bytes of a step, after a warm-up on a short sequence, which loads code and allocates the gradients."""
    steps = Steps(sizes, length, context)
    row, scores = steps.tokens, steps.short_nll
    steps.tokens, steps.short_nll = row[:, : context.size + 8], scores[:, : context.size + 8]
    steps.bind(kind)
    steps.run(kind)
    steps.tokens, steps.short_nll = row, scores
    steps.bind(kind)
    return peak_bytes_over_now(lambda: steps.run(kind))


def measure_long(kind: str, sizes: Sizes, length: int, context: ShortContext) -> tuple[float, float]:
    """CPU seconds and peak bytes of one step."""
    steps = Steps(sizes, length, context)
    model, row, seconds = steps.model, steps.tokens, 0.0

    def run(tokens: torch.Tensor) -> None:
        nonlocal seconds
        begin = time.process_time()
        if kind == EVALUATION:
            scorer = Scorer(model.eval(), context)
            scorer(tokens, long_nll=scorer.long_nll(tokens))
        elif kind == DUAL_CHUNK:
            token_nll(model, tokens)
        elif kind == HEADS:  # the answer repeats four tokens near the beginning
            text = [*tokens[0, :-4].tolist(), *tokens[0, 8:12].tolist()]
            retrieval_scores(model.eval(), [HeadSample(text, needle=range(8, 12), answer=len(text) - 4)])
        elif kind == COUNTED:
            step = Step(parse_weighting("dense:interpolation=0.75"), contrast="scorer")
            found = CountScorer(vocab_size=sizes["vocab_size"], divergence=False)(tokens, context)
            with_weighted_loss(model, step.weighting, contrast=step.contrast)
            run_step(model, tokens, {"long_nll": found.long_nll, "short_nll": found.short_nll}, autocast=False)
        else:
            steps.tokens, steps.short_nll = tokens, 10 * torch.rand(tokens.shape)
            steps.bind(kind)
            steps.run(kind)
        seconds = time.process_time() - begin

    if kind == DUAL_CHUNK:
        with_dual_chunk(model.eval())
    model.zero_grad(set_to_none=False)
    run(row[:, : context.size + 8])
    model.zero_grad(set_to_none=False)
    peak = peak_bytes_over_now(lambda: run(row))
    return seconds, peak


def planned_bytes(kind: str, sizes: Sizes, length: int, context: ShortContext) -> float:
    """Memory of a step as `tokenweight plan` estimates it, beyond existing weights and gradients."""
    config = tiny_llama(**sizes, max_position_embeddings=length).config
    held = hold(config, length, context=context if kind == "self-scored dense" else None, new_gradients=False)
    return max(held.scoring, held.forward, held.kept + held.loss, held.backward)


def measure_kinds(sizes: Sizes, length: int, context: ShortContext) -> dict[str, tuple[float, float]]:
    """Run `measure_long` for all types of step, one after the other."""
    return {kind: measure_long(kind, sizes, length, context) for kind in LONG_KINDS}


def report_long(report: Report, sizes: Sizes, length: int, context: ShortContext) -> None:
    """Add the rows of every type of step at one length."""
    shape = f"{sizes['num_hidden_layers']} layer, {sizes['hidden_size']} wide, {sizes['vocab_size']} words"
    x = f"random Llama ({shape}), 1 x {length} tokens, windows {context.size}/{context.stride}, float32"
    found = in_fresh_process(measure_kinds, sizes, length, context, keep_freed=False)
    for kind, (seconds, peak) in found.items():
        setting = {"what": "one step on a long sequence", "x": x, "implementation": kind}
        report.add(**setting, metric=SECONDS, unit="s", values=[seconds])
        report.add(**setting, metric=MEMORY, unit="KiB", values=[peak / 1024 / length])
        if kind not in (EVALUATION, DUAL_CHUNK, HEADS):
            planned = planned_bytes(kind, sizes, length, context) / 1024 / length
            report.add(**setting, metric=PLANNED, unit="KiB", values=[planned])
    report.finish()


def report_length(
    report: Report, sizes: Sizes, length: int, context: ShortContext, rounds: int, weighed: tuple[str, ...]
) -> None:
    """Add the time of every type of step, and the memory of those in `weighed`."""
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
    """Matplotlib figure of time per token, on a log scale, and memory per token."""
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


def length_figure(memory: Lines, planned: Lines) -> Any:
    """Matplotlib figure of the memory of a step by sequence length, with the plan's estimates dotted."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4), layout="constrained")
    panel = figure.subplots()
    colors = dict(zip(memory, ("#1f5a92", "#f59132", "#333333", "#69a8de", "#7a4b9a", "#4f9a54")))
    for found, style in ((memory, {"marker": "o", "markersize": 3}), (planned, {"linestyle": ":"})):
        for kind, points in found.items():
            label = f"{kind}, planned" if found is planned else kind
            lengths, values = zip(*((length, length * kib / 2**20) for length, kib in points))
            panel.plot(lengths, values, color=colors[kind], label=label, **style)
    lengths = sorted({length for points in memory.values() for length, _ in points})
    panel.set(title="Memory of a step", ylabel="GiB", xlabel="tokens of a sequence (k: 1,024 tokens)")
    panel.set(xlim=(0, None), ylim=(0, None))
    panel.set_xticks(lengths, [f"{length / 1024:g}k" for length in lengths])
    panel.spines[["top", "right"]].set_visible(False)
    panel.legend(frameon=False, fontsize="small", loc="upper left", bbox_to_anchor=(1, 1))
    return figure


def draw_long_figure(results: Path, path: Path) -> None:
    """Draw the stored results of --long: `path`.svg and `path`.png."""
    from tokenweight.view import write_figure

    found = [by_length(Results(results), metric, "length") for metric in (MEMORY, PLANNED)]
    if not all(found):
        raise SystemExit(f"{results} holds no results of long sequences: run benchmarks/growth.py --long first")
    write_figure(length_figure(*({kind: [*points.items()] for kind, points in one.items()} for one in found)), path)


def draw_figure(results: Path, path: Path) -> None:
    """Draw the stored results: `path`.svg and `path`.png."""
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
    long: bool = False
    """Measure one step of each type on up to 131,072 tokens, with a smaller model: the rows of `length`."""
    long_lengths: tuple[int, ...] = (16384, 32768, 65536, 131072)
    """Tokens of the sequences of --long."""
    draw: Path | None = None
    """Draw the stored results (--csv) to this path, as SVG and PNG, and measure nothing."""

    def run(self) -> None:
        if self.draw is not None:
            (draw_long_figure if self.long else draw_figure)(self.csv or RESULTS, self.draw)
            return
        if self.long:
            self.run_long()
            return
        if self.quick:
            self.lengths, self.size, self.stride, self.width, self.words = (256,), 32, 24, 32, 256
        sizes = {"hidden_size": self.width, "intermediate_size": 3 * self.width, "vocab_size": self.words}
        sizes |= {"num_hidden_layers": self.layers}
        report, context = self.report("growth"), ShortContext(self.size, self.stride)
        for length in self.lengths:
            report_length(report, sizes, length, context, self.rounds, KINDS[::3] if self.quick else KINDS)
            report.finish()

    def run_long(self) -> None:
        """Measure one step of each type at each length."""
        lengths, context = self.long_lengths, ShortContext(self.size, self.stride)
        sizes = {"hidden_size": 16, "intermediate_size": 48, "vocab_size": 4096, "num_hidden_layers": 1}
        sizes |= {"num_attention_heads": 1, "num_key_value_heads": 1}
        if self.quick:
            lengths, context, sizes["vocab_size"] = (128,), ShortContext(32, 24), 256
        report = self.report("length")
        for length in lengths:
            report_long(report, sizes, length, context)


if __name__ == "__main__":
    tyro.cli(Growth).run()
