"""Scripts of the benchmarks as modules."""

import importlib.util
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"


def load(name):
    """A script by its path without the ending; scripts import what stands beside them and in `bench` by plain names."""
    path = BENCHMARKS / f"{name}.py"
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, path.stem, module)
        patch.syspath_prepend(str(BENCHMARKS))
        patch.syspath_prepend(str(path.parent))
        spec.loader.exec_module(module)
    return module
