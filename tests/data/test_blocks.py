"""A folder that is opened by the heads of its blocks holds what Arrow's reader finds in its shards, or is refused."""

import json
import multiprocessing
import os
import pickle
import shutil
import zlib

import datasets
import numpy as np
import pyarrow as pa
import pytest

from tokenweight.data import load_rows, row_lengths, shards, verify
from tokenweight.data.shards import finish_dataset, new_shard
from tokenweight.data.stores import BLOCKS, mapped, read_sparsely
from tokenweight.data.stores.blocks import in_threads, read_blocks
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


def by_heads(folder):
    """The rows as they are read by the heads that were kept; None if they are not used."""
    found = read_blocks(folder, [path.name for path in sorted(folder.glob("rows-*.arrow"))], state(folder))
    return None if found is None else found[0]


def state(folder):
    return read_json(folder / "state.json")["_fingerprint"]


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


def test_every_value_is_that_of_arrows_reader(folder):
    expected, found = plain(folder), by_heads(folder)
    found.validate(full=True)
    assert found.equals(expected)
    assert found.to_pylist() == expected.to_pylist()
    assert found.column("input_ids").num_chunks == expected.column("input_ids").num_chunks == 6
    rows = load_rows(folder)
    assert rows.with_format(None).to_list() == expected.to_pylist()
    assert rows.with_format(None)[[3, 0, 7, 3]] == expected.take([3, 0, 7, 3]).to_pydict()
    assert rows.with_format(None)[-1] == expected.to_pylist()[-1]
    assert row_lengths(rows).tolist() == [4, 9, 1, 3, 30, 2, 5, 0, 1, 0, 200, 0]
    assert [os.path.basename(file["filename"]) for file in rows.cache_files] == [
        f"rows-{n:05d}.arrow" for n in range(5)
    ]


