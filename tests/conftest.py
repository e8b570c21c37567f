"""Check the shapes in the signatures of the package while its tests run."""

import jaxtyping
import pytest

jaxtyping.install_import_hook("tokenweight", "beartype.beartype")


@pytest.fixture
def unchecked(monkeypatch):
    """Call the package as its users do, without checks of signatures: to see its own answer to a wrong argument."""
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)
