"""Make the lists of versions that `make install` installs, or check them against pyproject.toml without a network.

`requirements/locked.txt` has one version of every package that the library, its extras and its dependency groups need,
with the hashes of its files, for every platform and Python. The list is complete: pip and uv install it without
resolving anything (`--no-deps`), and both install the same. `build.txt` has what builds the few packages that come
without a wheel. `lowest.txt` has the lowest versions that pyproject.toml admits, for the lowest Python; `make
check-lowest` tests them. torch is in none of the files: its builds for CPU and for CUDA share a version, and the
Makefile chooses.
"""

import argparse
import hashlib
import json
import re
import shutil
import subprocess
import sys
import tempfile
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
FILES = ("locked.txt", "build.txt", "lowest.txt")
BUILDERS = ["editables", "setuptools", "wheel"]  # beside what [build-system] names: for editable installs and sdists
UV = "uv pip compile --quiet --universal --python-version 3.11 --fork-strategy fewest --generate-hashes"
UV += " --no-emit-index-url --no-annotate --no-header --no-config"

_OF_TORCH = re.compile(r"(torch|triton|(nvidia|cuda)-.*)")
_DIGEST = "# of pyproject.toml: sha256 "


def tables(pyproject: dict[str, Any]) -> dict[str, list[str]]:
    """The requirements in pyproject.toml by the name of their table, without those that are not locked."""
    project, lock = pyproject["project"], pyproject["tool"]["lock"]
    found = {"build-system": pyproject["build-system"]["requires"], "dependencies": project["dependencies"]}
    found |= {f"extra {name}": group for name, group in project["optional-dependencies"].items()}
    found |= {f"group {name}": group for name, group in pyproject["dependency-groups"].items()}
    found["tool.lock.without-dependencies"] = lock["without-dependencies"]
    return {
        table: [entry for entry in group if isinstance(entry, str) and name_of(entry) not in lock["unlocked"]]
        for table, group in found.items()
    }


def of_users(pyproject: dict[str, Any]) -> dict[str, list[str]]:
    """Those of `tables` that come with the package: its dependencies and its extras."""
    return {table: group for table, group in tables(pyproject).items() if re.match("dependencies|extra ", table)}


def digest(pyproject: dict[str, Any]) -> str:
    """A digest of all that decides what the files hold."""
    decisive = [tables(pyproject), pyproject["tool"]["lock"], pyproject["project"]["requires-python"]]
    return hashlib.sha256(json.dumps(decisive, sort_keys=True).encode()).hexdigest()


def blocks(text: str) -> list[str]:
    """Each package of a requirements file: the line that names it and the indented lines of its hashes."""
    return re.findall(r"^[A-Za-z0-9].*(?:\n[ ].*)*", text, flags=re.MULTILINE)


def name_of(requirement: str) -> str:
    """The normalized name of the package that a requirement asks for."""
    return re.sub(r"[-_.]+", "-", re.split(r"[\s=<>!~;@\[]", requirement, maxsplit=1)[0]).lower()


def versions(text: str) -> dict[str, set[str]]:
    """The versions in a requirements file by package; more than one if they differ by platform or Python."""
    found: dict[str, set[str]] = {}
    for block in blocks(text):
        found.setdefault(name_of(block), set()).update(re.findall(r"==([^\s;]+)", block.splitlines()[0]))
    return found


def problems(pyproject: dict[str, Any], files: dict[str, str]) -> Iterator[str]:
    """Say in what the files differ from what pyproject.toml asks for, a line for each difference.

    Args:
        pyproject: the contents of pyproject.toml.
        files: the text of each of `FILES` by its name.
    """
    for file, text in files.items():
        if _DIGEST + digest(pyproject) not in text.splitlines():
            yield f"{file}: made for other dependencies than those of pyproject.toml; run make lock"
        if "://" in text:
            yield f"{file}: has an address: expected names, versions and hashes"
        for block in blocks(text):
            if _OF_TORCH.fullmatch(name_of(block)):
                yield f"{file}: {name_of(block)} comes with torch: expected it to be left out"
            if not re.match(r"[^\s;=]+==.*(\n +--hash=sha256:[0-9a-f]{64}.*)+$", block):
                yield f"{file}: {name_of(block)}: expected name==version and its hashes"
    yield from _unmet(pyproject, versions(files["locked.txt"]))
    yield from _untested(pyproject, versions(files["lowest.txt"]))


