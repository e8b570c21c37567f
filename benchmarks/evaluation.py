"""Evaluating a model: time relative to the unavoidable forward passes, and LongPPL beside its authors' package.

    python benchmarks/evaluation.py            about 10 minutes on two cores
    python benchmarks/evaluation.py --quick    seconds, on a tiny model: a smoke test

The native metrics of one model (losses by position and context, LongPPL by the model itself, short range; no probes)
read each sequence once with its full context, and in windows for each short context. `forward passes` are those of the
decoder over exactly these inputs, plus the head's logits of the tokens whose losses are needed, without losses.

LongPPL: the function `compute_longppl` of the package `longppl` 0.3.0, with one model as evaluator and evaluated,
beside ours with the same windows on the same text. The values must agree to 1e-3, or the benchmark stops.
The package reads the text twice with its full context, and reads the first window; ours reads the text once and skips
the first window. Both then read the same windows: the more there are, the smaller the difference.
"""

import math
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import datasets
import numpy as np
import torch
import tyro

from bench.measure import alternately
from bench.models import model_and_row
from bench.report import Bench, Report
from tokenweight import Scorer, ShortContext
from tokenweight.data import key_tokens
from tokenweight.evaluate import EvalPlan, EvalSettings, Judging, Rows, make_plan, open_weights, row_measures, row_sums
from tokenweight.method import prediction_mask, sliding_windows

OURS, PASSES, PACKAGE = "tokenweight", "forward passes", "longppl 0.3.0"


def inputs(plan: EvalPlan, tokens: torch.Tensor) -> list[torch.Tensor]:
    """All inputs of the native metrics for a sequence: itself, and for each context the windows beyond the first."""
    contexts = [(size, size // 2) for size in plan.sizes] + [tuple(plan.long_context)]
    read = [tokens]
    for size, stride in contexts:
        spans = sliding_windows(tokens.shape[1], size, stride)
        read.append(torch.stack([tokens[0, w.start : w.start + size] for w in spans if w.stop - w.start == size]))
    return read


def native(report: Report, rounds: int, length: int, quick: bool) -> None:
    name, model, tokens = model_and_row(length, quick=quick)
    data = datasets.Dataset.from_dict({"input_ids": tokens.tolist()}).with_format("numpy")
    plan = make_plan(EvalSettings(name, Path("rows"), Path("out"), probes="none"), length)
    rows = Rows(data, np.array([length]))
    judging = Judging(open_weights(Path(tempfile.mkdtemp()) / "weights.npy", 1, length)[0])
    read = inputs(plan, tokens)

    def forward() -> None:
        for batch in read:
            states = model.base_model(input_ids=batch, use_cache=False).last_hidden_state
            model.lm_head(states if batch is tokens else states[:, states.shape[1] // 2 :])

    runs = {OURS: lambda: row_measures(model, plan, rows, judging), PASSES: forward}
    with torch.no_grad():
        seconds = alternately(runs, rounds)
    contexts = ", ".join(map(str, plan.sizes))
    x = f"{name}, row {length}, contexts {contexts}, LongPPL {'/'.join(map(str, plan.long_context))}, float32"
    for run, values in seconds.items():
        setting = {"what": "native measures of one model", "x": x, "implementation": run}
        report.add(**setting, metric="time", unit="s", values=values)
    setting |= {"implementation": OURS}
    report.add_ratio(**setting, metric=f"time / {PASSES}", over=seconds[OURS], under=seconds[PASSES])


def longppl(report: Report, rounds: int, length: int, trunc_len: int, step: int, alpha: float) -> None:
    from longppl.longppl import compute_longppl

    from tokenweight import load_tokenizer
    from tokenweight.cli.demo import packaged_model

    name, model, tokens = model_and_row(length, quick=False)
    tokenizer = load_tokenizer(packaged_model())
    text = tokenizer.decode(tokens[0], clean_up_tokenization_spaces=False, skip_special_tokens=True)
    again = tokenizer(text, return_tensors="pt").input_ids
    scorer = Scorer(model, ShortContext(trunc_len + step, step))
    found: dict[str, float] = {}

    def ours() -> None:
        long_nll = scorer.long_nll(again)
        key = key_tokens(long_nll, scorer(again, long_nll=long_nll), prediction_mask(again), alpha=alpha)
        found[OURS] = math.exp(row_sums(long_nll, key).mean)

    def theirs() -> None:
        settings = {"trunc_len": trunc_len, "sliding_window": step, "alpha": alpha}
        result = compute_longppl(text, model, model, tokenizer, tokenizer, **settings)
        found[PACKAGE] = float(result["longppl"])

    runs: dict[str, Callable[[], Any]] = {OURS: ours, PACKAGE: theirs}
    with torch.no_grad():
        seconds = alternately(runs, rounds)
    if abs(found[OURS] - found[PACKAGE]) > 1e-3:
        raise SystemExit(f"LongPPL is {found[OURS]} here and {found[PACKAGE]} there: expected the same to 1e-3")
    x = f"{name}, text of {again.shape[1]} tokens, {trunc_len}/{step}, alpha {alpha:g}, float32"
    for run, values in seconds.items():
        setting = {"what": "LongPPL of a text", "x": x, "implementation": run}
        report.add(**setting, metric="time", unit="s", values=values)
        report.add(**setting, metric="LongPPL", unit="1", values=[found[run]])
    setting |= {"implementation": OURS}
    report.add_ratio(**setting, metric=f"time / {PACKAGE}", over=seconds[OURS], under=seconds[PACKAGE])


@dataclass
class Evaluation(Bench):
    """Time to evaluate a model."""

    rounds: int = 3
    length: int = 2048
    """Tokens of the sequence, and of the first text; the second has 6144, and the windows of the package."""
    part: Literal["all", "native", "longppl"] = "all"
    """Part of the benchmark to run; LongPPL is left out of a quick run."""

    def run(self) -> None:
        report, length = self.report("evaluation"), self.length
        if self.part != "longppl":
            native(report, self.rounds, 64 if self.quick else length, self.quick)
        if self.part != "native" and not self.quick:
            longppl(report, self.rounds, length, length // 4, length // 16, 2.0)
            longppl(report, 1, 6144, 4096, 1024, 0.5)  # no token of this text gains 2 nats
        report.finish()


if __name__ == "__main__":
    tyro.cli(Evaluation).run()
