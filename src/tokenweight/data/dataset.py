"""Open rows and scores: what a folder holds, and one of its short contexts."""

import contextlib
import hashlib
import logging
import os
from collections.abc import Iterator, Mapping, Sequence, Set
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq

from tokenweight.data.columns import COLUMNS, TRANSLATED, check_lengths, check_types, translate
from tokenweight.data.contents import Contents, contents_of
from tokenweight.data.documents import naming
from tokenweight.data.shards import check_name, dataset_files, locked, noted_contents
from tokenweight.data.stores import local_folder, map_rows, map_table, read_note_of
from tokenweight.method import SCORES, Weighting
from tokenweight.models import SCORE_OPTIONS, TEACHER
from tokenweight.records import make_folder, read_json, replaced, writing_to

logger = logging.getLogger(__name__)
_SIZED = ("short_nll", "divergence")
"""Scores that are stored for each short context, with its size at the end of the name."""
_OWN_CONTRAST = "Losses of a scorer that are comparable with each other only: contrast scorer."
_ROWS_READ = 64  # at a time, when all rows are looked at


def load_rows(folder: str | os.PathLike[str]) -> datasets.Dataset:
    """Open a folder of rows, mapped into memory, with its columns as numpy arrays: one that `datasets` wrote, or one of
    Parquet files with lists of tokens, whoever wrote them. Their rows are kept in the cache of `datasets`, as is the
    copy of a folder that is named by a URL (`local_folder`).

    Of a folder that `tokenweight` wrote, the sizes of shards are compared with those that were written, so that a file
    that was cut off is found. Contents are not read: `verify` does that. Of any other, the lengths of all columns are
    compared, and what other tools say of tokens becomes ours: padding (where `attention_mask` is 0) is left out, labels
    are -100 where `completion_mask`, `assistant_masks` or `loss_mask` is 0, and `seq_lengths` become `position_ids`.
    Rows that differ by this are written once, to the cache of `datasets`.

    Raises:
        ValueError: if it is neither; naming a shard that is missing or has another size than was
            written, a column that is missing, of another type, or would change what a row means but is not read, or a
            row whose columns do not fit each other.
    """
    return _opened(local_folder(folder))[0]


def open_rows(folder: str | os.PathLike[str]) -> tuple[datasets.Dataset, Contents]:
    """`load_rows` and `read_contents` at once. A warning says how many rows have no token to predict.

    Raises:
        ValueError: as `load_rows` does; if no token is predicted in any row.
    """
    rows, noted = _opened(local_folder(folder))
    contents = scan_contents(rows) if noted is None else noted
    check_predicted(contents, folder)
    return rows, contents


def check_predicted(contents: Contents, folder: str | os.PathLike[str]) -> None:
    """Raise a ValueError if no token is predicted in any row, and warn if none is in some."""
    if contents.unpredicted == contents.rows:
        raise ValueError(f"{folder}: no token is predicted in any row: expected labels other than -100")
    if contents.unpredicted:
        counted = f"{contents.unpredicted} of {contents.rows} rows"
        logger.warning("%s: no token is predicted in %s, first in row %d", folder, counted, contents.first_unpredicted)


def _opened(folder: Path) -> tuple[datasets.Dataset, Contents | None]:
    """The rows of a folder; and their contents, if noted when they were written."""
    if not folder.is_dir():
        raise ValueError(f"{folder}: no such folder of rows; make one with `tokenweight prepare`")
    check_name(folder)
    files = [] if (folder / "state.json").is_file() else dataset_files(folder)
    noted = noted_contents(folder, check=True)
    rows = _of_parquet(folder, files) if files else _of_arrow(folder, own=noted is not None)
    if "input_ids" not in rows.column_names:
        raise ValueError(f"{folder} has no column input_ids: found {', '.join(rows.column_names)}")
    if not len(rows):
        raise ValueError(f"{folder} holds no rows")
    check_types(rows, folder)
    if noted is None or {*TRANSLATED} & {*rows.column_names}:
        check_lengths(rows, folder)
        rows, noted = translate(rows, folder, _cache(folder)), None
    return rows.with_format("numpy"), noted


def _of_arrow(folder: Path, *, own: bool) -> datasets.Dataset:
    """The rows of a folder of `datasets`; `own` if its files are as `new_shard` and `finish_dataset` wrote them."""
    try:
        rows = map_rows(folder) if own else datasets.load_from_disk(str(folder))
    except IndexError:  # so `datasets` says that there are none
        raise ValueError(f"{folder} holds no rows") from None
    except (OSError, ValueError, KeyError) as error:
        raise ValueError(f"{folder} is not a finished `datasets` folder: {' '.join(str(error).split())}") from error
    if isinstance(rows, datasets.DatasetDict):
        raise ValueError(f"{folder} holds several splits ({', '.join(rows)}): name one of its folders")
    return rows


