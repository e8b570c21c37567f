"""Answers by distance, what the context gains, and the heads that copy: what weights change within the model.

    python benchmarks/evidence/distances.py runs/conditions

writes distances.md into the folder. The *margin* of an answer is by how much its log-probability is above that of the
likeliest other value of its attribute. The *gain* of a token is its loss with the short context less that with the
long one, by the model itself. The *retrieval score* of a head is the share of far answers at which it attends most to
the value that is copied (arXiv 2404.15574).
"""

import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from frontier import cell, made, read_runs, table
from miniature import Bench, experiment_of
from torch import Tensor
from worlds import Rows

from tokenweight import Scorer
from tokenweight.evaluate.heads.scores import THRESHOLD

ARMS = ("uniform", "dense-.5", "dense-0", "expected-bounded-.5", "longce", "count-.5")
BINS = {"within the old context": (1, 128), "1 to 2 times": (128, 256), "2 to 4 times": (256, 512)}
"""Name -> distances of answers, in tokens."""
ROWS, AT_ONCE = 64, 8
"""Held-out rows that are read, and how many at once."""


@torch.no_grad()
def read(bench: Bench, arm: str, unit: list[int], rows: Rows) -> dict[str, Any]:
    """The measures of one model: scalars, and `heads`, the retrieval score of each."""
    model, size = bench.trained(arm, unit), bench.experiment.size
    model.set_attn_implementation("eager")
    scorer, symbols = Scorer(model, bench.experiment.context), bench.world.symbols
    columns: dict[str, list[Tensor]] = {"loss": [], "margin": [], "distance": [], "attended": []}
    gains: dict[str, list[Tensor]] = {"gain of answers": [], "gain of plain text": []}
    for first in range(0, len(rows.tokens), AT_ONCE):
        tokens, plain, distance = (torch.as_tensor(of[first : first + AT_ONCE]) for of in rows[:3])
        output = model(input_ids=tokens, output_attentions=True)
        logs = output.logits[:, :-1].log_softmax(dim=2)
        losses = torch.zeros(tokens.shape)
        losses[:, 1:] = -logs.gather(2, tokens[:, 1:, None])[..., 0]
        gain = scorer(tokens) - losses
        gains["gain of answers"].append(gain[distance >= size])
        late = plain.clone()
        late[:, :size] = False
        gains["gain of plain text"].append(gain[late])
        row, place = distance.nonzero(as_tuple=True)
        own, answers = logs[row, place - 1], tokens[row, place]
        begins = answers - (answers - symbols.value(0, 0)) % symbols.values  # the first value of the attribute
        others = own.gather(1, begins[:, None] + torch.arange(symbols.values))
        others.scatter_(1, (answers - begins)[:, None], -torch.inf)
        columns["loss"].append(losses[row, place])
        columns["margin"].append(-losses[row, place] - others.max(dim=1).values)
        columns["distance"].append(distance[row, place])
        most = torch.stack([layer[row, :, place - 1].argmax(dim=2) for layer in output.attentions], dim=1)
        columns["attended"].append((most == (place - distance[row, place])[:, None, None]).float())
    values = {name: torch.cat(parts) for name, parts in columns.items()}
    found: dict[str, Any] = {name: torch.cat(parts).mean().item() for name, parts in gains.items()}
    for bin_name, (low, high) in BINS.items():
        chosen = (values["distance"] >= low) & (values["distance"] < high)
        found |= {(bin_name, key): values[key][chosen].mean().item() for key in ("loss", "margin")}
    found["heads"] = values["attended"][values["distance"] >= size].mean(dim=0)
    return found


def heads(own: Sequence[dict[str, Any]]) -> list[str]:
    """Cells on retrieval heads: how many there are, and the score of the best, over units."""
    scores = [one["heads"] for one in own]
    number = statistics.fmean(int((of > THRESHOLD).sum()) for of in scores)
    return [f"{number:.1f} of {scores[0].numel()}", f"{statistics.fmean(of.max().item() for of in scores):.2f}"]


def tables(folder: Path) -> str:
    """The tables of a folder of runs."""
    runs, bench = read_runs(folder), Bench(experiment_of(folder), folder)
    rows = Rows(*(of[:ROWS] for of in bench.held_out()))
    units = [list(unit) for unit in runs["uniform"]]
    of = {arm: [read(bench, arm, unit, rows) for unit in units] for arm in ARMS}

    def shown(arm: str, key: Any) -> str:
        values = [one[key] for one in of[arm]]
        if arm == "uniform":
            return f"{statistics.fmean(values):.3f}"
        return cell(np.subtract(values, [one[key] for one in of["uniform"]]).tolist())

    parts = [f"{made(runs)} {len(units)} units, {ROWS} held-out rows.\n"]
    for key in ("loss", "margin"):
        lines = [[arm, *(shown(arm, (one, key)) for one in BINS)] for arm in ARMS]
        parts.append(table([f"{key} of answers", *BINS], lines))
    kinds = ("gain of answers", "gain of plain text")
    lines = [[arm, *(shown(arm, kind) for kind in kinds), *heads(of[arm])] for arm in ARMS]
    parts.append(table(["arm", *kinds, "retrieval heads", "score of the best"], lines))
    return "\n".join(parts)


def main(arguments: Sequence[str]) -> None:
    """Write the tables of a folder of runs."""
    text = tables(Path(arguments[0]))
    (Path(arguments[0]) / "distances.md").write_text(text, encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main(sys.argv[1:])
