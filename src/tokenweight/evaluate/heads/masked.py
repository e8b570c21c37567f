"""Head ablation: recall of the probes without the best retrieval heads, and without as many others."""

import random
from collections.abc import Sequence
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from tokenweight.evaluate.comparison import compare
from tokenweight.evaluate.heads.attention import without_heads
from tokenweight.evaluate.heads.scores import THRESHOLD, HeadScores
from tokenweight.evaluate.probe_scoring import ProbeRecord, probe_measures, score_cells
from tokenweight.evaluate.probes import Probe
from tokenweight.evaluate.settings import EvalPlan

Heads = list[tuple[int, int]]
"""Layer and head of each, numbered from 0."""


def masked_probes(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    cells: Sequence[Sequence[Probe]],
    plan: EvalPlan,
    chosen: tuple[Heads, Heads],
    grid: Sequence[ProbeRecord],
) -> dict[str, Any]:
    """Ask the probes again without some heads, and without as many others.

    Args:
        chosen: result of `choose_heads`.
        grid: the scores of the same probes with all heads.

    Returns:
        `heads` and `control` (layer and head of each); `comparison`, a table as of `compare`, all heads first.
    """
    heads, control = chosen
    table = [("all heads", probe_measures(grid, plan))]
    for name, masked in (("masked", heads), ("others masked", control)):
        with without_heads(masked):
            table.append((name, probe_measures(score_cells(model, tokenizer, cells, plan.probe_by), plan)))
    entries = compare(table, seed=plan.seed)
    return {
        "heads": [list(one) for one in heads],
        "control": [list(one) for one in control],
        "comparison": [[one._asdict() for one in row] for row in entries],
    }


def choose_heads(plan: EvalPlan, scores: HeadScores) -> tuple[Heads, Heads]:
    """The heads of `plan.mask_heads`, and as many others, drawn at random, if possible from those that do not retrieve.

    Raises:
        ValueError: if the model does not have these heads, or not as many others.
    """
    ranked = scores.ranked()
    if isinstance(plan.mask_heads, int):
        heads = [(layer, head) for layer, head, _ in ranked[: plan.mask_heads]]
    else:
        heads = [(layer, head) for layer, head in plan.mask_heads or []]
    listed = f"top:{plan.mask_heads}" if isinstance(plan.mask_heads, int) else ",".join(f"{a}.{b}" for a, b in heads)
    if not scores.has(heads):
        raise ValueError(f"mask_heads {listed}: expected layers and heads of {_extent(scores)}, each from 0")
    rest = [(layer, head, score) for layer, head, score in ranked if (layer, head) not in heads]
    others = [one for one in rest if one[2] <= THRESHOLD]
    others = others if len(others) >= len(heads) else rest
    if len(others) < len(heads):
        raise ValueError(
            f"mask_heads {listed}: expected at most half of {len(ranked)} heads, for as many others follow"
        )
    drawn = random.Random(f"tokenweight heads, seed {plan.seed}").sample(others, len(heads))
    return heads, [(layer, head) for layer, head, _ in drawn]


def _extent(scores: HeadScores) -> str:
    heads = max(own.shape[1] for own in scores.scores)
    return f"a model whose last layer is {scores.layers[-1]}, with {heads} heads"