def _cache(folder: Path, *, kind: str = "") -> Path:
    """The file for rows that differ from those in the folder, in the cache of `datasets`."""
    stats = [((folder / name).resolve(), (folder / name).stat()) for name in dataset_files(folder)]
    known = hashlib.sha256(repr([(path, stat.st_size, stat.st_mtime_ns) for path, stat in stats]).encode())
    return Path(datasets.config.HF_DATASETS_CACHE) / "tokenweight" / f"{known.hexdigest()[:32]}{kind}.arrow"


def _of_parquet(folder: Path, files: Sequence[str]) -> datasets.Dataset:
    """The rows of Parquet files, one file after the other, from a file in the cache that is mapped into memory."""
    path = _cache(folder, kind="-parquet")
    with writing_to(path.parent):
        make_folder(path.parent)
    with locked(path, wait=True):
        if not path.is_file():
            _write_arrow([folder / name for name in files], path)
    return datasets.Dataset(map_table(path))


def _write_arrow(files: Sequence[Path], path: Path) -> None:
    """Write the rows of Parquet files to an Arrow file, with the columns and types of the first of them."""
    schema: pa.Schema | None = None
    with replaced(path) as part, contextlib.ExitStack() as stack, writing_to(path.parent):
        for file in files:
            for columns in _parquet_columns(file):
                if schema is None:
                    schema = pa.schema([(name, column.type) for name, column in columns.items()])
                    writer = stack.enter_context(pa.ipc.new_stream(str(part), schema))
                if differ := {*columns} ^ {*schema.names}:
                    raise ValueError(
                        f"{file}: expected the columns of {files[0].name}, {min(differ)} is in one of them"
                    )
                try:
                    values = [columns[field.name].cast(field.type) for field in schema]
                except pa.ArrowException as error:
                    raise ValueError(f"{file}: expected the types of {files[0].name}: {error}") from error
                writer.write_batch(pa.record_batch(values, schema=schema))
        if schema is None:
            raise ValueError(f"{files[0].parent} holds no rows")


def _parquet_columns(file: Path) -> Iterator[dict[str, pa.Array]]:
    with naming(lambda: str(file)), pq.ParquetFile(file) as opened:
        for batch in opened.iter_batches(_ROWS_READ):
            yield {name: _plain(column) for name, column in zip(batch.schema.names, batch.columns)}


def _plain(column: pa.Array) -> pa.Array:
    """A column as lists and values: for a tensor (Ray) its values, for a category (pandas) its name."""
    while isinstance(column, pa.ExtensionArray):
        column = column.storage
    if pa.types.is_dictionary(column.type):
        return column.dictionary_decode()
    if pa.types.is_struct(column.type) and {field.name for field in column.type} == {"data", "shape"}:
        return column.field("data")
    return column


def read_contents(folder: str | os.PathLike[str]) -> Contents:
    """The contents of a folder of rows, in numbers: from the notes written with it, else from all of its rows.

    Raises:
        ValueError: as `load_rows` does.
    """
    return noted_contents(local_folder(folder)) or open_rows(folder)[1]


def read_provenance(folder: str | os.PathLike[str]) -> dict[str, Any]:
    """The provenance of a folder of rows or scores, here or at a URL: `scores.json`, else `rows.json`, or nothing.

    Raises:
        ValueError: if that cannot be read.
    """
    found = (read_note_of(folder, name) for name in ("scores.json", "rows.json"))
    return next((note for note in found if note is not None), {})


def read_prepared(provenance: Mapping[str, Any]) -> Mapping[str, Any]:
    """The notes of `prepare` on rows with this provenance: for scored ones, in the folder that was scored.

    Nothing, if that folder is gone; with a warning, if it cannot be read.
    """
    scored = provenance.get("rows")
    if not isinstance(scored, str):
        return provenance
    try:
        return read_provenance(scored)
    except ValueError as error:
        logger.warning("%s: of which texts the scored rows are made is not known", error)
        return {}


def holds_pieces(provenance: Mapping[str, Any]) -> bool:
    """Whether rows with this provenance are pieces of 2^k + 1 tokens, of which the last is only predicted."""
    return read_prepared(provenance).get("short") == "decompose"


def scan_contents(rows: datasets.Dataset) -> Contents:
    """The contents of rows, in numbers, from every token."""
    columns = [name for name in COLUMNS if name in rows.column_names]
    return sum(map(contents_of, rows.select_columns(columns).with_format("arrow").iter(_ROWS_READ)), Contents())


def load_scores(
    folder: str | os.PathLike[str], *, size: int | None = None, stride: int | None = None
) -> tuple[datasets.Dataset, dict[str, Any]]:
    """Open a scored folder: its rows, and its provenance (empty, if it was not made by `score_rows`).

    The chosen scores are the column `short_nll`, and `divergence` if it is stored; `provenance["context"]` is the size
    and stride of their windows.
    A stride other than the expected one causes a warning. If the scorer's losses are comparable with each other only,
    `info.description` of the rows says so, which `select` and `map` keep, and `noted_contrast` reads.

    Args:
        size: size of the short context; by default the only one that is stored.
        stride: the expected stride.

    Raises:
        ValueError: if the folder is not finished, has no scores with a short context of that size, or was changed after
            it was scored.
    """
    rows, provenance = choose_scores(load_rows(folder), folder, size=size, stride=stride)
    if provenance.get("contrast") == "scorer" and noted_contrast(rows) is None:
        rows.info.description = f"{rows.info.description or ''}\n{_OWN_CONTRAST}".strip()
    return rows, provenance


