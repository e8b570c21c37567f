"""A folder that is opened by the heads of its blocks holds what Arrow's reader finds in its shards."""

import itertools
import json
import multiprocessing
import os
import pickle
import shutil
import zlib
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
import pytest

from tokenweight.data import load_rows, row_lengths, shards, verify
from tokenweight.data.shards import finish_dataset, new_shard
from tokenweight.data.stores import BLOCKS, blocks, mapped
from tokenweight.data.stores.blocks import Blocks, in_threads
from tokenweight.records import read_json, write_json

SCHEMA = pa.schema(
    {
        "input_ids": pa.list_(pa.int32()),
        "short_nll_8": pa.list_(pa.float32()),
        "document": pa.string(),
        "documents": pa.list_(pa.string()),
        "teacher_ids": pa.list_(pa.list_(pa.int32())),
        "teacher_logprobs": pa.list_(pa.list_(pa.float16())),
        "weight": pa.float64(),
    }
)


def table(lengths, seed=0):
    """Rows of these lengths with every type of column, and nulls where others may have written some."""
    draw = np.random.default_rng(seed)
    rows = []
    for number, length in enumerate(lengths):
        nested = [[int(token) for token in draw.integers(0, 60, draw.integers(0, 4))] for _ in range(length)]
        rows.append(
            {
                "input_ids": draw.integers(0, 60, length).tolist(),
                "short_nll_8": draw.random(length).tolist() if number % 3 else None,
                "document": f"Größe {number}" if number % 2 else None,
                "documents": [f"{seed} {number}", None, ""][: number % 4],
                "teacher_ids": nested,
                "teacher_logprobs": [[float(np.float16(-0.1 * token)) for token in tokens] for tokens in nested],
                "weight": number / 7,
            }
        )
    return pa.Table.from_pylist(rows, SCHEMA)


def written(folder, parts, schema=SCHEMA):
    """A finished folder: of each shard the tables that it holds, each of which is a block."""
    folder.mkdir()
    write_json(folder / "rows.json", {})
    names = [f"rows-{number:05d}.arrow" for number in range(len(parts))]
    for name, tables in zip(names, parts):
        with new_shard(folder / name, schema) as (file, _):
            for one in tables:
                file.write(one)
    finish_dataset(folder, names)
    return folder


@pytest.fixture
def read(monkeypatch):
    """The names of shards that Arrow's reader has read, because the heads that were kept were not used."""
    names = []

    def read_shard(path):
        names.append(path.name)
        return ordinary(path)

    ordinary = blocks.read_shard
    monkeypatch.setattr(blocks, "read_shard", read_shard)
    return names


def opened(folder):
    return Blocks.opened(folder, read_json(folder / "state.json"))


def by_heads(folder):
    kept = opened(folder)
    return pa.concat_tables([kept.table(number) for number in range(len(kept.rows))])


def plain(folder):
    """The rows as Arrow reads the shards."""
    streams = [pa.ipc.open_stream(path.read_bytes()) for path in sorted(folder.glob("rows-*.arrow"))]
    return pa.concat_tables([stream.read_all() for stream in streams])


@pytest.fixture
def blocks_of_ten(monkeypatch):
    monkeypatch.setattr(shards, "_GROUP_TOKENS", 10)


@pytest.fixture
def folder(blocks_of_ten, tmp_path):
    """Five shards: several blocks, one row, none, an empty table, and blocks of empty and long rows."""
    parts = [[table([4, 9, 1]), table([3, 30], 1), table([2], 2)], [table([5], 3)], [], [table([])]]
    return written(tmp_path / "rows", [*parts, [table([0, 1, 0], 4), table([200], 5), table([0], 6)]])


def names(folder):
    return [path.name for path in sorted(folder.glob("rows-*.arrow"))]


LENGTHS = [4, 9, 1, 3, 30, 2, 5, 0, 1, 0, 200, 0]


def test_every_value_is_that_of_arrows_reader(folder, read):
    expected, found = plain(folder), by_heads(folder)
    found.validate(full=True)
    assert found.equals(expected)
    assert found.to_pylist() == expected.to_pylist()
    assert found.column("input_ids").num_chunks == expected.column("input_ids").num_chunks == 6
    rows = load_rows(folder)
    assert rows.with_format(None).to_list() == expected.to_pylist()
    assert rows.with_format(None)[[3, 0, 7, 3]] == expected.take([3, 0, 7, 3]).to_pydict()
    assert rows.with_format(None)[-1] == expected.to_pylist()[-1]
    for first, last in ((0, 12), (1, 7), (5, 6), (6, 8), (11, 12), (4, 4), (9, 40)):
        assert rows.with_format("arrow")[first:last].equals(expected.slice(first, last - first))
    assert rows.with_format("arrow")["weight"].to_pylist() == expected["weight"].to_pylist()
    assert row_lengths(rows).tolist() == LENGTHS
    assert [os.path.basename(file["filename"]) for file in rows.cache_files] == names(folder)
    assert not read


