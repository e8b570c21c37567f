"""Figures of scored sequences, training runs and evaluations, read from their folders."""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from torch import Tensor

from tokenweight.data import ScoredRow, read_rows, token_pieces
from tokenweight.evaluate import read_table, short_names
from tokenweight.method import ShortContext, Weighting, document_positions
from tokenweight.records import read_json, read_metrics, run_kind
from tokenweight.view import plots
from tokenweight.view.excerpt import about_windows, windows_of
from tokenweight.view.heads import head_figure
from tokenweight.view.summaries import by_kind, by_position, difference_histogram, row_kinds

PASSAGE = 20
"""Tokens of the passage that is drawn token by token."""


def draw(
    folders: Sequence[Path],
    weightings: dict[str, Weighting],
    *,
    first_row: int = 0,
    num_rows: int = 8,
    size: int | None = None,
    smooth: bool = False,
    style: str = "paper",
) -> dict[str, Figure]:
    """Draw every figure possible from the folders: several per folder of scores or evaluation, one for all trainings.

    Args:
        folders: folders that `score`, `train` or `eval` has written, with different names.
        weightings: weightings of the scored sequences, by their names in the figures.
        first_row: number of the first scored sequence.
        num_rows: largest number of scored sequences.
        size: tokens of the short context, where scores of several are stored.
        smooth: average weight by position over the tokens that each window scores.
        style: one of `STYLES`.

    Returns:
        The figures by file name. The label of a figure of scores gives its number of sequences, and notes features that
        do not come from the text.

    Raises:
        ValueError: if a folder is not one of these, or has nothing to draw.
    """
    names = [folder.resolve().name for folder in folders]
    if twice := {name for name in names if names.count(name) > 1}:
        raise ValueError(f"{', '.join(sorted(twice))}: two folders have this name, and so would their figures")
    kinds = [run_kind(folder) for folder in folders]
    figures: dict[str, Figure] = {}
    for name, folder, kind in zip(names, folders, kinds):
        own = {}
        if kind == "scored":
            rows = read_rows(folder, first_row, num_rows, size=size)
            windows = windows_of(rows[0], folder) if smooth else None
            own = score_figures(rows, weightings, window=rows[0].size, windows=windows, style=style)
        elif kind == "evaluation":
            own = evaluation_figures(folder, style=style)
        figures |= {f"{name}-{what}": figure for what, figure in own.items()}
    trainings = {name: _losses(folder) for name, folder, kind in zip(names, folders, kinds) if kind == "training"}
    if trainings:
        figures["loss-by-step"] = plots.step_figure(trainings, style=style)
    return figures


def score_figures(
    rows: Sequence[ScoredRow],
    weightings: dict[str, Weighting],
    *,
    window: int | None = None,
    windows: ShortContext | None = None,
    style: str = "paper",
) -> dict[str, Figure]:
    """Draw the differences beyond the first window, the weight by position and by kind of token, and a passage.

    Without a tokenizer there are no kinds and no passage.

    Args:
        window: tokens of the short context.
        windows: over which to average weight by position (`by_position`).

    Raises:
        ValueError: if no token has a shorter context.
    """
    weights = {name: [row.weigh(weighting) for row in rows] for name, weighting in weightings.items()}
    places = [document_positions(row.tokens, row.position_ids) for row in rows]
    beyond = [row._replace(mask=row.mask & (own >= (window or 0))) for row, own in zip(rows, places)]
    if not any(row.mask.any() for row in beyond):
        raise ValueError(f"no document of these rows is longer than the first window of {window} tokens")
    bins = {name: by_position(rows, own, windows=windows) for name, own in weights.items()}
    note = "" if rows[0].num_rows is None else f"{len(rows):,} of {rows[0].num_rows:,} sequences."
    smooth = windows is not None
    explained = f"{note} {about_windows(rows[0], smooth=smooth)}".strip()
    figures = {
        "differences": plots.difference_figure(difference_histogram(beyond), note=note, style=style),
        "weight-by-position": plots.position_figure(bins, window=window, smooth=smooth, note=explained, style=style),
    }
    if rows[0].tokenizer is not None:
        kinds = [row_kinds(row, token_pieces(row.tokens[0].tolist(), row.tokenizer)) for row in rows]
        shares = {name: by_kind(rows, own, kinds) for name, own in weights.items()}
        figures["weight-by-kind"] = plots.kind_figure(shares, note=note, style=style)
        figures["passage"] = _passage(beyond, {name: own[0] for name, own in weights.items()}, style)
    return figures


def _passage(rows: Sequence[ScoredRow], weights: dict[str, Tensor], style: str) -> Figure:
    """The tokens of the first row around the one whose losses differ most.

    Args:
        rows: sequences whose masks exclude the first window.
        weights: of the first row.
    """
    row = rows[0]
    difference = (row.long_nll - row.short_nll).abs().where(row.mask, 0)[0]
    first = max(0, min(int(difference.argmax()) - PASSAGE * 3 // 4, len(difference) - PASSAGE))
    shown = slice(first, first + PASSAGE)
    pieces = token_pieces(row.tokens[0].tolist(), row.tokenizer)[shown]
    of = "" if row.num_rows is None else f"1 of {row.num_rows:,} sequences, number {row.number}, "
    note = f"{of}from token {first}."
    of_tokens = {name: own[0, shown].tolist() for name, own in weights.items()}
    return plots.passage_figure(pieces, of_tokens, note=note, style=style)


def evaluation_figures(folder: Path, *, style: str = "paper") -> dict[str, Figure]:
    """Draw loss by position, and benefit by context, with the changes from the first model; and retrieval heads.

    Raises:
        ValueError: if `eval.json` is not what `tokenweight eval` writes.
    """
    record = read_json(folder / "eval.json")
    try:
        table, edges, sizes = read_table(record), record["settings"]["edges"], record["settings"]["sizes"]
        known = {entry.measure for row in table for entry in row if entry.value is not None}
        figures = {"loss-by-position": plots.loss_figure(table, edges, style=style)}
        if f"benefit_{sizes[0]}" in known:  # all use the same tokens, which short documents lack
            figures["benefit-by-context"] = plots.benefit_figure(table, sizes, style=style)
        for name, model in zip(short_names(table), record.get("models", [])):
            if "heads" in model:
                of = re.sub(r"[^-.\w]+", "-", name)  # a path, if the last parts are equal
                figures[f"heads-{of}"] = head_figure(model["heads"], style=style)
        return figures
    except (KeyError, TypeError) as error:
        raise ValueError(f"{folder}/eval.json is not what `tokenweight eval` writes: {error!r}") from error


def _losses(folder: Path) -> list[dict[str, Any]]:
    """Read the lines with a loss, by step; if an interruption left two lines of a step, the later counts."""
    steps = {line["step"]: line for line in read_metrics(folder) if "loss" in line}
    if not steps:
        raise ValueError(f"{folder}/metrics.jsonl holds no loss: expected lines that the training logged")
    return [steps[step] for step in sorted(steps)]
