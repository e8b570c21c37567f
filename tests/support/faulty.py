"""Commands run by a warm process as forks of itself; at a point of their work that has a name they get a signal.

The points are those that the package reports itself (`tokenweight.records.reached`), such as "batch
scores-00001-of-00004.arrow", and halves of what torch and transformers write or remove of a checkpoint. What other
libraries do in between is not counted.
"""

import atexit
import contextlib
import io
import itertools
import json
import os
import random
import resource
import runpy
import shutil
import signal
import subprocess
import sys
import tempfile
import traceback
from functools import cache
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from transformers import modeling_utils

import models
from texts import TEXT, trained_tokenizer

PREPARE = ["prepare", "corpus.jsonl", "--tokenizer", "model", "--length", "64"]
SCORE = ["score", "rows", "--model", "model", "--max_tokens", "512"]
COMMANDS = {
    "drop": [*PREPARE, "--out", "out"],
    "packed": [*PREPARE, "--short", "pack", "--out", "out"],
    "drawn": [*PREPARE, "--short", "pack", "--seed", "3", "--out", "out"],
    "long": [*SCORE, "--size", "16", "--long", "--out", "out"],
    "ladder": [*SCORE, "--size", "8,16", "--out", "out"],
}
SMALL = {"prepare.SHARD_TOKENS": 1000, "prepare.BATCH_CHARACTERS": 500, "score.SHARD_TOKENS": 1024}
"""So that a few rows make several shards."""
NUMBERS = itertools.count()


@cache
def origin():
    """A folder to run commands in: a model, a corpus and its rows."""
    root = _server()[1] / "origin"
    root.mkdir()
    tokenizer = trained_tokenizer(framed=True)
    special = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    models.tiny(dtype=torch.float32, vocab_size=300, **special).save_pretrained(root / "model")
    tokenizer.save_pretrained(root / "model")
    lengths = random.Random(0)
    starts = list(itertools.accumulate(range(25), lambda start, _: start + lengths.randrange(20, 450)))
    lines = [json.dumps({"text": TEXT[start:stop]}) for start, stop in itertools.pairwise(starts)]
    (root / "corpus.jsonl").write_text("\n".join(lines) + "\n")
    assert run(root, *PREPARE, "--out", "rows").status == 0
    return root


def copied(folder):
    """The same in another folder."""
    shutil.copytree(origin(), folder, dirs_exist_ok=True, ignore=shutil.ignore_patterns("whole-*"))
    return folder


@cache
def whole(name):
    """What a command leaves that nothing disturbs."""
    out = f"whole-{name}"
    assert run(origin(), *COMMANDS[name][:-1], out).status == 0
    found = contents(origin() / out)
    assert len([file for file in found if file.endswith(".arrow")]) > 2
    return found


def contents(folder):
    """The bytes of every file, hidden ones too, but for what is said there of time and machine."""
    found = {file.name: file.read_bytes() for file in folder.iterdir()}
    for name in found.keys() & {"rows.json", "scores.json"}:
        found[name] = {key: value for key, value in json.loads(found[name]).items() if key != "environment"}
    return found


class Ended(NamedTuple):
    status: int | None
    """None: it did not end, but was stopped."""
    printed: str
    errors: str


