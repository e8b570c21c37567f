"""Full disks, damaged and changed files, broken corpora and models: what commands say, and how they go on."""

import itertools
import shutil
from pathlib import Path

import datasets
import pytest
import torch
from faulty import COMMANDS, contents, copied, refused, run, small_disk, told, whole
from transformers import AutoModelForCausalLM, TrainingArguments

from texts import trained_tokenizer
from tokenweight.data.shards import read_note
from tokenweight.train import TrainSettings, train

LADDER = COMMANDS["ladder"]
SHOW = ["show", "out", "--row", "20", "--size", "16"]
TRAIN = ["train", "--model", "model", "--data", "out", "--size", "16", "--out", "trained"]
SHARD = "scores-00001-of-00004.arrow"
"""Rows 16 to 31."""


@pytest.fixture
def place(tmp_path):
    return copied(tmp_path)


@pytest.fixture
def scored(place):
    assert run(place, *LADDER).status == 0
    return place / "out"


@pytest.fixture
def begun(place):
    """Rows of which two shards are there when prepare is killed."""
    assert run(place, *COMMANDS["drop"], at="batch rows-00002.arrow").status < 0
    assert (place / "out.unfinished" / "rows-00001.arrow").exists()
    return place / "out.unfinished"


def test_a_full_disk_is_told_and_with_room_the_command_goes_on(place, tmp_path):
    disk = tmp_path / "disk"
    with small_disk(disk):
        for file in ("model", "corpus.jsonl"):
            (disk / file).symlink_to(place / file)
        refusals = []
        for room in range(0, 1_000_000, 32_768):
            (disk / "filler").write_bytes(bytes((1 << 20) - room - 4096))
            done = run(disk, *COMMANDS["packed"])
            (disk / "filler").unlink()
            if done.status == 0:
                break
            refused(done, "cannot write to out.unfinished: No space left on device")
            refusals.append([read_note(shard) is not None for shard in (disk / "out.unfinished").glob("*.arrow")])
        assert len(refusals) > 2
        assert all(all(shards) for shards in refusals)
        assert any(refusals)
        assert contents(disk / "out") == whole("packed")


def test_a_file_that_may_not_grow_is_told_like_a_full_disk(place):
    assert run(place, *LADDER, at="open scores-00002-of-00004.arrow").status < 0
    refused(run(place, *LADDER, limit=8192), "cannot write to out: File too large")
    assert len(list((place / "out").glob("*.arrow"))) == 2
    assert run(place, *LADDER).status == 0
    assert contents(place / "out") == whole("ladder")


