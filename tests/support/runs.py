"""Batches, and that training does not depend on how a step is split, stored, interrupted or described."""

import os
import subprocess
import sys

import datasets

# Float64 weights: two orders of the same sums differ by about 1e-15 of a gradient, and AdamW divides a gradient by its
# own size plus 1e-8, so that of one that is 0 but for rounding at most 1e-15 / 1e-8 of a step of 0.01 is left: 1e-9.
# The Trainer keeps losses in float32, and adds those of the parts of a step.
SAME_WEIGHTS, SAME_LOSSES = {"rtol": 0, "atol": 1e-9}, {"rel": 4 * 2**-24}


def packed(rows, *groups):
    """Some rows behind one another in each row, as documents that do not see each other."""
    columns = {name: [[value for i in group for value in rows[i][name]] for group in groups] for name in rows.features}
    columns["position_ids"] = [[t for i in group for t in range(len(rows[i]["input_ids"]))] for group in groups]
    return datasets.Dataset.from_dict(columns)


def torchrun(*words, processes=2, **environ):
    """Run Python with these words in two or more processes, which have to succeed."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    command += map(str, words)
    environ = {**os.environ, "OMP_NUM_THREADS": "1", **environ}
    done = subprocess.run(command, env=environ, capture_output=True, text=True, timeout=1200)
    assert done.returncode == 0, done.stderr[-4000:]
