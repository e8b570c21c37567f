"""LongPPL of trained models: their perplexity on key tokens, which a model that is not among them selects.

    python benchmarks/evidence/judged.py runs/conditions
    python benchmarks/evidence/judged.py runs/spaced
    python benchmarks/evidence/judged.py runs/spaced 10-        those arms alone whose names begin so

writes judged.md into the folder. Key tokens (arXiv 2410.23771) are those whose loss falls by more than 2 nats from the
short to the long context, to less than 2, by the judge. For the real model that is the same model at a wider rotary
base, not trained, which recalls nearly everything; for the small ones, in each unit, what `uniform` became after four
times the steps.
"""

import math
import statistics
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from frontier import interval, made, read_runs, table, uniform_of
from miniature import Bench, experiment_of, inputs
from torch import Tensor
from worlds import Rows

from tokenweight import Scorer, load_model, token_nll
from tokenweight.evaluate.intervals import Sums, paired_difference, row_sums
from tokenweight.method import KeyTokens

AT_ONCE = 8
"""Rows."""
WIDE = {"method": "base", "theta": 500_000.0}
JUDGE = "480-uniform"
"""Arms of as many steps are not compared."""
KINDS = ("all", "plain")


def losses(read: Callable[..., Tensor], rows: Rows) -> Tensor:
    """The loss of every token of the rows by `read`, a few rows at once."""
    given, found = inputs(rows), []
    del given["labels"]
    for first in range(0, len(rows.tokens), AT_ONCE):
        own = {name: values[first : first + AT_ONCE] for name, values in given.items()}
        found.append(read(own.pop("input_ids"), **own))
    return torch.cat(found)


def key_tokens(bench: Bench, judge: Any, rows: Rows) -> dict[str, Tensor]:
    """Which tokens of the rows are key tokens, of all and of the plain text."""
    long = losses(partial(token_nll, judge), rows)
    short = losses(Scorer(judge, bench.experiment.context), rows)
    predicted = inputs(rows)["labels"] != -100
    predicted[:, 0] = False
    found = KeyTokens().score(long, short).bool() & predicted
    return {"all": found, "plain": found & torch.as_tensor(rows.plain)}


def model_of(bench: Bench, arm: str, unit: list[int]) -> Any:
    """A trained model."""
    path = bench.run_path(arm, unit).with_suffix("")
    return load_model(path, dtype="float32").eval() if path.is_dir() else bench.trained(arm, unit)


def judge_of(bench: Bench, unit: list[int]) -> Any:
    """The model that selects key tokens."""
    if isinstance(bench.experiment.model, str):
        return bench.begun(unit[0], WIDE).eval()
    return bench.trained(JUDGE, unit)


def judged(folder: Path, begins: str = "") -> str:
    """The table of a folder, or of those of its arms whose names begin in a certain way."""
    runs, bench = read_runs(folder), Bench(experiment_of(folder), folder)
    compared = [arm for arm in runs if arm.startswith(begins) and not arm.startswith(JUDGE.removesuffix("uniform"))]
    rows, of = bench.held_out(), {arm: [] for arm in compared}
    shares: dict[str, list[float]] = {kind: [] for kind in KINDS}
    for unit in next(iter(runs.values())):
        keys = key_tokens(bench, judge_of(bench, list(unit)), rows)
        for kind, chosen in keys.items():
            shares[kind].append(float(chosen.sum() / np.prod(rows.tokens.shape)))
        for arm in compared:
            nll = losses(partial(token_nll, model_of(bench, arm, list(unit))), rows)
            of[arm].append({kind: row_sums(nll, chosen) for kind, chosen in keys.items()})
    lines = []
    for arm, own in of.items():
        other = uniform_of(arm, compared)
        lines.append([arm, *(shown(own, of[other], kind, arm == other) for kind in KINDS)])
    told = ", ".join(f"{100 * statistics.fmean(shares[kind]):.2f} % of tokens ({kind})" for kind in KINDS)
    return f"{made(runs)} Key tokens: {told}.\n\n" + table(["arm", "LongPPL", "of plain text"], lines)


def shown(own: Sequence[dict[str, Sums]], other: Sequence[dict[str, Sums]], kind: str, is_base: bool) -> str:
    """LongPPL of uniform weights; of others the ratio to it: over units, or with one unit over rows."""
    if any(math.isnan(one[kind].mean) for one in own):  # no key token in some unit
        return ""
    if is_base:
        return f"{math.exp(statistics.fmean(one[kind].mean for one in own)):.3f}"
    if len(own) == 1:
        mean, ends, _ = paired_difference(own[0][kind], other[0][kind])
    else:
        mean, width = interval(one[kind].mean - base[kind].mean for one, base in zip(own, other))
        ends = (mean - width, mean + width)
    if ends is None:
        return f"x {math.exp(mean):.3f}"
    star = "\\*" if ends[0] * ends[1] > 0 else ""
    return f"x {math.exp(mean):.3f}{star}<br>[x {math.exp(ends[0]):.3f}, x {math.exp(ends[1]):.3f}]"


def main(arguments: Sequence[str]) -> None:
    """Write the table of a folder of runs."""
    folder = Path(arguments[0])
    text = judged(folder, *arguments[1:])
    (folder / "judged.md").write_text(text, encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main(sys.argv[1:])