def flip(shard):
    found = bytearray(shard.read_bytes())
    found[len(found) // 2] ^= 1
    shard.write_bytes(found)


def truncate(shard):
    shard.write_bytes(shard.read_bytes()[:-100])


def without_note(shard):
    shard.with_suffix(".json").unlink()


NOTE = SHARD.replace(".arrow", ".json")
DAMAGES = [
    (flip, (SHARD, "is damaged: its sha256")),
    (truncate, (SHARD, "is damaged: it has ")),
    (without_note, (NOTE, "cannot be read")),
    (Path.unlink, (SHARD, "is missing")),
]


@pytest.mark.parametrize(("damage", "named"), DAMAGES)
def test_a_damaged_shard_of_scores_is_refused_by_name_and_scored_again_alone(damage, named, scored):
    others = {file: file.stat().st_ino for file in scored.glob("*.arrow") if file.name != SHARD}
    damage(scored / SHARD)
    for command in (SHOW, TRAIN):
        refused(run(scored.parent, *command), *named, "`tokenweight score` with the same options makes it again")
    done = run(scored.parent, *LADDER)
    assert done.status == 0
    if damage is Path.unlink:
        assert done.errors == ""
    else:
        told(done.errors, f"out/{named[0]}", "scoring it again")
    assert "tokens, 1,024 of them scored now" in done.printed
    assert contents(scored) == whole("ladder")
    assert {file: file.stat().st_ino for file in others} == others


def test_rows_of_other_shards_are_shown_beside_a_damaged_one(scored):
    flip(scored / SHARD)
    assert run(scored.parent, "show", "out", "--row", "0", "--size", "16").status == 0


@pytest.mark.parametrize("process", [0, 1])
def test_only_the_first_process_of_a_job_reads_what_it_will_train_on(process, scored, monkeypatch):
    """The others would read the same files: their own checks are those of sizes."""
    flip(scored / SHARD)
    monkeypatch.chdir(scored.parent)
    monkeypatch.setattr(TrainingArguments, "process_index", property(lambda arguments: process))
    settings = TrainSettings("no model", scored.name, "run", size=16)  # the model is opened next
    with pytest.raises(ValueError, match="is damaged" if process == 0 else "no model"):
        train(settings)


@pytest.mark.parametrize(
    ("damage", "named"),
    [
        (flip, "rows-00001.arrow is damaged"),
        (truncate, "rows-00001.arrow is damaged"),
        (without_note, "rows-00001.json cannot be read"),
        (Path.unlink, None),
    ],
)
def test_a_damaged_shard_of_unfinished_rows_is_named_and_made_again(damage, named, begun):
    damage(begun / "rows-00001.arrow")
    done = run(begun.parent, *COMMANDS["drop"])
    assert done.status == 0
    if named is None:
        assert done.errors == ""
    else:
        told(done.errors, f"out.unfinished/{named}", "made again, and those after it")
    assert contents(begun.parent / "out") == whole("drop")


@pytest.mark.parametrize("damage", [flip, truncate])
def test_damaged_rows_are_not_scored(damage, place):
    damage(place / "rows" / "rows-00001.arrow")
    refused(run(place, *LADDER), "rows/rows-00001.arrow is damaged", "remove rows and prepare the rows again")
    assert list((place / "out").glob("scores-00002*")) == []  # the first rows are in another shard


def test_unfinished_scores_are_not_used(place):
    assert run(place, *LADDER, at="open scores-00002-of-00004.arrow").status < 0
    for command in (SHOW, TRAIN):
        refused(run(place, *command), "out is not a finished `datasets` folder")


def edited(folder):
    columns = datasets.load_from_disk(str(folder)).to_dict()
    columns["input_ids"][3][7] += 1
    return datasets.Dataset.from_dict(columns)


def test_rows_that_were_edited_do_not_join_scores_of_others(scored):
    edited(scored.parent / "rows").save_to_disk(str(scored.parent / "rows"))
    refused(run(scored.parent, *LADDER), "out out: ", "scores of other sequences, rows")


def test_scores_that_were_saved_again_are_refused_in_place_and_of_unknown_origin_elsewhere(scored):
    rows = edited(scored)
    rows.save_to_disk(str(scored.parent / "copy"))
    done = run(scored.parent, "show", "copy", *SHOW[2:])
    assert done.status == 0
    told(done.errors, "copy does not say who scored it")
    rows.save_to_disk(str(scored))
    for command in (SHOW, TRAIN):
        refused(run(scored.parent, *command), "out was changed after it was scored", "data-00000-of-00001.arrow")


def test_another_tokenizer_is_refused_by_both_names(scored):
    shutil.copytree(scored.parent / "model", scored.parent / "other")
    trained_tokenizer(framed=True, vocab_size=299).save_pretrained(scored.parent / "other")
    for command in (
        [*SHOW, "--model", "other"],
        ["train", "--model", "other", *TRAIN[3:]],
    ):
        refused(run(scored.parent, *command), "tokenizer of model (", "but other has another (")
    reference = ["score", "rows", "--model", "other", "--as", "reference", "--out", "new"]
    refused(run(scored.parent, *reference), "as reference: other has another tokenizer than rows")


def test_settings_that_changed_before_the_first_shard_was_there_are_taken(place):
    assert run(place, *COMMANDS["drop"], at="batch rows-00000.arrow").status < 0
    assert (place / "out.unfinished" / "rows.json").exists()
    assert run(place, *COMMANDS["packed"]).status == 0
    assert contents(place / "out") == whole("packed")


def test_a_model_that_gives_nan_is_told_by_row_and_position_and_its_scores_are_not_stored(place):
    tokens = datasets.load_from_disk(str(place / "rows"))["input_ids"][:]
    seen = set(itertools.chain.from_iterable(tokens[:32]))  # in the first two shards
    row = next(row for row in range(32, 48) if not seen.issuperset(tokens[row][:-1]))
    token = next(token for token in tokens[row] if token not in seen)
    mended = AutoModelForCausalLM.from_pretrained(place / "model")
    broken = AutoModelForCausalLM.from_pretrained(place / "model")
    broken.get_input_embeddings().weight.data[token] = torch.nan
    broken.save_pretrained(place / "model")
    refused(run(place, *LADDER), f"row {row}, position ", " is nan")  # attention may spread it to tokens before
    assert sorted(file.name for file in (place / "out").glob("*.arrow")) == [
        f"scores-0000{number}-of-00004.arrow" for number in (0, 1)
    ]
    mended.save_pretrained(place / "model")
    refused(run(place, *LADDER), "out out: ", "weights_fingerprint is '")


def test_a_broken_line_of_a_corpus_is_named_and_once_it_is_mended_prepare_goes_on(place):
    corpus = place / "corpus.jsonl"
    lines = corpus.read_text().splitlines()
    corpus.write_text("\n".join([*lines[:18], '{"text": ', *lines[19:]]))
    refused(run(place, *COMMANDS["drop"]), "corpus.jsonl, line 19: not JSON")
    kept = {file: file.stat().st_ino for file in (place / "out.unfinished").glob("*.arrow")}
    assert len(kept) > 0
    corpus.write_text("\n".join(lines) + "\n")
    assert run(place, *COMMANDS["drop"]).status == 0
    assert {file: (place / "out" / file.name).stat().st_ino for file in kept} == kept
    assert contents(place / "out") == whole("drop")
