"""Change the meaning of one line at a time, and see that a fast test fails.

    python tools/mutations.py [NAME ...] [--jobs 2] [--least N] [--list PATH] [--results PATH]

A mutation (tools/mutations.toml) replaces a text that its file holds exactly once, in a copy of the tree, and names the
tests that should notice. It is killed if one of these fails, and survives if all pass. First, all of them have to pass
without any mutation. What was found is kept in the file of results, and looked for again only where the mutated file,
the mutation or its tests have changed since: a run that was interrupted goes on.

The exit status is 0 if at least N of those that were asked for are killed (by default all), 1 if fewer are, and 2 if
the list does not fit the tree.
"""

import argparse
import contextlib
import hashlib
import importlib
import json
import os
import queue
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import tomllib
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[1]
TIMEOUT = 300
"""Seconds after which a mutation counts as killed: what never ends does not pass."""
_LEFT_OUT = shutil.ignore_patterns(".*", "__pycache__", "*.egg-info", "build", "dist", "demo", "runs", "site")


class Mutation(NamedTuple):
    """A change of meaning, and who has to notice."""

    name: str
    file: str
    old: str
    new: str
    tests: tuple[str, ...]
    """Files of tests, or tests in them, as pytest takes them."""


class Found(NamedTuple):
    """What became of a mutation."""

    status: str
    """killed or survived."""
    by: str
    """The first test that failed."""
    seconds: float
    digest: str
    """Of what this depends on."""


def read_mutations(path: Path, root: Path, names: Sequence[str] = ()) -> list[Mutation]:
    """Read the mutations of a list that have these names, by default all.

    Raises:
        ValueError: if a name is unknown or occurs twice, a text is not in its file exactly once or is not changed, or
            a file of tests is missing.
    """
    given = tomllib.loads(path.read_text(encoding="utf-8"))["mutation"]
    mutations = [Mutation(**{**one, "tests": tuple(one["tests"])}) for one in given]
    known = [mutation.name for mutation in mutations]
    if twice := [name for name in known if known.count(name) > 1]:
        raise ValueError(f"{path}: {twice[0]} occurs {known.count(twice[0])} times: expected once")
    if unknown := [name for name in names if name not in known]:
        raise ValueError(f"{unknown[0]}: expected one of {', '.join(known)}")
    for name, file, old, new, tests in mutations:
        text = (root / file).read_text(encoding="utf-8") if (root / file).is_file() else ""
        if text.count(old) != 1:
            raise ValueError(f"{path}: {name}: {old!r} occurs {text.count(old)} times in {file}: expected once")
        if old == new:
            raise ValueError(f"{path}: {name}: new is {new!r}: expected another text than old")
        for test in tests:
            if not (root / test.partition("::")[0]).is_file():
                raise ValueError(f"{path}: {name}: tests has {test}: expected a file of tests")
    return [mutation for mutation in mutations if not names or mutation.name in names]


def digest_of(mutation: Mutation, root: Path) -> str:
    """16 hex digits of a mutation, the file that it changes, and its tests."""
    files = {mutation.file, *(test.partition("::")[0] for test in mutation.tests)}
    texts = [(root / file).read_text(encoding="utf-8") for file in sorted(files)]
    return hashlib.sha256(json.dumps([mutation, texts]).encode()).hexdigest()[:16]


