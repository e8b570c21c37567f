"""What is written beside results: settings, versions, device, commit; and the lines of a metrics file."""

import contextlib
import json
import os
import platform
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

_KINDS = {"scores.json": "scored", "run.json": "training", "eval.json": "evaluation"}
"""What a folder is, by the file it holds."""


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
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    model = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        names = [line.partition(":")[2].strip() for line in cpuinfo.read_text().splitlines() if "model name" in line]
        model = names[0] if names else model
    return f"{model}, {torch.get_num_threads()} threads"


def source_commit() -> str | None:
    """The commit this package was imported from, with `+dirty` after it if files differ; None outside a checkout."""

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(Path(__file__).parent), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()

    try:
        if not git("ls-files", "--error-unmatch", Path(__file__).name):
            return None
        return git("rev-parse", "--short=12", "HEAD") + ("+dirty" if git("status", "--porcelain", "-uno") else "")
    except (OSError, subprocess.SubprocessError):
        return None


def write_json(path: Path, value: Any) -> None:
    """Write `value` under a temporary name and rename it: a reader sees the old file or the new one, never half of
    it."""
    descriptor, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(descriptor, "w") as file:
            json.dump(value, file, indent=2, ensure_ascii=False, default=str)
            file.write("\n")
            file.flush()
            os.fsync(file.fileno())  # or the name could outlive the contents when the machine stops
        os.chmod(name, 0o644)
        os.replace(name, path)
    except BaseException:
        os.unlink(name)
        raise


def read_json(path: Path) -> dict[str, Any]:
    """Read a file that `write_json` wrote.

    Raises:
        ValueError: if it is missing or damaged, naming it.
    """
    try:
        value = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} cannot be read: {error}") from error
    if not isinstance(value, dict):
        raise ValueError(f"{path} holds a {type(value).__name__}: expected a JSON object")
    return value


def differences(there: dict[str, Any], ours: dict[str, Any], *, ignored: Sequence[str] = ("environment",)) -> str:
    """What our settings have otherwise than those written down, in one line; empty if nothing."""
    return "; ".join(
        f"{key} is {there.get(key)!r} there, {value!r} now"
        for key, value in ours.items()
        if key not in ignored and there.get(key) != value
    )


def read_provenance(folder: str | os.PathLike[str]) -> dict[str, Any]:
    """What is known of a folder of rows or scores: `scores.json`, else `rows.json`, else nothing."""
    for name in ("scores.json", "rows.json"):
        if (Path(folder) / name).is_file():
            return read_json(Path(folder) / name)
    return {}


def run_kind(folder: Path) -> str:
    """What wrote a folder: "scored", "training" or "evaluation".

    Raises:
        ValueError: if it is none of these.
    """
    for name, kind in _KINDS.items():
        if (folder / name).is_file():
            return kind
    found = f"holds no {', '.join(_KINDS)}" if folder.is_dir() else "is no folder"
    raise ValueError(f"{folder} {found}: expected a folder of `score`, `train` or `eval`")


def append_line(path: Path, value: dict[str, Any]) -> None:
    """Append one line to a .jsonl file."""
    with path.open("a") as file:
        file.write(json.dumps(value) + "\n")


def read_metrics(folder: Path) -> list[dict[str, Any]]:
    """The numbers in each line of a training's `metrics.jsonl`; none, if it has not logged anything yet.

    Raises:
        ValueError: naming a line that is damaged.
    """
    path, lines = folder / "metrics.jsonl", []
    for number, text in enumerate(path.read_text(encoding="utf-8").splitlines() if path.is_file() else [], 1):
        try:
            values = json.loads(text)
            step = values["step"] + 0
        except (ValueError, TypeError, KeyError) as error:
            raise ValueError(f"{path}, line {number}: expected an object with a step ({error!r})") from None
        lines.append({"step": step, **{key: value for key, value in values.items() if isinstance(value, int | float)}})
    return lines
