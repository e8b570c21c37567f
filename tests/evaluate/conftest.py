"""Models and data that the tests of evaluations share, made once in each process."""

import shutil

import datasets
import numpy as np
import pytest
import torch
from evaluations import DOCUMENTS, LABELS, POSITIONS, save

import models
from texts import trained_tokenizer


@pytest.fixture(scope="session")
def place(tmp_path_factory):
    """Models without a tokenizer, in float64, that change their mind by several nats with the context; and rows."""
    root = tmp_path_factory.mktemp("eval")
    for name, seed in {"base": 0, "trained": 1, "judge": 14}.items():
        models.tiny(seed=seed, initializer_range=0.9).save_pretrained(root / name)
    shutil.copytree(root / "base", root / "copy")
    save(root / "rows", document=DOCUMENTS)
    save(root / "packed", position_ids=POSITIONS, documents=[["a", "b"]] * 6, labels=LABELS.tolist())
    return root


@pytest.fixture(scope="session")
def with_tokenizer(tmp_path_factory):
    """Two models of 460 positions with a tokenizer, and rows of 440 tokens."""
    root = tmp_path_factory.mktemp("probes")
    for seed, name in enumerate(["base", "trained"]):
        options = {"vocab_size": 300, "max_position_embeddings": 460, "dtype": torch.float32}
        models.tiny(seed=seed, **options).save_pretrained(root / name)
        trained_tokenizer().save_pretrained(root / name)
    tokens = np.random.default_rng(0).integers(2, 300, (2, 440)).tolist()
    datasets.Dataset.from_dict({"input_ids": tokens}).save_to_disk(str(root / "rows"))
    return root
