"""A lock that is not what pyproject.toml asks for is refused, and what differs is named."""

import importlib.util
import re
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SPEC = importlib.util.spec_from_file_location("lock", ROOT / "tools/lock.py")
lock = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(lock)


@pytest.fixture
def pyproject():
    return tomllib.loads((ROOT / "pyproject.toml").read_text())


@pytest.fixture
def files():
    return {file: (ROOT / "requirements" / file).read_text() for file in lock.FILES}


def found(pyproject, files):
    """The problems, each cut after what it is about, without the one that every change of dependencies has."""
    lines = [line for line in lock.problems(pyproject, files) if "run make lock" not in line]
    return [re.match(r"[\w.]+: [\w-]+", line)[0] for line in lines]


def test_the_lock_of_the_repository_is_current(pyproject, files):
    assert list(lock.problems(pyproject, files)) == []


def test_every_file_is_stale_after_any_change_of_dependencies(pyproject, files):
    changes = {
        "dependencies": lambda: pyproject["project"]["dependencies"].append("six"),
        "an extra": lambda: pyproject["project"]["optional-dependencies"]["plots"].append("six"),
        "a group": lambda: pyproject["dependency-groups"]["docs"].append("six"),
        "python": lambda: pyproject["project"].update({"requires-python": ">=3.12"}),
    }
    before = lock.digest(pyproject)
    for change in changes.values():
        change()
        assert lock.digest(pyproject) != before
        before = lock.digest(pyproject)
        stale = [line for line in lock.problems(pyproject, files) if "run make lock" in line]
        assert [line.partition(":")[0] for line in stale] == list(lock.FILES)


@pytest.mark.parametrize(
    ("table", "requirement"),
    [("dependencies", "rich>=99"), ("optional-dependencies", "trl<1"), ("dependency-groups", "mypy==1.15")],
)
def test_a_version_outside_its_bounds_is_named(table, requirement, pyproject, files):
    group = {
        "dependencies": lambda: pyproject["project"]["dependencies"],
        "optional-dependencies": lambda: pyproject["project"]["optional-dependencies"]["trl"],
        "dependency-groups": lambda: pyproject["dependency-groups"]["lint"],
    }[table]()
    group.append(requirement)
    assert f"locked.txt: {lock.name_of(requirement)}" in found(pyproject, files)


def test_a_missing_package_is_named(pyproject, files):
    (block,) = [block for block in lock.blocks(files["locked.txt"]) if lock.name_of(block) == "lazy-loader"]
    files["locked.txt"] = files["locked.txt"].replace(block + "\n", "")
    assert found(pyproject, files) == ["locked.txt: lazy-loader"]


def test_a_lower_bound_below_what_is_tested_is_named(pyproject, files):
    dependencies = pyproject["project"]["dependencies"]
    (index,) = [i for i, requirement in enumerate(dependencies) if requirement.startswith("datasets")]
    dependencies[index] = "datasets>=1"
    assert found(pyproject, files) == ["lowest.txt: datasets"]


def test_what_comes_with_torch_a_missing_hash_and_an_address_are_refused(pyproject, files):
    files["locked.txt"] += f"nvidia-cublas==13.1 \\\n    --hash=sha256:{64 * '0'}\n"
    files["build.txt"] += "six==1.17.0\n"
    files["lowest.txt"] += "# from file://somewhere\n"
    assert found(pyproject, files) == ["locked.txt: nvidia-cublas", "build.txt: six", "lowest.txt: has"]


def test_names_are_compared_in_one_spelling():
    lines = "Lazy_Loader==0.6 ; python_version < '3.12' \\\n    --hash=sha256:0\n"
    assert lock.versions(lines) == {"lazy-loader": {"0.6"}}
    assert lock.name_of("lm-eval[ruler]>=0.4") == "lm-eval"