def test_columns_change_as_in_any_data_set_and_are_found_again_where_it_is_unpickled(folder):
    rows, others = (
        load(str(folder)) for load in (lambda path: load_rows(path).with_format(None), datasets.load_from_disk)
    )
    for change in (
        lambda data: data.rename_columns({"short_nll_8": "short_nll"}).remove_columns(["document", "weight"]),
        lambda data: data.select_columns(["weight", "input_ids"]),
        lambda data: data.select(range(2, 8)).rename_column("weight", "other"),
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


def kept(folder, change):
    """Write what was kept again, with a change of its line and the rest."""
    line, _, rest = zlib.decompress((folder / BLOCKS).read_bytes()).partition(b"\n")
    note, rest = json.loads(line), bytearray(rest)
    change(note, rest)
    (folder / BLOCKS).write_bytes(zlib.compress(json.dumps(note).encode() + b"\n" + rest))


def added(place, numbers):
    """Add to numbers of the table of sizes, from a place on."""

    def change(note, rest):
        sizes = np.frombuffer(rest, "<i8")
        sizes[place : place + len(numbers)] += numbers

    return change


@pytest.mark.parametrize(
    "damage",
    [
        lambda folder: (folder / BLOCKS).write_bytes((folder / BLOCKS).read_bytes()[:-1]),
        lambda folder: (folder / BLOCKS).write_bytes(b""),
        lambda folder: (folder / BLOCKS).write_bytes(flipped((folder / BLOCKS).read_bytes())),
        lambda folder: kept(folder, lambda note, rest: rest.clear()),
        lambda folder: kept(folder, lambda note, rest: note.pop("schema")),
        lambda folder: kept(folder, lambda note, rest: note["shards"][0].pop()),
        lambda folder: kept(folder, lambda note, rest: note["shards"][0].__setitem__(1, 8)),  # bytes
        lambda folder: kept(folder, lambda note, rest: note["shards"][1].__setitem__(2, 2)),  # rows
        lambda folder: kept(folder, lambda note, rest: note["shards"][1].__setitem__(3, 0)),  # blocks
        lambda folder: kept(folder, added(1, [1 << 40])),  # beyond the file
        lambda folder: kept(folder, added(1, [64, 0, -64])),  # a body ends within the next one
        lambda folder: kept(folder, added(0, [4, -4])),  # and begins where no value begins
        lambda folder: kept(folder, added(1, [-8])),
    ],
)  # fmt: skip
def test_heads_that_do_not_fit_are_refused_by_name(damage, folder):
    expected = plain(folder).to_pylist()
    damage(folder)
    with pytest.raises(ValueError, match=rf"{folder / BLOCKS} does not fit the shards.*; remove it"):
        load_rows(folder)
    (folder / BLOCKS).unlink()
    assert load_rows(folder).with_format(None).to_list() == expected


def flipped(content):
    place = len(content) // 2
    return content[:place] + bytes([content[place] ^ 16]) + content[place + 1 :]


def later(path, seconds):
    os.utime(path, (path.stat().st_atime, path.stat().st_mtime + seconds))


def test_heads_are_used_as_long_as_no_shard_is_newer(folder, tmp_path):
    expected, first = plain(folder), folder / "rows-00000.arrow"
    later(first, 3600)  # by the clock of another host
    assert by_heads(folder) is None
    assert load_rows(folder).with_format(None).to_list() == expected.to_pylist()
    finish_dataset(folder, [path.name for path in sorted(folder.glob("rows-*.arrow"))])
    assert by_heads(folder).equals(expected)
    assert by_heads(shutil.copytree(folder, tmp_path / "copy")).equals(expected)
    later(tmp_path / "copy" / "rows-00002.arrow", 7200)  # as if copied last, without the times of files
    assert by_heads(tmp_path / "copy") is None
    assert load_rows(tmp_path / "copy").with_format(None).to_list() == expected.to_pylist()
    assert verify(tmp_path / "copy") == 5


def test_a_shard_that_is_replaced_by_one_of_as_many_bytes_is_noticed(folder):
    first, before, kept_then = folder / "rows-00000.arrow", plain(folder), (folder / BLOCKS).read_bytes()
    known, time = first.stat(), (folder / BLOCKS).stat().st_mtime_ns
    with new_shard(first, SCHEMA) as (file, _):
        for one in (table([3, 30], 1), table([4, 9, 1]), table([2], 2)):
            file.write(one)
    later(first, 1)
    after = plain(folder)
    assert first.stat().st_size == known.st_size
    assert not after.equals(before)
    assert load_rows(folder).with_format(None).to_list() == after.to_pylist()
    os.utime(first, ns=(time, time))  # nothing but what it holds says so
    with pytest.raises(ValueError, match=rf"{folder}: shards and their notes were replaced since it was finished"):
        verify(folder)
    finish_dataset(folder, [path.name for path in sorted(folder.glob("rows-*.arrow"))])
    assert by_heads(folder).equals(after)
    assert verify(folder) == 5
    (folder / BLOCKS).write_bytes(kept_then)  # of the contents before
    assert by_heads(folder) is None
    assert load_rows(folder).with_format(None).to_list() == after.to_pylist()


def test_a_shard_of_another_size_is_refused_though_all_together_have_their_bytes(folder):
    first, second = (folder / f"rows-0000{number}.arrow" for number in range(2))
    first.write_bytes(first.read_bytes() + bytes(8))
    second.write_bytes(second.read_bytes()[:-8])
    with pytest.raises(ValueError, match=rf"{first} has \d+ bytes, \d+ were written"):
        load_rows(folder)


def test_what_is_read_sparsely_is_read_ahead_again_afterwards(folder, monkeypatch):
    told, rows = [], load_rows(folder)
    monkeypatch.setattr(mapped, "advise", lambda maps, advice: told.append((len(maps), advice)))
    with pytest.raises(KeyError), read_sparsely(rows.remove_columns("weight")):
        raise KeyError
    assert told == [(5, "MADV_RANDOM"), (5, "MADV_NORMAL")]
    with read_sparsely(datasets.Dataset.from_dict({"input_ids": [[1]]})):  # of which nothing is mapped
        pass


@pytest.mark.parametrize("count", [0, 1, 64, 65, 200])
def test_threads_keep_the_order(count):
    assert in_threads(lambda item: 2 * item, range(count)) == [2 * item for item in range(count)]
