"""Cost of opening a scored folder as the corpus grows tenfold: bytes read, and time.

    python benchmarks/opening.py            a minute
    python benchmarks/opening.py --quick    seconds, on a small corpus: a smoke test

The folders hold random tokens and scores in the shards that `score` would make. Before each round the pages of both
are dropped from memory, so that all reads come from the disk and are counted by the kernel, readahead included
(`read_bytes` of /proc/self/io: Linux, and a file system on a disk). They are opened in turns, one first in every other
round: whichever is first also waits for what was forgotten besides. "Lengths" are what a mixture reads in addition.
"""

import os
import shutil
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import tyro

from bench.report import Bench
from tokenweight.data import load_scores, row_lengths, shards
from tokenweight.data.score import write
from tokenweight.records import write_json

SCHEMA = pa.schema({"input_ids": pa.list_(pa.int32()), "short_nll_1024": pa.list_(pa.float32())})
SMALL, LARGE = "a tenth", "all"


def make(folder: Path, num_rows: int, length: int, shard_tokens: int | None = None) -> int:
    """Write a scored folder, and return its number of shards."""
    draw = np.random.default_rng(0)
    folder.mkdir()
    lengths = np.full(num_rows, length)
    parts = write._shards(lengths, shard_tokens or write._shard_tokens(lengths))
    names = [f"scores-{number:05d}-of-{len(parts):05d}.arrow" for number in range(len(parts))]
    write_json(folder / "scores.json", {"contexts": [{"size": 1024, "stride": 768}]})
    for name, part in zip(names, parts):
        with shards.new_shard(folder / name, SCHEMA) as (file, note):
            for rows in np.array_split(part, max(1, len(part) * length // 32768)):  # in batches as in `score`
                offsets = np.arange(len(rows) + 1, dtype=np.int32) * length
                tokens = draw.integers(0, 50000, len(rows) * length, dtype=np.int32)
                losses = draw.random(len(tokens), dtype=np.float32)
                columns = [pa.ListArray.from_arrays(offsets, values) for values in (tokens, losses)]
                file.write(pa.Table.from_arrays(columns, schema=SCHEMA))
            note["differences"] = {}
    shards.finish_dataset(folder, names)
    shards.unlock(folder)
    return len(names)


def forget(folder: Path) -> None:
    """Drop the pages of all files of a folder from memory."""
    for path in folder.iterdir():
        descriptor = os.open(path, os.O_RDONLY)
        os.fsync(descriptor)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)


def read_bytes() -> int:
    """Bytes that this process has read from disk so far."""
    lines = Path("/proc/self/io").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("read_bytes"))


def cost(work: Callable[[Path], Any], folder: Path) -> tuple[float, float]:
    """Bytes read and seconds taken by `work` on a folder."""
    before, begun = read_bytes(), time.perf_counter()
    work(folder)
    return read_bytes() - before, time.perf_counter() - begun


WORK: dict[str, Callable[[Path], Any]] = {
    "datasets.load_from_disk": lambda folder: datasets.load_from_disk(str(folder)),
    "open": load_scores,
    "open, and read a row": lambda folder: load_scores(folder)[0][0],
    "open, and lengths of rows": lambda folder: row_lengths(load_scores(folder)[0]),
}


@dataclass
class Opening(Bench):
    """Bytes and time of opening a scored folder."""

    tokens: int = 64 << 20
    """Tokens of the larger corpus."""
    length: int = 8192
    """Tokens of a row."""
    shard_tokens: int | None = None
    """Tokens of a shard, by default those that `score` would choose."""
    folder: Path | None = None
    """Folder for the temporary corpora; by default that of temporary files."""

    def run(self) -> None:
        if self.quick:
            self.tokens, self.length = 1 << 20, 1024
        report, num_rows = self.report("opening"), self.tokens // self.length
        place = Path(tempfile.mkdtemp(dir=self.folder))
        try:
            corpora = {SMALL: num_rows // 10, LARGE: num_rows // 10 * 10}
            num_shards = {
                name: make(place / name, rows, self.length, self.shard_tokens) for name, rows in corpora.items()
            }
            x = f"{self.tokens >> 20} M tokens in {num_shards[LARGE]} shards, and a tenth in {num_shards[SMALL]}"
            for what, work in WORK.items():
                for name in corpora:
                    work(place / name)
                found: dict[str, list[tuple[float, float]]] = {name: [] for name in corpora}
                for number in range(self.rounds):
                    for name in corpora:
                        forget(place / name)
                    for name in [*corpora][:: 1 if number % 2 else -1]:
                        found[name].append(cost(work, place / name))
                for number, (metric, unit, scale) in enumerate((("bytes", "KiB", 1 / 1024), ("time", "ms", 1e3))):
                    values = {name: [scale * one[number] for one in costs] for name, costs in found.items()}
                    for name in corpora:
                        setting = {"what": what, "x": x, "implementation": name}
                        report.add(**setting, metric=metric, unit=unit, values=values[name])
                    report.add_ratio(**setting, metric=f"{metric} / {SMALL}", over=values[LARGE], under=values[SMALL])
        finally:
            shutil.rmtree(place)
        report.finish()


if __name__ == "__main__":
    tyro.cli(Opening).run()