def test_a_shard_is_opened_when_one_of_its_rows_is_read(folder, monkeypatch):
    touched, table_of = [], Blocks.table
    monkeypatch.setattr(Blocks, "table", lambda self, number: touched.append(number) or table_of(self, number))
    rows = load_rows(folder).rename_column("weight", "other").remove_columns("document")
    assert (len(rows), rows.num_columns, len(rows.data), rows.data.shape) == (12, 6, 12, (12, 6))
    assert row_lengths(rows).tolist() == LENGTHS
    assert not touched
    assert rows[6]["other"] == 0
    assert touched == [1]
    assert [len(row["input_ids"]) for row in rows.select([7, 6, 8])] == [0, 5, 1]
    assert touched == [1, 4]
    assert [len(row["input_ids"]) for row in rows.select(range(5, 7))] == [2, 5]
    assert touched == [1, 4, 0]


@pytest.mark.skipif(not Path("/proc/self/fd").is_dir(), reason="the files of a process are not listed")
def test_no_more_shards_are_open_than_a_process_may_have_files(blocks_of_ten, tmp_path, monkeypatch):
    monkeypatch.setattr(mapped, "_OPEN", 3)
    folder = written(tmp_path / "rows", [[table([number + 1], number)] for number in range(20)])
    rows, most = load_rows(folder), 0
    for number in np.random.default_rng(0).permutation(20):
        assert len(rows[int(number)]["input_ids"]) == number + 1
        most = max(most, sum(target_of(link).startswith(str(folder)) for link in Path("/proc/self/fd").iterdir()))
    assert most == 4  # and what is kept


def target_of(link):
    try:
        return os.readlink(link)
    except FileNotFoundError:  # that of the folder itself, which was listed
        return ""


def test_lengths_are_those_of_the_tokens_whatever_has_their_name(folder):
    rows = load_rows(folder)
    named = rows.remove_columns("input_ids").rename_column("documents", "input_ids")
    assert row_lengths(named).tolist() == [len(documents) for documents in rows.with_format(None)["documents"]]
    assert row_lengths(rows.select([10, 1])).tolist() == [200, 9]
    assert row_lengths(rows.select_columns(["weight", "input_ids"])).tolist() == LENGTHS


def test_columns_change_as_in_any_data_set_and_are_found_again_where_it_is_unpickled(folder):
    rows, others = (
        load(str(folder)) for load in (lambda path: load_rows(path).with_format(None), datasets.load_from_disk)
    )
    for change in (
        lambda data: data.rename_columns({"short_nll_8": "short_nll"}).remove_columns(["document", "weight"]),
        lambda data: data.select_columns(["weight", "input_ids"]),
        lambda data: data.select(range(2, 8)).rename_column("weight", "other"),
        lambda data: data.select(range(4, 4)),
        lambda data: data.select([9, 1, 1]).select_columns(["documents"]),
        lambda data: data.cast_column("weight", datasets.Value("float32")),
        lambda data: data.add_column("more", list(range(12))),
        lambda data: data.filter(lambda row: row["weight"] > 0.3, load_from_cache_file=False),
        lambda data: data.flatten(),
        lambda data: datasets.concatenate_datasets([data, data.select([0])]),
    ):
        found, expected = change(rows), change(others)
        assert found.features == expected.features
        assert found.to_list() == expected.to_list()
        again = pickle.loads(pickle.dumps(found))
        assert (again.features, again.to_list()) == (expected.features, expected.to_list())
    assert rows.to_list() == others.to_list()
    assert len(pickle.dumps(rows.rename_column("weight", "other").data)) < 2500  # no rows


@pytest.mark.slow
def test_a_process_that_was_not_forked_opens_the_rows_again(folder):
    rows = load_rows(folder).with_format(None).rename_column("weight", "other")
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        assert pool.apply(datasets.Dataset.to_list, [rows]) == rows.to_list()


def test_nothing_is_kept_of_shards_that_arrows_reader_must_read(blocks_of_ten, tmp_path):
    some = pa.table({"input_ids": pa.array([[1, 2], [3]], pa.list_(pa.int32())), "kind": ["a", "b"]})
    coded = some.set_column(1, "kind", some["kind"].dictionary_encode())
    encoded = written(tmp_path / "coded", [[coded], [coded]], coded.schema)
    assert not (encoded / BLOCKS).exists()
    differ = written(tmp_path / "differ", [[some], [some]], some.schema)
    assert by_heads(differ).equals(plain(differ))
    with new_shard(differ / "rows-00001.arrow", SCHEMA.remove(6)) as (file, _):
        file.write(table([7, 2]).drop(["weight"]))
    (differ / BLOCKS).unlink()
    finish_dataset(differ, ["rows-00000.arrow", "rows-00001.arrow"])
    assert not (differ / BLOCKS).exists()


