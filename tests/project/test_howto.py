"""The how-to pages are short, and what they say to type works: on tiny models, or it says what it needs."""

import re
import shlex
import shutil
import subprocess
from pathlib import Path

import datasets
import huggingface_hub
import jaxtyping
import pytest
import torch
import yaml

import models
from texts import EXCERPT, trained_tokenizer
from tokenweight import cli
from tokenweight.cli import doctor

ROOT = Path(__file__).parents[2]
HOWTO = ROOT / "docs/howto"
PAGES = sorted(path.stem for path in HOWTO.glob("*.md"))
BEGIN = {"first-run-on-your-texts": "texts", "mixtures": "texts"}
"""Pages that begin with texts; the others with what the first one makes."""
SMALL = {
    "32768": "64", "16384": "32", "8192": "16", "4096": "12", "2048": "8", "240": "2", "100": "20",
}  # fmt: skip
LONG = ("choosing", "cluster", "reading-results")
"""Pages whose commands take long."""
every_page = pytest.mark.parametrize("page", [pytest.param(p, marks=[pytest.mark.slow] * (p in LONG)) for p in PAGES])


def blocks(page):
    """(language, text, the paragraph before it) of each block of a page."""
    parts = (HOWTO / f"{page}.md").read_text().split("```")
    found = zip(parts[1::2], parts[::2], strict=False)
    return [(*block.split("\n", 1), before.strip().rpartition("\n\n")[2]) for block, before in found]


def smaller(text):
    """A text with every number of tokens or steps that stands in it in small."""
    return re.sub(r"(?<![\w.-])\d+(?![\w.-])|(?<=_)\d+\b", lambda number: SMALL.get(number[0], number[0]), text)


def commands(text, begin=""):
    """Words of each command of a block, which may go on in further lines."""
    lines = re.sub(r"\\\n *", "", text).splitlines()
    return [shlex.split(line.removeprefix(begin), comments=True) for line in lines if line.startswith(begin)]


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    """A model and texts."""
    root = tmp_path_factory.mktemp("howto") / "texts"
    model = models.tiny(dtype=torch.float32, vocab_size=300, bos_token_id=0, eos_token_id=1)
    model.save_pretrained(root / "MODEL")
    trained_tokenizer(framed=True).save_pretrained(root / "MODEL")
    text = EXCERPT.read_text(encoding="utf-8")
    for number, name in enumerate(("books", "held-out", "code")):
        (root / name).mkdir()
        (root / name / "a.txt").write_text(text[3000 * number :][:3000], encoding="utf-8")
    return root


@pytest.fixture(scope="module")
def made(texts):
    """The same, with sequences, scores, a trained model, and scores that another program wrote as Parquet."""
    root = shutil.copytree(texts, texts.parent / "made")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(root)
        patch.setattr(jaxtyping.config, "jaxtyping_disable", True)  # as the fixture `unchecked`, for the module
        for name, source in (("data", "books"), ("validation", "held-out")):
            assert cli.main(["prepare", source, "--tokenizer", "MODEL", "--length", "64", "--out", name]) == 0
        assert cli.main(["score", "data", "--model", "MODEL", "--size", "16", "--long", "--out", "scored"]) == 0
        train = ["train", "--model", "MODEL", "--data", "scored", "--out", "run", "--trainer.max_steps", "1"]
        assert cli.main(train) == 0
        (root / "scored-by-ray").mkdir()
        datasets.load_from_disk("scored").to_parquet("scored-by-ray/part-0.parquet")
        shutil.rmtree("run/checkpoint-1", ignore_errors=True)
        (root / "run").rename(root / "trained")
    return root


@pytest.fixture
def place(page, request, tmp_path, monkeypatch):
    """The folder that a page is read in."""
    shutil.copytree(request.getfixturevalue(BEGIN.get(page, "made")), tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "100")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    (tmp_path / "recipes").symlink_to(ROOT / "recipes")
    monkeypatch.setattr(doctor, "examine", lambda: iter([("torch", torch.__version__)]))  # has tests of its own
    if not any(" --out run " in f"{text} " for _, text, _ in blocks(page)) and (tmp_path / "trained").exists():
        (tmp_path / "trained").rename(tmp_path / "run")
    return tmp_path


