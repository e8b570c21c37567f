"""The meaning of the columns of rows: ours, those of other tools that become ours, and those rejected by name."""

import logging
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from tokenweight.records import writing_to

logger = logging.getLogger(__name__)
COLUMNS = ("input_ids", "position_ids", "labels")
"""Columns that losses depend on."""
MASKS = ("completion_mask", "assistant_masks", "loss_mask")
"""0 where a token is read, but not trained on: there labels become -100."""
TRANSLATED = ("attention_mask", *MASKS, "seq_lengths", "token_type_ids")
"""Columns of other tools that are translated into `COLUMNS`."""
_SCORES = re.compile(r"long_nll|ref_nll|(short_nll|divergence)(_\d+)?|teacher_(ids|logprobs)")
BESIDE = ("ref_nll", "teacher_ids", "teacher_logprobs")
"""Scores of other models than the scorer, which stand beside its own."""
_HARMLESS = ("special_tokens_mask",)
# Names by which other tools say something about single tokens, and about the weight of whole rows.
_MEANT = re.compile(
    r"mask|weight|scale|segment|sequence_ids?$|doc(ument)?_ids?$|seq_?idx|seq_?len|type_ids|embeds|pixel|^decoder_|"
    r"input_features"
)
_MEANT_OF_ROW = re.compile(r"(loss|token|sample)_?(weight|scale)s?")


def is_score(column: str) -> bool:
    """Whether a column holds a score of each token."""
    return _SCORES.fullmatch(column) is not None


def check_types(rows: datasets.Dataset, folder: Any) -> None:
    """Raise a ValueError that names a column of another type than expected, or one that would be ignored though it
    changes what a row means. Other columns with a value for each token cause a warning: one row of them is read.
    """
    unused = []
    for name, kind in ((field.name, field.type) for field in rows.features.arrow_schema):
        values = _element(_element(kind)) if name in BESIDE[1:] else _element(kind)
        ints = values is not None and pa.types.is_integer(values)
        numbers = ints or (values is not None and (pa.types.is_floating(values) or pa.types.is_boolean(values)))
        if name in COLUMNS and not ints:
            raise ValueError(f"{folder}: {name} holds {kind}: expected a list of whole numbers in each row")
        if (name in TRANSLATED or is_score(name)) and not numbers:
            each = "lists of numbers" if name in BESIDE[1:] else "a list of numbers"
            raise ValueError(f"{folder}: {name} holds {kind}: expected {each} in each row")
        if _of_token(name) or name in (*TRANSLATED, *_HARMLESS):
            continue
        of_tokens = numbers or _element(values) is not None
        if _MEANT_OF_ROW.fullmatch(name) or (of_tokens and _MEANT.search(name)):
            raise ValueError(
                f"{folder} has a column {name}, which is not read: expected what it says in labels (-100 where nothing "
                "is trained) or position_ids (from 0 in each document), or rows without it"
            )
        if numbers:
            first = rows.select_columns([name, "input_ids"])[0]
            if len(first[name] or ()) == len(first["input_ids"] or ()) > 1:
                unused.append(name)
    if unused:
        logger.warning("%s has values for each token that are not used: %s", folder, ", ".join(unused))


def check_lengths(rows: datasets.Dataset, folder: Any) -> None:
    """Raise a ValueError that names a row without tokens, or whose columns do not hold a value for each. Only the
    numbers of values are read."""
    names = [name for name in rows.column_names if _of_token(name) or name in TRANSLATED]
    first = 0
    for table in rows.select_columns(names).with_format("arrow").iter(64):
        lengths = {name: pc.list_value_length(table.column(name)).to_numpy() for name in names}  # NaN where null
        tokens = lengths["input_ids"]
        for name in names:
            expected = tokens > 0 if name in ("input_ids", "seq_lengths") else lengths[name] == tokens
            if not expected.all():
                row = int(np.flatnonzero(~expected)[0])
                found = lengths[name][row]
                if name == "input_ids" and found == 0:
                    raise ValueError(f"{folder}: row {first + row} is empty: expected at least one token")
                values = "null" if np.isnan(found) else f"{found:.0f} values"
                of = "tokens" if name == "input_ids" else f"one for each of {tokens[row]:.0f} tokens"
                raise ValueError(f"{folder}: row {first + row} has {values} in {name}: expected {of}")
            flat = pc.list_flatten(table.column(name))
            if flat.null_count:
                row = next(i for i, values in enumerate(table.column(name)) if values.values.null_count)
                raise ValueError(f"{folder}: row {first + row} has null among the values of {name}: expected numbers")
        first += len(table)


