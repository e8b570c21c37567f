"""Every kind of causal language model that transformers trains works, or is rejected, as docs/architectures.md says."""

import re
from pathlib import Path

import pytest
import transformers
from architecture_table import HEAD, PAGE, row
from architectures import KINDS
from packaging.version import Version

QUICK = [
    "llama",
    "opt",
    "gemma3 of text and pictures",
    "gemma3_text",
    "ministral3",
    "mixtral",
    "deepseek_v3",
    "gpt_oss",
    "minicpm3",
    "llama4_text",
    "mamba",
    "granitemoehybrid nope",
    "qwen3_5_text",
]
"""One for each way in which they differ; the others are tried among the slow tests."""
LOCK = Path(__file__).parents[2] / "requirements/locked.txt"
LOCKED = Version(re.search(r"^transformers==([\d.]+)", LOCK.read_text(), flags=re.MULTILINE)[1])
ROWS = dict(line.removeprefix("| ").split(" | ", 1) for line in PAGE.read_text().removeprefix(HEAD).splitlines())


def test_the_page_has_a_row_for_each_kind():
    assert PAGE.read_text().startswith(HEAD)
    assert [*ROWS] == sorted(KINDS)
    assert len({kind.split()[0] for kind in KINDS}) >= 40


@pytest.mark.parametrize("kind", [pytest.param(k, marks=() if k in QUICK else pytest.mark.slow) for k in KINDS])
def test_an_architecture_works_or_is_rejected_as_its_page_says(kind):
    if Version(transformers.__version__) < LOCKED:
        pytest.skip(f"the page is of transformers {LOCKED} and later")
    # Each part compares with a computation by hand before it says "equal": `architecture_table`.
    assert row(kind) == f"| {kind} | {ROWS[kind]}"
