"""Scoring with a short context: tokens read per second, beside the plain forward pass of the same model.

    python benchmarks/scoring.py            about 10 minutes on two cores
    python benchmarks/scoring.py --quick    seconds, on a tiny model: says nothing

The scorer of a frozen model reads every window of a row, the first one too. Counted are the tokens that the windows
read, overlaps included, whether they are scored or not. Two baselines run `model(tokens).logits` without gradient:

    forward of the windows    the very same tokens in the same batches: decoder and full logits, no loss
    forward of the row        the row at its full length, once: what scoring costs beside the long context
"""

import tempfile
from collections.abc import Callable
from itertools import count
from pathlib import Path
from typing import Any

import datasets
import torch
import tyro

from common import RESULTS, Report, alternately, model_and_row
from tokenweight import Scorer, ShortContext
from tokenweight.data import RowScorer, score_rows
from tokenweight.method import sliding_windows

SCORER = "tokenweight.Scorer"
STORED = "tokenweight.score_rows, to disk"
WINDOWS = "forward of the windows"
ROW = "forward of the row"


def window_batch(tokens: torch.Tensor, context: ShortContext) -> torch.Tensor:
    """What the scorer reads of a row, as one batch; all windows must be full."""
    spans = [
        (0, context.size),
        *((w.start, w.stop) for w in sliding_windows(tokens.shape[1], context.size, context.stride)),
    ]
    return torch.stack([tokens[0, start:stop] for start, stop in spans])


def main(
    *,
    length: int = 4096,
    size: int = 1024,
    stride: int = 768,
    rounds: int = 7,
    quick: bool = False,
    csv: Path | None = None,
) -> None:
    """Speed of scoring.

    Args:
        length: tokens of the row.
        size: tokens that a window reads.
        stride: tokens that a window scores; must divide length - size.
        rounds: of timings, after one that is not counted.
        quick: a tiny model, a 64th of the tokens, one round, to see that the benchmark runs; writes no file unless
            `csv` is given.
        csv: file to append rows to; by default results.csv beside this script.
    """
    if quick:
        length, size, stride, rounds = length // 64, size // 64, stride // 64, 1
    if (length - size) % stride:
        raise SystemExit(f"stride={stride}: expected a divisor of length - size = {length - size}")
    report = Report("scoring", csv if quick or csv else RESULTS)
    name, model, tokens = model_and_row(length, quick=quick)
    scorer = Scorer(model, ShortContext(size, stride))
    batch = window_batch(tokens, scorer.context)
    rows, row_scorer = datasets.Dataset.from_dict({"input_ids": tokens.tolist()}), RowScorer(model, [scorer.context])
    folder, numbers = tempfile.mkdtemp(), count()
    runs: dict[str, Callable[[], Any]] = {
        SCORER: lambda: scorer(tokens),
        STORED: lambda: score_rows(rows, row_scorer, Path(folder) / str(next(numbers)), provenance={}),
        WINDOWS: lambda: model(input_ids=batch, use_cache=False).logits,
        ROW: lambda: model(input_ids=tokens, use_cache=False).logits,
    }
    with torch.no_grad():
        seconds = alternately(runs, rounds)
    num_read = {**dict.fromkeys(runs, batch.numel()), ROW: tokens.numel()}
    speeds = {run: [num_read[run] / value for value in values] for run, values in seconds.items()}
    x = f"{name}, row {length}, {len(batch)} windows {size}/{stride}, float32"
    for run, values in seconds.items():
        setting = {"what": "scoring a row with a short context", "x": x, "implementation": run}
        report.add(**setting, metric="time", unit="s", values=values)
        report.add(**setting, metric="tokens read per second", unit="tokens/s", values=speeds[run])
        for other in (WINDOWS, ROW) if run in (SCORER, STORED) else ():
            metric = f"tokens read per second / {other}"
            report.add_ratio(**setting, metric=metric, over=speeds[run], under=speeds[other])
    report.finish()


if __name__ == "__main__":
    tyro.cli(main)