def translated(row: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """The columns of a row with a value for each token, as ours: without padding, and with labels and positions that
    say what masks and lengths of other tools said.

    Args:
        row: with `input_ids`, perhaps `labels`, `position_ids`, scores, and columns of `TRANSLATED`.

    Raises:
        ValueError: if a mask has a hole or values other than 0 and 1, or two columns contradict each other.
    """
    ours = {name: np.asarray(row[name]) for name in row if _of_token(name)}
    tokens = ours["input_ids"].astype(np.int64)
    masks = {name: _mask(name, row[name], len(tokens)) for name in ("attention_mask", *MASKS) if name in row}
    if np.any(row.get("token_type_ids", 0)):
        raise ValueError("token_type_ids are not all 0: expected rows without them, as windows do not read them")
    if "seq_lengths" in row:
        lengths = np.asarray(row["seq_lengths"])
        positions = np.concatenate([np.arange(length) for length in lengths] or [lengths])
        if len(positions) != len(tokens) or (lengths < 1).any():
            raise ValueError(f"seq_lengths add up to {lengths.sum()}: expected {len(tokens)}, the tokens of the row")
        if not np.array_equal(ours.setdefault("position_ids", positions), positions):
            raise ValueError("seq_lengths and position_ids differ: expected one of them")
    read = masks.pop("attention_mask", None)
    for mask in masks.values():
        ours["labels"] = np.where(mask, ours.get("labels", tokens), -100)
    if read is None:
        return ours
    places = np.flatnonzero(read)
    if not len(places):
        raise ValueError("attention_mask is 0 for every token: expected a token that is read")
    start, stop = int(places[0]), int(places[-1]) + 1
    if len(places) < stop - start:
        hole = start + int(np.argmin(read[start:stop]))
        raise ValueError(f"attention_mask is 0 for token {hole}, between others: expected padding at the ends only")
    return {name: values[start:stop] for name, values in ours.items()}


def translate(rows: datasets.Dataset, folder: Any, path: Path) -> datasets.Dataset:
    """Rows in which `translated` has turned the columns of other tools into ours.

    Args:
        path: the Arrow file that keeps what differs from the rows as they are, for this call and later ones.
    """
    names = [name for name in TRANSLATED if name in rows.column_names and not _says_nothing(rows, name)]
    rows = rows.remove_columns([name for name in TRANSLATED if name in rows.column_names and name not in names])
    if not names:
        return rows
    lists = {name: datasets.List(kind.feature) for name, kind in rows.features.items() if _of_token(name)}
    if "seq_lengths" in names:
        lists.setdefault("position_ids", datasets.List(datasets.Value("int64")))
    if set(names) & set(MASKS):
        lists["labels"] = datasets.List(datasets.Value("int64"))
    kept = {name: kind for name, kind in rows.features.items() if name not in names}

    def convert(row: dict[str, Any], number: int) -> dict[str, np.ndarray]:
        try:
            return translated(row)
        except ValueError as error:
            raise ValueError(f"{folder}: row {number}: {error}") from None

    with writing_to(path.parent):
        return rows.with_format("numpy").map(
            convert,
            with_indices=True,
            remove_columns=names,
            features=datasets.Features({**kept, **lists}),
            cache_file_name=str(path),
            load_from_cache_file=True,
            new_fingerprint=path.stem,
        )


def _mask(name: str, values: Any, length: int) -> np.ndarray:
    mask = np.asarray(values)
    if mask.shape != (length,):
        raise ValueError(f"{name} has the shape {mask.shape}: expected {length} values, one for each token")
    if other := set(np.unique(mask).tolist()) - {0, 1}:
        raise ValueError(f"{name} holds {min(other)}: expected 0 and 1")
    return mask.astype(bool)


def _says_nothing(rows: datasets.Dataset, name: str) -> bool:
    """Whether a column holds only the values that its absence would mean."""
    plain = 0 if name == "token_type_ids" else 1
    for table in rows.select_columns(name).with_format("arrow").iter(64):
        values = pc.list_flatten(table.column(name))
        if name == "seq_lengths" or not pc.all(pc.equal(values.cast(pa.float64()), plain)).as_py():
            return False
    return True


def _of_token(name: str) -> bool:
    """Whether a column is ours and has a value for each token."""
    return name in COLUMNS or is_score(name)


def _element(kind: pa.DataType | None) -> pa.DataType | None:
    """The type of a list's values; None for what is no list."""
    if kind is None or not (
        pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind)
    ):
        return None
    return kind.value_type
