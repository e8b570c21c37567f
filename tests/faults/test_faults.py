"""Commands that are killed, interrupted or run at once: what they leave, and that the next run ends the same."""

import itertools
import os
import re
import signal

import pytest
from faulty import COMMANDS, contents, copied, ended, run, start, told, whole

from tokenweight.data import load_scores

TOKENS = 51 * 64  # of the rows
LADDER = COMMANDS["ladder"]


@pytest.fixture
def place(tmp_path):
    return copied(tmp_path)


def left_behind(place, finished):
    """Where a killed command was; what it left must not pass for finished unless it is."""
    out, unfinished = place / "out", place / "out.unfinished"
    if not unfinished.exists() and (out / "state.json").is_file():
        found = {name: value for name, value in contents(out).items() if not name.startswith(".")}
        assert found == finished
        return "after the last shard"
    if not unfinished.exists() and out.exists():
        with pytest.raises(ValueError, match="is not a finished `datasets` folder"):
            load_scores(out)
    files = [file.name for folder in (unfinished, out) if folder.exists() for file in folder.iterdir()]
    if any(file.startswith(".") and ".arrow." in file and not file.endswith(".lock") for file in files):
        return "within a shard"
    return "between shards" if any(file.endswith(".arrow") for file in files) else "before the first shard"


def shard(name, number):
    return f"scores-{number:05d}-of-00004.arrow" if name in ("long", "ladder") else f"rows-{number:05d}.arrow"


def moments(name):
    """Points of all kinds in a command, each after those before it."""
    within = [f"{point} {shard(name, number)}" for number, point in enumerate(("open", "batch", "written"), 0)]
    note = [f"{point} {shard(name, 2).replace('.arrow', '.json')}" for point in ("open", "rename")]
    last = [f"{point} {shard(name, 2)}" for point in ("rename", "renamed")]
    data_set = [f"written {file}.json" for file in ("contents", "dataset_info", "state")]
    folder = ["renamed state.json", *(["rename out"] if name in ("drop", "packed", "drawn") else [])]
    return [*within, *note, *last, *data_set, *folder]


@pytest.mark.parametrize("name", ["packed", pytest.param("long", marks=pytest.mark.slow)])
def test_killed_again_and_again_a_command_ends_as_if_undisturbed(name, place):
    where = []
    for point in moments(name):
        done = run(place, *COMMANDS[name], at=point)
        assert done == (-signal.SIGKILL, "", ""), point
        where.append(left_behind(place, whole(name)))
    assert run(place, *COMMANDS[name]).status == 0
    assert contents(place / "out") == whole(name)
    assert {"before the first shard", "within a shard", "between shards"} <= set(where)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["drawn", "ladder"])
def test_killed_at_any_point_a_command_ends_as_if_undisturbed(name, place):
    for point in itertools.count():
        killed = run(place, *COMMANDS[name], at=point)
        if killed.status == 0:
            break
        assert killed.status == -signal.SIGKILL
        if left_behind(place, whole(name)) != "after the last shard" or name == "ladder":  # else it would be refused
            done = run(place, *COMMANDS[name])
            assert (done.status, done.errors) == (0, "")
        assert contents(place / "out") == whole(name)
        (place / "out").rename(place / f"out{point}")
    assert point > 50


@pytest.mark.parametrize("name", ["drop", "ladder"])
def test_an_interruption_is_told_and_a_command_ends_as_if_undisturbed(name, place):
    for point in (f"batch {shard(name, 0)}", f"rename {shard(name, 1)}", "open state.json"):
        done = run(place, *COMMANDS[name], at=point, send="SIGINT")
        assert (done.status, done.printed) == (130, ""), point
        told(done.errors, "interrupted")
    assert run(place, *COMMANDS[name]).status == 0
    assert contents(place / "out") == whole(name)


def new_tokens(done):
    assert (done.status, done.errors) == (0, "")
    return [int(number.replace(",", "")) for number in re.findall(r"([\d,]+) (?:tokens,|of them scored)", done.printed)]


def stopped(place, name):
    """A command that was stopped while it writes a shard, whose lock it holds."""
    started = start(place, *COMMANDS[name], at=f"batch {shard(name, 1)}", send="SIGSTOP")
    assert ended(started).status is None
    assert left_behind(place, None) == "within a shard"
    return started


def test_of_two_that_score_at_once_each_makes_what_the_other_does_not(place):
    first = stopped(place, "ladder")
    second = run(place, *LADDER)
    assert "1 of 4 shards are not there yet" in second.printed
    assert not (place / "out" / "state.json").exists()
    os.kill(first[0], signal.SIGCONT)
    (total, ours), (_, theirs) = new_tokens(ended(first)), new_tokens(second)
    assert ours + theirs == total == TOKENS
    assert contents(place / "out") == whole("ladder")


@pytest.mark.parametrize("name", ["ladder", "drop"])
def test_a_lock_does_not_outlive_the_process_that_held_it(name, place):
    killed = stopped(place, name)
    os.kill(killed[0], signal.SIGKILL)
    ended(killed)
    assert run(place, *COMMANDS[name]).status == 0
    assert contents(place / "out") == whole(name)


SHARES = {
    "same": ([], {}, [], {}),
    "job-array": (["--shard", "0/2"], {}, ["--shard", "1/2"], {}),
    "torchrun": ([], {"RANK": "0", "WORLD_SIZE": "2"}, [], {"RANK": "1", "WORLD_SIZE": "2"}),
}


@pytest.mark.parametrize("shares", SHARES.values(), ids=SHARES)
def test_two_processes_share_the_work_and_one_finishes(shares, place):
    one, its, other, others = shares
    both = [start(place, *LADDER, *one, **its), start(place, *LADDER, *other, **others)]
    done = [new_tokens(ended(process)) for process in both]
    assert max(total for total, _ in done) == sum(new for _, new in done) == TOKENS
    assert contents(place / "out") == whole("ladder")


def test_of_two_that_prepare_at_once_the_second_is_refused(place):
    first = stopped(place, "drop")
    second = run(place, *COMMANDS["drop"])
    assert second.status == 2
    told(second.errors, "out out: another process")
    os.kill(first[0], signal.SIGCONT)
    assert ended(first).status == 0
    assert contents(place / "out") == whole("drop")