def noted_contrast(rows: Any) -> str | None:
    """The contrast that `load_scores` has noted with rows: "scorer", or None if it has noted none."""
    info = getattr(rows, "info", None)
    return "scorer" if _OWN_CONTRAST in (getattr(info, "description", None) or "") else None


def choose_scores(
    rows: datasets.Dataset,
    folder: str | os.PathLike[str],
    *,
    size: int | None = None,
    stride: int | None = None,
    needed: Set[str] = frozenset({"short_nll"}),
) -> tuple[datasets.Dataset, dict[str, Any]]:
    """`load_scores` of rows that `load_rows` has opened.

    Args:
        needed: the columns that have to be there, of `tokenweight.method.SCORES`.
    """
    place = local_folder(folder)
    provenance = read_json(place / "scores.json") if (place / "scores.json").is_file() else {}
    if provenance and (place / "state.json").is_file():
        _check_not_resaved(place)
    for name in [name for name in (*SCORES, *TEACHER) if name in needed]:
        if not any(column == name or column.startswith(f"{name}_") for column in rows.column_names):
            raise ValueError(
                f"{folder} has no column {name}: score it with `tokenweight score {folder}{SCORE_OPTIONS[name]}`"
            )
    if not provenance:
        logger.warning("%s does not say who scored it: its scores are used as they are", folder)
    first = next((name for name in _SIZED if name in needed), None)
    if first is None:
        return rows, provenance
    sizes = [int(name.rpartition("_")[2]) for name in rows.column_names if name.startswith(f"{first}_")]
    if first in rows.column_names:  # `score` did not write it, and nothing says its context
        if size is None:
            return _with_all(rows, folder, needed), provenance
        if size not in sizes:
            raise ValueError(
                f"size {size}: {folder} has a column {first}, which does not say its size: call it {first}_{size}, "
                "or leave size out"
            )
    if size is None and len(sizes) == 1:
        size = sizes[0]
    if size not in sizes:
        known, other = ", ".join(map(str, sizes)), "" if size is None else f" {size}"
        raise ValueError(f"size{other}: {folder} holds scores with short contexts of {known} tokens: name one of them")
    context = next((one for one in provenance.get("contexts", ()) if one["size"] == size), {"size": size})
    if stride is not None and context.get("stride", stride) != stride:
        logger.warning("%s was scored with stride %s, not %s: it is used as it is", folder, context["stride"], stride)
    rows = rows.remove_columns([name for name in _SIZED if name in rows.column_names])
    chosen = {f"{name}_{size}": name for name in _SIZED if f"{name}_{size}" in rows.column_names}
    return _with_all(rows.rename_columns(chosen), folder, needed, size), {**provenance, "context": context}


def _with_all(
    rows: datasets.Dataset, folder: str | os.PathLike[str], needed: Set[str], size: int | None = None
) -> datasets.Dataset:
    """The rows themselves; a ValueError if they lack a column of the size that was chosen."""
    for name in [name for name in _SIZED if name in needed and name not in rows.column_names]:
        column = name if size is None else f"{name}_{size}"
        raise ValueError(
            f"{folder} has no column {column}: score it with `tokenweight score {folder}{SCORE_OPTIONS[name]}`"
        )
    return rows


def check_scores(
    weighting: Weighting, provenance: Mapping[str, Any], folder: str | os.PathLike[str], contrast: str = "scorer"
) -> None:
    """Raise a ValueError if the scores of a folder, by their provenance, cannot be compared as a weighting requires.

    Args:
        contrast: the source of the long losses that it compares: "scorer", of the scores, or "trained", of a model.
    """
    stored, wanted = provenance.get("divergence"), weighting.divergence
    if None not in (stored, wanted) and stored != wanted:
        raise ValueError(
            f"{folder} holds the divergence {stored!r}, but weighting {weighting} needs {wanted!r}: score its "
            f"sequences with `tokenweight score --divergence {wanted}`"
        )
    if provenance.get("contrast") != "scorer":  # losses of a model
        return
    if contrast == "scorer" and weighting.of_losses and "ref_nll" in weighting.uses:
        raise ValueError(
            f"weighting {weighting}: compares losses with those of a reference model, and those of "
            f"{provenance.get('model')} in {folder} are comparable with each other only: expected another weighting"
        )
    if contrast == "trained" and weighting.uses_short:
        raise ValueError(
            f"contrast trained: {folder} was scored by {provenance.get('model')}, whose losses cannot be compared with "
            "those of the model that is trained: expected contrast scorer"
        )


def has_scores(rows: datasets.Dataset) -> bool:
    """Whether the rows have short losses, of one context or several."""
    return any(name.startswith("short_nll") for name in rows.column_names)


def _check_not_resaved(folder: Path) -> None:
    for name in dataset_files(folder):
        if not name.startswith("scores-"):
            raise ValueError(f"{folder} was changed after it was scored: its rows are in {name}; score them again")