def _unmet(pyproject: dict[str, Any], locked: dict[str, set[str]]) -> Iterator[str]:
    from packaging.requirements import Requirement

    for table, group in tables(pyproject).items():
        for requirement in group:
            name = name_of(requirement)
            if name not in locked:
                yield f"locked.txt: {name} is missing: expected {requirement} ({table})"
            for version in sorted(locked.get(name, ())):
                if not Requirement(requirement).specifier.contains(version, prereleases=True):
                    yield f"locked.txt: {name} is {version}: expected {requirement} ({table})"


def _untested(pyproject: dict[str, Any], lowest: dict[str, set[str]]) -> Iterator[str]:
    """Lower bounds that nothing tests, since another requirement of ours asks for more."""
    from packaging.requirements import Requirement
    from packaging.version import Version

    for table, group in of_users(pyproject).items():
        for requirement in group:
            tested = min(lowest.get(name_of(requirement), ()), key=Version, default="missing")
            bounds = [bound.version for bound in Requirement(requirement).specifier if bound.operator == ">="]
            if tested == "missing" or [Version(tested)] != [Version(bound) for bound in bounds]:
                yield f"lowest.txt: {name_of(requirement)} is {tested}: expected what bounds {requirement} ({table})"


def make(pyproject: dict[str, Any], torch: str) -> dict[str, str]:
    """Resolve everything anew with uv, which asks the package index.

    Args:
        pyproject: the contents of pyproject.toml.
        torch: a requirement that fixes the version of torch; what torch needs, but for CUDA, is locked too.

    Returns:
        The text of each of `FILES` by its name.
    """
    groups = tables(pyproject)
    alone = _compile(groups.pop("tool.lock.without-dependencies"), "--no-deps")
    building = [*groups["build-system"], *BUILDERS]
    locked = _compile([torch, *BUILDERS, *(requirement for group in groups.values() for requirement in group)])
    pins = [block.splitlines()[0].rstrip("\\ ") for block in blocks(locked)]
    test_tools = {name_of(requirement) for requirement in groups["group test"]}  # no user installs these: as locked
    lowest = [requirement for group in of_users(pyproject).values() for requirement in group]
    lowest += [torch, *(pin.split(" ;")[0] for pin in pins if name_of(pin) in test_tools)]
    lowest = [f"{requirement} ; python_version < '3.12'" for requirement in lowest]  # the oldest have no newer wheels
    made = {
        "locked.txt": locked + alone,
        "build.txt": _compile(building, constraints=pins),
        "lowest.txt": _compile(lowest, "--resolution", "lowest-direct") + alone,
    }
    head = "# Made by `make lock`. Complete but for torch: install it with --no-deps.\n"
    return {file: f"{head}{_DIGEST}{digest(pyproject)}\n{text}" for file, text in made.items()}


def _compile(requirements: list[str], *options: str, constraints: list[str] | None = None) -> str:
    with tempfile.TemporaryDirectory() as folder:
        given, fixed = Path(folder, "given.in"), Path(folder, "fixed.in")
        given.write_text("\n".join(requirements))
        fixed.write_text("\n".join(constraints or []))
        command = [*UV.split(), "--constraints", str(fixed), *options, str(given)]
        text = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
    return "".join(f"{block}\n" for block in blocks(text) if not _OF_TORCH.fullmatch(name_of(block)))


def main() -> int:
    """Make the files or check them; the exit status is 1 if they are not what pyproject.toml asks for."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    action = parser.add_mutually_exclusive_group(required=True)
    action.add_argument("--check", action="store_true", help="say in what the files differ from pyproject.toml")
    action.add_argument("--torch", metavar="REQUIREMENT", help="make the files, for this version of torch")
    arguments = parser.parse_args()
    pyproject, folder = tomllib.loads((ROOT / "pyproject.toml").read_text()), ROOT / "requirements"
    if arguments.check:
        found = list(problems(pyproject, {file: (folder / file).read_text() for file in FILES}))
        print("\n".join(found), end="\n" if found else "", file=sys.stderr)
        return 1 if found else 0
    if shutil.which("uv") is None:
        print("make lock: uv is not on the PATH: pip install uv", file=sys.stderr)
        return 1
    for file, text in make(pyproject, arguments.torch).items():
        (folder / file).write_text(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
