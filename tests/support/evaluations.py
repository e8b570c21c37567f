"""Every measure of rows and probes against slow computations, and how often what is read."""

import shutil

import datasets
import numpy as np
import pytest
import torch

import models
from texts import trained_tokenizer
from tokenweight.evaluate import EvalSettings

LENGTH, SIZES, LONG = 24, [6, 10], (9, 4)
TOKENS = models.some_tokens(6, LENGTH, seed=5)
DOCUMENTS = list("aabbbc")
POSITIONS = [[*range(14), *range(10)], [*range(24)], [*range(5), *range(19)]] * 2
LABELS = TOKENS.clone()
OPTIONS = {"sizes": "6,10", "short": 7, "long_size": 9, "long_stride": 4, "probes": "none"}


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """Models without a tokenizer, in float64, that change their mind by several nats with the context; and rows."""
    root = tmp_path_factory.mktemp("eval")
    for name, seed in {"base": 0, "trained": 1, "judge": 14}.items():
        models.tiny(seed=seed, initializer_range=0.9).save_pretrained(root / name)
    shutil.copytree(root / "base", root / "copy")
    save(root / "rows", document=DOCUMENTS)
    save(root / "packed", position_ids=POSITIONS, documents=[["a", "b"]] * 6, labels=LABELS.tolist())
    return root


def save(folder, **columns):
    datasets.Dataset.from_dict({"input_ids": TOKENS.tolist(), **columns}).save_to_disk(str(folder))


def settings(place, out, model="trained", *, data="rows", **options):
    for name in ("baseline", "evaluator"):
        if options.get(name):
            options[name] = str(place / options[name])
    return EvalSettings(str(place / model), place / data, out, **{**OPTIONS, **options})


def values(model):
    return {measure["name"]: measure["value"] for measure in model["measures"]}


@pytest.fixture(scope="module")
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