@every_page
def test_what_a_page_says_to_type_works(page, place, unchecked, capsys):
    printed = ""
    for language, text, before in blocks(page):
        if language == "console":
            for program, *words in commands(smaller(text), "$ "):
                if program == "tokenweight":
                    extra = {"eval": ["--probes", "none"], "plan": ["--lengths", "none"]}.get(words[0], [])
                    assert cli.main([*words, *extra]) == 0, (words, capsys.readouterr().err)
                    printed = capsys.readouterr().out
                else:
                    assert program == "pip"
        elif language == "python":
            code = compile(smaller(text), page, "exec")
            if not re.search("[Nn]eeds a (network|Ray cluster)", before):
                exec(code, {})
        elif language == "bash":
            assert re.search(r"\b[Nn]eeds ", text + (HOWTO / f"{page}.md").read_text().split("\n\n")[1])
            subprocess.run(["bash", "-n"], input=text, text=True, check=True)
            for words in commands(re.sub(r"\$SLURM_ARRAY_TASK_ID", "0", text)):
                if "tokenweight" in words and "--print-completion" not in words:
                    cli.parse(words[words.index("tokenweight") + 1 :])
        elif language == "yaml" and page == "cluster":
            (container,) = yaml.safe_load(text)["spec"]["template"]["spec"]["containers"]
            *_, command = container["command"]
            cli.parse(shlex.split(command.replace("$JOB_COMPLETION_INDEX", "0"))[1:])
        elif language == "" and page == "cluster":
            assert text.splitlines()
            assert [
                line for line in text.splitlines() if line not in [one.rstrip() for one in printed.splitlines()]
            ] == []


@every_page
def test_a_page_is_short_and_listed(page):
    text = (HOWTO / f"{page}.md").read_text()
    assert len(" ".join(text.split("```")[::2]).split()) <= 900 if page == "cluster" else len(text.splitlines()) <= 60
    assert f"howto/{page}.md" in (ROOT / "mkdocs.yml").read_text()
    assert f"({page}.md)" in (HOWTO / "index.md").read_text() or page == "index"


def test_the_worked_example_has_no_number_that_is_not_in_the_evidence():
    evidence = (ROOT / "recipes/evidence/README.md").read_text()
    example = (HOWTO / "reading-results.md").read_text().partition("## A worked example")[2]
    numbers = re.findall(r"\d+\.\d{3,}", example)
    assert len(numbers) > 40
    assert [number for number in numbers if number not in evidence] == []
    rows = [line for line in example.splitlines() if re.match(r"\| [a-z].*\d", line)]
    for row in rows[1:]:  # each as it stands there, under its columns
        name, half, benefit, longppl, short = [cell.strip() for cell in row.split("|")[1:-1]]
        (theirs,) = [
            line for line in evidence.splitlines() if line.startswith(f"| {name.split()[0]} |") and "<br>" in line
        ]
        cells = [cell.strip().rpartition("<br>")[2].replace("\\*", "") for cell in theirs.split("|")[2:6]]
        assert [half, benefit, longppl, short] == cells


def test_a_path_of_an_object_store_is_refused_in_one_line(texts, unchecked, monkeypatch, capsys):
    monkeypatch.chdir(texts)
    for words in (
        ["prepare", "s3://bucket/books", "--tokenizer", "MODEL", "--length", "64", "--out", "new"],
        ["score", "s3://bucket/data", "--model", "MODEL", "--size", "16", "--out", "new"],
        ["train", "--model", "MODEL", "--data", "hf://datasets/a/b", "--out", "new"],
    ):
        assert cli.main(words) == 2
        assert capsys.readouterr().err.count("\n") == 1
    assert not Path("new").exists()
