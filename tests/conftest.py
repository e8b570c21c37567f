"""Check the shapes in the signatures of the package while its tests run.

Nothing here imports torch before a test needs it: the process that hands tests to workers reads this file as well.
"""

import gc
import os

if "PYTEST_XDIST_WORKER" in os.environ:  # workers side by side, and their processes: a thread each, set before torch
    os.environ.setdefault("OMP_NUM_THREADS", "1")

import checking
import hypothesis
import jaxtyping
import pytest

checking.check_package()
# The same examples in every run, and no limit on the time that one takes: that would test the machine.
hypothesis.settings.register_profile("tokenweight", deadline=None, derandomize=True)
hypothesis.settings.load_profile("tokenweight")


def pytest_collection_modifyitems(items):
    """The demo takes minutes: at the end of the tests it would keep one core busy and leave the others idle."""
    items.sort(key=lambda item: item.path.name != "test_wheel.py")


def pytest_collection_finish():
    """What was imported is there to the end: each `gc.collect` of the Trainer would look through it again."""
    gc.freeze()


@pytest.fixture(scope="module", autouse=True)
def later_imports():
    """What the tests of a module imported stays as well, and with it the little garbage of the moment."""
    yield
    gc.freeze()


@pytest.fixture
def unchecked(monkeypatch):
    """Call the package as its users do, without checks of signatures: to see its own answer to a wrong argument."""
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)


@pytest.fixture
def own_cache(tmp_path, monkeypatch):
    """The cache of `datasets` is in `tmp_path`."""
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")


@pytest.fixture
def folders(tmp_path):
    """Rows, and a model without a tokenizer, in `tmp_path`."""
    import torch

    import models

    models.some_rows().save_to_disk(str(tmp_path / "rows"))
    models.tiny(dtype=torch.float32).save_pretrained(tmp_path / "model")
    return tmp_path


@pytest.fixture
def shards_of_two(monkeypatch):
    """Scores are stored in shards of two rows of `models.some_rows`."""
    import models

    monkeypatch.setattr("tokenweight.data.score.write.SHARD_TOKENS", 2 * models.LENGTH + 1)


@pytest.fixture(params=[False, True], ids=["plain", "framed"])
def framed(request):
    """Whether a tokenizer puts BOS before a text and EOS after it."""
    return request.param
