"""Leases on files, valid on all hosts that see the file. Locks are not: on some file systems one host alone knows them,
and others have none."""

import contextlib
import hashlib
import json
import os
import socket
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from tokenweight.records.files import reached

RENEWAL = 30.0
"""Seconds after which the holder of a lease renews it."""
EXPIRY = 300.0
"""Seconds for which a process watches a lease of another host before it takes the holder for dead: seconds of its own
clock, in which nobody renewed it. Clocks of different hosts are never compared."""
_seen: dict[Path, tuple[float, float, Any]] = {}
"""For leases of other hosts: when their state was first seen, when last, and the state."""


class LeaseLost(Exception):
    """Another process has taken over: this one did nothing for `EXPIRY` seconds, or could not be seen to."""


@dataclass(frozen=True)
class Held:
    """Returned in place of a lease that another process has."""

    alive: bool
    """Whether that process was seen alive: it runs on this host, or has just renewed the lease."""

    def __bool__(self) -> bool:
        return False


class Lease:
    """The right to make a file: of one process, until that releases it or ends.

    A lease is a file beside that one, which only one process can make, and renews. Whoever has seen the holder dead
    makes the next one, `.NAME.1.lock` after `.NAME.lock`; so nothing of a holder who lives after all is removed, and of
    two who take over at once one succeeds.
    """

    def __init__(self, path: Path, number: int) -> None:
        self.path = path
        *self._own, self._next = (_file(path, one) for one in range(number + 2))
        self._ended = threading.Event()
        threading.Thread(target=self._renew, name=f"lease of {path.name}", daemon=True).start()

    @property
    def dead(self) -> list[str]:
        """Each earlier holder, as ".HOST.PROCESS.": it was seen dead, and may have died before it could tidy up."""
        found = []
        for file in self._own[:-1]:
            with contextlib.suppress(FileNotFoundError):  # nothing is left to be made: another process has tidied up
                if holder := _holder(file.read_bytes()):
                    found.append(f".{holder['host']}.{holder['pid']}.")
        return found

    @property
    def lost(self) -> bool:
        """Whether another process has taken over, or nothing is left to be made."""
        return self._next.exists() or not self._own[-1].exists()

    def check(self) -> None:
        """Raise LeaseLost if the file is another process's to make."""
        if self.lost:
            raise LeaseLost(f"{self.path}: another process has taken it over")

    def release(self) -> None:
        """Let others make the file. What another process has taken over is left to it."""
        self._ended.set()
        for file in [] if self.lost else self._own:
            file.unlink(missing_ok=True)

    def _renew(self) -> None:
        while not self._ended.wait(RENEWAL) and not self.lost:
            with contextlib.suppress(OSError):
                os.utime(self._own[-1])


@contextlib.contextmanager
def leased(path: Path, *, wait: bool = False, known: bool = False) -> Iterator[Lease | Held]:
    """The lease of the file at `path`, or `Held` if another process has it.

    Nothing is known at first of a holder on another host: it is taken for dead if repeated calls over `EXPIRY` seconds
    see no renewal.

    Args:
        wait: until it can be had.
        known: wait until it can be had, or its holder was seen to be alive.
    """
    for _ in pauses():
        found = _taken(path)
        if isinstance(found, Lease) or not (wait or (known and not found.alive)):
            break
    try:
        if found:
            reached("locked", path)
        yield found
    finally:
        if isinstance(found, Lease):
            found.release()


def pauses() -> Iterator[None]:
    """Wait between steps with exponential backoff, but not so long that a lease could be renewed twice."""
    pause = min(0.01, RENEWAL / 10)
    while True:
        yield
        time.sleep(pause)
        pause = min(2 * pause, RENEWAL / 10)


def _file(path: Path, number: int) -> Path:
    return path.with_name(f".{path.name}.{number}.lock" if number else f".{path.name}.lock")


def _taken(path: Path) -> Lease | Held:
    number = 0
    while _file(path, number + 1).exists():
        number += 1
    file = _file(path, number)
    try:
        with file.open("rb") as opened:  # which asks the server of a network file system, where `stat` may not
            text, renewed = opened.read(), os.fstat(opened.fileno()).st_mtime_ns
    except FileNotFoundError:
        pass
    else:
        if (held := _seen_alive(file, _holder(text), (text, renewed))) is not None:
            return held
        number += 1
    file = _file(path, number)
    try:
        descriptor = os.open(file, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666)
    except FileExistsError:  # another process was faster
        return Held(alive=False)
    own = {"host": socket.gethostname(), "system": _system(), "pid": os.getpid(), "started": _started(os.getpid())}
    with os.fdopen(descriptor, "w", encoding="utf-8") as written:
        json.dump({**own, "time": time.strftime("%Y-%m-%dT%H:%M:%S%z")}, written)  # the time is for people
    return Lease(path, number)


def _holder(text: bytes) -> dict[str, Any]:
    """The contents of a lease; empty, if its holder has not written it yet, or never will."""
    with contextlib.suppress(ValueError):
        return json.loads(text)
    return {}


def _seen_alive(file: Path, holder: dict[str, Any], state: Any) -> Held | None:
    """Whether the holder of a lease is known to be alive; None if it is dead."""
    if os.name == "posix" and (holder.get("host"), holder.get("system")) == (socket.gethostname(), _system()):
        return Held(alive=True) if _is_running(holder["pid"], holder["started"]) else None
    now = time.monotonic()
    first, last, known = _seen.get(file, (now, now, state))
    renewed = state != known
    first = now if renewed else first
    _seen[file] = (first, now, state)
    if now - first >= EXPIRY:
        del _seen[file]
        return None
    return Held(alive=renewed and now - last <= 2 * RENEWAL)


@cache
def _system() -> str:
    """Identifier of this boot and process namespace: two hosts, or two containers on one, may have the same name."""
    known = []
    with contextlib.suppress(OSError):
        known.append(Path("/proc/sys/kernel/random/boot_id").read_text())
    with contextlib.suppress(OSError):
        known.append(os.readlink("/proc/self/ns/pid"))
    return hashlib.sha256("".join(known).encode()).hexdigest()[:16]


def _is_running(pid: int, started: str | None) -> bool:
    """Whether a process of this host that began at `started` is still running."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # it is another user's
        pass
    return _started(pid) in (started, "unknown")


def _started(pid: int) -> str | None:
    """Start time of a process, as the kernel counts it; None if it has ended, "unknown" where it cannot be read."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return "unknown"
    return None if fields[0] in "ZX" else fields[19]
