"""Whole steps on the tensors of a GPU that is not there: devices, dtypes, and for what the host waits."""

import json
import os
import subprocess
import sys
from pathlib import Path

import fake_gpu
import pytest

# Weighting, whether the model scores itself, whether documents are packed; and the waits of tokenweight.
CASES = {
    ("uniform", False, False): {"tolist in inputs.py": 1},
    ("longce", False, False): {"tolist in inputs.py": 1},
    ("dense", False, False): {"tolist in inputs.py": 1},
    ("sparse", False, False): {"tolist in inputs.py": 1, "tolist in rows.py": 1},
    ("rho1", False, False): {"tolist in inputs.py": 1, "tolist in rows.py": 1},
    ("dense", True, False): {"tolist in inputs.py": 1},
    ("expected(gain)", True, False): {"tolist in inputs.py": 1},
    # Documents: of a scorer, where they begin, and whether positions are skipped; and whether attention separates them.
    ("longce", True, True): {
        "tolist in inputs.py": 1,
        "cpu in scorer.py": 1,
        "__bool__ in scorer.py": 1,
        "tolist in causal.py": 1,
    },
}


@pytest.mark.slow
def test_a_step_on_a_gpu_has_all_its_tensors_there_and_waits_once():
    names = {json.dumps(case): expected for case, expected in CASES.items()}
    done = subprocess.run(
        [sys.executable, fake_gpu.__file__, *names],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(Path(fake_gpu.__file__).parent), *sys.path])},
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1]) == names
