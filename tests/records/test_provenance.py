"""What a number needs beside it: settings, versions, device, commit."""

import json
import platform
import sys
from datetime import UTC, datetime, timedelta
from importlib.metadata import version

import pytest

from tokenweight.records import environment, provenance


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
