"""What a folder holds is known from its notes, whatever its shards, and opening it reads no more of a larger one."""

import re
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
import pytest
import torch
from scored import tiny_scorer

from models import LENGTH, some_rows
from texts import some_documents, trained_tokenizer
from tokenweight.data import (
    Contents,
    load_rows,
    prepare,
    prepare_rows,
    read_contents,
    row_lengths,
    scan_contents,
    score_rows,
)
from tokenweight.data.contents import contents_of
from tokenweight.data.shards import finish_dataset, new_shard
from tokenweight.method import prediction_mask
from tokenweight.records import read_json, write_json

ROWS = {"input_ids": [[5, 6, 7], [8, 9]], "position_ids": [[0, 1, 0], [0, 1]]}


def test_the_fingerprint_of_rows_is_theirs_however_they_are_stored():
    rows = datasets.Dataset.from_dict(ROWS)
    wide = datasets.Features({name: datasets.List(datasets.Value("int32")) for name in ROWS})
    same = [
        rows.with_format("numpy"),
        rows.cast(wide),
        datasets.Dataset.from_dict({"name": ["a", "b"], **ROWS}),
        datasets.Dataset.from_dict({name: values[::-1] for name, values in ROWS.items()}).select([1, 0]),
        datasets.concatenate_datasets([rows.select([0]), rows.select([1])]),
    ]
    assert {scan_contents(other).fingerprint for other in same} == {scan_contents(rows).fingerprint}


def test_the_fingerprint_of_rows_changes_with_any_edit_of_tokens_or_positions():
    edits = [
        ROWS,
        {**ROWS, "input_ids": [[5, 6, 4], [8, 9]]},
        {**ROWS, "input_ids": [[8, 9], [5, 6, 7]]},
        {"input_ids": [[5, 6], [7, 8, 9]], "position_ids": [[0, 1], [0, 0, 1]]},
        {"input_ids": [[5, 6, 7, 8, 9]], "position_ids": [[0, 1, 0, 0, 1]]},
        {"input_ids": [[5, 6, 7, 8, 9], []], "position_ids": [[0, 1, 0, 0, 1], []]},
        {**ROWS, "position_ids": [[0, 1, 2], [0, 1]]},
        {**ROWS, "labels": [[5, 6, 7], [8, -100]]},
        {"input_ids": ROWS["input_ids"]},
        {"input_ids": ROWS["position_ids"], "position_ids": ROWS["input_ids"]},
    ]
    fingerprints = [scan_contents(datasets.Dataset.from_dict(columns)).fingerprint for columns in edits]
    assert len(set(fingerprints)) == len(edits)


def numbers_of(rows):
    """Counts and extremes, one row at a time."""
    tokens = [list(map(int, row)) for row in rows["input_ids"]]
    lengths, ids = [len(row) for row in tokens], [token for row in tokens for token in row]
    return Contents(len(rows), len(ids), min(lengths), max(lengths), min(ids), max(ids))


def test_rows_without_a_token_to_predict_are_counted_in_all_parts():
    generator = np.random.default_rng(0)
    rows = [generator.choice([-100, 7], size=generator.integers(1, 4), p=[0.8, 0.2]).tolist() for _ in range(200)]
    positions = [[0, *generator.integers(0, 2, len(row) - 1).tolist()] for row in rows]
    masks = [prediction_mask(torch.tensor([row]), torch.tensor([places])) for row, places in zip(rows, positions)]
    silent = [number for number, mask in enumerate(masks) if not mask.any()]
    data = datasets.Dataset.from_dict({"input_ids": rows, "labels": rows, "position_ids": positions})
    found = scan_contents(data)
    assert (found.unpredicted, found.first_unpredicted) == (len(silent), silent[0])
    spoken = next(number for number in range(200) if number not in silent)
    later = scan_contents(data.select([spoken])) + scan_contents(data.select([spoken, silent[0]]))
    assert (later.unpredicted, later.first_unpredicted) == (1, 2)


def notes(folder):
    return [read_json(shard.with_suffix(".json")) for shard in sorted(folder.glob("*.arrow"))]


@pytest.fixture
def prepared(tmp_path, monkeypatch):
    """The same rows in one shard and in many."""
    documents, found = some_documents() * 2, {}
    for num_tokens in (1 << 24, 100):
        monkeypatch.setattr(prepare, "SHARD_TOKENS", num_tokens)
        monkeypatch.setattr(prepare, "BATCH_CHARACTERS", num_tokens)
        found[num_tokens] = tmp_path / f"rows-{num_tokens}"
        prepare_rows(documents, trained_tokenizer(), 16, found[num_tokens], short="pack")
    return list(found.values())


