"""What the results of the extension depend on: tables of the runs of recipes/evidence/conditions.yaml.

    python benchmarks/evidence/conditions.py runs/conditions

writes conditions.md into the folder: what rates and strengths reach together, what steps and numbers of facts change,
which model should score, and what the bias of weights that depend on the target does.
"""

import json
import statistics
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from frontier import Extension, at_price, cell, made, table
from miniature import Bench, experiment_of
from price import both_losses, weights_of_all
from torch import Tensor
from worlds import Rows

from tokenweight.method import ScoreWeighting, parse_weighting

RATES = ("", "x.5-", "x2-")
FAMILIES = {
    "uniform": ("uniform",),
    "dense": ("dense-.75", "dense-.5", "dense-0"),
    "expected dense": ("expected-dense-.5",),
    "expected bounded gain": ("expected-bounded-.5", "expected-bounded-0"),
    "longce": ("longce",),
    "count": ("count-.5",),
}
"""Name -> its arms, each at all rates."""
BUDGETS = (0.0, 0.01, 0.02, 0.05)
"""Plain loss above that of `uniform`, in nats."""
CONDITIONS = {
    "60 steps": "60-",
    "120 steps, 1.2 % answers": "",
    "480 steps": "480-",
    "no answers": "without-",
    "0.4 % answers": "rare-",
    "3 % answers": "common-",
}
COMPARED = ("dense-.5", "expected-bounded-.5", "count-.5")
SINGLE = ("sparse-.1", "sparse-.2", "sparse-.5", "uniform-as-dense-.5", "uniform-as-dense-0", "uniform-as-longce")
SINGLE += ("foreign-dense-.5", "wide-both-expected-gain-.5")
SCORERS = ("filled-dense-.5", "small-dense-.5", "foreign-dense-.5", "original-both-dense-.5", "wide-both-dense-.5")
SCORERS += ("wide-both-expected-gain-.5", "uniform-both-dense-.5")
"""Arms to compare with `dense-.5`."""
BIASED = ("uniform", "dense-.75", "dense-.5", "dense-0", "longce")
ROWS = 64
"""Held-out rows on which the bias is measured."""
SHOWN = {"far": "far loss", "far_right": "far accuracy", "short": "short", "beyond": "beyond"}


def values(found: Extension, arm: str, key: str) -> list[float]:
    """A measure of an arm in every unit."""
    return [found.of[arm][unit][key] for unit in found.units]


def crossed(found: Extension) -> str:
    """What families reach over their strengths and rates together, beside uniform weights over their rates."""
    of = {name: [f"{rate}{arm}" for rate in RATES for arm in arms] for name, arms in FAMILIES.items()}
    uniform = of.pop("uniform")
    areas = {
        name: [1000 * (a - b) for a, b in zip(found.volumes([*arms, *uniform]), found.volumes(uniform))]
        for name, arms in of.items()
    }
    rows = []
    for name, arms in of.items():
        more = [a - b for a, b in zip(areas[name], areas["dense"])]
        gains = (cell(gains_at(found, [*arms, *uniform], uniform, budget)) for budget in BUDGETS)
        rows.append([name, cell(areas[name], "{:+.2f}"), cell(more, "{:+.2f}") if any(more) else "", *gains])
    budgets = [f"gain at +{budget:g}" if budget else "gain at no price" for budget in BUDGETS]
    return table(["family", "area beyond uniform's", "more than dense's", *budgets], rows)


def gains_at(found: Extension, arms: Sequence[str], others: Sequence[str], budget: float) -> list[float]:
    """In each unit, by how much lower the far loss of arms is than that of others, at a plain loss of up to `budget`
    above that of `uniform`."""
    gains = []
    for unit in found.units:
        price = found.of["uniform"][unit]["plain"] + budget
        gains.append(at_price(found.points(others, unit), price) - at_price(found.points(arms, unit), price))
    return gains


