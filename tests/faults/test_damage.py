"""Full disks, damaged and changed files, broken corpora and models: what commands say, and how they go on."""

import ast
import itertools
import re
import shutil
from pathlib import Path

import datasets
import pytest
import torch
from faulty import COMMANDS, DOC, contents, copied, refused, run, small_disk, told, whole
from transformers import AutoModelForCausalLM

from texts import trained_tokenizer
from tokenweight.data.shards import read_note

LADDER = COMMANDS["ladder"]
SHOW = ["show", "out", "--size", "16"]
TRAIN = ["train", "--model", "model", "--data", "out", "--size", "16", "--out", "trained"]


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
    for step in range(25, 60):
        run(place, *COMMANDS["drop"], at=step)
        if (place / "out.unfinished" / "rows-00001.arrow").exists():
            return place / "out.unfinished"
    raise AssertionError("two shards were never there")


def test_every_message_of_the_document_is_told_in_a_test():
    tests = [Path(__file__).with_name(f"test_{name}.py") for name in ("damage", "faults", "long_runs")]
    nodes = itertools.chain.from_iterable(ast.walk(ast.parse(test.read_text(encoding="utf-8"))) for test in tests)
    literals = {node.value for node in nodes if isinstance(node, ast.Constant)}
    messages = re.findall("`` (.*?) ``", DOC.read_text(encoding="utf-8"))
    assert len(messages) > 20
    assert set(messages) <= literals


@pytest.mark.parametrize("name", ["packed", pytest.param("ladder", marks=pytest.mark.slow)])
def test_a_full_disk_is_told_and_with_room_the_command_goes_on(name, place, tmp_path):
    disk = tmp_path / "disk"
    with small_disk(disk):
        for file in ("model", "corpus.jsonl", "rows"):
            (disk / file).symlink_to(place / file)
        refusals = []
        for room in range(0, 1_000_000, 32_768):
            (disk / "filler").write_bytes(bytes((1 << 20) - room - 4096))
            done = run(disk, *COMMANDS[name])
            (disk / "filler").unlink()
            if done.status == 0:
                break
            where = "out" if name == "ladder" else "out.unfinished"
            refused("cannot write to …: No space left on device", done, where)
            refusals.append([read_note(shard) is not None for shard in (disk / where).glob("*.arrow")])
        assert len(refusals) > 2
        assert all(all(shards) for shards in refusals)
        assert any(refusals)
        assert contents(disk / "out") == whole(name)


def test_a_file_that_may_not_grow_is_told_like_a_full_disk(place):
    assert run(place, *LADDER, at=40).status < 0
    before = len(list((place / "out").glob("*.arrow")))
    assert before > 0
    refused("cannot write to …: File too large", run(place, *LADDER, limit=8192), "out")
    assert len(list((place / "out").glob("*.arrow"))) == before
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


DAMAGED = (
    "… is damaged: its sha256 is …, … was written; `tokenweight score` with the same options makes it again",
    "… is damaged: its sha256 is …, … was written: scoring it again",
)
UNREADABLE = (
    "… cannot be read: [Errno 2] No such file or directory: '…'; "
    "`tokenweight score` with the same options makes it again",
    "… cannot be read: [Errno 2] No such file or directory: '…': scoring it again",
)
MISSING = ("… is missing; `tokenweight score` with the same options makes it again", None)


@pytest.mark.parametrize(
    ("damage", "messages"),
    [(flip, DAMAGED), (truncate, DAMAGED), (without_note, UNREADABLE), (Path.unlink, MISSING)],
)
def test_a_damaged_shard_of_scores_is_refused_by_name_and_scored_again_alone(damage, messages, scored):
    others = {file: file.stat().st_mtime_ns for file in scored.glob("*.arrow") if "-00001-" not in file.name}
    damage(scored / "scores-00001-of-00004.arrow")
    refusal, warning = messages
    for command in (SHOW, TRAIN):
        refused(refusal, run(scored.parent, *command), "out/scores-00001-of-00004.")
    done = run(scored.parent, *LADDER)
    assert done.status == 0
    assert told(warning, done.errors) if warning else done.errors == ""
    assert warning is None or "out/scores-00001-of-00004." in done.errors
    assert "tokens, 1,024 of them scored now" in done.printed
    assert contents(scored) == whole("ladder")
    assert {file: file.stat().st_mtime_ns for file in others} == others


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (flip, "… is damaged: its sha256 is …, … was written; it is made again, and those after it"),
        (truncate, "… is damaged: its sha256 is …, … was written; it is made again, and those after it"),
        (
            without_note,
            "… cannot be read: [Errno 2] No such file or directory: '…'; it is made again, and those after it",
        ),
        (Path.unlink, None),
    ],
)
def test_a_damaged_shard_of_unfinished_rows_is_named_and_made_again(damage, message, begun):
    damage(begun / "rows-00001.arrow")
    done = run(begun.parent, *COMMANDS["drop"])
    assert done.status == 0
    assert told(message, done.errors) if message else done.errors == ""
    assert message is None or "out.unfinished/rows-00001." in done.errors
    assert contents(begun.parent / "out") == whole("drop")


