"""Rows that are mapped, drawn without a list, and kept elsewhere are the rows that were written."""

import json
import pickle

import datasets
import fsspec
import numpy as np
import pytest
import torch
from scored import CONTEXT, tiny_scorer

import models
from tokenweight import cli
from tokenweight.data import (
    Permutation,
    RowScorer,
    folder_exists,
    load_rows,
    load_scores,
    local_folder,
    read_provenance,
    score_rows,
    stream_rows,
    upload,
    verify,
)
from tokenweight.data.stores import blocks, map_table, remote_url
from tokenweight.data.stores.remote import _copied
from tokenweight.records import read_json
from tokenweight.train import sequences


@pytest.fixture
def scored(own_cache, shards_of_two, tmp_path):
    """A scored folder of four shards."""
    score_rows(models.some_rows(), tiny_scorer(), tmp_path / "scored", provenance={"model": "some"})
    return tmp_path / "scored"


def test_a_table_that_is_mapped_is_what_was_written_and_is_pickled_by_its_name(scored):
    shard = next(scored.glob("*.arrow"))
    table = map_table(shard)
    assert table.table.equals(datasets.Dataset.from_file(str(shard)).data.table)
    assert len(pickle.dumps(table)) < 1000
    assert pickle.loads(pickle.dumps(table)).table.equals(table.table)
    rows, plain = load_rows(scored), datasets.load_from_disk(str(scored))
    assert rows.with_format(None)[:] == plain[:]
    assert rows.features == plain.features
    assert rows._fingerprint == load_rows(scored)._fingerprint
    assert len(rows.cache_files) == 4


@pytest.mark.parametrize("length", [*range(1, 20), 64, 65, 5000])
def test_a_permutation_has_each_number_once_at_its_place(length):
    order = Permutation(length, [3, 1])
    listed = list(order)
    assert sorted(listed) == list(range(length))
    assert [order[place] for place in range(min(length, 70))] == listed[:70]
    assert order[2:9:3] == listed[2:9:3]
    assert order[-1] == listed[-1]
    with pytest.raises(IndexError):
        order[length]
    assert list(Permutation(length, [3, 1])) == listed
    if length >= 64:
        assert list(Permutation(length, [3, 2])) != listed


def test_orders_are_drawn_as_if_by_lot():
    # Which number comes first, and by how much the next one differs, over many seeds: about as often as by chance.
    firsts = np.bincount([Permutation(10, [seed])[0] for seed in range(500)], minlength=10)
    assert ((firsts - 50) ** 2 / 50).sum() < 27.9  # chi-square of 9 degrees of freedom: 0.1 % by chance
    order = np.array(Permutation(1 << 16, [0])[:])
    assert abs(np.corrcoef(order[:-1], order[1:])[0, 1]) < 0.02
    assert abs(np.corrcoef(order, np.arange(len(order)))[0, 1]) < 0.02


def test_a_drawn_order_is_another_one_in_each_epoch_and_the_same_when_it_is_resumed():
    epoch = iter([0, 1, 1])
    drawn = sequences.Drawn(50, 7, lambda: next(epoch))
    first, second, again = list(drawn), list(drawn), list(drawn)
    assert len(drawn) == 50
    assert first != second == again
    assert sorted(first) == sorted(second) == list(range(50))


@pytest.fixture(params=["file", "memory"])
def elsewhere(request, tmp_path):
    """The URL of a folder that is not there yet."""
    _copied.cache_clear()
    url = f"file://{tmp_path}/bucket/scored" if request.param == "file" else f"memory://{tmp_path.name}/scored"
    assert remote_url(url) == url
    yield url
    files, root = fsspec.url_to_fs(url)
    if files.exists(root):
        files.rm(root, recursive=True)


def test_a_folder_elsewhere_is_opened_streamed_and_verified_as_the_one_that_was_sent(elsewhere, scored, monkeypatch):
    assert not folder_exists(elsewhere)
    assert read_provenance(elsewhere) == {}
    assert upload(scored, elsewhere) == len([path for path in scored.iterdir() if not path.name.startswith(".")])
    assert folder_exists(elsewhere)
    assert read_provenance(elsewhere) == read_provenance(scored)
    assert not (scored.parent / "cache" / "tokenweight").exists()  # nothing was copied for it
    rows, provenance = load_scores(elsewhere)
    ours, known = load_scores(scored)
    assert rows.with_format(None)[:] == ours.with_format(None)[:]
    assert provenance == known
    assert read_provenance(local_folder(elsewhere))["model"] == "some"
    assert verify(elsewhere) == 4
    stored = datasets.load_from_disk(str(scored)).to_list()
    assert list(stream_rows(elsewhere)) == list(stream_rows(scored)) == stored
    assert upload(scored, elsewhere) == len(list(scored.glob("*.json"))) + 1  # shards are there
    copy = load_rows(local_folder(elsewhere)).with_format(None)  # whose times are those of the files that were sent
    monkeypatch.setattr(blocks, "read_shard", None)
    assert copy.to_list() == datasets.load_from_disk(str(scored)).to_list()


