"""Files and folders that are complete or absent, whatever ends the process that writes them."""

import contextlib
import errno
import itertools
import json
import os
import shutil
import socket
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

hook: Callable[[str, Path], object] | None = None
"""Called by `reached`. Tests set it, to stop, kill or interrupt a process at a point of its work that has a name."""
_NUMBERS = itertools.count()
LEASE = 24 * 3600
"""Seconds for which a temporary file of another host, which cannot be asked, is left alone: by the clock of the file
system."""


def reached(point: str, path: Path) -> None:
    """Report that the work on `path` is at this point; nothing happens, unless a test has set `hook`.

    The points of a file are "open" (its temporary file is about to be made), "written" (it is complete, but may not be
    on the disk), "rename" (it is on the disk) and "renamed"; those of a new folder are the same. "synced" follows
    whatever is forced to the disk: a file, or the names in a folder. Writers add their own, such as "batch" before and
    after each batch of a shard.
    """
    if hook is not None:
        hook(point, path)


@contextlib.contextmanager
def writing_to(folder: Path) -> Iterator[None]:
    """Say in one line which folder could not be written to, and why: the exception of a full disk names no file.

    Raises:
        OSError: in place of another one, with its `errno`.
    """
    try:
        yield
    except OSError as error:
        reason = error if error.errno is None else os.strerror(error.errno)
        named = OSError(f"cannot write to {folder}: {reason}")
        named.errno = error.errno
        raise named from error


@contextlib.contextmanager
def replaced(path: Path) -> Iterator[Path]:
    """Write a file so that a reader sees the old one or the new one, never a part of it, and nothing else is left.

    The contents are on the disk before the name is, and the name is when this returns, so that neither can be lost
    when the machine stops.

    Yields:
        A path in the same folder to write to. It gets the name `path` at the end, unless an exception was raised.
    """
    part = _temporary(path)
    reached("open", path)
    try:
        yield part
        reached("written", path)
        with writing_to(path.parent):
            sync(part)
            _rename(part, path)
    finally:
        part.unlink(missing_ok=True)


@contextlib.contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """Make a folder that appears with all of its files, or not at all.

    Yields:
        An empty folder beside it to write to.

    Raises:
        ValueError: if `path` exists.
    """
    if path.exists():
        raise ValueError(f"out {path}: exists already; name a new folder")
    part = _temporary(path)
    reached("open", path)
    try:
        make_folder(part)
        yield part
        reached("written", path)
        with writing_to(path.parent):
            sync_tree(part)
            _rename(part, path)
    finally:
        shutil.rmtree(part, ignore_errors=True)


def make_folder(path: Path) -> None:
    """Make a folder and its parents, unless it exists; the names of all new ones are on the disk afterwards."""
    missing = [folder for folder in (path, *path.parents) if not folder.exists()]
    for folder in reversed(missing):
        folder.mkdir(exist_ok=True)
        sync(folder.parent)


def sync_tree(folder: Path) -> None:
    """Force a folder and all that is in it to the disk: files before the names that lead to them."""
    for inner in sorted(folder.rglob("*"), key=lambda path: (path.is_dir(), -len(path.parts), path)):
        sync(inner)
    sync(folder)


def rename_folder(folder: Path, path: Path) -> None:
    """Rename a complete folder whose files are on the disk to its final name."""
    sync(folder)
    _rename(folder, path)


def remove_abandoned(folder: Path, pattern: str, dead: Sequence[str] = ()) -> None:
    """Remove temporary files that were left by processes which have ended. The caller has the lease for them.

    Those of other hosts are removed when they are old, or if their process was seen dead: `dead` has its
    ".HOST.PROCESS.".
    """
    for path in folder.glob(pattern):
        with contextlib.suppress(FileNotFoundError):  # renamed or removed meanwhile
            if any(process in path.name for process in dead) or _is_abandoned(path):
                path.unlink()


def _is_abandoned(path: Path) -> bool:
    name, _, number = path.name.rpartition(".")
    name, _, process = name.rpartition(".")
    if os.name != "posix" or not (name.endswith(f".{socket.gethostname()}") and (process + number).isdecimal()):
        return _now(path.parent) - path.stat().st_mtime > LEASE
    try:
        os.kill(int(process), 0)
    except ProcessLookupError:
        return True
    except PermissionError:  # it is another user's
        return False
    return int(process) == os.getpid()  # left by an earlier process of that number: this one is not writing yet


def _now(folder: Path) -> float:
    """The time by the clock that stamps the files of a folder, which may be that of a server."""
    probe = _temporary(folder / "now")
    try:
        probe.touch()
        return probe.stat().st_mtime
    finally:
        probe.unlink(missing_ok=True)


def write_json(path: Path, value: Any) -> None:
    """Write `value` as a JSON file that is complete or absent; what JSON has no type for is written as its string."""
    text = json.dumps(value, indent=2, ensure_ascii=False, default=str)
    with replaced(path) as part, writing_to(path.parent):
        # Names of files that are not UTF-8 hold halves of surrogate pairs, which are written as JSON escapes.
        part.write_bytes(f"{text}\n".encode("utf-8", "backslashreplace"))


def read_json(path: Path) -> dict[str, Any]:
    """Read a file that `write_json` wrote.

    Raises:
        ValueError: if it is missing or damaged, naming it.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} cannot be read: {error}") from error
    if not isinstance(value, dict):
        raise ValueError(f"{path} holds a {type(value).__name__}: expected a JSON object")
    return value


def _temporary(path: Path) -> Path:
    """A hidden name that no other writer of `path` has, in this process, on this host or on another one."""
    return path.with_name(f".{path.name}.{socket.gethostname()}.{os.getpid()}.{next(_NUMBERS)}")


def _rename(source: Path, target: Path) -> None:
    reached("rename", target)
    os.replace(source, target)
    sync(target.parent)
    reached("renamed", target)


def sync(path: Path) -> None:
    """Wait until a file, or the names in a folder, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if not (path.is_dir() and error.errno in (errno.EINVAL, errno.ENOTSUP)):  # some network file systems
            raise
    finally:
        os.close(descriptor)
    reached("synced", path)
