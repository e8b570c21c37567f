"""Measurements: alternating timings, and peak memory in fresh processes."""

import contextlib
import gc
import os
import resource
import sys
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch

GIB = 2**30
GIVEN_BACK = "freed memory given back"
"""Label of a memory measurement in a process that returns freed memory to the system: see `in_fresh_process`."""


def alternately(
    runs: dict[str, Callable[[], Any]],
    rounds: int,
    before: Callable[[str], Any] = lambda name: None,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, list[float]]:
    """Seconds of each run in each of `rounds` rounds, after one warm-up round.

    All runs take turns in one process, so that a slow minute of the machine hits all of them; every other round is in
    reverse order, so that none always follows the same one. `before(name)` is called before each run and not timed.
    `clock` is wall-clock time by default; pass `time.process_time` for the CPU time of a single-threaded run.
    """
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for number in range(rounds + 1):
        for name in list(runs) if number % 2 else reversed(list(runs)):
            before(name)
            gc.collect()
            _finish_on_gpu()
            begin = clock()
            runs[name]()
            _finish_on_gpu()
            duration = clock() - begin
            if number:
                seconds[name].append(duration)
            print(f"round {number} of {rounds}: {name} {duration:.3f} s", file=sys.stderr)
    return seconds


def _finish_on_gpu() -> None:
    """Wait for the GPU, which runs behind the host, before the clock is read."""
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()


def in_fresh_process(function: Callable[..., Any], *arguments: Any, keep_freed: bool = True) -> Any:
    """Run `function`, defined at the top level of a module, in a fresh process, and return its result.

    Unless `keep_freed`, the C library (glibc) returns freed memory to the system at once instead of keeping it for the
    next tensor: resident memory is then what is held. This is slower, since every tensor takes fresh pages.
    """
    settings = {} if keep_freed else {"MALLOC_MMAP_THRESHOLD_": "131072"}  # once set, the threshold no longer adapts
    with patch.dict(os.environ, settings), ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        return pool.submit(function, *arguments).result()


def peak_bytes_over_now(run: Callable[[], Any]) -> int:
    """Peak resident memory of this process while `run` runs, beyond what is resident when it is called.

    Everything that the process holds in RAM counts: tensors, packing buffers of the matrix multiplication, the
    allocator's slack. Where the kernel does not allow the peak to be reset, the peak since the start of the process is
    taken instead: the result may then be too high, never too low. Call it in a fresh process.
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
