"""Error of scores and weights when the scorer is in bfloat16, compared with float32.

    python benchmarks/precision.py            some minutes on two cores, 2 GiB of memory
    python benchmarks/precision.py --quick    seconds, on a tiny model: a smoke test

A frozen scorer needs no gradients, and many devices read windows faster in 16 bits. The price is rounding, and a score
is a small difference of two losses. Weights and decoder are rounded; products with the head are summed in float32.
"scorer" leaves the long losses in float32, as for a model trained in it; "scorer, and model" rounds both, which
changes weights only. Each value is of one sequence; errors of losses exclude the first window, whose tokens have the
same context in both. p50, p20 and p80 are over sequences. No time is measured: a CPU without bfloat16 instructions
tells nothing about a GPU.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
import tyro

from bench.models import model_and_row
from bench.report import Bench
from tokenweight import Scorer, ShortContext, parse_weighting, token_nll

WEIGHTINGS = {"dense": "dense:interpolation=0.75", "longce": "longce:cap=5", "sparse": "sparse:keep=0.2"}


class Losses(NamedTuple):
    """Losses of the same sequences, `[batch, length]`."""

    long: torch.Tensor
    short: torch.Tensor


def errors(rounded: Losses, exact: Losses, size: int) -> dict[tuple[str, str], torch.Tensor]:
    """Errors of the scores: (metric, unit) -> value of each sequence."""
    error = (rounded.short - exact.short).abs()[:, size:]
    contrast = (exact.long - exact.short).abs()[:, size:]
    return {
        ("mean error of a short loss", "nats"): error.mean(dim=1),
        ("its 99th percentile", "nats"): error.quantile(0.99, dim=1),
        ("mean error / mean |long - short|", "1"): error.mean(dim=1) / contrast.mean(dim=1),
    }


def changes(rounded: Losses, exact: Losses) -> dict[tuple[str, str], torch.Tensor]:
    """Changes of the weights: (metric, unit) -> value of each sequence, whose first token has no weight."""
    mask, found = torch.ones_like(exact.long, dtype=torch.bool), {}
    mask[:, 0] = False
    for name, text in WEIGHTINGS.items():
        weighting = parse_weighting(text)
        before, after = weighting(*exact, mask), weighting(*rounded, mask)
        if name == "sparse":
            kept, same = before > 0, (before > 0) & (after > 0)
            found["tokens of sparse that stay", "1"] = same.sum(dim=1) / kept.sum(dim=1)
        else:
            found[f"mean change of a weight, {name}", "1"] = (after - before).abs()[:, 1:].mean(dim=1)
    return found


@dataclass
class Precision(Bench):
    """Error of scores and weights in bfloat16."""

    rounds: tyro.conf.Suppress[int] = 1
    rows: int = 4
    """Sequences that one text is cut into."""
    length: int = 2048
    """Tokens of a sequence, a multiple of 16."""
    size: int = 512
    """Tokens that a window reads."""
    stride: int = 384
    """Tokens that a window scores."""

    def run(self) -> None:
        rows, few = self.rows, 16 if self.quick else 1
        length, context = self.length // few, ShortContext(self.size // few, self.stride // few)
        report, losses = self.report("precision"), {}
        for dtype in (torch.float32, torch.bfloat16):
            name, model, tokens = model_and_row(rows * length, quick=self.quick, dtype=dtype)
            tokens = tokens.view(rows, length)
            losses[dtype] = Losses(token_nll(model, tokens), Scorer(model, context)(tokens))
        exact, rounded = losses.values()
        scorer = rounded._replace(long=exact.long)
        found = {
            "scorer": errors(scorer, exact, context.size) | changes(scorer, exact),
            "scorer, and model": changes(rounded, exact),
        }
        x = f"{name}, {rows} x {length} tokens, windows {context.size}/{context.stride}"
        for who, metrics in found.items():
            setting = {"what": "scores and weights in bfloat16, beside float32", "x": x, "implementation": who}
            report.add_each({metric: values.tolist() for metric, values in metrics.items()}, **setting)
        report.finish()


if __name__ == "__main__":
    tyro.cli(Precision).run()
