"""Folders to train on, and settings of short runs."""

import pytest
import torch
from distributed import some_rows

import models
from tokenweight import ShortContext
from tokenweight.data import score_folder
from tokenweight.train import TrainSettings


@pytest.fixture(scope="session")
def corpus(tmp_path_factory):
    """A model without a tokenizer; rows of two kinds, each also scored, and the second with another context, too."""
    root = tmp_path_factory.mktemp("corpus")
    models.tiny(dtype=torch.float32).save_pretrained(root / "model")
    some_rows((40,) * 9, scored=False).save_to_disk(str(root / "long"))
    some_rows((24, 16, 30) * 4, scored=False).save_to_disk(str(root / "mixed"))
    for name, context in (("long", (10, 7)), ("mixed", (10, 7)), ("mixed", (8, 6))):
        out = root / (f"scored-{name}" if context == (10, 7) else "otherwise")
        score_folder(root / name, str(root / "model"), [ShortContext(*context)], out)
    return root


@pytest.fixture
def short_run(corpus, tmp_path):
    """Settings of four steps."""
    trainer = {"max_steps": 4, "warmup_steps": 0, "learning_rate": 1e-2, "save_steps": 2}
    data = str(corpus / "scored-long")
    return TrainSettings(str(corpus / "model"), data, str(tmp_path / "out"), trainer=trainer)
