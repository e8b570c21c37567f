"""Commands that are killed, interrupted or run at once: what they leave, and that the next run ends the same."""

import itertools
import os
import random
import re
import signal
import time
from collections import Counter

import pytest
from faulty import COMMANDS, contents, copied, ended, run, start, told, whole

from tokenweight.data import load_scores

TOKENS = 51 * 64  # of the rows
LADDER = COMMANDS["ladder"]
WITHIN = 22  # the step of scoring that writes to the second shard


@pytest.fixture
def place(tmp_path):
    return copied(tmp_path)


@pytest.fixture(scope="module")
def undisturbed():
    return {name: whole(name) for name in COMMANDS}


def left_behind(place, whole):
    """Where a killed command was; what it left must not pass for finished unless it is."""
    out, unfinished = place / "out", place / "out.unfinished"
    if not unfinished.exists() and (out / "state.json").is_file():
        found = {name: value for name, value in contents(out).items() if not name.startswith(".")}
        assert found == whole
        return "after the last shard"
    if not unfinished.exists() and out.exists():
        with pytest.raises(ValueError, match="is not a finished `datasets` folder"):
            load_scores(out)
    files = [file.name for folder in (unfinished, out) if folder.exists() for file in folder.iterdir()]
    if any(file.startswith(".") and ".arrow." in file and not file.endswith(".lock") for file in files):
        return "within a shard"
    return "between shards" if any(file.endswith(".arrow") for file in files) else "before the first shard"


@pytest.mark.slow
def test_killed_again_and_again_a_command_ends_as_if_undisturbed(place, undisturbed):
    chance, kills, where = random.Random(1), 0, Counter()
    for name, command in COMMANDS.items():
        while (done := run(place, *command, at=chance.randrange(40))).status != 0:
            assert done == (-signal.SIGKILL, "", "")
            kills += 1
            where[left_behind(place, undisturbed[name])] += 1
        assert contents(place / "out") == undisturbed[name]
        (place / "out").rename(place / name)
    assert kills >= 20
    assert len(where) == 4
    assert where["within a shard"] >= 5


@pytest.mark.slow
@pytest.mark.parametrize("name", ["drawn", "ladder"])
def test_killed_at_any_step_a_command_ends_as_if_undisturbed(name, place, undisturbed):
    for step in itertools.count():
        killed = run(place, *COMMANDS[name], at=step)
        if killed.status == 0:
            break
        assert killed.status == -signal.SIGKILL
        left_behind(place, undisturbed[name])
        done = run(place, *COMMANDS[name])
        assert (done.status, done.errors) == (0, "")
        assert contents(place / "out") == undisturbed[name]
        (place / "out").rename(place / f"out{step}")
    assert step > 50


@pytest.mark.slow
@pytest.mark.parametrize("name", ["packed", "ladder"])
def test_killed_at_any_moment_a_command_ends_as_if_undisturbed(name, place, undisturbed):
    chance = random.Random(2)
    for _ in range(5):
        killed = start(place, *COMMANDS[name])
        time.sleep(chance.random() * 0.4)
        os.kill(killed[0], signal.SIGKILL)
        ended(killed)
        if left_behind(place, undisturbed[name]) == "after the last shard":
            break
    if name == "ladder" or not (place / "out").exists():
        assert run(place, *COMMANDS[name]).status == 0
    assert contents(place / "out") == undisturbed[name]


@pytest.mark.parametrize("name", ["drawn", "long"])
def test_an_interruption_is_told_and_a_command_ends_as_if_undisturbed(name, place, undisturbed):
    chance, interruptions = random.Random(3), 0
    while (done := run(place, *COMMANDS[name], at=chance.randrange(60), send="SIGINT")).status != 0:
        assert (done.status, done.printed) == (130, "")
        assert told("interrupted", done.errors)
        interruptions += 1
    assert interruptions >= 2
    assert contents(place / "out") == undisturbed[name]


def new_tokens(done):
    assert (done.status, done.errors) == (0, "")
    return [int(number.replace(",", "")) for number in re.findall(r"([\d,]+) (?:tokens,|of them scored)", done.printed)]


def stopped(place, *command):
    """A command that was stopped while it writes a shard, whose lock it holds."""
    started = start(place, *command, at=WITHIN, send="SIGSTOP")
    assert ended(started).status is None
    assert left_behind(place, None) == "within a shard"
    return started


def test_of_two_that_score_at_once_each_makes_what_the_other_does_not(place, undisturbed):
    first = stopped(place, *LADDER)
    second = run(place, *LADDER)
    assert told("…; … of … shards are not there yet: other processes' shares", second.printed)
    assert not (place / "out" / "state.json").exists()
    os.kill(first[0], signal.SIGCONT)
    (total, ours), (_, theirs) = new_tokens(ended(first)), new_tokens(second)
    assert ours + theirs == total
    assert contents(place / "out") == undisturbed["ladder"]


def test_a_lock_does_not_outlive_the_process_that_held_it(place, undisturbed):
    for name in ("ladder", "drop"):
        killed = stopped(place, *COMMANDS[name])
        os.kill(killed[0], signal.SIGKILL)
        ended(killed)
        assert run(place, *COMMANDS[name]).status == 0
        assert contents(place / "out") == undisturbed[name]
        (place / "out").rename(place / name)


SHARES = {
    "same": ([], {}, [], {}),
    "job-array": (["--shard", "0/2"], {}, ["--shard", "1/2"], {}),
    "torchrun": ([], {"RANK": "0", "WORLD_SIZE": "2"}, [], {"RANK": "1", "WORLD_SIZE": "2"}),
}


@pytest.mark.parametrize("shares", SHARES.values(), ids=SHARES)
def test_two_processes_share_the_work_and_one_finishes(shares, place, undisturbed):
    one, its, other, others = shares
    both = [start(place, *LADDER, *one, **its), start(place, *LADDER, *other, **others)]
    done = [new_tokens(ended(process)) for process in both]
    assert max(total for total, _ in done) == sum(new for _, new in done) == TOKENS
    assert contents(place / "out") == undisturbed["ladder"]


def test_of_two_that_prepare_at_once_the_second_is_refused(place, undisturbed):
    first = stopped(place, *COMMANDS["drop"])
    second = run(place, *COMMANDS["drop"])
    assert second.status == 2
    assert told("--out …: another process is making it", second.errors)
    os.kill(first[0], signal.SIGCONT)
    assert ended(first).status == 0
    assert contents(place / "out") == undisturbed["drop"]
