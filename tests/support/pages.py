"""Folders for the page of `tokenweight report`, and the page taken apart."""

import html
import json
import re

import datasets
import torch

import models
from texts import EXCERPT, trained_tokenizer
from tokenweight import ShortContext
from tokenweight.data import score_folder
from tokenweight.evaluate import Measure, compare
from tokenweight.records import write_json

LENGTH = 240
HOSTILE = (
    "</script><script>window.hacked = 1</script><img src=x onerror='hacked=1'> &amp; <!-- \x00\x1b[31m \u202eabc\u2066 "
    "{{ 7 * 7 }} {% raw %} naïve 你好 🙂 ahab saw ahab"
)
EDGES = [0, 60, 120, 240]
CURVES = [
    {"step": 1, "loss": 6.5, "grad_norm": 4.25, "learning_rate": 0.0, "weight_mean": 1.0},
    {"step": 2, "loss": 6.25, "grad_norm": 5.5, "learning_rate": 2e-6, "weight_mean": 1.0 - 6e-9},
    {"step": 2, "train_runtime": 1.5, "train_loss": 6.375},
]


def make_runs(root):
    """Scored rows of a text and a hostile one; packed ones; a training run; an evaluation of two models."""
    tokenizer = trained_tokenizer()
    models.tiny(dtype=torch.float32, vocab_size=300, max_position_embeddings=256).save_pretrained(root / "model")
    tokenizer.save_pretrained(root / "model")
    texts = [EXCERPT.read_text(encoding="utf-8")[2000:4000], (HOSTILE + " ") * 3]
    tokens = [tokenizer(text)["input_ids"][:LENGTH] for text in texts]
    rows = datasets.Dataset.from_dict({"input_ids": tokens, "document": ["a", "b"]}).with_format("numpy")
    rows.save_to_disk(str(root / "rows"))
    positions = [[*range(40), *range(LENGTH - 40)]] * 2
    rows.add_column("position_ids", positions).save_to_disk(str(root / "rows-packed"))
    for name, size, data in (("scored", 32, "rows"), ("packed", 16, "rows-packed")):
        score_folder(root / data, str(root / "model"), [ShortContext(size, size // 2)], root / name, with_long=True)
    score_folder(root / "rows", str(root / "model"), [ShortContext(32, 16)], root / "short")
    (root / "run").mkdir()
    write_json(root / "run" / "run.json", {"settings": {"weighting": "sparse:keep=0.2,seed=0"}})
    (root / "run" / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in CURVES))
    (root / "evaluated").mkdir()
    write_json(root / "evaluated" / "eval.json", evaluation())
    return root


def evaluation():
    """Two models on three documents, of which only one has tokens in the last bin: no interval there."""
    found = []
    for number, name in enumerate(("runs/base", "runs/model")):
        measures = [Measure("all", "long", "nats", "lower", [600.0 - 7 * number, 300.0, 320.0], [200.0, 100.0, 100.0])]
        for start in EDGES[:-1]:
            tokens = [60.0, 0.0, 0.0] if start == EDGES[-2] else [60.0, 50.0, 40.0]
            total = [tokens[i] * (3 - start / 300 - number * (0.1 + i / 40)) for i in range(3)]
            measures.append(Measure(f"position_{start}", "long", "nats", "lower", total, tokens))
        measures.append(Measure("probe", "long", "share", "higher", [1.0, number, 1.0], [1.0, 1.0, 1.0]))
        found.append((name, measures))
    return {
        "settings": {"edges": EDGES, "sizes": [60]},
        "unit": "document",
        "models": [
            {"model": name, "measures": [{"name": m.name, "num_tokens": m.num_tokens} for m in measures]}
            for name, measures in found
        ],
        "comparison": [[entry._asdict() for entry in row] for row in compare(found)],
    }


def element(page, start, end="</script>"):
    """What stands between `start` and the next `end`."""
    return page[page.index(start) + len(start) :].split(end)[0]


def embedded(page):
    """What the script reads."""
    return json.loads(element(page, '<script type="application/json" id="data">'))


def text_of(markup):
    """The text of a piece of HTML, as a browser reads it."""
    return html.unescape(re.sub(r"<[^>]*>", "", markup))


def passages(page):
    """The text of every passage."""
    return [text_of(part.partition(">")[2].split("</div>")[0]) for part in page.split('<div class="passage"')[1:]]


def tables(page):
    """Every table of numbers: (number of its weighting or None, hidden, rows of cells as text)."""
    found = []
    for part in page.split("<table")[1:]:
        attributes, _, content = part.split("</table>")[0].partition(">")
        number = re.search(r'data-setting="(\d+)"', attributes)
        rows = [re.split(r"<t[hd](?: [^>]*)?>", row)[1:] for row in content.split("<tr")[2:]]
        cells = [[text_of(cell).strip() for cell in row] for row in rows]
        found.append((number and int(number[1]), " hidden" in attributes, cells))
    return found