class Tree:
    """A copy of the tree, and a process that runs its tests in forks."""

    def __init__(self, root: Path, folder: Path, preload: Sequence[str]) -> None:
        self.path = Path(shutil.copytree(root, folder / "tree", ignore=_LEFT_OUT))
        self.output = folder / "output"
        paths = [str(self.path / "src"), *filter(None, [os.environ.get("PYTHONPATH")])]
        environment = {"OMP_NUM_THREADS": "1", **os.environ, "PYTHONPATH": os.pathsep.join(paths)}
        environment |= {"PYTHONDONTWRITEBYTECODE": "1"}  # a file may change twice within a second
        self.process = subprocess.Popen(
            [sys.executable, __file__, "--serve", str(self.output), *preload],
            cwd=self.path,
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def run(self, tests: Sequence[str]) -> tuple[int, str]:
        """Run tests until one fails: the exit status of pytest, and the test that failed, or the last lines."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(json.dumps(list(tests)) + "\n")
        self.process.stdin.flush()
        status = json.loads(self.process.stdout.readline())
        if status is None:
            return 1, f"no end after {TIMEOUT} s"
        said = self.output.read_text(encoding="utf-8", errors="replace")
        failed = [line.split(" - ")[0] for line in said.splitlines() if line.startswith("FAILED ")]
        return status, failed[0].removeprefix("FAILED ") if failed else said[-3000:]

    def close(self) -> None:
        """End the process."""
        self.process.communicate()


def serve(output: Path, preload: Sequence[str]) -> None:
    """Read lists of tests from the standard input, run each in a fork, and print the exit status; null if none came."""
    import pytest

    for name in preload:
        importlib.import_module(name)
    for line in sys.stdin:
        child = os.fork()
        if child == 0:
            file = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            for descriptor in (1, 2):
                os.dup2(file, descriptor)
            status = pytest.main(["-x", "-q", "-p", "no:cacheprovider", "-m", "not slow", *json.loads(line)])
            sys.stdout.flush()
            os._exit(int(status))
        print(json.dumps(_status(child)), flush=True)


def _status(child: int) -> int | None:
    """The exit status of a process; None if it had to be killed."""
    end = time.monotonic() + TIMEOUT
    while time.monotonic() < end:
        ended, status = os.waitpid(child, os.WNOHANG)
        if ended:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.05)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return None


def try_mutation(mutation: Mutation, tree: Tree, digest: str) -> Found:
    """Apply a mutation to a copy of the tree, run its tests, and take it back.

    Raises:
        ValueError: if the tests could not run: a mutation that cannot be imported says nothing about tests.
    """
    path, begun = tree.path / mutation.file, time.perf_counter()
    text = path.read_text(encoding="utf-8")
    path.write_text(text.replace(mutation.old, mutation.new), encoding="utf-8")
    try:
        status, said = tree.run(mutation.tests)
    finally:
        path.write_text(text, encoding="utf-8")
    if status not in (0, 1):
        raise ValueError(f"{mutation.name}: pytest ended with status {status}: expected tests that run\n{said}")
    seconds = round(time.perf_counter() - begun, 1)
    return Found("survived", "", seconds, digest) if status == 0 else Found("killed", said, seconds, digest)


def try_all(
    mutations: Sequence[Mutation], root: Path, results: Path, *, jobs: int = 1, preload: Sequence[str] = ()
) -> dict[str, Found]:
    """Try those that no earlier run has tried as they are now, and print each.

    Args:
        preload: modules that are imported once, before tests run in forks.

    Raises:
        ValueError: if a test fails without any mutation, or cannot run.
    """
    before = json.loads(results.read_text(encoding="utf-8")) if results.is_file() else {}
    digests = {mutation.name: digest_of(mutation, root) for mutation in mutations}
    found = {name: Found(*before[name]) for name in digests if name in before and before[name][3] == digests[name]}
    left = [mutation for mutation in mutations if mutation.name not in found]
    if not left:
        return found
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
        trees: queue.Queue[Tree] = queue.Queue()
        for number in range(min(jobs, len(left))):
            trees.put(Tree(root, Path(folder) / str(number), preload))
            stack.callback(trees.queue[-1].close)
        every = sorted({test for mutation in left for test in mutation.tests})
        status, said = trees.queue[0].run(every)
        if status:
            raise ValueError(f"without any mutation, pytest ends with status {status}: expected 0\n{said}")

        def attempt(mutation: Mutation) -> tuple[str, Found]:
            tree = trees.get()
            try:
                return mutation.name, try_mutation(mutation, tree, digests[mutation.name])
            finally:
                trees.put(tree)

        with ThreadPoolExecutor(jobs) as pool:
            for name, one in pool.map(attempt, left):
                found[name] = one
                results.write_text(json.dumps({**before, **found}, indent=1), encoding="utf-8")
                print(f"{one.status:8}  {one.seconds:6.1f} s  {name}  {one.by}", flush=True)
    return found


def main(arguments: Sequence[str] | None = None) -> int:
    """Try mutations, and say how many are killed and which survive."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help="mutations to try; by default all")
    parser.add_argument("--jobs", type=int, default=2, help="tests that run at a time")
    parser.add_argument("--least", type=int, help="mutations that have to be killed; by default all")
    parser.add_argument("--list", type=Path, default=ROOT / "tools/mutations.toml", help="the list of mutations")
    parser.add_argument("--results", type=Path, default=ROOT / "build/mutations.json", help="what was found")
    parser.add_argument("--root", type=Path, default=ROOT, help="the tree with src/ and tests/")
    given = parser.parse_args(arguments)
    try:
        mutations = read_mutations(given.list, given.root, given.names)
        given.results.parent.mkdir(parents=True, exist_ok=True)
        preload = tomllib.loads(given.list.read_text(encoding="utf-8")).get("preload", [])
        found = try_all(mutations, given.root, given.results, jobs=max(1, given.jobs), preload=preload)
    except (ValueError, KeyError, TypeError) as error:
        print(f"mutations: {error}", file=sys.stderr)
        return 2
    killed = [name for name, one in found.items() if one.status == "killed"]
    survivors = [name for name in found if name not in killed]
    print(f"{len(killed)} of {len(found)} killed" + (f"; survived: {', '.join(survivors)}" if survivors else ""))
    return 0 if len(killed) >= (len(found) if given.least is None else given.least) else 1


if __name__ == "__main__":
    if sys.argv[1:2] == ["--serve"]:
        serve(Path(sys.argv[2]), sys.argv[3:])
    else:
        sys.exit(main())
