"""Checkpoints are resumed from only if they are what was written, and are on the disk before they are relied on."""

import logging

import pytest
from transformers import TrainingArguments

from tokenweight.records import files, read_json
from tokenweight.train.checkpoints import MARK, check_contents, find_checkpoint, is_whole, mark_whole


def checkpoint(out, step):
    folder = out / f"checkpoint-{step}"
    (folder / "part").mkdir(parents=True)
    for name in ("rng_state.pth", "optimizer.pt", "part/shard.bin"):
        (folder / name).write_bytes(bytes(range(200)) * step)
    mark_whole(folder)
    return folder


def flip(file):
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


def resumed(out, given="true"):
    return find_checkpoint(out, TrainingArguments(output_dir=str(out), resume_from_checkpoint=given, report_to="none"))


def test_a_bit_that_flipped_is_found_when_a_run_resumes_and_an_earlier_checkpoint_is_taken(tmp_path, caplog):
    first, second = checkpoint(tmp_path, 1), checkpoint(tmp_path, 2)
    assert resumed(tmp_path) == second
    flip(second / "part/shard.bin")
    assert is_whole(second)
    with caplog.at_level(logging.WARNING):
        assert resumed(tmp_path) == first
    (told,) = caplog.messages
    assert told.startswith(f"{second}/part/shard.bin is damaged: its checksum is ")
    assert told.endswith(f"was written: resuming from {first}")
    with pytest.raises(
        ValueError, match=r"^trainer\.resume_from_checkpoint \S+-2: \S+shard.bin is damaged: .+, or true$"
    ):
        resumed(tmp_path, str(second))
    flip(first / "optimizer.pt")
    with pytest.raises(
        ValueError, match=r"^trainer\.resume_from_checkpoint true: \S+ holds no .*-2/part/shard.bin is d"
    ):
        resumed(tmp_path)


@pytest.mark.parametrize("part", [1, 7, 10_000])
def test_checksums_do_not_depend_on_who_computes_them(part, tmp_path, monkeypatch):
    monkeypatch.setattr("tokenweight.train.checkpoints._PART", part)
    folder = checkpoint(tmp_path, 3)
    assert {noted["bytes"] for noted in read_json(folder / MARK).values()} == {600}
    flip(folder / "optimizer.pt")
    found = []
    for process in range(2):
        try:
            check_contents(folder, (process, 2))
        except ValueError as error:
            found.append(str(error))
    assert len(found) == 1
    assert "optimizer.pt is damaged" in found[0]


def test_a_checkpoint_is_on_the_disk_before_its_mark_and_its_name_before_it_is_relied_on(tmp_path, monkeypatch):
    calls = []
    monkeypatch.setattr(files, "hook", lambda point, path: calls.append((point, path.name)))
    checkpoint(tmp_path, 1)
    known = [name for point, name in calls if point == "synced" and not name.startswith(f".{MARK}")]
    assert known[:3] == ["shard.bin", "optimizer.pt", "rng_state.pth"]
    assert known[3:] == ["part", "checkpoint-1", "checkpoint-1", tmp_path.name]  # the second with its mark
    assert calls.index(("open", MARK)) > calls.index(("synced", "checkpoint-1"))
