"""The wheel alone: without the checkout, and with no package but those that it declares."""

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
from test_rows import EXCERPT, trained_tokenizer

import models

ROOT = Path(__file__).parents[2]


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
        done = subprocess.run(command, cwd=root, env=variables, capture_output=True, text=True)
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
    run(
        "tokenweight",
        "score",
        "rows",
        "--model",
        "model",
        "--size",
        "16",
        "--stride",
        "12",
        "--long",
        "--out",
        "scored",
    )
    assert run("tokenweight", "show", "scored", "--row", "0").strip()
    run("tokenweight", "report", "scored", "--out", "report.html")
    assert "<html" in (run.root / "report.html").read_text(encoding="utf-8")


@pytest.mark.slow
def test_it_has_the_marker_that_its_signatures_are_types(run):
    script = "from importlib.resources import files; print(files('tokenweight').joinpath('py.typed').is_file())"
    assert run("python", "-c", script).strip() == "True"
