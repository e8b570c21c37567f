"""Files of results: whole or not at all, with what a number needs beside it."""

import json
import os
import platform
import sys
from datetime import UTC, datetime, timedelta
from importlib.metadata import version
from pathlib import Path

import pytest

from tokenweight.records import append_line, environment, provenance, read_json, read_provenance, write_json


def test_what_is_written_is_read_again(tmp_path):
    value = {"text": "naïve — 你好", "number": 2e-5, "list": [1, None, True], "nested": {"a": {}}}
    write_json(tmp_path / "a.json", value)
    assert read_json(tmp_path / "a.json") == value
    write_json(tmp_path / "a.json", {"path": tmp_path})  # what JSON has no type for is written as its string
    assert read_json(tmp_path / "a.json") == {"path": str(tmp_path)}
    assert [file.name for file in tmp_path.iterdir()] == ["a.json"]
    assert (tmp_path / "a.json").stat().st_mode & 0o777 == 0o644


@pytest.mark.parametrize("existing", [True, False])
def test_a_failure_while_writing_leaves_the_old_file_and_nothing_else(existing, tmp_path):
    if existing:
        write_json(tmp_path / "a.json", {"old": 1})
    with pytest.raises(TypeError, match="keys must be"):
        write_json(tmp_path / "a.json", {"long": "x" * 100_000, "bad": {(1, 2): 3}})
    assert [file.name for file in tmp_path.iterdir()] == ["a.json"] * existing
    if existing:
        assert read_json(tmp_path / "a.json") == {"old": 1}


def test_an_interruption_before_the_renaming_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch):
    write_json(tmp_path / "a.json", {"old": 1})

    def interrupt(source, target):
        assert json.loads(Path(source).read_text()) == {"new": 2}
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", interrupt)
    with pytest.raises(KeyboardInterrupt):
        write_json(tmp_path / "a.json", {"new": 2})
    assert [file.name for file in tmp_path.iterdir()] == ["a.json"]
    assert read_json(tmp_path / "a.json") == {"old": 1}


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


def test_the_provenance_of_scores_goes_before_that_of_rows(tmp_path):
    assert read_provenance(tmp_path) == {}
    write_json(tmp_path / "rows.json", {"length": 3})
    assert read_provenance(tmp_path) == {"length": 3}
    write_json(tmp_path / "scores.json", {"size": 2})
    assert read_provenance(str(tmp_path)) == {"size": 2}


def test_lines_are_appended(tmp_path):
    lines = [{"step": 1, "loss": 0.1}, {"step": 2, "text": "a\nb"}]
    for line in lines:
        append_line(tmp_path / "a.jsonl", line)
    assert [json.loads(line) for line in (tmp_path / "a.jsonl").read_text().splitlines()] == lines


def test_the_environment_has_command_versions_device_and_time(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["/some/where/tokenweight", "score", "rows", "--size", "8"])
    found = environment()
    assert found["command"] == ["tokenweight", "score", "rows", "--size", "8"]
    packages = ("tokenweight", "torch", "transformers", "accelerate", "datasets")
    assert found["versions"] == {"python": platform.python_version(), **{name: version(name) for name in packages}}
    assert found["device"]
    assert abs(datetime.now(UTC) - datetime.fromisoformat(found["date"])) < timedelta(hours=1)  # UTC, not local time
    assert json.loads(json.dumps(found)) == found


def git_answers(**answers):
    """A stand-in for `git` that knows these commands, and fails for others."""

    def run(command, **kwargs):
        words = command[3:]  # after git -C FOLDER
        if words[0] not in answers:
            raise provenance.subprocess.CalledProcessError(128, command)
        return provenance.subprocess.CompletedProcess(command, 0, stdout=answers[words[0]], stderr="")

    return run


@pytest.mark.parametrize(
    ("answers", "expected"),
    [
        ({"ls-files": "records.py\n", "rev-parse": "0123456789ab\n", "status": ""}, "0123456789ab"),
        ({"ls-files": "records.py\n", "rev-parse": "0123456789ab\n", "status": " M a.py\n"}, "0123456789ab+dirty"),
        ({"rev-parse": "0123456789ab\n", "status": ""}, None),  # installed inside somebody else's checkout
        ({}, None),
    ],
)
def test_the_commit_is_that_of_this_source_or_none(answers, expected, monkeypatch):
    monkeypatch.setattr(
        provenance.subprocess, "run", git_answers(**{k.replace("_", "-"): v for k, v in answers.items()})
    )
    assert provenance.source_commit() == expected
