"""From texts to stored scores: throughput, memory as the corpus grows, size on disk.

    python benchmarks/corpus.py            about 10 minutes on two cores
    python benchmarks/corpus.py --quick    seconds, on few texts and a tiny tokenizer: a smoke test

`prepare_rows` is timed beside `datasets.map` with the same tokenizer over the same texts, which both read from a folder
of `datasets`; `map` writes the tokens of each text unchanged, `prepare_rows` cuts them into sequences with checksums.

Memory is the peak anonymous memory of a process beyond what it holds before (mapped files do not count), for a corpus
and one ten times as large, made of the same texts repeated. Sequences are scored by a tiny random model: what grows
with the corpus does not depend on the model.
"""

import shutil
import tempfile
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import chain, islice, repeat
from pathlib import Path
from typing import Any

import datasets
import tyro

from bench.measure import GIB, alternately, in_fresh_process
from bench.models import model_and_row, sotu_texts, tiny_llama
from bench.report import Bench, Report
from tokenweight import ShortContext, load_tokenizer
from tokenweight.cli.demo import packaged_model
from tokenweight.data import Document, RowScorer, find_sources, load_rows, prepare_rows, read_documents, score_rows

PREPARE, MAP = "tokenweight.prepare_rows", "datasets.map"
LENGTH = 4096


def speed(report: Report, documents: list[Document], length: int, rounds: int) -> None:
    """Measure tokens per second of `prepare_rows`, beside `datasets.map`."""
    datasets.disable_progress_bars()
    tokenizer = load_tokenizer(packaged_model())
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        data = datasets.Dataset.from_dict({"text": [document.text for document in documents]})
        data.save_to_disk(str(folder / "texts"))
        num_tokens = sum(len(tokens) for tokens in tokenizer(data["text"][:])["input_ids"])

        def prepare() -> None:
            shutil.rmtree(folder / "rows", ignore_errors=True)
            prepare_rows(read_documents(find_sources([folder / "texts"])), tokenizer, length, folder / "rows")

        def tokenize() -> None:
            read = datasets.load_from_disk(str(folder / "texts"))
            read.map(
                lambda batch: tokenizer(batch["text"]),
                batched=True,
                remove_columns="text",
                load_from_cache_file=False,
                cache_file_name=str(folder / "mapped.arrow"),
            )

        seconds = alternately({PREPARE: prepare, MAP: tokenize}, rounds)
    speeds = {run: [num_tokens / value for value in values] for run, values in seconds.items()}
    x = f"SmolLM2 tokenizer, {len(documents)} texts, {num_tokens} tokens, rows of {length}"
    for run, values in speeds.items():
        setting = {"what": "texts to rows", "x": x, "implementation": run}
        report.add(**setting, metric="tokens per second", unit="tokens/s", values=values)
        if run == PREPARE:
            report.add_ratio(**setting, metric=f"tokens per second / {MAP}", over=values, under=speeds[MAP])


def anonymous_bytes() -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon:"))


def most_anonymous_bytes(run: Callable[[], Any]) -> int:
    """Peak anonymous memory of this process while `run` runs, beyond the current, sampled a hundred times a second."""
    before = most = anonymous_bytes()
    done = threading.Event()

    def watch() -> None:
        nonlocal most
        while not done.wait(0.01):
            most = max(most, anonymous_bytes())

    watcher = threading.Thread(target=watch)
    watcher.start()
    run()
    done.set()
    watcher.join()
    return most - before


def memory_of_preparing(num_texts: int, length: int) -> int:
    tokenizer = load_tokenizer(packaged_model())
    again: Iterator[Document] = islice(chain.from_iterable(repeat(sotu_texts())), num_texts)
    prepare_rows(sotu_texts()[:2], tokenizer, 64, Path(tempfile.mkdtemp()) / "rows")  # warm up
    with tempfile.TemporaryDirectory() as name:
        return most_anonymous_bytes(lambda: prepare_rows(again, tokenizer, length, Path(name) / "rows"))


def memory_of_scoring(num_rows: int, length: int) -> int:
    scorer = RowScorer(tiny_llama(max_position_embeddings=length), [ShortContext(length // 4, length // 8)])
    with tempfile.TemporaryDirectory() as name:
        generated = datasets.Dataset.from_generator(
            lambda: ({"input_ids": [row % 250] * length} for row in range(num_rows)), cache_dir=name
        )
        few = generated.select(range(2))
        score_rows(few.with_format("numpy"), scorer, Path(name) / "few", provenance={})  # warm up
        rows = generated.with_format("numpy")
        return most_anonymous_bytes(lambda: score_rows(rows, scorer, Path(name) / "scored", provenance={}))


def memory(report: Report, num_texts: int, num_rows: int, length: int) -> None:
    for what, function, num, unit in (
        ("prepare_rows", memory_of_preparing, num_texts, "texts"),
        ("score_rows", memory_of_scoring, num_rows, "rows"),
    ):
        found = {factor: in_fresh_process(function, factor * num, length) / GIB for factor in (1, 10)}
        setting = {"what": "memory as the corpus grows", "x": f"{num} and {10 * num} {unit}, rows of {length}"}
        for factor, value in found.items():
            metric = f"most anonymous memory, {factor} x"
            report.add(**setting, implementation=f"tokenweight.{what}", metric=metric, unit="GiB", values=[value])
        setting |= {"implementation": f"tokenweight.{what}", "metric": "most anonymous memory, 10 x / 1 x"}
        report.add_ratio(**setting, over=[found[10]], under=[found[1]])


def size_on_disk(report: Report, documents: list[Document], length: int) -> None:
    """Measure bytes of the folders per million tokens."""
    _, model, _ = model_and_row(length, quick=True)
    tokenizer = load_tokenizer(packaged_model())
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        prepare_rows(documents, tokenizer, length, folder / "rows")
        rows = load_rows(folder / "rows").map(lambda row: {"input_ids": row["input_ids"] % model.config.vocab_size})
        for with_long in (False, True):
            scorer = RowScorer(model, [ShortContext(length // 4, length // 8)], with_long=with_long)
            score_rows(rows.with_format("numpy"), scorer, folder / f"scored-{with_long}", provenance={})
        for kind, path in (("rows", "rows"), ("scored", "scored-False"), ("scored --long", "scored-True")):
            used = sum(file.stat().st_size for file in (folder / path).rglob("*"))
            num_tokens = len(rows) * length
            setting = {"what": "bytes on disk", "x": f"{len(rows)} rows of {length}", "implementation": kind}
            report.add(**setting, metric="per million tokens", unit="MB", values=[used / num_tokens])


@dataclass
class Corpus(Bench):
    """Speed, memory and disk size of sequences and scores."""

    def run(self) -> None:
        report, documents = self.report("corpus"), sotu_texts()[: 6 if self.quick else None]
        length = 256 if self.quick else LENGTH
        speed(report, documents, length, self.rounds)
        memory(report, len(documents), 64 if self.quick else 128, length)
        size_on_disk(report, documents[: 20 if self.quick else 60], length)
        report.finish()


if __name__ == "__main__":
    tyro.cli(Corpus).run()
