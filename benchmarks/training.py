"""One training step (forward and backward, no optimizer) under several weightings, beside its FLOP estimate.

    python benchmarks/training.py            about 20 minutes on two cores, 8 GiB of memory
    python benchmarks/training.py --others   the same for weightings beyond those of the paper
    python benchmarks/training.py --compiled the same with the decoder compiled, as `--trainer.torch_compile true` does
    python benchmarks/training.py --quick    seconds, on a tiny model: a smoke test

The estimate counts multiply-adds only. With B the decoder's forward pass over the sequence, H one product with the
output head for every predicted token, k the fraction of tokens with a weight, and S scoring (forward pass over the
tokens that the windows read, head on those they score; the first window is not read when the model scores itself):

    uniform, longce    3 B + 3 H                one pass: the weight is known, or follows from the token's own losses
    dense, gain, …     3 B + 4 H                the weights need all losses first (3 H if all logits fit at once)
    sparse, rho1, …    3 B + (1 + 3 k) H        gradients for tokens with a weight only
    of the scorer      3 B + (1 + 2 k) H        contrast scorer, divergences, positions: weights are known before
    self-scored        the same + S, and for a divergence H once more for the tokens of the windows

A frozen scorer costs nothing here: its scores are columns of the data. Those of a selection are random, as only its k
matters. `CountScorer` counts within the step, on the CPU; no model reads a window for it. The ratios are to the uniform
step; "measured / arithmetic" above 1 is time that multiply-adds do not explain. Under --autocast the decoder runs in
bfloat16 and, on a CPU, the head in float32: equal FLOPs then take unequal time, and the estimate says little.
"""

import contextlib
import dataclasses
import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import tyro

from bench.measure import alternately
from bench.models import model_and_row
from bench.report import Bench
from tokenweight import CountScorer, Scorer, ShortContext, Weighting, parse_weighting, with_weighted_loss
from tokenweight.method import fit_at_once, sliding_windows
from tokenweight.models import causal_parts, score_columns
from tokenweight.plan import count_forward, step_flops

UNIFORM = "uniform"


@dataclass(frozen=True)
class Step:
    """A training step: weighting, self-scored or stored scores, contrast, whether `CountScorer` counts within the step,
    and whether the decoder is compiled."""

    weighting: Weighting
    self_scored: bool = False
    contrast: str = "trained"
    counted: bool = False
    compiled: bool = False

    @property
    def columns(self) -> frozenset[str]:
        """The data columns that the step needs."""
        return frozenset() if self.self_scored else score_columns(self.weighting, self.contrast)


STEPS = {
    UNIFORM: Step(parse_weighting("uniform")),
    "frozen dense": Step(parse_weighting("dense:interpolation=0.75")),
    "frozen longce": Step(parse_weighting("longce")),
    "frozen sparse": Step(parse_weighting("sparse:keep=0.2")),
    "count-scored dense": Step(parse_weighting("dense:interpolation=0.75"), contrast="scorer", counted=True),
    "self-scored dense": Step(parse_weighting("dense:interpolation=0.75"), self_scored=True),
    "self-scored sparse": Step(parse_weighting("sparse:keep=0.2"), self_scored=True),
}
KIN = {
    UNIFORM: STEPS[UNIFORM],
    "frozen dense": STEPS["frozen dense"],
    "dense of the scorer": Step(parse_weighting("dense:interpolation=0.75"), contrast="scorer"),
    "sparse of the scorer": Step(parse_weighting("sparse:keep=0.2"), contrast="scorer"),
    "exact": Step(parse_weighting("exact:threshold=512")),
    "eslm": Step(parse_weighting("eslm:keep=0.9")),
    "rho1": Step(parse_weighting("rho1:keep=0.6")),
    "frozen gain": Step(parse_weighting("gain")),
    "frozen longfilter": Step(parse_weighting("longfilter")),
    "frozen mix": Step(parse_weighting("mix(dense, uniform, share=0.5)")),
    "frozen expected gain": Step(parse_weighting("expected(gain)")),
    "self-scored dense": STEPS["self-scored dense"],
    "self-scored expected gain": Step(parse_weighting("expected(gain)"), self_scored=True),
    "self-scored expected boundedgain": Step(parse_weighting("expected(boundedgain)"), self_scored=True),
}
"""Weightings beyond those of the paper, with dense for comparison."""
COMPILED = {
    f"{name}, compiled" if compiled else name: dataclasses.replace(STEPS[name], compiled=compiled)
    for name in (UNIFORM, "frozen dense", "self-scored dense")
    for compiled in (False, True)
}


