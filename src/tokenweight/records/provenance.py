"""Provenance that is written beside results: settings, versions, device, commit."""

import contextlib
import platform
import subprocess
import sys
from collections.abc import Sequence
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from tokenweight.records.counts import counted

_KINDS = {"scores.json": "scored", "run.json": "training", "eval.json": "evaluation"}
"""The type of a folder, by the file it holds."""


def environment() -> dict[str, Any]:
    """Command line, versions, device, source commit and time: what a number needs beside it to mean something."""
    return {
        "command": [Path(sys.argv[0]).name.replace("__main__.py", "tokenweight"), *sys.argv[1:]],
        "versions": versions(),
        "device": device_name(),
        "commit": source_commit(),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def versions() -> dict[str, str]:
    """The versions of Python and of the packages that results depend on."""
    found = {"python": platform.python_version()}
    for package in ("tokenweight", "torch", "transformers", "accelerate", "datasets"):
        with contextlib.suppress(PackageNotFoundError):
            found[package] = version(package)
    return found


def device_name() -> str:
    """The accelerator's name, or the processor's with the number of threads that torch uses."""
    import torch  # not at the top: the rest of this module is used where torch need not be loaded

    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    model = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        lines = cpuinfo.read_text(encoding="utf-8", errors="replace").splitlines()
        names = [line.partition(":")[2].strip() for line in lines if "model name" in line]
        model = names[0] if names else model
    return f"{model}, {counted(torch.get_num_threads(), 'thread')}"


def source_commit() -> str | None:
    """The commit this package was imported from, with `+dirty` after it if files differ; None outside a checkout."""

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(Path(__file__).parent), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()

    try:
        if not git("ls-files", "--error-unmatch", Path(__file__).name):
            return None
        # Benchmarks append their results while they run, to the one file that does not count.
        changed = git("status", "--porcelain", "-uno", "--", ":/", ":(top,exclude)benchmarks/results.csv")
        return git("rev-parse", "--short=12", "HEAD") + ("+dirty" if changed else "")
    except (OSError, subprocess.SubprocessError):
        return None


def differences(there: dict[str, Any], ours: dict[str, Any], *, ignored: Sequence[str] = ("environment",)) -> str:
    """Differences of our settings from those written down, in one line; empty if there are none."""
    return "; ".join(
        f"{key} is {there.get(key)!r} there, {value!r} now"
        for key, value in ours.items()
        if key not in ignored and there.get(key) != value
    )


def run_kind(folder: Path) -> str:
    """The type of run that wrote a folder: "scored", "training" or "evaluation".

    Raises:
        ValueError: if it is none of these.
    """
    for name, kind in _KINDS.items():
        if (folder / name).is_file():
            return kind
    found = f"holds no {', '.join(_KINDS)}" if folder.is_dir() else "is no folder"
    raise ValueError(f"{folder} {found}: expected a folder of `score`, `train` or `eval`")
