"""The Python of the pages on the method runs, on a tiny model; links lead somewhere, in the site too."""

import re
import runpy
from pathlib import Path

import pytest
import torch

import models
from tokenweight import ShortContext
from tokenweight.data import score_folder

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
BLOCKS = [
    block
    for page in ("method.md", "weightings.md")
    for block in re.findall(r"```python\n(.*?)```", (DOCS / page).read_text(), flags=re.DOTALL)
]
LOOP, TRAINER, FUNCTION, DATACLASS, OTHERS = BLOCKS
SITE = runpy.run_path(str(ROOT / "tools/docs_site.py"))
PAGES = sorted([*(str(path.relative_to(ROOT)) for path in DOCS.rglob("*.md")), *SITE["PAGES"]])


@pytest.mark.parametrize("block", BLOCKS, ids=["loop", "trainer", "function", "dataclass", "others"])
def test_python_blocks_run(block, folders, monkeypatch):
    monkeypatch.chdir(folders)
    Path("model").rename("MODEL")
    score_folder(folders / "rows", "MODEL", [ShortContext(8, 5)], folders / "scored")
    known = {"steps": [[models.some_tokens(1, 24), models.some_tokens(2, 16, seed=1)]] * 2, "__name__": "page"}
    exec(compile(block.replace("size=8192", "size=8"), "method.md", "exec"), known)
    if block == TRAINER:
        assert known["trainer"].state.global_step == 2


def test_the_example_weightings_do_what_their_docstrings_say():
    long, short = torch.rand(2, 3, 9, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    mask = torch.ones(3, 9, dtype=torch.bool)
    mask[:, 0] = mask[1, 4] = False
    known: dict = {"__name__": "page"}
    for block in (FUNCTION, DATACLASS):
        exec(compile(block.split("\n\nmodel =")[0], "method.md", "exec"), known)
    weights = known["surprise"](long, short, mask)
    assert (weights * mask).sum(dim=1).tolist() == pytest.approx(mask.sum(dim=1).tolist())
    assert known["Above"](nats=0.5)(long, short, mask).bool().tolist() == ((short - long > 0.5) & mask).tolist()
    exec(compile(OTHERS, "weightings.md", "exec"), known)
    assert torch.allclose(known["focal"](long, short, mask), (1 - (-long).exp()) ** 2)
    positions = torch.arange(9).expand(3, 9)
    assert torch.equal(known["Later"](4)(long, short, mask, positions=positions), (mask & (positions >= 4)).double())
    divergence = torch.rand(3, 9, dtype=torch.float64)
    weights = known["entropy"](long, short, mask, divergence=divergence)
    assert torch.allclose(
        weights, divergence * mask * mask.sum(1, keepdim=True) / (divergence * mask).sum(1, keepdim=True)
    )
    logits = torch.randn(5, 7, dtype=torch.float64)
    entropy = torch.distributions.Categorical(logits=logits).entropy()
    assert torch.allclose(known["entropy"].weighting.of_logits(logits, torch.randn_like(logits)), entropy)


def anchors(page):
    headings = re.findall(r"^#+ (.+)$", page.read_text(), re.MULTILINE)
    return {"#" + re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_to_files_and_headings(page):
    links = re.findall(r"\]\(([^)\s#]*)(#[^)\s]*)?\)", (ROOT / page).read_text())
    for target, anchor in links:
        if not target.startswith("http"):
            found = ((ROOT / page).parent / target) if target else ROOT / page
            assert found.exists(), target
            assert not anchor or anchor in anchors(found), anchor


def test_a_page_moved_into_the_site_keeps_its_links():
    known = {"index.md", "method.md", "weights.svg", "recipes/README.md"}
    moved = SITE["relinked"]
    assert (
        moved("![w](docs/weights.svg) [m](docs/method.md#x)", "README.md", known)
        == "![w](weights.svg) [m](method.md#x)"
    )
    assert (
        moved("[r](../recipes/README.md) [h](../README.md)", "docs/method.md", known)
        == "[r](recipes/README.md) [h](index.md)"
    )
    assert moved("[m](../docs/method.md)", "recipes/README.md", known) == "[m](../method.md)"
    assert (
        moved("[a file](../Makefile), [there](https://arxiv.org)", "docs/method.md", known)
        == "a file, [there](https://arxiv.org)"
    )
    with pytest.raises(ValueError, match=r"docs/method.md: link to gone.md"):
        moved("[gone](gone.md)", "docs/method.md", known)


def test_every_page_is_in_the_navigation_of_the_site():
    listed = re.findall(r": (\S+\.md)$", (ROOT / "mkdocs.yml").read_text(), re.MULTILINE)
    made = [f"api/{package}.md" for package in ("tokenweight", *SITE["PACKAGES"])]
    assert sorted(listed) == sorted([*map(SITE["place"], PAGES), *made])
    there = {path.parent.name for path in (ROOT / "src/tokenweight").glob("*/__init__.pyi")}
    assert set(SITE["PACKAGES"]) == there