def changed(folder, change):
    """Write what was kept again, with a change of its line, of what is known of shards, and of their parts."""
    content = (folder / BLOCKS).read_bytes()
    start = 8 + int.from_bytes(content[:8], "little")
    line, _, rest = zlib.decompress(content[8:start]).partition(b"\n")
    note = json.loads(line)
    known = np.frombuffer(rest, "<i8", note["shards"] * 5).reshape(-1, 5).copy()
    stops = start + np.cumsum(known[:, 3:])
    parts = [bytearray(zlib.decompress(content[a:b])) for a, b in itertools.pairwise([start, *stops])]
    change(note, known, parts)
    compressed = [zlib.compress(part) for part in parts]
    known[:, 3:] = np.reshape([*map(len, compressed)], (-1, 2))
    first = zlib.compress(json.dumps(note).encode() + b"\n" + known.tobytes() + rest[known.nbytes :])
    rewritten(folder, b"".join([len(first).to_bytes(8, "little"), first, *compressed]))


def rewritten(folder, content):
    """Change the content of the file as a failing disk does: its time stays."""
    time = (folder / BLOCKS).stat().st_mtime_ns
    (folder / BLOCKS).write_bytes(content)
    os.utime(folder / BLOCKS, ns=(time, time))


def added(place, numbers):
    """Add to numbers of the table of sizes of the first shard, from a place on."""

    def change(note, known, parts):
        sizes = np.frombuffer(parts[1], "<i8")
        sizes[place : place + len(numbers)] += numbers

    return change


def cut(place):
    return lambda folder: rewritten(folder, (folder / BLOCKS).read_bytes()[:place])


def overwritten(place, by):
    def damage(folder):
        content = bytearray((folder / BLOCKS).read_bytes())
        content[place : place + len(by)] = by
        rewritten(folder, content)

    return damage


@pytest.mark.parametrize(
    "damage",
    [
        cut(0),
        cut(7),
        cut(100),
        overwritten(0, b"\xff" * 8),
        overwritten(0, bytes(8)),
        overwritten(9, b"\0\0"),
        lambda folder: changed(folder, lambda note, known, parts: note.pop("dataset")),
        lambda folder: changed(folder, lambda note, known, parts: note.update(shards=4)),
        lambda folder: changed(folder, lambda note, known, parts: note.update(shards="many")),
    ],
)
def test_if_what_is_kept_of_a_folder_is_damaged_all_shards_are_read_ordinarily(damage, folder, caplog):
    expected = plain(folder).to_pylist()
    damage(folder)
    assert opened(folder) is None
    assert f"{folder / BLOCKS} does not fit the shards beside it" in caplog.text
    rows = load_rows(folder).with_format(None)
    assert rows.to_list() == expected
    assert row_lengths(rows).tolist() == LENGTHS


@pytest.mark.parametrize(
    ("damage", "shard"),
    [
        (cut(-1), 4),
        (overwritten(-9, b"\0\0\0"), 4),
        (lambda folder: changed(folder, lambda note, known, parts: parts[1].clear()), 0),
        (lambda folder: changed(folder, lambda note, known, parts: parts[7].clear()), None),  # of no blocks
        (lambda folder: changed(folder, lambda note, known, parts: known[1].__setitem__(2, 0)), 1),
        (lambda folder: changed(folder, lambda note, known, parts: known[1].__setitem__(2, 1 << 40)), 1),
        (lambda folder: changed(folder, added(1, [1 << 40])), None),  # the file itself goes on
        (lambda folder: changed(folder, added(1, [64, 0, -64])), 0),  # a body ends within the next one
        (lambda folder: changed(folder, added(0, [4, -4])), 0),  # and begins where no value begins
        (lambda folder: changed(folder, added(1, [-8])), 0),
    ],
)  # fmt: skip
def test_if_the_heads_of_a_shard_are_damaged_it_is_read_ordinarily(damage, shard, folder, read, caplog):
    expected = plain(folder).to_pylist()
    damage(folder)
    rows = load_rows(folder).with_format(None)
    assert rows.to_list() == expected
    assert rows[6] == expected[6]
    assert {*read} == ({*()} if shard is None else {f"rows-{shard:05d}.arrow"})
    assert (f"{folder / BLOCKS} does not fit the shards beside it" in caplog.text) is (shard is not None)
    assert row_lengths(rows).tolist() == LENGTHS


