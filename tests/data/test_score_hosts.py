"""Hosts that share a file system and nothing else score one folder together, while most of them die."""

import contextlib
import json
import os
import random
import signal
import socket
import time
from collections import defaultdict

import datasets
import pytest

import models
from tokenweight import CountScorer, ShortContext
from tokenweight.data import RowScorer, score_rows
from tokenweight.records import files, leases

HOSTS = [f"node-{number}.cluster" for number in range(4)]


def rows():
    return datasets.Dataset.from_dict({"input_ids": models.some_tokens(40, 24).tolist()}).with_format("numpy")


def scored(out):
    scorer = RowScorer(CountScorer(vocab_size=61), [ShortContext(8, 5)], max_tokens=30)
    return score_rows(rows(), scorer, out, provenance={}, shard_tokens=100)


def contents(folder):
    return {file.name: file.read_bytes() for file in folder.iterdir()}


def live(host, out, log, dies_at, off):
    """As a process of a host whose clock is off, which has no locks in common with others; it dies at some point."""
    utime, now, points = os.utime, time.time, iter(range(10**6))
    socket.gethostname = lambda: host
    time.time = lambda: now() + off
    # `Path.touch` gives two arguments, and asks for the time of the file system.
    os.utime = lambda path, *times, **given: utime(
        path, *times or [None if given else (time.time(), time.time())], **given
    )
    leases.RENEWAL, leases.EXPIRY = 0.05, 4.0  # on a busy machine a live process may do nothing for long

    def reached(point, path):
        if path.suffix == ".arrow" and point in ("open", "renamed"):
            os.write(log, f"{host} {point} {path.name}\n".encode())
        if point == "locked":
            with contextlib.suppress(FileNotFoundError):  # the folder is complete, and another has tidied up
                utime(path.with_name(f".{path.name}.lock"), (time.time(), time.time()))
        if next(points) == dies_at:
            os.kill(os.getpid(), signal.SIGKILL)

    files.hook = reached
    while scored(out).missing_shards:
        pass


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(3))
def test_three_of_four_hosts_die_and_the_folder_is_as_if_one_had_made_it(seed, tmp_path, monkeypatch):
    draw, out = random.Random(seed), tmp_path / "scored"
    survivor, log = draw.choice(HOSTS), os.open(tmp_path / "log", os.O_CREAT | os.O_WRONLY | os.O_APPEND)
    began = []
    for host in HOSTS:
        dies_at = None if host == survivor else draw.randrange(5, 60)
        if (pid := os.fork()) == 0:
            try:
                live(host, out, log, dies_at, off=draw.choice([-3600, 3600]))
                os._exit(0)
            finally:
                os._exit(1)
        began.append(pid)
    ended = {host: os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for host, pid in zip(HOSTS, began)}
    assert ended[survivor] == 0
    assert set(ended.values()) == {0, -signal.SIGKILL}, ended  # one whose point did not come before the end lives
    scored(tmp_path / "alone")
    whole = contents(tmp_path / "alone")
    if any(name.endswith(".lock") for name in contents(out)):
        # One died while it made sure that the folder, which was complete, is a data set: the next to come tidies up.
        monkeypatch.setattr(leases, "EXPIRY", 4.0)
        scored(out)
    assert contents(out) == whole
    assert json.loads(whole["scores.json"])["shard_tokens"] == 100
    made = defaultdict(list)
    for line in (tmp_path / "log").read_text().splitlines():
        host, point, shard = line.split()
        made[shard].append((host, point))
    assert len(made) > 6
    for shard, points in made.items():
        openers = [host for host, point in points if point == "open"]
        assert survivor not in openers[:-1], (shard, points)  # again only where its owner has died
        assert len(openers) == len(set(openers))
        renamed = [point for _, point in points].count("renamed")
        assert renamed == 1 or (renamed == 0 and openers[-1] != survivor)  # it died before it could say so