def test_notes_say_what_a_look_at_every_token_says_however_rows_are_cut_into_shards(prepared):
    one, many = prepared
    assert [len(notes(folder)) for folder in prepared] == [1, len(notes(many))]
    assert len(notes(many)) > 5
    found = scan_contents(load_rows(one))
    assert found == read_contents(one) == read_contents(many) == scan_contents(load_rows(many))
    numbers = numbers_of(load_rows(one))
    assert Contents(**{**vars(found), "digest": 0}) == numbers
    assert sum(map(Contents.from_json, notes(many)), Contents()) == found
    assert all("cutter" not in note for note in notes(many))


def test_scores_have_the_contents_of_their_rows(shards_of_two, tmp_path):
    lengths = [24, 24, 9, 30, 2, 24]
    tokens = [np.random.default_rng(length).integers(3, 60, length).tolist() for length in lengths]
    rows = datasets.Dataset.from_dict({"input_ids": tokens}).with_format("numpy")
    score_rows(rows, tiny_scorer(), tmp_path / "scored", provenance={})
    assert read_contents(tmp_path / "scored") == scan_contents(rows)
    assert [note["longest"] for note in notes(tmp_path / "scored")] == [24, 30, 24]
    assert row_lengths(load_rows(tmp_path / "scored")).tolist() == lengths


def test_any_cut_into_parts_adds_up_to_the_whole():
    table = some_rows(labels=[[-100] * LENGTH] * 3 + [[5] * LENGTH] * 4).with_format("arrow")[:]
    for cut in range(8):
        assert contents_of(table[:cut]) + contents_of(table[cut:]) == contents_of(table)


def test_rows_that_were_saved_anew_are_looked_at(prepared):
    folder = prepared[0]
    columns = load_rows(folder).to_dict()
    columns["input_ids"][2][3] += 1
    before = read_contents(folder)
    datasets.Dataset.from_dict(columns).save_to_disk(str(folder))
    found = read_contents(folder)
    assert found == scan_contents(load_rows(folder))
    assert found.fingerprint != before.fingerprint


def test_rows_of_others_are_looked_at(tmp_path):
    some_rows().save_to_disk(str(tmp_path / "rows"))
    assert read_contents(tmp_path / "rows") == scan_contents(some_rows())


def written(folder, num_shards, num_tokens):
    """A folder of rows of 1000 tokens, `num_tokens` in each shard."""
    schema = pa.schema({"input_ids": pa.list_(pa.int32())})
    files = [f"rows-{number:05d}.arrow" for number in range(num_shards)]
    folder.mkdir()
    write_json(folder / "rows.json", {})
    for number, name in enumerate(files):
        tokens = np.random.default_rng(number).integers(0, 60, num_tokens, dtype=np.int32)
        rows = pa.ListArray.from_arrays(np.arange(0, num_tokens + 1, 1000, dtype=np.int32), tokens)
        with new_shard(folder / name, schema) as (file, _):
            file.write(pa.Table.from_arrays([rows], schema=schema))
    finish_dataset(folder, files)
    return folder


def read_by_opening(folder):
    """Bytes that the process reads when it opens a folder, and bytes of its shards that are then in memory."""
    before = int(re.search(r"rchar: (\d+)", Path("/proc/self/io").read_text())[1])
    rows, contents = load_rows(folder), read_contents(folder)
    after = int(re.search(r"rchar: (\d+)", Path("/proc/self/io").read_text())[1])
    assert len(rows) == contents.rows
    mapped = re.split(r"^(?=[0-9a-f]+-[0-9a-f]+ )", Path("/proc/self/smaps").read_text(), flags=re.MULTILINE)
    sizes = [re.search(r"^Rss: +(\d+) kB", one, re.MULTILINE)[1] for one in mapped if f"{folder}/rows-" in one]
    return after - before, 1024 * sum(map(int, sizes))


@pytest.mark.skipif(not Path("/proc/self/smaps").exists(), reason="the system does not count what a process reads")
def test_opening_ten_times_the_tokens_reads_no_more(tmp_path):
    once = written(tmp_path / "once", num_shards=4, num_tokens=200_000)
    ten_times = written(tmp_path / "ten-times", num_shards=4, num_tokens=2_000_000)
    more_shards = written(tmp_path / "more-shards", num_shards=40, num_tokens=200_000)
    read_by_opening(once)  # whatever is read the first time, by any folder
    (read, mapped), (read_ten, mapped_ten), (read_more, more) = map(read_by_opening, (once, ten_times, more_shards))
    assert read_ten <= 1.2 * read
    assert mapped == mapped_ten == more == 0  # no page of a shard
    assert (read_more - read) / 36 < 256  # a name, thrice; no note of a shard
    assert read_contents(ten_times).tokens == 10 * read_contents(once).tokens