def test_what_cannot_be_reached_is_not_taken_for_missing(monkeypatch):
    def refused(*arguments, **given):
        raise PermissionError("no key")

    for method in ("ls", "info", "cat_file"):
        monkeypatch.setattr(f"fsspec.implementations.memory.MemoryFileSystem.{method}", refused)
    for read in (folder_exists, read_provenance, load_rows):
        with pytest.raises(ValueError, match=r"^memory://bucket/rows: no key"):
            read("memory://bucket/rows")


def test_what_was_sent_in_part_or_changed_is_not_opened_and_a_copy_is_completed(elsewhere, scored):
    files, root = fsspec.url_to_fs(elsewhere)
    with pytest.raises(ValueError, match=f"^{elsewhere}: no such folder of rows"):
        load_rows(elsewhere)
    upload(scored, elsewhere)
    name = sorted(path.name for path in scored.glob("*.arrow"))[2]
    content = files.cat_file(f"{root}/{name}")
    files.pipe_file(f"{root}/{name}", content[:-9] + b"x" + content[-8:])
    with pytest.raises(ValueError, match=rf"^{elsewhere}/{name} is damaged: its sha256 is \w+…, \w+… was written"):
        load_rows(elsewhere)
    files.pipe_file(f"{root}/{name}", content)
    first = sorted(path.name for path in scored.glob("*.arrow"))[0]
    files.pipe_file(f"{root}/{first}", b"it is here already, and not read again")
    assert len(load_rows(elsewhere)) == models.NUM_ROWS


def test_a_folder_elsewhere_whose_note_of_a_shard_was_lost_is_opened_all_the_same(elsewhere, scored):
    upload(scored, elsewhere)
    files, root = fsspec.url_to_fs(elsewhere)
    files.rm(f"{root}/{sorted(path.stem for path in scored.glob('*.arrow'))[1]}.json")
    assert load_rows(elsewhere).with_format(None)[:] == load_rows(scored).with_format(None)[:]


def test_other_scores_of_as_many_bytes_replace_those_that_were_sent(elsewhere, scored, monkeypatch):
    other = scored.with_name("other")
    scorer = RowScorer(models.tiny(seed=1, dtype=torch.float32), [CONTEXT])
    score_rows(models.some_rows(), scorer, other, provenance={"model": "other"})
    sizes = [[path.stat().st_size for path in sorted(folder.glob("*.arrow"))] for folder in (scored, other)]
    assert sizes[0] == sizes[1]
    upload(scored, elsewhere)
    files, root = fsspec.url_to_fs(elsewhere)
    put = type(files).put_file

    def interrupted(self, source, target, **given):
        if target.endswith("-00002-of-00004.arrow"):
            raise ConnectionError("lost")
        put(self, source, target, **given)

    monkeypatch.setattr(type(files), "put_file", interrupted)
    with pytest.raises(ValueError, match="lost"):
        upload(other, elsewhere)
    assert not files.exists(f"{root}/state.json")  # neither the old folder nor the new one is a finished one
    monkeypatch.setattr(type(files), "put_file", put)
    assert upload(other, elsewhere) == len(list(other.glob("*.json"))) + 3  # two shards, and the heads of their blocks
    rows, provenance = load_scores(elsewhere)
    assert provenance["model"] == "other"
    assert rows.with_format(None)[:] == load_scores(other)[0].with_format(None)[:]


def test_the_command_line_takes_urls_and_says_where_it_writes(elsewhere, scored, capsys, unchecked):
    assert cli.main(["upload", str(scored), "--to", elsewhere]) == 0
    assert cli.main(["verify", str(scored), elsewhere]) == 0
    assert capsys.readouterr().out.count("4 shards are what was written") == 2
    assert cli.main(["export", elsewhere, "--format", "jsonl", "--out", str(scored.parent / "lines")]) == 0
    lines = (scored.parent / "lines" / "rows.jsonl").read_text().splitlines()
    assert [json.loads(line)["document"] for line in lines] == list("abcdefg")
    assert read_json(scored.parent / "lines" / "scores.json")["model"] == "some"
    assert cli.main(["export", str(scored), "--format", "jsonl", "--out", elsewhere]) == 2
    assert "expected a folder on this machine" in capsys.readouterr().err
    assert cli.main(["verify", str(scored.parent)]) == 2
    for words in (["verify"], ["verify", "nothing"], ["upload", "nothing", "--to", elsewhere]):
        assert cli.main(words) == 2
    assert [line.partition(":")[2] for line in capsys.readouterr().err.splitlines()[1:]] == [
        " name at least one folder",
        " nothing: no such folder of rows",
        " nothing is not a finished folder of rows: expected one that prepare or score has completed",
    ]


def test_the_hub_gets_all_files_of_a_folder_with_its_provenance(scored, monkeypatch):
    calls = []

    class Hub:
        def create_repo(self, name, **settings):
            calls.append(name)

        def upload_folder(self, *, folder_path, repo_id, path_in_repo, **settings):
            calls.append((folder_path, repo_id, path_in_repo))

    monkeypatch.setattr("huggingface_hub.HfApi", Hub)
    upload(scored, "hf://datasets/org/name/part")
    assert calls == ["org/name", (scored, "org/name", "part")]
    with pytest.raises(ValueError, match=r"^hf://models/x: expected hf://datasets/ORG/NAME"):
        upload(scored, "hf://models/x")
