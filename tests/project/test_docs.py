"""The Python of the concept pages runs as it stands there, on a tiny model with windows that fit it."""

import re
from pathlib import Path

import pytest
import torch

import models
from tokenweight import ShortContext
from tokenweight.data import score_folder

DOCS = Path(__file__).parents[2] / "docs"
PAGES = {name: (DOCS / name).read_text() for name in ("concepts.md", "weightings.md", "footguns.md")}
BLOCKS = [
    (name, number, block)
    for name, page in PAGES.items()
    for number, block in enumerate(re.findall(r"```python\n(.*?)```", page, flags=re.DOTALL))
]


@pytest.mark.parametrize(("name", "number", "block"), BLOCKS, ids=[f"{name} {number}" for name, number, _ in BLOCKS])
def test_python_blocks_run(name, number, block, folders, monkeypatch):
    monkeypatch.chdir(folders)
    Path("model").rename("MODEL")
    score_folder(folders / "rows", "MODEL", [ShortContext(8, 5)], folders / "scored")
    block = block.replace("size=8192, stride=6144", "size=8, stride=5")
    known = {"steps": [[models.some_tokens(1, 24), models.some_tokens(2, 16, seed=1)]] * 2, "__name__": "page"}
    exec(compile(block, name, "exec"), known)
    if (name, number) == ("concepts.md", 1):
        assert known["trainer"].state.global_step == 2


def test_the_example_weightings_do_what_their_docstrings_say():
    long, short = torch.rand(2, 3, 9, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    mask = torch.ones(3, 9, dtype=torch.bool)
    mask[:, 0] = mask[1, 4] = False
    known: dict = {}
    for name, _, block in BLOCKS:
        if name == "weightings.md":
            exec(compile(block.replace('load_model("MODEL")', "None").split("\n\nmodel =")[0], name, "exec"), known)
    weights = known["surprise"](long, short, mask)
    assert (weights * mask).sum(dim=1).tolist() == pytest.approx(mask.sum(dim=1).tolist())
    assert known["Above"](nats=0.5)(long, short, mask).bool().tolist() == ((short - long > 0.5) & mask).tolist()


@pytest.mark.parametrize("page", sorted(DOCS.glob("*.md")), ids=lambda page: page.name)
def test_links_between_pages_lead_to_files(page):
    links = [link.partition("#")[0] for link in re.findall(r"\]\(([^)\s]+)\)", page.read_text())]
    gone = [link for link in links if link and not link.startswith("http") and not (DOCS / link).exists()]
    assert not gone
