"""Count-based scoring: tokens per second on one core, beside a small language model that scores with both contexts.

    python benchmarks/count.py            about 3 minutes
    python benchmarks/count.py --quick    seconds, on random tokens and a tiny model: a smoke test

The counts score the longest State of the Union message, in tokens of SmolLM2. Throughput is the tokens of the sequence,
each counted once, per second of CPU time. The language model scores a sequence of `--model_length` tokens: the windows
after the first, and once the full sequence, as `tokenweight score --long` does.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import tyro

from bench.measure import alternately
from bench.models import model_and_row, sotu_texts
from bench.report import Bench
from tokenweight import CountScorer, Scorer, ShortContext, load_tokenizer
from tokenweight.cli.demo import packaged_model

LOSSES = "CountScorer, losses"
DIVERGENCE = "CountScorer, losses and divergence"
MODEL = "language model, long and short losses"


@dataclass
class Count(Bench):
    """Throughput of scoring without a language model."""

    rounds: int = 3
    length: int = 32768
    """Tokens of the sequence that is scored by counts."""
    model_length: int = 4096
    """Tokens of the sequence that the language model scores."""
    size: int = 1024
    """Tokens that a window reads; it scores three quarters of them."""
    order: int = 4
    """Order of the n-gram counts."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.quick:
            self.length, self.model_length, self.size = self.length // 64, self.model_length // 64, self.size // 64

    def run(self) -> None:
        report, context = self.report("count"), ShortContext(self.size)
        name, model, tokens = model_and_row(self.model_length, quick=self.quick)
        row = tokens.repeat(1, 8) if self.quick else self.row()
        scorer = Scorer(model, context)
        runs: dict[str, Callable[[], Any]] = {
            LOSSES: lambda: CountScorer(self.order, divergence=False)(row, context),
            DIVERGENCE: lambda: CountScorer(self.order)(row, context),
            MODEL: lambda: scorer(tokens, long_nll=scorer.long_nll(tokens)),
        }
        seconds = alternately(runs, self.rounds, clock=time.process_time)
        lengths = {LOSSES: row.numel(), DIVERGENCE: row.numel(), MODEL: tokens.numel()}
        speeds = {run: [lengths[run] / value for value in values] for run, values in seconds.items()}
        windows = f"windows {context.size}/{context.stride}, one core"
        for run, values in speeds.items():
            x = f"{name}, row {self.model_length}, {windows}, float32"
            x = x if run == MODEL else f"order {self.order}, row {row.numel()}, {windows}"
            setting = {"what": "scoring by counts", "x": x, "implementation": run}
            report.add(**setting, metric="tokens per second", unit="tokens/s", values=values)
            if run != MODEL:
                metric = f"tokens per second / {name}"
                report.add_ratio(**setting, metric=metric, over=values, under=speeds[MODEL])
        report.finish()

    def row(self) -> torch.Tensor:
        """The longest text, cut to length."""
        text = max((document.text for document in sotu_texts()), key=len)
        tokens = torch.tensor([load_tokenizer(packaged_model())(text)["input_ids"]])[:, : self.length]
        if tokens.shape[1] < self.length:
            raise SystemExit(f"the text has {tokens.shape[1]} tokens: expected at least {self.length}")
        return tokens


if __name__ == "__main__":
    torch.set_num_threads(1)
    tyro.cli(Count).run()
