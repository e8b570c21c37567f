"""The record of an evaluation about the heads of its models, and the metric of their change."""

from collections.abc import Sequence
from typing import Any

from tokenweight.evaluate.comparison import Measure
from tokenweight.evaluate.heads.scores import THRESHOLD, HeadScores

CHOOSE, COMPARE = slice(0, None, 2), slice(1, None, 2)
"""Samples on which the first model's heads are chosen, and samples on which they are compared: on the same samples, the
choice would be biased towards heads that happened to do well there."""


def add_heads(records: Sequence[dict[str, Any]], scores: Sequence[HeadScores], earlier: dict[str, Any] | None) -> None:
    """Add the heads, and the metric `retrieval_heads`, to the records of models.

    Args:
        scores: of each of these models, on the same samples.
        earlier: the record of the model whose heads are followed; by default that of the first of these models.
    """
    for record, own in zip(records, scores):
        ranked = own.ranked(CHOOSE)
        record["heads"] = {
            **record.get("heads", {}),
            "layers": list(own.layers),
            "scores": [[round(score, 4) for score in heads] for heads in own.means()],
            "retrieval_heads": [list(one) for one in own.ranked() if one[2] > THRESHOLD],
            "followed": [[layer, head] for layer, head, score in ranked if score > THRESHOLD],
            "samples": len(own.scores[0]),
        }
    followed = (earlier or records[0])["heads"]["followed"]
    for record, own in zip(records, scores):
        record["heads"]["followed"] = followed
        if followed and own.has(followed):
            total = own.of(followed, COMPARE).tolist()
            if total:
                measure = Measure("retrieval_heads", "long", "share", "higher", total, [1.0] * len(total), True)
                record["measures"].append({**measure._asdict(), "value": measure.value})


def heads_markdown(models: Sequence[dict[str, Any]]) -> str:
    """The retrieval heads, one line per model; empty if there are none."""
    lines = []
    for model in models:
        if "heads" in model:
            found, total = model["heads"]["retrieval_heads"], sum(map(len, model["heads"]["scores"]))
            listed = ", ".join(f"{layer}.{head} ({score:.2f})" for layer, head, score in found)
            lines.append(f"- {model['model']}: {len(found)} of {total} heads{': ' if listed else ''}{listed}")
    title = f"\n## Heads with a retrieval score above {THRESHOLD:g}\n\nLayer.head (score), both from 0.\n\n"
    return title + "\n".join(lines) + "\n" if lines else ""
