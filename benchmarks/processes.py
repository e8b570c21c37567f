"""Speedup of `tokenweight prepare` by several processes, from the start of the command to its end.

    python benchmarks/processes.py            about 6 minutes on two cores
    python benchmarks/processes.py --quick    a minute, on few texts: a smoke test

One tokenizing process per core, beside a single process. The latter uses the threads of the tokenizers library, which
use all cores; it is timed without them, too. Each command starts a fresh interpreter, which takes seconds, so the
texts are repeated several times.
"""

import functools
import os
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from unittest.mock import patch

import datasets
import tyro

from bench.measure import alternately
from bench.models import sotu_texts
from bench.report import Bench, Report
from tokenweight import load_tokenizer
from tokenweight.cli.demo import packaged_model
from tokenweight.data import Document, prepare_rows


def command_times(report: Report, texts: list[str], length: int, rounds: int, repeats: int) -> None:
    """Seconds from the start of the command to its end."""
    num = os.cpu_count() or 1
    model = str(packaged_model())
    num_tokens = repeats * sum(map(len, load_tokenizer(model)(texts)["input_ids"]))
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        datasets.Dataset.from_dict({"text": texts * repeats}).save_to_disk(str(folder / "texts"))

        def prepare(num_proc: int, threads: str = "true") -> None:
            shutil.rmtree(folder / "rows", ignore_errors=True)
            words = ["prepare", folder / "texts", "--tokenizer", model, "--length", length, "--out", folder / "rows"]
            command = [sys.executable, "-m", "tokenweight", *words, "--num_proc", num_proc]
            settings = {**os.environ, "TOKENIZERS_PARALLELISM": threads}
            subprocess.run(list(map(str, command)), check=True, env=settings, stdout=subprocess.DEVNULL)

        one, alone = "prepare --num_proc 1", "prepare --num_proc 1, TOKENIZERS_PARALLELISM=false"
        runs = {
            one: functools.partial(prepare, 1),
            alone: functools.partial(prepare, 1, "false"),
            f"prepare --num_proc {num}": functools.partial(prepare, num),
        }
        seconds = alternately(runs, rounds)
    speeds = {run: [num_tokens / value for value in values] for run, values in seconds.items()}
    x = f"SmolLM2 tokenizer, {repeats} x {len(texts)} texts, {num_tokens} tokens, rows of {length}"
    for run, values in speeds.items():
        setting = {"what": "texts to rows, by processes", "x": x, "implementation": run}
        report.add(**setting, metric="tokens per second", unit="tokens/s", values=values)
        if run != one:
            report.add_ratio(**setting, metric=f"tokens per second / {one}", over=values, under=speeds[one])


def serial_share(report: Report, texts: list[str], length: int, rounds: int) -> None:
    """CPU time of the first process while others tokenize, as a fraction of that of a single process: the serial part
    of Amdahl's law. It does not depend on the load of the machine."""
    tokenizer = load_tokenizer(str(packaged_model()))
    documents = [Document(str(number), text) for number, text in enumerate(texts)]
    shares = []
    with tempfile.TemporaryDirectory() as name, patch.dict(os.environ, {"TOKENIZERS_PARALLELISM": "false"}):

        def seconds(num_proc: int) -> float:
            begin = time.process_time()
            prepare_rows(documents, tokenizer, length, f"{name}/rows", num_proc=num_proc)
            shutil.rmtree(f"{name}/rows")
            return time.process_time() - begin

        for _ in range(rounds + 1):
            alone = seconds(1)
            shares.append(seconds(2) / alone)
    what, x = "texts to rows, what remains in one process", f"SmolLM2 tokenizer, {len(texts)} texts"
    setting = {"what": what, "x": x, "implementation": "prepare --num_proc N"}
    report.add(**setting, metric="CPU time / all CPU time", unit="1", values=shares[1:])


@dataclass
class Processes(Bench):
    """Tokens per second of the command, by number of processes."""

    def run(self) -> None:
        report = self.report("processes")
        texts = [document.text for document in sotu_texts()[: 6 if self.quick else None]]
        datasets.disable_progress_bars()
        length = 256 if self.quick else 4096
        serial_share(report, texts, length, self.rounds)
        command_times(report, texts, length, self.rounds, 1 if self.quick else 2)
        report.finish()


if __name__ == "__main__":
    tyro.cli(Processes).run()
