"""The benchmarks run, their rows are complete, and their FLOP counts are what torch counts."""

import importlib.util
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"


def load(name):
    """A script of the benchmarks as a module; they import each other by their plain names."""
    spec = importlib.util.spec_from_file_location(name, BENCHMARKS / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, name, module)
        patch.syspath_prepend(str(BENCHMARKS))
        spec.loader.exec_module(module)
    return module
