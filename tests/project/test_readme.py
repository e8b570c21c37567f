"""What README says is true: its Python and commands run, its tree is the tree, its numbers are measured."""

import re
import runpy
import shlex
from pathlib import Path

import pytest
import torch

import models
from texts import EXCERPT, trained_tokenizer
from tokenweight.cli import main

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()


def blocks(language: str) -> list[str]:
    fenced = README.split("```")[1::2]
    return [block.removeprefix(f"{language}\n") for block in fenced if block.startswith(f"{language}\n")]


@pytest.fixture
def place(tmp_path, monkeypatch):
    """The folder that README is read in: a tiny model by each of the names that it has there, and texts."""
    special = {"bos_token_id": 0, "eos_token_id": 1}
    model = models.tiny(dtype=torch.float32, vocab_size=300, **special)
    for name in ("HuggingFaceTB/SmolLM2-135M", "MODEL"):
        model.save_pretrained(tmp_path / name)
        trained_tokenizer(framed=True).save_pretrained(tmp_path / name)
    (tmp_path / "books").mkdir()
    for name in ("book.txt", "books/book.txt"):
        (tmp_path / name).write_text(EXCERPT.read_text(encoding="utf-8")[:4000], encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_python_blocks_run(place, capsys):
    for block in blocks("python"):
        block = block.replace("4096", "64").replace("1024", "16")
        exec(compile(block, "README.md", "exec"), {})
        assert "tensor(" in capsys.readouterr().out


def test_the_commands_lead_from_texts_to_a_table(place, unchecked, monkeypatch):
    (commands,) = [block for block in blocks("console") if "prepare" in block]
    commands = [shlex.split(line.removeprefix("$ ")) for line in commands.splitlines()]
    assert [words[:2] for words in commands] == [
        ["tokenweight", name] for name in ("prepare", "score", "show", "train", "eval")
    ]
    small = {"32768": "64", "8192": "16", "240": "2"}
    monkeypatch.setenv("COLUMNS", "100")
    for _, *words in commands:
        words = [small.get(word, word) for word in words]
        # Probes in texts of so few tokens would have no room.
        assert main([*words, "--probes", "none"] if words[0] == "eval" else words) == 0, words
        if words[0] == "prepare":
            assert main([*words[:-1], "validation"]) == 0
    assert (place / "evaluation/table.md").read_text().startswith("|")


def test_the_tree_names_the_packages_and_no_other():
    (tree,) = [block for block in blocks("") if block.startswith("src/")]
    listed = re.findall(r"^  (\w+)/ ", tree, flags=re.MULTILINE)
    assert len(listed) == len(tree.splitlines()) - 1
    there = [path.parent.name for path in (ROOT / "src/tokenweight").glob("*/__init__.py")]
    assert sorted(listed) == sorted(there)


def test_readme_stays_short():
    assert len(README.splitlines()) <= 150


def test_the_tables_of_the_benchmarks_are_what_the_results_say(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    made = runpy.run_module("bench.table")
    for path, table in made["pages"]().items():
        text = path.read_text()
        begin = text.index(made["BEGIN"]) + len(made["BEGIN"])
        assert text[begin : text.index(made["END"], begin)].strip() == table.strip(), path
