"""The folders that a run reads: their rows, with the scores that its weights need and no others."""

import logging
from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass
from typing import Any

import datasets

from tokenweight.data.columns import COLUMNS
from tokenweight.data.contents import Contents
from tokenweight.data.dataset import (
    check_scores,
    choose_scores,
    has_scores,
    open_rows,
    read_prepared,
    read_provenance,
)
from tokenweight.method import SCORES, Weighting
from tokenweight.models import TEACHER

logger = logging.getLogger(__name__)
Windows = Mapping[str, int | None]
"""Size and stride of a short context, as for `load_scores`; what is left out is not chosen by."""


@dataclass(frozen=True)
class Source:
    """An opened folder of sequences."""

    folder: str
    rows: datasets.Dataset
    contents: Contents
    provenance: dict[str, Any]
    """Metadata stored with it; `context` holds the windows of the selected scores."""

    @property
    def context(self) -> dict[str, Any]:
        """Size and stride of the stored short losses, as far as they are known."""
        return self.provenance.get("context", {})

    @property
    def texts(self) -> dict[str, Any]:
        """Metadata of the texts from `prepare`; for scored data, from the folder that was scored."""
        prepared = read_prepared(self.provenance)
        if (prepared.get("rows"), prepared.get("tokens")) != (self.contents.rows, self.contents.tokens):
            return {}  # the folder has other sequences by now
        noted = ("texts", "hub", "subset", "split", "seed", "documents")
        return {key: prepared[key] for key in noted if prepared.get(key) not in (None, [])}

    @property
    def record(self) -> dict[str, Any]:
        """Its entry in `run.json`, as one of several sources."""
        return {"path": self.folder, "rows": self.contents.numbers, "texts": self.texts, "data": self.provenance}


def open_sources(
    folders: Sequence[str], weighting: Weighting, needed: Set[str], contrast: str, windows: Windows, scorer: str
) -> list[Source]:
    """Open the folders of a training run; their contents are not verified.

    Args:
        folders: each of its own, or the parts of a mixture.
        weighting: the one that makes weights of the scores.
        needed: the columns that have to be there, of `SCORES` and `TEACHER`.
        contrast: the source of the long losses, as for `check_scores`.
        windows: of the short context.
        scorer: the source of the short losses; if it is not "stored", a folder must not hold any.

    Raises:
        ValueError: if a folder is not a data folder, is cut off, lacks scores that are needed, or holds others than the
            weighting compares; if the folders of a mixture differ in their short contexts or teacher tokens.
    """
    sources = [_opened(folder, weighting, needed, contrast, windows, scorer) for folder in folders]
    if needed:
        _check_windows(sources)
    if TEACHER[0] in needed:
        _check_teachers(sources)
    return sources


def _opened(
    folder: str, weighting: Weighting, needed: Set[str], contrast: str, windows: Windows, scorer: str
) -> Source:
    """One folder of a training run."""
    (rows, contents), provenance = open_rows(folder), read_provenance(folder)
    if scorer != "stored" and has_scores(rows):
        raise ValueError(
            f"scorer {scorer!r}: {folder} holds stored scores (short_nll), which would not be used: set scorer to "
            "stored, or data to the sequences before scoring"
        )
    if needed:
        rows, scores = choose_scores(rows, folder, **windows, needed=needed)
        check_scores(weighting, scores, folder, contrast)
        provenance = {**provenance, **scores}
    others = {*SCORES, *TEACHER} - needed
    rows = rows.remove_columns([name for name in rows.column_names if name in others])
    return Source(folder, rows, contents, provenance)


def _check_windows(sources: Sequence[Source]) -> None:
    """Raise a ValueError if folders were scored with different short contexts."""
    first, *others = sources
    told = {one.folder: ", ".join(f"{name} {value}" for name, value in one.context.items()) for one in sources}
    for source in others:
        if any(first.context.get(name) != value for name, value in source.context.items() if name in first.context):
            raise ValueError(
                f"data {source.folder}: scored with {told[source.folder]}, but {first.folder} with "
                f"{told[first.folder]}: expected one short context in all folders of a mixture"
            )


def _check_teachers(sources: Sequence[Source]) -> None:
    """Raise a ValueError if folders store different numbers of teacher tokens, which cannot be batched together."""
    first, *others = ((source.folder, len(source.rows[0][TEACHER[0]][0])) for source in sources)
    for folder, top_k in others:
        if top_k != first[1]:
            raise ValueError(
                f"data {folder}: scored with top_k {top_k} of a teacher, but {first[0]} with {first[1]}: expected one "
                "top_k in all folders of a mixture"
            )


def open_held_out(folder: str, weighting: Weighting, needed: Set[str], contrast: str, windows: Windows) -> Source:
    """Open held-out sequences, with their scores, if any, for the same windows as in the data.

    Where their scores are not those that the weighting needs, a warning says so, and they are left out.

    Raises:
        ValueError: if the folder is not a data folder, or is cut off.
    """
    (rows, contents), provenance, columns = open_rows(folder), read_provenance(folder), {*COLUMNS}
    if any(name.startswith((*needed,)) for name in rows.column_names):
        try:
            chosen, scores = choose_scores(rows, folder, **windows, needed=needed)
            check_scores(weighting, scores, folder, contrast)
            rows, provenance, columns = chosen, {**provenance, **scores}, {*COLUMNS, *needed}
        except ValueError as error:
            logger.warning("eval_data: %s; its weighted loss is not measured", error)
    rows = rows.select_columns([name for name in rows.column_names if name in columns])
    return Source(folder, rows, contents, provenance)
