"""Shards are whole or not there, and only one process makes each."""

import os
import signal
import socket
import subprocess
import sys
import time

import pyarrow as pa
import pytest

from tokenweight.data import verify
from tokenweight.data.shards import check_name, dataset_files, finish_dataset, locked, new_shard, read_note, unlock
from tokenweight.records import files, read_json, write_json
from tokenweight.records.files import LEASE

SCHEMA = pa.schema({"input_ids": pa.list_(pa.int32())})
TABLE = pa.table({"input_ids": [[1, 2, 3], [4]]}, schema=SCHEMA)


def write(path, **note):
    with new_shard(path, SCHEMA) as (file, added):
        file.write(TABLE)
        file.write(TABLE)
        added.update(note)


def test_a_shard_has_a_note_of_what_is_in_it(tmp_path):
    write(tmp_path / "a.arrow", more=[1])
    note = read_note(tmp_path / "a.arrow")
    assert (note["rows"], note["tokens"], note["more"]) == (4, 8, [1])
    with pa.ipc.open_stream(tmp_path / "a.arrow") as stream:
        assert stream.read_all().num_rows == 4
    assert {file.name for file in tmp_path.iterdir()} == {"a.arrow", "a.json"}
    assert read_note(tmp_path / "b.arrow") is None


def test_nothing_has_the_name_of_a_shard_before_it_is_whole(tmp_path):
    def interrupted():
        with new_shard(tmp_path / "a.arrow", SCHEMA) as (file, _):
            file.write(TABLE)
            assert not (tmp_path / "a.arrow").exists()
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert list(tmp_path.iterdir()) == []


def test_where_there_is_a_shard_there_is_its_note(tmp_path, monkeypatch):
    named = []
    monkeypatch.setattr(files, "hook", lambda point, path: named.append(path.name) if point == "renamed" else None)
    write(tmp_path / "a.arrow")
    assert named == ["a.json", "a.arrow"]


@pytest.mark.parametrize(
    "damage",
    [
        lambda content: content[:-1],
        lambda content: content + b"\0",
        lambda content: content[:100] + bytes([content[100] ^ 1]) + content[101:],
        lambda content: b"",
    ],
)
def test_a_shard_that_is_not_what_was_written_is_refused_by_name(damage, tmp_path):
    path = tmp_path / "a.arrow"
    write(path)
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(ValueError, match=rf"{path} is damaged: its sha256 is \w+…, \w+… was written"):
        read_note(path)
    path.with_suffix(".json").unlink()
    with pytest.raises(ValueError, match=r"a\.json cannot be read"):
        read_note(path)


HOLDER = """
import os, socket, sys, time
from pathlib import Path
from tokenweight.data.shards import locked
with locked(Path(sys.argv[1])) as alone:
    Path(sys.argv[1]).with_name(f".a.arrow.{socket.gethostname()}.{os.getpid()}.0").write_text("half")
    print(alone, flush=True)
    time.sleep(600)
"""


def test_a_lock_is_one_process_s_and_ends_with_it(tmp_path):
    path = tmp_path / "a.arrow"
    with subprocess.Popen([sys.executable, "-c", HOLDER, str(path)], stdout=-1, text=True) as holder:
        assert holder.stdout.readline() == "True\n"
        with locked(path) as alone:
            assert not alone
        (half,) = tmp_path.glob(".a.arrow.*.0")
        os.kill(holder.pid, signal.SIGKILL)
        holder.wait()
    with locked(path) as alone:
        assert alone
        assert not half.exists()  # what the killed process left
        assert (tmp_path / ".a.arrow.lock").exists()


def test_a_file_that_another_process_may_be_writing_is_left_alone_by_who_has_the_lock(tmp_path):
    # As where locks are known to one host only: another one, whose clock is an hour off, has the same lock.
    host, other = socket.gethostname(), os.getppid()
    now = time.time()
    written = {
        f".a.arrow.{host}.{other}.0": now,
        ".a.arrow.elsewhere.net.7.0": now - 3600,
        ".a.json.elsewhere.net.7.1": now + 3600,
        ".ab.arrow.elsewhere.net.7.2": now - 10 * LEASE,
    }
    left = {".a.arrow.elsewhere.net.8.0": now - 2 * LEASE, f".a.json.{host}.{os.getpid()}.99": now}
    for name, changed in {**written, **left}.items():
        (tmp_path / name).write_text("half")
        os.utime(tmp_path / name, (changed, changed))
    with locked(tmp_path / "a.arrow") as alone:
        assert alone
        assert {file.name for file in tmp_path.iterdir()} == {*written, ".a.arrow.lock"}


def test_finished_files_are_a_data_set_whose_fingerprint_is_that_of_their_contents(tmp_path):
    states = []
    for folder in (tmp_path / "one", tmp_path / "two"):
        folder.mkdir()
        for name in ("a.arrow", "b.arrow"):
            write(folder / name)
        with locked(folder / "a.arrow"):
            pass
        finish_dataset(folder, ["a.arrow", "b.arrow"])
        unlock(folder)
        assert dataset_files(folder) == ["a.arrow", "b.arrow"]
        assert not list(folder.glob(".*"))
        states.append(read_json(folder / "state.json"))
    assert states[0] == states[1]


def test_shards_that_were_replaced_with_their_notes_are_refused(tmp_path):
    for name in ("rows-0.arrow", "rows-1.arrow"):
        write(tmp_path / name)
    write_json(tmp_path / "rows.json", {})
    finish_dataset(tmp_path, ["rows-0.arrow", "rows-1.arrow"])
    assert verify(tmp_path) == 2
    with new_shard(tmp_path / "rows-1.arrow", SCHEMA) as (file, _):
        file.write(TABLE.take([1, 0]))
    with pytest.raises(ValueError, match=rf"^{tmp_path}: shards and their notes were replaced.*; remove {tmp_path}"):
        verify(tmp_path, range(1))
    finish_dataset(tmp_path, ["rows-0.arrow", "rows-1.arrow"])
    assert verify(tmp_path) == 2


def test_a_folder_whose_name_is_no_text_is_refused_by_it(tmp_path):
    check_name(tmp_path / "Größe")
    with pytest.raises(ValueError, match=r"rows-\\xe9: expected a name in UTF-8"):
        check_name(tmp_path / os.fsdecode(b"rows-\xe9"))