def flops_of(model: Any, step: Step, length: int, context: ShortContext, *, checkpointing: bool = False) -> float:
    """FLOPs of a step, by the table at the top of this file."""
    scored = sliding_windows(length, context.size, context.stride) if step.self_scored else []
    forward = count_forward(model.config)
    at_once = fit_at_once(length, model.config.vocab_size)
    counted: dict[str, Any] = {"contrast": step.contrast, "checkpointing": checkpointing, "at_once": at_once}
    return step_flops(forward, length, step.weighting, scored, **counted).total


def run_step(model: Any, tokens: torch.Tensor, scores: dict[str, torch.Tensor], autocast: bool) -> None:
    with torch.autocast("cpu", torch.bfloat16) if autocast else contextlib.nullcontext():
        loss = model(input_ids=tokens, labels=tokens, **scores).loss
    loss.backward()


def measure(
    model: Any, tokens: torch.Tensor, context: ShortContext, rounds: int, autocast: bool, steps: dict[str, Step]
) -> dict[str, list[float]]:
    scorer = Scorer(model, context)
    long_nll = scorer.long_nll(tokens)
    drawn = {name: torch.rand(tokens.shape) for name in ("ref_nll", "divergence")}  # no cost depends on their values
    columns = {"long_nll": long_nll, "short_nll": scorer(tokens, long_nll=long_nll), **drawn}

    decoder = causal_parts(model).decoder
    compiled = decoder._compiled_call_impl

    def prepare(name: str) -> None:
        model.zero_grad(set_to_none=True)
        step = steps[name]
        decoder._compiled_call_impl = compiled if step.compiled else None
        with_weighted_loss(model, step.weighting, scorer if step.self_scored else None, contrast=step.contrast)

    counter = CountScorer(vocab_size=model.config.vocab_size, divergence=False)

    def run(step: Step) -> None:
        found = counter(tokens, context) if step.counted else None
        scores = {column: columns[column] if found is None else getattr(found, column) for column in step.columns}
        run_step(model, tokens, scores, autocast)

    runs: dict[str, Callable[[], Any]] = {name: functools.partial(run, step) for name, step in steps.items()}
    return alternately(runs, rounds, prepare)


@dataclass
class Training(Bench):
    """Time of a training step."""

    length: int = 2048
    """Tokens of the sequence, a multiple of 16; windows read a quarter and score 3/16 of it."""
    autocast: bool = False
    """Run the forward pass under bfloat16 autocast."""
    others: bool = False
    """Weightings beyond those of the paper."""
    compiled: bool = False
    """Compare the compiled decoder with the uncompiled one."""

    def run(self) -> None:
        kind = "weightings" if self.others else "compiled" if self.compiled else "training"
        report = self.report(kind)
        length = self.length // 16 if self.quick else self.length
        context = ShortContext(size=length // 4, stride=3 * length // 16)
        name, model, tokens = model_and_row(length, quick=self.quick)
        model.train()
        if self.compiled:  # inductor takes minutes
            causal_parts(model).decoder.compile(backend="eager" if self.quick else "inductor")
        steps = {"weightings": KIN, "compiled": COMPILED, "training": STEPS}[kind]
        seconds = measure(model, tokens, context, self.rounds, self.autocast, steps)
        flops = {run: flops_of(model, step, length, context) for run, step in steps.items()}
        x = f"{name}, 1 x {length} tokens, windows {context.size}/{context.stride}, "
        x += "bfloat16 autocast" if self.autocast else "float32"
        for run, values in seconds.items():
            setting = {"what": "training step, forward and backward", "x": x, "implementation": run}
            ratio = flops[run] / flops[UNIFORM]
            report.add(**setting, metric="time", unit="s", values=values)
            report.add_ratio(**setting, metric=f"time / {UNIFORM}", over=values, under=seconds[UNIFORM])
            report.add(**setting, metric=f"arithmetic / {UNIFORM}", unit="1", values=[ratio])
            predicted = [ratio * value for value in seconds[UNIFORM]]
            report.add_ratio(**setting, metric="measured / arithmetic", over=values, under=predicted)
        report.finish()


if __name__ == "__main__":
    tyro.cli(Training).run()
