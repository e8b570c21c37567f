"""One training step (forward and backward, no optimizer) under several weightings, beside what arithmetic says.

    python benchmarks/training.py            about 20 minutes on two cores, 8 GiB of memory
    python benchmarks/training.py --quick    seconds, on a tiny model: says nothing

The arithmetic counts multiply-adds only. With B the decoder's forward pass over the row, H one product with the output
head for every predicted token, k the share of tokens with a weight, and S scoring (forward pass over the tokens that
the windows read, head on those they score; the first window is not read when the model scores itself):

    uniform, longce    3 B + 3 H                one pass: the weight is known, or follows from the token's own losses
    dense              3 B + 4 H                the weights need all losses first
    sparse             3 B + (1 + 3 k) H        gradients for tokens with a weight only
    self-scored        the same + S

A frozen scorer costs nothing here: its losses are a column of the data. The ratios are to the uniform step; "measured /
arithmetic" above 1 is time that multiply-adds do not explain. Under --autocast the decoder runs in bfloat16 and, on a
CPU, the head in float32: equal FLOPs then take unequal time, and the arithmetic says little.
"""

import contextlib
import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import tyro

from bench.measure import alternately
from bench.models import model_and_row
from bench.report import Bench
from tokenweight import Scorer, ShortContext, Weighting, parse_weighting, with_weighted_loss
from tokenweight.method import sliding_windows
from tokenweight.plan import count_forward, step_flops

UNIFORM = "uniform"


@dataclass(frozen=True)
class Step:
    """A weighting, and whether the model scores itself or finds the scores of a frozen model in the data."""

    weighting: Weighting
    self_scored: bool

    @property
    def reads_stored(self) -> bool:
        """Whether it needs the column of short losses."""
        return self.weighting.uses_short and not self.self_scored


STEPS = {
    UNIFORM: Step(parse_weighting("uniform"), self_scored=False),
    "frozen dense": Step(parse_weighting("dense:interpolation=0.75"), self_scored=False),
    "frozen longce": Step(parse_weighting("longce"), self_scored=False),
    "frozen sparse": Step(parse_weighting("sparse:keep=0.2"), self_scored=False),
    "self-scored dense": Step(parse_weighting("dense:interpolation=0.75"), self_scored=True),
    "self-scored sparse": Step(parse_weighting("sparse:keep=0.2"), self_scored=True),
}


def flops_of(model: Any, step: Step, length: int, context: ShortContext, *, checkpointing: bool = False) -> float:
    """FLOPs of a step: the table at the top of this file."""
    scored = sliding_windows(length, context.size, context.stride) if step.self_scored else []
    forward = count_forward(model.config)
    return step_flops(forward, length, step.weighting, scored, checkpointing=checkpointing).total


def run_step(model: Any, tokens: torch.Tensor, short_nll: torch.Tensor | None, autocast: bool) -> None:
    with torch.autocast("cpu", torch.bfloat16) if autocast else contextlib.nullcontext():
        loss = model(input_ids=tokens, labels=tokens, short_nll=short_nll).loss
    loss.backward()


def measure(
    model: Any, tokens: torch.Tensor, context: ShortContext, rounds: int, autocast: bool
) -> dict[str, list[float]]:
    scorer = Scorer(model, context)
    short_nll = scorer(tokens)

    def prepare(name: str) -> None:
        model.zero_grad(set_to_none=True)
        with_weighted_loss(model, STEPS[name].weighting, scorer if STEPS[name].self_scored else None)

    runs: dict[str, Callable[[], Any]] = {}
    for name, step in STEPS.items():
        column = short_nll if step.reads_stored else None
        runs[name] = functools.partial(run_step, model, tokens, column, autocast)
    return alternately(runs, rounds, prepare)


@dataclass
class Training(Bench):
    """Time of a training step."""

    length: int = 2048
    """Tokens of the sequence, a multiple of 16; windows read a quarter and score 3/16 of it."""
    autocast: bool = False
    """Run the forward pass under bfloat16 autocast."""

    def run(self) -> None:
        report, length = self.report("training"), self.length // 16 if self.quick else self.length
        context = ShortContext(size=length // 4, stride=3 * length // 16)
        name, model, tokens = model_and_row(length, quick=self.quick)
        model.train()
        seconds = measure(model, tokens, context, self.rounds, self.autocast)
        flops = {run: flops_of(model, step, length, context) for run, step in STEPS.items()}
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
