"""The packages: what they offer is what they say they offer."""

import importlib
import types

import pytest

import tokenweight

PACKAGES = [name for name in tokenweight.__all__ if isinstance(getattr(tokenweight, name), types.ModuleType)]


@pytest.mark.parametrize("package", ["tokenweight", *(f"tokenweight.{name}" for name in PACKAGES)])
def test_every_public_name_is_there_and_is_not_hidden_by_a_module_of_the_same_name(package):
    module = importlib.import_module(package)
    for name in set(module.__all__) - set(PACKAGES):
        value = getattr(module, name)  # imports the file in which it lives, which becomes an attribute as well
        assert not isinstance(value, types.ModuleType), name
        assert getattr(module, name) is value


def test_dir_names_what_is_public_and_nothing_else():
    packages = ["tokenweight", *(f"tokenweight.{name}" for name in PACKAGES)]
    for module in map(importlib.import_module, packages):
        assert dir(module) == sorted(module.__all__)
        assert not [name for name in dir(module) if name.startswith("_")]
