"""What several processes of `tokenweight prepare` gain, from the start of the command to its end.

    python benchmarks/processes.py            about 6 minutes on two cores
    python benchmarks/processes.py --quick    a minute, on few texts: says nothing

A process that tokenizes for each core, beside one process. That one has the threads of the tokenizers library, which
use all cores; it is timed without them, too. Each command starts anew, which takes seconds, so over the texts several
times.
"""

import functools
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any
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
    """From the start of the command to its end."""
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


def serial_shares(report: Report, texts: list[str], length: int, rounds: int) -> None:
    """CPU time that neither threads nor processes can share: what more cores gain follows by Amdahl's law.

    CPU time does not depend on what else the machine does. Threads share what the tokenizers library does, processes
    all but what the first process does while others tokenize.
    """
    tokenizer = load_tokenizer(str(packaged_model()))
    documents = [Document(str(number), text) for number, text in enumerate(texts)]
    shares: dict[str, list[float]] = {"threads of the tokenizer": [], "prepare --num_proc N": []}
    with tempfile.TemporaryDirectory() as name, patch.dict(os.environ, {"TOKENIZERS_PARALLELISM": "false"}):

        def seconds(run: Callable[[], Any]) -> float:
            begin = time.process_time()
            run()
            shutil.rmtree(f"{name}/rows", ignore_errors=True)
            return time.process_time() - begin

        for _ in range(rounds + 1):
            alone, beside = (
                seconds(lambda: prepare_rows(documents, tokenizer, length, f"{name}/rows", num_proc=num))  # noqa: B023
                for num in (1, 2)
            )
            tokens = seconds(lambda: tokenizer.backend_tokenizer.encode_batch(texts, add_special_tokens=False))
            for share, value in zip(shares.values(), (1 - tokens / alone, beside / alone)):
                share.append(value)
    setting = {"what": "texts to rows, what remains in one process", "x": f"SmolLM2 tokenizer, {len(texts)} texts"}
    for run, values in shares.items():
        report.add(**setting, implementation=run, metric="CPU time / all CPU time", unit="1", values=values[1:])


@dataclass
class Processes(Bench):
    """Tokens per second of the command, by its processes."""

    def run(self) -> None:
        report = self.report("processes")
        texts = [document.text for document in sotu_texts()[: 6 if self.quick else None]]
        datasets.disable_progress_bars()
        length = 256 if self.quick else 4096
        serial_shares(report, texts, length, self.rounds)
        command_times(report, texts, length, self.rounds, 1 if self.quick else 2)
        report.finish()


if __name__ == "__main__":
    tyro.cli(Processes).run()