def test_if_lengths_are_damaged_they_are_read_from_the_shard(folder, caplog):
    changed(folder, lambda note, known, parts: parts[0].__delitem__(slice(-4, None)))
    assert row_lengths(load_rows(folder)).tolist() == LENGTHS
    assert f"{folder / BLOCKS} does not fit the shards beside it (5 lengths of 6 rows)" in caplog.text


def later(path, nanoseconds):
    stat = path.stat()
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns + nanoseconds))


def test_heads_are_used_for_the_file_that_had_them_and_copies_of_it(folder, tmp_path, read):
    expected, second = plain(folder), folder / "rows-00001.arrow"
    copy = shutil.copytree(folder, tmp_path / "copy")
    assert by_heads(copy).equals(expected)
    for unit in (1000, 10**9):  # what a copy keeps of times
        for path in [copy / BLOCKS, *copy.glob("rows-*.arrow")]:
            later(path, -(path.stat().st_mtime_ns % unit))
        assert by_heads(copy).equals(expected)
    assert not read
    for seconds in (3600, -7200):  # made later, or restored from somewhere
        later(second, seconds * 10**9)
        assert load_rows(folder).with_format(None).to_list() == expected.to_pylist()
        assert row_lengths(load_rows(folder)).tolist() == LENGTHS
        assert {*read} == {second.name}
        read.clear()
    finish_dataset(folder, names(folder))
    assert by_heads(folder).equals(expected)
    assert not read
    assert verify(folder) == 5


def test_a_shard_of_somebody_else_is_read_ordinarily(folder, read, monkeypatch):
    utime = os.utime

    def refused(path, **given):
        if path.name == "rows-00001.arrow":
            raise PermissionError(1, "Operation not permitted")
        utime(path, **given)

    monkeypatch.setattr(os, "utime", refused)
    (folder / BLOCKS).unlink()
    finish_dataset(folder, names(folder))
    assert by_heads(folder).equals(plain(folder))
    assert read == ["rows-00001.arrow"]


@pytest.mark.parametrize("seconds", [1, -1, -86400])
def test_a_shard_that_is_replaced_by_one_of_as_many_bytes_is_noticed(seconds, folder, read):
    first, before, kept_then = folder / "rows-00000.arrow", plain(folder), (folder / BLOCKS).read_bytes()
    known = first.stat()
    with new_shard(first, SCHEMA) as (file, _):
        for one in (table([3, 30], 1), table([4, 9, 1]), table([2], 2)):
            file.write(one)
    os.utime(first, ns=(known.st_mtime_ns, known.st_mtime_ns + seconds * 10**9))
    after = plain(folder)
    assert first.stat().st_size == known.st_size
    assert not after.equals(before)
    assert load_rows(folder).with_format(None).to_list() == after.to_pylist()
    assert row_lengths(load_rows(folder)).tolist() == [3, 30, 4, 9, 1, 2, *LENGTHS[6:]]
    os.utime(first, ns=(known.st_mtime_ns, known.st_mtime_ns))  # only its note says so
    with pytest.raises(ValueError, match=rf"{folder}: shards and their notes were replaced since it was finished"):
        verify(folder)
    finish_dataset(folder, names(folder))
    read.clear()
    assert by_heads(folder).equals(after)
    assert not read
    assert verify(folder) == 5
    (folder / BLOCKS).write_bytes(kept_then)  # of the contents before
    assert opened(folder) is None
    assert load_rows(folder).with_format(None).to_list() == after.to_pylist()


def test_a_shard_of_another_size_is_refused_though_all_together_have_their_bytes(folder):
    first, second = (folder / f"rows-0000{number}.arrow" for number in range(2))
    first.write_bytes(first.read_bytes() + bytes(8))
    second.write_bytes(second.read_bytes()[:-8])
    rows = load_rows(folder)
    for read_some in (lambda: rows[0], lambda: rows[6], lambda: row_lengths(rows), lambda: rows[:]):
        with pytest.raises(ValueError, match=rf"({first}|{second}) has \d+ bytes: \d+ were written"):
            read_some()


def test_a_shard_of_other_rows_is_refused(folder):
    changed(folder, lambda note, known, parts: known[1].__setitem__(1, 2))
    with pytest.raises(ValueError, match=f"{folder / 'rows-00001.arrow'} holds 1: 2 were written"):
        load_rows(folder)[7]


@pytest.mark.parametrize("count", [0, 1, 64, 65, 200])
def test_threads_keep_the_order(count):
    assert in_threads(lambda item: 2 * item, range(count)) == [2 * item for item in range(count)]
