"""Scoring with a short context: tokens read per second, relative to the plain forward pass of the same model.

    python benchmarks/scoring.py            about 10 minutes on two cores
    python benchmarks/scoring.py --quick    seconds, on a tiny model: a smoke test

A scorer that is another model reads every window of a sequence, including the first. All tokens that the windows read
are counted, overlaps included, whether scored or not. Two baselines run `model(tokens).logits` without gradient:

    forward of the windows    the very same tokens in the same batches: decoder and full logits, no loss
    forward of the row        the sequence at its full length, once: what scoring costs relative to the long context
"""

import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any

import datasets
import torch
import tyro

from bench.measure import alternately
from bench.models import model_and_row
from bench.report import Bench
from tokenweight import Scorer, ShortContext
from tokenweight.data import RowScorer, score_rows
from tokenweight.method import sliding_windows

SCORER = "tokenweight.Scorer"
STORED = "tokenweight.score_rows, to disk"
WINDOWS = "forward of the windows"
ROW = "forward of the row"


def window_batch(tokens: torch.Tensor, context: ShortContext) -> torch.Tensor:
    """All windows of a sequence that the scorer reads, as one batch; they must be full."""
    spans = [
        (0, context.size),
        *((w.start, w.stop) for w in sliding_windows(tokens.shape[1], context.size, context.stride)),
    ]
    return torch.stack([tokens[0, start:stop] for start, stop in spans])


@torch.no_grad()
def measure(
    model: Any, tokens: torch.Tensor, batch: torch.Tensor, scorer: Scorer, rounds: int
) -> dict[str, list[float]]:
    rows, row_scorer = datasets.Dataset.from_dict({"input_ids": tokens.tolist()}), RowScorer(model, [scorer.context])
    folder, numbers = tempfile.mkdtemp(), count()
    runs: dict[str, Callable[[], Any]] = {
        SCORER: lambda: scorer(tokens),
        STORED: lambda: score_rows(rows, row_scorer, Path(folder) / str(next(numbers)), provenance={}),
        WINDOWS: lambda: model(input_ids=batch, use_cache=False).logits,
        ROW: lambda: model(input_ids=tokens, use_cache=False).logits,
    }
    return alternately(runs, rounds)


@dataclass
class Scoring(Bench):
    """Speed of scoring."""

    rounds: int = 7
    length: int = 4096
    """Tokens of the sequence."""
    size: int = 1024
    """Tokens that a window reads."""
    stride: int = 768
    """Tokens that a window scores; must divide length - size."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.quick:
            self.length, self.size, self.stride = self.length // 64, self.size // 64, self.stride // 64
        if (self.length - self.size) % self.stride:
            found = f"stride={self.stride}: expected a divisor of length - size = {self.length - self.size}"
            raise SystemExit(found)

    def run(self) -> None:
        report = self.report("scoring")
        name, model, tokens = model_and_row(self.length, quick=self.quick)
        scorer = Scorer(model, ShortContext(self.size, self.stride))
        batch = window_batch(tokens, scorer.context)
        seconds = measure(model, tokens, batch, scorer, self.rounds)
        num_read = {**dict.fromkeys(seconds, batch.numel()), ROW: tokens.numel()}
        speeds = {run: [num_read[run] / value for value in values] for run, values in seconds.items()}
        x = f"{name}, row {self.length}, {len(batch)} windows {self.size}/{self.stride}, float32"
        for run, values in seconds.items():
            setting = {"what": "scoring a row with a short context", "x": x, "implementation": run}
            report.add(**setting, metric="time", unit="s", values=values)
            report.add(**setting, metric="tokens read per second", unit="tokens/s", values=speeds[run])
            for other in (WINDOWS, ROW) if run in (SCORER, STORED) else ():
                metric = f"tokens read per second / {other}"
                report.add_ratio(**setting, metric=metric, over=speeds[run], under=speeds[other])
        report.finish()


if __name__ == "__main__":
    tyro.cli(Scoring).run()