def by_condition(found: Extension) -> str:
    """Values of uniform weights under each condition, and the changes of other arms from them."""
    rows = []
    for name, begins in CONDITIONS.items():
        uniform = f"{begins}uniform"
        rows.append([name, "uniform", *(f"{statistics.fmean(values(found, uniform, key)):.3f}" for key in SHOWN)])
        for arm in COMPARED:
            rows.append(["", arm, *(cell(found.changes(f"{begins}{arm}", key, uniform)) for key in SHOWN)])
    return table(["condition", "arm", *SHOWN.values()], rows)


def beside(found: Extension, arms: Iterable[str], other: str) -> str:
    """Changes of arms from another."""
    rows = []
    for arm in arms:
        rates = [record["rate"] for record in found.runs[arm].values()]
        rows.append([arm, f"{statistics.fmean(rates):.2f}", *(cell(found.changes(arm, key, other)) for key in SHOWN)])
    return table([f"beside {other}", "rate", *SHOWN.values()], rows)


def corrected(weights: Tensor, long: Tensor) -> Tensor:
    """-log of q / w, normalized: what a model would predict if its weights had made it q in place of p."""
    return -(-long - weights.log()).log_softmax(dim=1)


@torch.no_grad()
def bias(bench: Bench, arm: str, unit: list[int], rows: Rows) -> dict[str, float]:
    """Of a trained model: `copied`, the probability of values where plain text stands beyond the short context; and the
    losses there and of far answers, as they are and corrected by the weights that the arm gives to each prediction."""
    model, weighting = bench.trained(arm, unit), parse_weighting(bench.experiment.arms[arm]["weighting"])
    symbols, size = bench.world.symbols, bench.experiment.size
    found: dict[str, list[float]] = {}
    for tokens, plain, distance in zip(torch.as_tensor(rows.tokens), rows.plain, rows.distance):
        long, short = both_losses(model, tokens, bench.experiment)
        targets = tokens[1:]
        late = torch.as_tensor(plain & (np.arange(len(plain)) >= size))[1:]
        far = torch.as_tensor(distance >= size)[1:]
        after = long
        if isinstance(weighting, ScoreWeighting):
            after = corrected(weights_of_all(weighting, long, short, targets), long)
        values = (-long).exp()[:, symbols.first + 2 + symbols.attributes :].sum(dim=1)
        one = {"copied": values[late]}
        for name, losses in (("", long), (" corrected", after)):
            own = losses.gather(1, targets[:, None])[:, 0]
            one |= {f"beyond{name}": own[late], f"far{name}": own[far]}
        for key, of in one.items():
            found.setdefault(key, []).extend(of.tolist())
    return {key: statistics.fmean(of) for key, of in found.items()}


def biases(found: Extension, folder: Path) -> str:
    """The bias of arms whose weights depend on the target, before and after correction."""
    bench = Bench(experiment_of(folder), folder)
    rows = Rows(*(of[:ROWS] for of in bench.held_out()))
    measured: dict[str, list[dict[str, float]]] = {
        arm: [bias(bench, arm, list(unit), rows) for unit in found.units] for arm in BIASED
    }
    head = ["copied", "beyond", "beyond corrected", "far", "far corrected"]
    lines = []
    for arm, own in measured.items():
        copied = f"{100 * statistics.fmean(one['copied'] for one in own):.3f} %"
        changes = (
            cell([one[key] - base[key.removesuffix(" corrected")] for one, base in zip(own, measured["uniform"])])
            for key in head[1:]
        )
        values = (f"{statistics.fmean(one[key] for one in own):.3f}" for key in head[1:])
        lines.append([arm, copied, *(values if arm == "uniform" else changes)])
    return table(["arm", *head], lines)


def main(arguments: Sequence[str]) -> None:
    """Write the tables of a folder of runs."""
    folder = Path(arguments[0])
    found: Any = Extension(folder)
    units = f"{len(found.units)} units: {json.dumps([list(unit) for unit in found.units])}."
    parts = [f"{made(found.runs)} {units}\n", crossed(found), by_condition(found)]
    parts += [beside(found, SINGLE, "uniform"), beside(found, SCORERS, "dense-.5"), biases(found, folder)]
    text = "\n".join(parts)
    (folder / "conditions.md").write_text(text, encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main(sys.argv[1:])