@cache
def _server():
    """The warm process, and a folder for what its forks print."""
    command = [sys.executable, __file__]
    settings = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "COLUMNS": "100"}
    server = subprocess.Popen(command, env=settings, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    atexit.register(server.communicate)
    streams = tempfile.TemporaryDirectory()
    atexit.register(streams.cleanup)
    return server, Path(streams.name)


def _ask(**request):
    server, _ = _server()
    server.stdin.write(json.dumps(request) + "\n")
    server.stdin.flush()
    return json.loads(server.stdout.readline())


def start(folder, *argv, at=None, send="SIGKILL", limit=None, small=True, **environment):
    """Start a command in `folder`.

    Args:
        at: a point of its work, "NAME FILE", or the number of a point, from 0: there it gets the signal.
        send: which one.
        limit: bytes; no file can grow beyond.
        small: whether shards are `SMALL`.
        environment: more variables.
    """
    streams = [str(_server()[1] / str(next(NUMBERS))) for _ in ("output", "error")]
    settings = {"at": at, "send": send, "limit": limit, "small": small, "environment": environment}
    return _ask(folder=str(folder), argv=argv, streams=streams, **settings), streams


def ended(started):
    """Wait until it ends or is stopped."""
    pid, streams = started
    return Ended(_ask(wait=pid), *(Path(name).read_text() for name in streams))


def run(folder, *argv, **settings):
    return ended(start(folder, *argv, **settings))


def _signal_at(at, send):
    """Send this process a signal at a point that the package reports, or within a file or folder of a checkpoint."""
    from tokenweight.records import files

    numbers, left = itertools.count(), [at]

    def reached(point, path):
        here = next(numbers) if isinstance(at, int) else f"{point} {Path(path).name}"
        if here in left:
            left.clear()  # whoever is stopped and goes on comes here again
            os.kill(os.getpid(), getattr(signal, send))

    def halved(save):
        def halfway(value, file, *args, **kwargs):
            save(value, file, *args, **kwargs)
            os.truncate(file, os.stat(file).st_size // 2)
            reached("half", file)
            save(value, file, *args, **kwargs)

        return halfway

    def removed(folder, *args, remove=shutil.rmtree, **kwargs):
        if Path(folder).name.startswith("checkpoint-"):
            for file in sorted(file for file in Path(folder).iterdir() if file.is_file())[::2]:
                file.unlink()
            reached("half", folder)
        remove(folder, *args, **kwargs)

    files.hook = reached
    torch.save, modeling_utils.safe_save_file = halved(torch.save), halved(modeling_utils.safe_save_file)
    shutil.rmtree = removed


def _fork(folder, argv, streams, at, send, limit, small, environment):
    from tokenweight.data import prepare
    from tokenweight.data.score import write

    for number, name in enumerate(streams, 1):
        os.dup2(os.open(name, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
    os.chdir(folder)
    os.environ.update(environment)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a job in the background may have begun with it ignored
    for name, value in SMALL.items() if small else ():
        module, _, setting = name.partition(".")
        setattr({"prepare": prepare, "score": write}[module], setting, value)
    if at is not None:
        _signal_at(at, send)
    if limit is not None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    sys.argv = ["tokenweight", *argv]
    try:
        runpy.run_module("tokenweight", run_name="__main__")
        status = 0
    except SystemExit as stop:
        status = stop.code
    except BaseException:
        traceback.print_exc()
        status = 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def _serve():
    """Answer requests on standard input: a command, with its process id; a process id, with its exit status."""
    from tokenweight import cli, load_model
    from tokenweight.cli import demo
    from tokenweight.data import prepare
    from tokenweight.data.score import write
    from tokenweight.records import provenance
    from tokenweight.train import run

    assert all((demo, prepare, write, run))  # imported before the first fork, as all that is warmed here
    provenance.source_commit = lambda: None  # it takes longer than all else
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
        models.tiny().save_pretrained(folder)
        load_model(folder)
        for command in ("prepare", "score", "train", "show"):
            cli.main([command, "--help"])
    for line in sys.stdin:
        request = json.loads(line)
        if "wait" in request:
            _, status = os.waitpid(request["wait"], os.WUNTRACED)
            answer = None if os.WIFSTOPPED(status) else os.waitstatus_to_exitcode(status)
        elif (answer := os.fork()) == 0:
            try:
                _fork(**request)
            finally:
                os._exit(1)
        print(json.dumps(answer), flush=True)
    os._exit(0)


if __name__ == "__main__":
    _serve()


def refused(done, *named):
    """Whether a command ended with one line that names these, and nothing else was printed."""
    assert (done.status, done.printed) == (2, ""), done
    told(done.errors, *named)


def told(errors, *named):
    """Whether one line was printed on standard error, in which these stand."""
    assert errors.count("\n") == 1, errors
    assert all(name in errors for name in named), errors


@contextlib.contextmanager
def small_disk(folder):
    """A file system of one megabyte."""
    folder.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", folder], capture_output=True).returncode:
        pytest.skip("a file system of its own can be mounted by root only")
    try:
        yield
    finally:
        subprocess.run(["umount", folder], check=True)
