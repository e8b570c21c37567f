"""Files and folders are complete or absent, on the disk before they have their names, and leave nothing behind."""

import os
import socket

import pytest

from tokenweight.records import files, new_folder, read_json, replaced, write_json


def test_what_is_written_is_read_again(tmp_path):
    value = {"text": "naïve — 你好", "name": "caf\udce9", "number": 2e-5, "list": [1, None, True], "nested": {"a": {}}}
    write_json(tmp_path / "a.json", value)
    assert read_json(tmp_path / "a.json") == value
    write_json(tmp_path / "a.json", {"path": tmp_path})  # what JSON has no type for is written as its string
    assert read_json(tmp_path / "a.json") == {"path": str(tmp_path)}
    assert [file.name for file in tmp_path.iterdir()] == ["a.json"]


@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o644), (0o077, 0o600), (0o002, 0o664)])
def test_a_file_has_the_permissions_of_the_umask(umask, mode, tmp_path):
    before = os.umask(umask)
    try:
        write_json(tmp_path / "a.json", {})
    finally:
        os.umask(before)
    assert (tmp_path / "a.json").stat().st_mode & 0o777 == mode


@pytest.mark.parametrize("existing", [True, False])
def test_a_failure_while_writing_leaves_the_old_file_and_nothing_else(existing, tmp_path):
    if existing:
        write_json(tmp_path / "a.json", {"old": 1})
    with pytest.raises(TypeError, match="keys must be"):
        write_json(tmp_path / "a.json", {"long": "x" * 100_000, "bad": {(1, 2): 3}})
    assert [file.name for file in tmp_path.iterdir()] == ["a.json"] * existing
    if existing:
        assert read_json(tmp_path / "a.json") == {"old": 1}


def stopped_at(point):
    def stop(name, path):
        if name == point:
            raise KeyboardInterrupt

    return stop


@pytest.mark.parametrize("point", ["open", "written", "rename", "renamed"])
def test_an_interruption_at_any_point_leaves_the_old_file_or_the_new_one_and_nothing_else(point, tmp_path, monkeypatch):
    write_json(tmp_path / "a.json", {"old": 1})
    monkeypatch.setattr(files, "hook", stopped_at(point))
    with pytest.raises(KeyboardInterrupt):
        write_json(tmp_path / "a.json", {"new": 2})
    assert [file.name for file in tmp_path.iterdir()] == ["a.json"]
    assert read_json(tmp_path / "a.json") == ({"new": 2} if point == "renamed" else {"old": 1})


@pytest.mark.parametrize("point", ["open", "written", "rename", "renamed"])
def test_an_interruption_at_any_point_leaves_no_folder_or_the_complete_one(point, tmp_path, monkeypatch):
    monkeypatch.setattr(files, "hook", stopped_at(point))

    def make():
        with new_folder(tmp_path / "out") as part:
            (part / "one").write_text("1")
            (part / "two").write_text("2")

    with pytest.raises(KeyboardInterrupt):
        make()
    left = sorted(str(file.relative_to(tmp_path)) for file in tmp_path.rglob("*"))
    assert left == (["out", "out/one", "out/two"] if point == "renamed" else [])


def test_a_folder_that_exists_is_refused_and_kept(tmp_path):
    (tmp_path / "out").mkdir()
    with pytest.raises(ValueError, match=r"out .*/out: exists already"), new_folder(tmp_path / "out"):
        pass
    assert [file.name for file in tmp_path.iterdir()] == ["out"]


def recorded(monkeypatch):
    """The names of what is forced to the disk and renamed, in order; a temporary name as that of its file."""
    calls = []

    def reached(point, path):
        if point in ("synced", "renamed"):
            calls.append(f"{point} {path.name.removeprefix('.').partition(f'.{socket.gethostname()}.')[0]}")

    monkeypatch.setattr(files, "hook", reached)
    return calls


def test_contents_are_on_the_disk_before_the_name_and_the_name_before_it_is_relied_on(tmp_path, monkeypatch):
    calls = recorded(monkeypatch)
    with replaced(tmp_path / "a") as part:
        part.write_text("1")
    assert calls == ["synced a", f"synced {tmp_path.name}", "renamed a"]
    calls.clear()
    with new_folder(tmp_path / "new" / "out") as part:
        (part / "b" / "c").mkdir(parents=True)
        for name in ("b/c/one", "b/two", "three"):
            (part / name).write_text("1")
    made = [f"synced {tmp_path.name}", "synced new"]
    inner = ["one", "two", "three", "c", "b", "out"]  # files before the names that lead to them
    assert calls == [*made, *(f"synced {name}" for name in inner), "synced new", "renamed out"]


def test_what_is_forced_to_the_disk_is(tmp_path, monkeypatch):
    forced = []
    monkeypatch.setattr(files.os, "fsync", lambda descriptor: forced.append(os.fstat(descriptor).st_ino))
    files.sync(tmp_path)
    assert forced == [tmp_path.stat().st_ino]


def test_a_disk_that_is_full_is_told_with_the_folder(tmp_path, monkeypatch):
    def full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(files.os, "fsync", full)
    with pytest.raises(OSError, match=f"^cannot write to {tmp_path}: No space left on device$") as told:
        write_json(tmp_path / "a.json", {})
    assert told.value.errno == 28
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "a.json cannot be read: .*No such file"),
        (b'{"a": 1', "a.json cannot be read: Expecting"),
        (b"\xff", "a.json cannot be read: .*utf-8"),
        (b"[1]", "a.json holds a list: expected a JSON object"),
    ],
)
def test_a_record_that_is_missing_or_damaged_is_refused_by_name(content, message, tmp_path):
    if content is not None:
        (tmp_path / "a.json").write_bytes(content)
    with pytest.raises(ValueError, match=message):
        read_json(tmp_path / "a.json")
