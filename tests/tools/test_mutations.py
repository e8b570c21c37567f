"""A mutation is killed by a test that fails, survives where none does, and is refused where it does not fit."""

import importlib.util
import json
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SPEC = importlib.util.spec_from_file_location("mutations", ROOT / "tools/mutations.py")
mutations = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(mutations)

TOY = "def larger(a, b):\n    return a if a > b else b\n"
TEST = "from toy import larger\n\n\ndef test_larger():\n    assert larger(2, 1) == 2\n"
BASE = {"name": "strict", "file": "src/toy.py", "old": "a > b", "new": "a >= b", "tests": ["tests/test_toy.py"]}


@pytest.fixture
def tree(tmp_path, monkeypatch):
    """A package of one function, and a test of it."""
    for path, text in {"src/toy.py": TOY, "tests/test_toy.py": TEST, "pyproject.toml": ""}.items():
        (tmp_path / path).parent.mkdir(exist_ok=True)
        (tmp_path / path).write_text(text)
    monkeypatch.delenv("PYTEST_ADDOPTS", raising=False)
    return tmp_path


def run(tree, *given, names=(), least=None):
    blocks = [
        "\n".join(["[[mutation]]", *(f"{key} = {json.dumps(value)}" for key, value in one.items())]) for one in given
    ]
    (tree / "list.toml").write_text("\n".join(blocks))
    options = ["--root", str(tree), "--list", str(tree / "list.toml"), "--results", str(tree / "results.json")]
    return mutations.main([*names, *options, *([] if least is None else ["--least", str(least)])])


@pytest.mark.slow
def test_of_two_mutations_the_one_that_no_test_notices_survives_and_what_is_known_is_not_tried_again(tree, capsys):
    other = {**BASE, "name": "other way", "new": "a < b"}
    assert run(tree, BASE, other) == 1
    first = capsys.readouterr().out
    assert first.endswith("1 of 2 killed; survived: strict\n")
    assert "test_toy.py::test_larger" in first
    assert (tree / "src/toy.py").read_text() == TOY
    assert run(tree, BASE, other, least=1) == 0
    assert capsys.readouterr().out == "1 of 2 killed; survived: strict\n"
    assert run(tree, BASE, other, names=["other way"]) == 0
    (tree / "tests/test_toy.py").write_text(TEST.replace("larger(2, 1) == 2", "larger(1, 1.0) is not 1"))
    capsys.readouterr()
    assert run(tree, BASE) == 0
    assert "killed" in capsys.readouterr().out.splitlines()[0]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"old": "a"}, "occurs 9 times in src/toy.py: expected once"),
        ({"old": "gone"}, "occurs 0 times"),
        ({"file": "src/gone.py"}, "occurs 0 times in src/gone.py"),
        ({"new": "a > b"}, "expected another text"),
        ({"tests": ["tests/test_gone.py"]}, "expected a file of tests"),
        pytest.param({"new": "a >"}, "expected tests that run", marks=pytest.mark.slow),
    ],
)
def test_what_does_not_fit_the_tree_is_refused(changes, message, tree, capsys):
    count = TOY.count("a")
    assert run(tree, {**BASE, **changes}) == 2
    assert message.replace("9", str(count)) in capsys.readouterr().err


@pytest.mark.slow
def test_names_are_known_and_tests_pass_without_mutations(tree, capsys):
    assert run(tree, BASE, BASE) == 2
    assert "strict occurs 2 times" in capsys.readouterr().err
    assert run(tree, BASE, names=["loose"]) == 2
    assert "loose: expected one of strict" in capsys.readouterr().err
    (tree / "tests/test_toy.py").write_text(TEST.replace("== 2", "== 3"))
    assert run(tree, BASE) == 2
    assert "without any mutation" in capsys.readouterr().err


def test_the_list_of_the_package_fits_its_tree():
    found = mutations.read_mutations(ROOT / "tools/mutations.toml", ROOT)
    assert len(found) >= 60
