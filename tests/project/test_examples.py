"""The scripts of examples/ run as processes of their own, on a tiny model."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

import models
from texts import EXCERPT, trained_tokenizer
from tokenweight import ShortContext
from tokenweight.data import find_sources, prepare_rows, read_documents, score_folder

FOLDER = Path(__file__).parents[2] / "examples"
ARGUMENTS = {
    "own_loop": ["MODEL", "book.txt", "--length", "64", "--size", "16", "--steps", "2"],
    "with_trainer": ["MODEL", "scored", "out", "--steps", "2"],
    "with_trl": ["MODEL", "book*.txt", "out", "--size", "16", "--steps", "2"],
    "custom_weighting": ["MODEL", "book.txt", "--size", "16"],
}


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A model with its tokenizer, texts, and scored sequences."""
    root, tokenizer = tmp_path_factory.mktemp("examples"), trained_tokenizer()
    models.tiny(dtype=torch.float32, vocab_size=300).save_pretrained(root / "MODEL")
    tokenizer.save_pretrained(root / "MODEL")
    for name in ("book.txt", "book2.txt"):
        (root / name).write_text(EXCERPT.read_text(encoding="utf-8")[:800], encoding="utf-8")
    documents = read_documents(find_sources([str(root / "book.txt")]))
    prepare_rows(documents, tokenizer, 64, root / "rows")
    score_folder(root / "rows", str(root / "MODEL"), [ShortContext(16, 12)], root / "scored")
    return root


def test_every_example_is_run_and_short():
    assert {path.stem for path in FOLDER.glob("*.py")} == set(ARGUMENTS)
    for path in FOLDER.glob("*.py"):
        text = path.read_text()
        assert "AutoModelForCausalLM.from_pretrained(args.model)" in text
        code = [line for line in text.split('"""', 2)[2].splitlines() if line.strip()]
        assert len(code) <= 40, path


@pytest.mark.slow
@pytest.mark.parametrize("name", ARGUMENTS)
def test_an_example_runs(name, place, tmp_path):
    words = [str(place / word) if (place / word).exists() or "*" in word else word for word in ARGUMENTS[name]]
    environ = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true", "CI": "1"}
    command = [sys.executable, str(FOLDER / f"{name}.py"), *words]
    done = subprocess.run(command, cwd=tmp_path, env=environ, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "loss" in done.stdout
    if "out" in words:
        trained = AutoModelForCausalLM.from_pretrained(tmp_path / "out").state_dict()
        before = AutoModelForCausalLM.from_pretrained(place / "MODEL").state_dict()
        assert any(not torch.equal(value, before[name]) for name, value in trained.items())
