"""Folders of Parquet files: those of other tools as rows, and our own with the same guarantees as those of Arrow."""

import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from scored import CONTEXT, tiny_scorer

from models import LENGTH, NUM_ROWS, some_rows
from tokenweight.data import (
    export_rows,
    load_rows,
    load_scores,
    open_rows,
    read_contents,
    score_folder,
    score_rows,
    verify,
)
from tokenweight.records import read_json

pytestmark = pytest.mark.usefixtures("own_cache")


def same_rows(found, expected):
    assert found.column_names == expected.column_names
    for name in expected.column_names:
        assert np.array_equal(np.stack(found[name][:]), np.stack(expected[name][:])), name


def written(folder, table, *, files=2, prefix="part"):
    """A folder as other tools write it."""
    (folder / "nested").mkdir(parents=True)
    step = -(-len(table) // files)
    for number in range(files):
        name = f"{'nested/' * (number == 1)}{prefix}-{number}.parquet"
        pq.write_table(table.slice(number * step, step), folder / name)
    (folder / "_SUCCESS").touch()
    (folder / "_temporary-0.parquet").write_bytes(b"left by a task that failed")
    return folder


def of_lists(table):
    return table


def of_categories(table):
    return table.set_column(1, "document", table["document"].dictionary_encode())


def of_tensors(table):
    """As Ray writes rows of different lengths."""
    tokens = table["input_ids"].combine_chunks()
    shapes = pa.array([[LENGTH]] * len(table))
    return table.set_column(0, "input_ids", pa.StructArray.from_arrays([tokens, shapes], ["data", "shape"]))


@pytest.mark.parametrize("kind", [of_lists, of_categories, of_tensors])
def test_parquet_of_other_tools_is_read_as_rows(kind, folders):
    table = kind(some_rows().with_format("arrow")[:])
    folder = written(folders / "parquet", table)
    order = [4, 5, 6, 0, 1, 2, 3]  # nested/part-1 comes before part-0
    rows, contents = open_rows(folder)
    same_rows(rows, some_rows().select(order))
    assert (contents.rows, contents.tokens) == (NUM_ROWS, NUM_ROWS * LENGTH)
    load_rows(folder)
    assert len(list((folders / "cache" / "tokenweight").glob("*.arrow"))) == 1
    for file in folder.rglob("part*"):
        file.unlink()
    pq.write_table(table.slice(0, 2), folder / "part-0.parquet")
    same_rows(load_rows(folder), some_rows().select(range(2)))


def test_parquet_of_other_tools_is_scored_and_read_like_any_rows(folders):
    written(folders / "parquet", some_rows().with_format("arrow")[:], files=1)
    for name in ("rows", "parquet"):
        score_folder(folders / name, str(folders / "model"), [CONTEXT], folders / f"{name}-scored", with_long=True)
    expected = load_rows(folders / "rows-scored")
    same_rows(load_rows(folders / "parquet-scored"), expected)
    scored = written(folders / "by-ray", expected.with_format("arrow")[:], files=1)
    rows, provenance = load_scores(scored, size=8)
    assert provenance == {"context": {"size": 8}}
    assert np.array_equal(np.stack(rows["short_nll"][:]), np.stack(expected["short_nll_8"][:]))
    with pytest.raises(ValueError, match=r"^size 9: .*by-ray holds scores with short contexts of 8 tokens"):
        load_scores(scored, size=9)
    (scored / "scores.json").write_bytes((folders / "rows-scored" / "scores.json").read_bytes())
    assert load_scores(scored)[1]["context"] == {"size": 8, "stride": 5}


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda folder: pq.write_table(pa.table({"text": ["a"]}), folder / "a.parquet"),
            "no column input_ids: found text",
        ),
        (lambda folder: (folder / "a.parquet").write_bytes(b"PAR1"), r"a\.parquet: cannot be read"),
        (
            lambda folder: [
                pq.write_table(pa.table({"input_ids": [[1, 2]], **more}), folder / f"{name}.parquet")
                for name, more in (("a", {}), ("b", {"labels": [[1, 2]]}))
            ],
            r"b\.parquet: expected the columns of a\.parquet, labels is in one of them",
        ),
        (
            lambda folder: [
                pq.write_table(pa.table({"input_ids": [values]}), folder / f"{name}.parquet")
                for name, values in (("a", [1, 2]), ("b", ["c", "d"]))
            ],
            r"b\.parquet: expected the types of a\.parquet",
        ),
        (
            lambda folder: [
                pq.write_table(pa.table({"input_ids": [[1, 2]]}), folder / f"{split}-00000-of-00001.parquet")
                for split in ("train", "test")
            ],
            r"holds several splits \(test, train\)",
        ),
        (
            lambda folder: pq.write_table(pa.table({"input_ids": [[1]]}).slice(0, 0), folder / "a.parquet"),
            "holds no rows",
        ),
    ],
    ids=["column", "damaged", "columns", "types", "splits", "empty"],
)
def test_parquet_that_is_no_rows_is_refused_by_name(make, message, tmp_path):
    (tmp_path / "rows").mkdir()
    make(tmp_path / "rows")
    with pytest.raises(ValueError, match=message) as refusal:
        load_rows(tmp_path / "rows")
    assert str(tmp_path / "rows") in str(refusal.value)
    assert "\n" not in str(refusal.value)
    assert not list((tmp_path / "cache").rglob("*.arrow")) or "column" in message


