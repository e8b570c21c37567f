"""What a scorer in bfloat16 does to scores and weights, beside one in float32.

    python benchmarks/precision.py            some minutes on two cores, 2 GiB of memory
    python benchmarks/precision.py --quick    seconds, on a tiny model: says nothing

A frozen scorer needs no gradients, and many a device reads windows faster in 16 bits. The price is rounding, and a
score is a small difference of two losses. Weights and decoder have the lower precision; products with the head run in
float32 on a CPU, and sum in float32 on a GPU, so that nothing more is rounded there. "scorer" leaves the long losses in
float32, as of a model that is trained in it; "scorer, and model" rounds both. Each value is of one row; p50, p20 and
p80 are over rows. No time is measured: a CPU without instructions for bfloat16 would say nothing of a GPU.
"""

from pathlib import Path

import torch
import tyro

from common import RESULTS, Report, model_and_row
from tokenweight import Scorer, ShortContext, parse_weighting, token_nll

WEIGHTINGS = {"dense": "dense:interpolation=0.75", "longce": "longce:cap=5", "sparse": "sparse:keep=0.2"}


def compared(
    long_nll: torch.Tensor, short_nll: torch.Tensor, exact_long: torch.Tensor, exact_short: torch.Tensor
) -> dict[tuple[str, str], list[float]]:
    """(metric, unit) -> value of each row. The first token of a row has no loss."""
    mask = torch.ones_like(long_nll, dtype=torch.bool)
    mask[:, 0] = False
    error = (short_nll - exact_short).abs()[:, 1:]
    contrast = (exact_long - exact_short).abs()[:, 1:]
    found = {
        ("mean error of a short loss", "nats"): error.mean(dim=1),
        ("its 99th percentile", "nats"): error.quantile(0.99, dim=1),
        ("mean error / mean |long - short|", "1"): error.mean(dim=1) / contrast.mean(dim=1),
    }
    for name, text in WEIGHTINGS.items():
        weighting = parse_weighting(text)
        exact, rounded = weighting(exact_long, exact_short, mask), weighting(long_nll, short_nll, mask)
        if name == "sparse":
            kept, same = exact > 0, (exact > 0) & (rounded > 0)
            found["tokens of sparse that stay", "1"] = same.sum(dim=1) / kept.sum(dim=1)
        else:
            found[f"mean change of a weight, {name}", "1"] = (rounded - exact).abs()[:, 1:].mean(dim=1)
    return {key: values.tolist() for key, values in found.items()}


def main(
    *,
    rows: int = 4,
    length: int = 2048,
    size: int = 512,
    stride: int = 384,
    quick: bool = False,
    csv: Path | None = None,
) -> None:
    """Error of scores and weights.

    Args:
        rows: that one text is cut into.
        length: tokens of a row, a multiple of 16.
        size: tokens that a window reads.
        stride: tokens that a window scores.
        quick: a tiny model, a 16th of the tokens, to see that the benchmark runs; writes no file unless `csv` is given.
        csv: file to append rows to; by default results.csv beside this script.
    """
    if quick:
        length, size, stride = length // 16, size // 16, stride // 16
    report = Report("precision", csv if quick or csv else RESULTS)
    context = ShortContext(size, stride)
    losses = {}
    for dtype in (torch.float32, torch.bfloat16):
        name, model, tokens = model_and_row(rows * length, quick=quick, dtype=dtype)
        tokens = tokens.view(rows, length)
        losses[dtype] = (token_nll(model, tokens), Scorer(model, context)(tokens))
    (exact_long, exact_short), (long_nll, short_nll) = losses.values()
    x = f"{name}, {rows} x {length} tokens, windows {size}/{stride}"
    for who, long_of_weights in (("scorer", exact_long), ("scorer, and model", long_nll)):
        setting = {"what": "scores and weights in bfloat16, beside float32", "x": x, "implementation": who}
        for (metric, unit), values in compared(long_of_weights, short_nll, exact_long, exact_short).items():
            report.add(**setting, metric=metric, unit=unit, values=values)
    report.finish()


if __name__ == "__main__":
    tyro.cli(main)
