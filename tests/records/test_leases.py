"""A lease is one process's, on whichever host, until that ends; clocks of hosts may differ."""

import contextlib
import json
import os
import socket

import pytest

from tokenweight.records import Held, LeaseLost, leased, leases
from tokenweight.records.leases import EXPIRY, RENEWAL


class Hosts:
    """Whose name the host of this process has, and what its clock says."""

    def __init__(self, monkeypatch, path):
        self.name, self.clock, self.path = "here", 1000.0, path
        monkeypatch.setattr(socket, "gethostname", lambda: self.name)
        monkeypatch.setattr(leases.time, "monotonic", lambda: self.clock)
        self._left = contextlib.ExitStack()

    def held_by(self, name):
        """A lease that another host has, and does not release."""
        before, self.name = self.name, name
        found = self._left.enter_context(leased(self.path))
        self.name = before
        return found

    def look(self, seconds=0.0, *, renewed=False, off=0.0):
        """What this host is answered after so many seconds, in which the other may have renewed its lease."""
        self.clock += seconds
        if renewed:
            (file,) = self.path.parent.glob(".a.lock")
            os.utime(file, (self.clock + off, self.clock + off))
        with leased(self.path) as found:
            return found if isinstance(found, Held) else found.dead


@pytest.fixture
def hosts(monkeypatch, tmp_path):
    made = Hosts(monkeypatch, tmp_path / "a")
    yield made
    made._left.close()


@pytest.mark.parametrize("off", [-3600, 0, 3600])
def test_a_lease_of_another_host_holds_as_long_as_it_is_renewed_whatever_its_clock_says(off, hosts):
    hosts.held_by("there")
    assert hosts.look() == Held(alive=False)  # nothing is known yet
    for _ in range(20):
        assert hosts.look(RENEWAL, renewed=True, off=off) == Held(alive=True)
    assert hosts.look(1) == hosts.look(EXPIRY - 2) == Held(alive=False)
    assert hosts.look(2 * EXPIRY, renewed=True, off=off) == Held(alive=False)  # it was, but some time ago
    assert hosts.look(EXPIRY - 1) == Held(alive=False)
    assert hosts.look(1) == [f".there.{os.getpid()}."]  # of the dead holder


def test_who_follows_several_that_died_knows_all_of_them(hosts):
    hosts.held_by("one")
    for name in ("two", "three"):
        hosts.look()
        hosts.clock += EXPIRY
        hosts.held_by(name)
    hosts.look()
    assert hosts.look(EXPIRY) == [f".{name}.{os.getpid()}." for name in ("one", "two", "three")]


def test_who_is_taken_for_dead_and_comes_back_leaves_the_file_to_its_successor(hosts):
    first = hosts.held_by("there")
    hosts.look()
    hosts.clock += EXPIRY
    second = hosts.held_by("here")
    assert first.lost
    with pytest.raises(LeaseLost, match="a: another process has taken it over"):
        first.check()
    first.release()
    second.check()
    hosts.name = "elsewhere"
    assert hosts.look() == Held(alive=False)
    second.release()
    assert hosts.look() == []
    assert not list(hosts.path.parent.iterdir())


@pytest.mark.parametrize("said", ["", "{", None], ids=["nothing", "half", "other-boot"])
def test_a_lease_whose_holder_cannot_be_asked_is_watched(said, hosts):
    hosts.held_by("here")
    assert hosts.look() == Held(alive=True)  # this process
    lease = hosts.path.with_name(".a.lock")
    holder = json.loads(lease.read_text())
    lease.write_text(json.dumps({**holder, "system": "another", "pid": 2**22 + 1}) if said is None else said)
    assert hosts.look() == Held(alive=False)
    assert isinstance(hosts.look(EXPIRY), list)


@pytest.mark.parametrize("holder", [{"pid": 2**22 + 1}, {"started": "1"}], ids=["ended", "its number is another's"])
def test_a_holder_on_this_host_that_has_ended_is_followed_at_once(holder, hosts):
    hosts.held_by("here")
    lease = hosts.path.with_name(".a.lock")
    lease.write_text(json.dumps({**json.loads(lease.read_text()), **holder}))
    with leased(hosts.path) as found:
        assert found
        assert found.dead[0].startswith(".here.")
    assert not list(hosts.path.parent.iterdir())


def test_of_two_that_take_over_at_once_one_has_the_lease(hosts, monkeypatch):
    hosts.held_by("there")
    hosts.look()
    hosts.clock += EXPIRY
    created, faster = os.open, []

    def open_(path, flags, *args):
        if flags & os.O_EXCL and not faster:  # another host comes between the look and the lease
            faster.append(created(path, flags, *args))
            os.close(faster[0])
        return created(path, flags, *args)

    monkeypatch.setattr(leases.os, "open", open_)
    assert hosts.look() == Held(alive=False)
    assert faster


@pytest.mark.parametrize("lives", [True, False])
def test_who_has_to_know_waits_until_the_other_host_is_seen_to_live_or_is_taken_for_dead(lives, hosts, monkeypatch):
    hosts.held_by("there")
    begun = hosts.clock

    def sleep(seconds):
        hosts.clock += seconds
        if lives and hosts.clock > begun + RENEWAL:
            os.utime(hosts.path.with_name(".a.lock"), (hosts.clock, hosts.clock))

    monkeypatch.setattr(leases.time, "sleep", sleep)
    with leased(hosts.path, known=True) as found:
        assert bool(found) != lives
        assert lives == (isinstance(found, Held) and found.alive)
    assert hosts.clock - begun == pytest.approx(RENEWAL if lives else EXPIRY, abs=RENEWAL / 10)