@pytest.mark.parametrize("damage", [flip, truncate])
def test_damaged_rows_are_not_scored(damage, place):
    damage(place / "rows" / "rows-00001.arrow")
    message = "… is damaged: its sha256 is …, … was written; remove … and prepare the rows again"
    refused(message, run(place, *LADDER), "rows/rows-00001.arrow")


def test_unfinished_scores_are_not_used(place):
    assert run(place, *LADDER, at=40).status < 0
    for command in (SHOW, TRAIN):
        refused("… is not a finished `datasets` folder: …", run(place, *command), "out")


def edited(folder):
    columns = datasets.load_from_disk(str(folder)).to_dict()
    columns["input_ids"][3][7] += 1
    return datasets.Dataset.from_dict(columns)


def test_rows_that_were_edited_do_not_join_scores_of_others(scored):
    edited(scored.parent / "rows").save_to_disk(str(scored.parent / "rows"))
    message = "--out …: holds scores made otherwise (rows_fingerprint is '…' there, '…' now); name a new folder"
    refused(message, run(scored.parent, *LADDER))


def test_scores_that_were_saved_again_are_refused_in_place_and_of_unknown_origin_elsewhere(scored):
    rows = edited(scored)
    rows.save_to_disk(str(scored.parent / "copy"))
    done = run(scored.parent, "show", "copy", *SHOW[2:])
    assert done.status == 0
    assert told("… does not say who scored it: its scores are used as they are", done.errors)
    rows.save_to_disk(str(scored))
    message = "… was changed after it was scored: its rows are in …; score them again"
    for command in (SHOW, TRAIN):
        refused(message, run(scored.parent, *command), "out", "data-00000-of-00001.arrow")


def test_another_tokenizer_is_refused_by_both_names(scored):
    shutil.copytree(scored.parent / "model", scored.parent / "other")
    trained_tokenizer(framed=True, vocab_size=299).save_pretrained(scored.parent / "other")
    message = "… was made with the tokenizer of … (…), but … has another (…): prepare the rows with the tokenizer of …"
    for command in (
        [*SHOW, "--model", "other"],
        ["train", "--model", "other", *TRAIN[3:]],
        ["score", "rows", "--model", "other", "--size", "16", "--out", "new"],
    ):
        refused(message, run(scored.parent, *command), "tokenizer of model (", "but other has another")


@pytest.mark.parametrize("edit", [lambda lines: [lines[0][:-3] + '!"}', *lines[1:]], lambda lines: lines[:2]])
def test_texts_that_changed_after_prepare_was_killed_are_refused(edit, begun):
    corpus = begun.parent / "corpus.jsonl"
    corpus.write_text("\n".join(edit(corpus.read_text().splitlines())))
    refused(
        "the texts have changed since … was begun: remove it to start again",
        run(begun.parent, *COMMANDS["drop"]),
        "out.unfinished",
    )


def test_settings_that_changed_after_a_kill_are_refused_by_name(begun):
    message = "--out …: … was begun otherwise (short is 'drop' there, 'pack' now); go on with that, or remove it"
    refused(message, run(begun.parent, *COMMANDS["packed"]), "out.unfinished")


def test_settings_that_changed_before_the_first_shard_was_there_are_taken(place):
    assert run(place, *COMMANDS["drop"], at=10).status < 0
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
    done = run(place, *LADDER)
    message = "the long loss of row …, position … is nan: expected a finite number"
    refused(message, done, f"of row {row}, position ")  # which one: attention may spread it to the tokens before
    assert sorted(file.name for file in (place / "out").glob("*.arrow")) == [
        f"scores-0000{number}-of-00004.arrow" for number in (0, 1)
    ]
    mended.save_pretrained(place / "model")
    refused(
        "--out …: holds scores made otherwise (weights_fingerprint is '…' there, '…' now); name a new folder",
        run(place, *LADDER),
    )


def test_a_broken_line_of_a_corpus_is_named_and_once_it_is_mended_prepare_goes_on(place):
    corpus = place / "corpus.jsonl"
    lines = corpus.read_text().splitlines()
    corpus.write_text("\n".join([*lines[:18], '{"text": ', *lines[19:]]))
    refused("…, line …: not JSON (…)", run(place, *COMMANDS["drop"]), "corpus.jsonl, line 19")
    kept = {file: file.stat().st_mtime_ns for file in (place / "out.unfinished").glob("*.arrow")}
    assert len(kept) > 0
    corpus.write_text("\n".join(lines) + "\n")
    assert run(place, *COMMANDS["drop"]).status == 0
    assert {file: (place / "out" / file.name).stat().st_mtime_ns for file in kept} == kept
    assert contents(place / "out") == whole("drop")
