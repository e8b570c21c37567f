"""Whatever ends a command, its user reads one line, and a shell the status that it expects."""

import os
import subprocess
import sys

import pytest

from texts import EXCERPT, trained_tokenizer
from tokenweight import cli

pytestmark = pytest.mark.usefixtures("unchecked")  # tyro has a value of its own for settings that are missing


class Unprintable(Exception):
    """As of libraries whose exceptions say nothing."""


def raising(error):
    def run(*args, **kwargs):
        raise error

    return run


@pytest.mark.parametrize(
    ("error", "text"),
    [
        (TypeError("'<=' not supported\nbetween"), "'<=' not supported between (TypeError in "),
        (RuntimeError("no device"), "no device (RuntimeError in "),
        (KeyError("mode"), "'mode' (KeyError in "),
        (AttributeError("no such attribute"), "no such attribute (AttributeError in "),
        (AssertionError(), "no message (AssertionError in "),
        (RecursionError("too deep"), "too deep (RecursionError in "),
        (Unprintable(), "no message (Unprintable in "),
        (ValueError("trainer: of another library"), "--trainer: of another library (ValueError in "),
        (RuntimeError("x" * 9999), "x… (RuntimeError in "),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, Exception) else None,
)
def test_an_exception_of_another_library_is_one_line_that_says_which_and_where(error, text, monkeypatch, capfd):
    monkeypatch.delenv("TOKENWEIGHT_DEBUG", raising=False)
    monkeypatch.setattr("tokenweight.train.train", raising(error))
    assert cli.main(["train", "--model", "m", "--data", "d", "--out", "o"]) == 2
    printed, errors = capfd.readouterr()
    assert (printed, errors.count("\n")) == ("", 1)
    assert errors.startswith("tokenweight train: ")
    assert text in errors
    assert __name__ in errors
    assert "TOKENWEIGHT_DEBUG=1" in errors
    assert len(errors) < 700


@pytest.mark.parametrize("error", [KeyError("mode"), ValueError("of ours")])
def test_the_traceback_is_shown_if_it_is_asked_for(error, monkeypatch, capfd):
    monkeypatch.setenv("TOKENWEIGHT_DEBUG", "1")
    monkeypatch.setattr("tokenweight.train.train", raising(error))
    assert cli.main(["train", "--model", "m", "--data", "d", "--out", "o"]) == 2
    errors = capfd.readouterr().err
    assert errors.startswith("Traceback")
    assert errors.splitlines()[-1].startswith("tokenweight train: ")


@pytest.mark.parametrize(("code", "status"), [(None, 0), (0, 0), (3, 3), ("a message", 2)])
def test_a_library_that_exits_has_its_status(code, status, monkeypatch):
    monkeypatch.setattr("tokenweight.train.train", raising(SystemExit(code)))
    assert cli.main(["train", "--model", "m", "--data", "d", "--out", "o"]) == status


def test_an_interruption_is_said_and_has_status_130(monkeypatch, tmp_path, capfd):
    monkeypatch.setattr("tokenweight.data.prepare_rows", raising(KeyboardInterrupt()))
    trained_tokenizer().save_pretrained(tmp_path)
    argv = ["prepare", str(EXCERPT), "--tokenizer", str(tmp_path), "--length", "64", "--out", str(tmp_path / "out")]
    assert cli.main(argv) == 130
    assert capfd.readouterr().err.splitlines()[-1] == "tokenweight prepare: interrupted"


def unread(script, stream):
    """Run a Python script whose standard output or error nobody reads any more; (status, what is read of the other)."""
    read, write = os.pipe()
    os.close(read)
    other = {"stdout": "stderr", "stderr": "stdout"}[stream]
    settings = {**os.environ, "COLUMNS": "100"}
    done = subprocess.run([sys.executable, "-c", script], text=True, env=settings, **{stream: write, other: -1})
    os.close(write)
    return done.returncode, getattr(done, other)


RICH = "from rich.console import Console; Console().print('a line')"


@pytest.mark.parametrize(
    ("work", "stream"),
    [
        ("print('a line')", "stdout"),
        ("print('a line', flush=True)", "stdout"),
        ("print('a line ' * 100_000)", "stdout"),
        (RICH, "stdout"),
        ("sys.stderr.write('a line')", "stderr"),
        ("raise ValueError('said to nobody')", "stderr"),
        ("raise KeyboardInterrupt", "stderr"),
    ],
)
def test_output_that_nobody_reads_ends_the_command_quietly(work, stream):
    script = f"""
import sys
from tokenweight import cli
def work(words):
    {work}
cli._run = work
sys.exit(cli.main(["show"]))
"""
    assert unread(script, stream) == (141, "")


def test_help_into_a_pipe_that_is_closed_is_quiet():
    assert unread("import sys; from tokenweight import cli; sys.exit(cli.main([]))", "stdout") == (141, "")


def test_a_broken_pipe_that_is_not_the_output_is_an_error_like_others(monkeypatch, capfd):
    monkeypatch.setattr("tokenweight.train.train", raising(BrokenPipeError(32, "Broken pipe")))
    assert cli.main(["train", "--model", "m", "--data", "d", "--out", "o"]) == 2
    assert capfd.readouterr().err == "tokenweight train: [Errno 32] Broken pipe\n"
