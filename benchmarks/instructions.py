"""Instruction tuning on answers to questions about a long context, before and after, under two weightings.

    python benchmarks/instructions.py            some minutes on two cores, 4 GiB of memory
    python benchmarks/instructions.py --quick    seconds, on a tiny model: a smoke test

Each conversation is synthetic: a passage of a speech with an inserted sentence that gives the code of a place, a
question about that code, and the answer. `prepare_rows(chat=True)` makes sequences in which only the answer is
predicted. The model is SmolLM2-135M-Instruct; "dense" scores itself with windows of a quarter of the sequence. The
held-out conversations have other places, codes and passages. Each value is of one of them: the loss of its answer, and
of the digits in it, which only the long context reveals; the fraction of digits that the model ranks first. p50 is the
median, p20 and p80 are over conversations.
"""

import random
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import tyro

from bench.models import sotu_texts, tiny_llama
from bench.report import Bench
from tokenweight import Scorer, load_model, load_tokenizer, with_weighted_loss
from tokenweight.cli.demo import packaged_model
from tokenweight.data import Document, load_rows, prepare_rows
from tokenweight.data.chat import conversation_text

PLACES = "harbor,mill,chapel,library,orchard,tower,bakery,station,bridge,school,farm,forge,inn,museum,garden,theater"


def conversations(num: int, words: int) -> list[Document]:
    """Questions about passages of `words` words, each from a different text."""
    draw, texts, places = random.Random(0), sotu_texts()[-num:], PLACES.split(",")
    found = []
    for number, text in enumerate(texts):
        passage, place = text.text.split()[:words], places[number % len(places)]
        code = draw.randint(1000, 9999)
        passage.insert(draw.randrange(words // 2), f"The code of the {place} is {code}.")
        question = f"{' '.join(passage)}\n\nWhat is the code of the {place}?"
        turns = [("user", question), ("assistant", f"The code of the {place} is {code}.")]
        record = {"messages": [{"role": role, "content": content} for role, content in turns]}
        found.append(Document(text.name, conversation_text(record)))
    return found


@torch.no_grad()
def measured(model: Any, tokenizer: Any, row: dict[str, Any]) -> dict[tuple[str, str], float]:
    """Metrics of one conversation: (metric, unit) -> value."""
    tokens, labels = (torch.from_numpy(row[name]).long() for name in ("input_ids", "labels"))
    places = (labels != -100).nonzero()[:, 0]
    logits = model(input_ids=tokens[None]).logits[0, places - 1].float()
    losses = torch.nn.functional.cross_entropy(logits, labels[places], reduction="none")
    digits = torch.tensor([tokenizer.decode([token]).strip().isdigit() for token in labels[places].tolist()])
    right = (logits.argmax(dim=1) == labels[places])[digits]
    return {
        ("loss of the answer", "nats"): losses.mean().item(),
        ("loss of the code", "nats"): losses[digits].mean().item(),
        ("digits of the code found", "1"): right.float().mean().item(),
    }


@dataclass
class Instructions(Bench):
    """Answer losses before and after instruction tuning."""

    rounds: tyro.conf.Suppress[int] = 1
    steps: int = 8
    """Training steps, each on one new conversation."""
    held_out: int = 8
    """Number of held-out conversations."""
    words: int = 300
    """Words of a passage."""
    learning_rate: float = 2e-5
    """Constant learning rate of AdamW."""

    def run(self) -> None:
        report, tokenizer = self.report("instructions"), load_tokenizer(packaged_model())
        steps, held_out, words = (2, 2, 40) if self.quick else (self.steps, self.held_out, self.words)
        with tempfile.TemporaryDirectory() as folder:
            prepare_rows(conversations(steps + held_out, words), tokenizer, 8192, Path(folder) / "rows", chat=True)
            rows = [dict(row) for row in load_rows(Path(folder) / "rows")]
        trained, measuring = rows[:steps], rows[steps:]
        length = max(len(row["input_ids"]) for row in rows)
        x = f"{'tiny random Llama' if self.quick else 'SmolLM2-135M-Instruct'}, {steps} steps of 1 conversation, "
        x += f"at most {length} tokens, lr {self.learning_rate:g}, float32; {held_out} held out"
        for weighting in ("before", "uniform", "dense"):
            model = tiny_llama(vocab_size=49152) if self.quick else load_model(packaged_model(), dtype=torch.float32)
            if weighting != "before":
                self._train(model, weighting, trained, length)
            of_rows = [measured(model.eval(), tokenizer, row) for row in measuring]
            setting = {"what": "instruction tuning, on held-out conversations", "x": x, "implementation": weighting}
            for metric, unit in of_rows[0]:
                values = [found[metric, unit] for found in of_rows]
                means = {(f"mean {metric}", unit): [sum(values) / len(values)]}
                report.add_each({(metric, unit): values} | means, **setting)
        report.finish()

    def _train(self, model: Any, weighting: str, rows: list[dict[str, Any]], length: int) -> None:
        scorer = None if weighting == "uniform" else Scorer(model, size=length // 4)
        with_weighted_loss(model, weighting, scorer)
        optimizer = torch.optim.AdamW(model.parameters(), lr=self.learning_rate)
        for row in rows:
            batch = {name: torch.from_numpy(row[name]).long()[None] for name in ("input_ids", "labels")}
            model.train()(**batch).loss.backward()
            optimizer.step()
            optimizer.zero_grad()


if __name__ == "__main__":
    tyro.cli(Instructions).run()