@pytest.fixture
def scored(shards_of_two, tmp_path):
    """Our own scores as Parquet, and the same as Arrow."""
    for format in ("arrow", "parquet"):
        settings = {"provenance": {"model": "m"}, "format": format}
        score_rows(some_rows(), tiny_scorer(with_long=True), tmp_path / format, **settings)
    return tmp_path / "parquet"


def test_scores_in_parquet_are_those_in_arrow_with_notes_and_provenance(scored, tmp_path):
    assert len(list(scored.glob("*.parquet"))) == 4
    same_rows(load_rows(scored), load_rows(tmp_path / "arrow"))
    assert read_contents(scored) == read_contents(tmp_path / "arrow")
    provenance = load_scores(scored)[1]
    assert provenance == {**load_scores(tmp_path / "arrow")[1], "format": "parquet"}
    table = pa.concat_tables(map(pq.read_table, sorted(scored.glob("*.parquet"))))  # as any other tool reads them
    assert table["input_ids"].to_pylist() == some_rows().with_format(None)["input_ids"][:]


def test_parquet_shards_that_are_there_are_not_scored_again(scored, tmp_path):
    (kept, *_, gone) = sorted(scored.glob("*.parquet"))
    content, time = gone.read_bytes(), kept.stat().st_mtime_ns
    gone.unlink()
    with pytest.raises(ValueError, match=f"{gone} is missing; `tokenweight score`"):
        load_rows(scored)
    summary = score_rows(some_rows(), tiny_scorer(with_long=True), scored, provenance={"model": "m"}, format="parquet")
    assert (summary.new_tokens, gone.read_bytes(), kept.stat().st_mtime_ns) == (LENGTH, content, time)
    with pytest.raises(ValueError, match="format is 'parquet' there, 'arrow' now"):
        score_rows(some_rows(), tiny_scorer(with_long=True), scored, provenance={"model": "m"})


def test_damage_to_our_own_parquet_is_refused_by_name(scored):
    shard = sorted(scored.glob("*.parquet"))[1]
    content = shard.read_bytes()
    shard.write_bytes(content[:100] + bytes([content[100] ^ 1]) + content[101:])
    with pytest.raises(ValueError, match=f"{shard} is damaged"):
        verify(scored)
    shard.write_bytes(content + b"\0")
    with pytest.raises(ValueError, match=f"{shard} is damaged"):
        load_rows(scored)
    shard.write_bytes(content)
    (scored / "more.parquet").write_bytes(content)
    with pytest.raises(ValueError, match=r"holds more\.parquet besides the files that were written there"):
        load_rows(scored)


def test_parquet_of_which_shards_are_missing_is_not_taken_for_that_of_another_tool(shards_of_two, tmp_path):
    settings = {"provenance": {}, "format": "parquet", "share": (0, 2)}
    score_rows(some_rows(), tiny_scorer(), tmp_path / "scored", **settings)
    with pytest.raises(ValueError, match=r"scored is not finished: it has scores-00000-of-00004\.parquet"):
        load_rows(tmp_path / "scored")


def test_exported_parquet_is_the_folder_it_was_made_from(scored, tmp_path, monkeypatch):
    monkeypatch.setattr("tokenweight.data.export.SHARD_TOKENS", 3 * LENGTH)
    contents = export_rows(tmp_path / "arrow", tmp_path / "out", format="parquet")
    assert contents == read_contents(tmp_path / "out") == read_contents(scored)
    assert len(list((tmp_path / "out").glob("*.parquet"))) == 3
    same_rows(load_rows(tmp_path / "out"), load_rows(tmp_path / "arrow"))
    assert load_scores(tmp_path / "out")[1] == load_scores(scored)[1]
    verify(tmp_path / "out")


def test_exported_lines_hold_every_value(scored, tmp_path):
    nothing = {"labels": [[-100] * (LENGTH - 1) + [5]] * NUM_ROWS}
    score_rows(
        some_rows(**nothing).select([0]), tiny_scorer(with_long=True), tmp_path / "one", provenance={"model": "m"}
    )
    for folder in ("arrow", "one"):
        export_rows(tmp_path / folder, tmp_path / f"{folder}-lines", format="jsonl")
        found = [json.loads(line) for line in (tmp_path / f"{folder}-lines" / "rows.jsonl").read_text().splitlines()]
        rows = load_rows(tmp_path / folder)
        for line, row in zip(found, rows, strict=True):
            assert list(line) == rows.column_names
            for name, value in row.items():
                value = np.asarray(value)
                expected = np.array(line[name], dtype=value.dtype) if line[name] is not None else np.float32("nan")
                assert np.array_equal(expected, value, equal_nan=value.dtype.kind == "f"), name
        assert read_json(tmp_path / f"{folder}-lines" / "scores.json")["model"] == "m"
    assert max(len(str(loss)) for loss in found[0]["long_nll"]) <= 12


@pytest.mark.parametrize(
    ("format", "message"), [("csv", "^format csv: expected"), ("jsonl", "^out .*: exists already")]
)
def test_what_cannot_be_exported_is_refused(format, message, scored, tmp_path):
    with pytest.raises(ValueError, match=message):
        export_rows(tmp_path / "arrow", scored, format=format)
