"""Key tokens of LongPPL by an evaluator with another tokenizer."""

import copy
import functools

import datasets
import numpy as np
import pytest
import torch
from evaluations import settings

import models
from texts import BOS, TEXT, trained_tokenizer
from tokenweight import ShortContext, load_model, load_tokenizer
from tokenweight.data import key_tokens, text_tokens
from tokenweight.evaluate import evaluate
from tokenweight.method import prediction_mask
from tokenweight.models import AlignedScorer

LENGTH = 48
MILD = functools.partial(key_tokens, alpha=0.5, beta=-7.0)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A model, and three evaluators: with its tokenizer, with one more token that no text has, and with another."""
    root, ours = tmp_path_factory.mktemp("aligned"), trained_tokenizer(vocab_size=300)
    more = copy.deepcopy(ours)
    more.add_tokens(["\x01unused\x01"])
    tokenizers = {"model": ours, "same": ours, "more": more, "other": trained_tokenizer(vocab_size=420)}
    for seed, (name, tokenizer) in enumerate(tokenizers.items()):
        options = {"vocab_size": 420, "max_position_embeddings": 128, "initializer_range": 1.0}
        models.tiny(seed=min(seed, 1), **options).save_pretrained(root / name)
        tokenizer.save_pretrained(root / name)
    ids = text_tokens(ours, [TEXT])[0]
    rows = [[BOS, *ids[start : start + LENGTH - 1]] for start in range(0, 8 * LENGTH, LENGTH)]
    datasets.Dataset.from_dict({"input_ids": rows}).save_to_disk(str(root / "rows"))
    return root


@pytest.fixture(autouse=True)
def judged_mildly(monkeypatch):
    """A random model gives no token of a text a probability that LongPPL would call key."""
    monkeypatch.setattr("tokenweight.evaluate.losses.key_tokens", MILD)


def judged(place, out, evaluator):
    record = evaluate(settings(place, out, model="model", evaluator=evaluator))
    return record, np.load(out / "token_weights.npy")[0]


def test_a_tokenizer_that_splits_texts_alike_finds_the_same_tokens(place, tmp_path):
    _, same = judged(place, tmp_path / "same", "same")
    record, more = judged(place, tmp_path / "more", "more")
    assert same["key"].sum() > 2
    assert np.array_equal(more["key"], same["key"])
    assert np.allclose(more["soft"], same["soft"])
    assert len(record["evaluator"]["tokenizer_fingerprint"]) == 16


def test_each_token_is_judged_by_the_losses_of_its_group(place, tmp_path):
    record, found = judged(place, tmp_path / "out", "other")
    tokenizer = load_tokenizer(place / "other")
    options = {"tokenize": text_tokens, "prefix": [tokenizer.bos_token_id], "whole": True}
    scorer = AlignedScorer(load_model(place / "other"), tokenizer, load_tokenizer(place / "model"), **options)
    tokens = torch.as_tensor(datasets.load_from_disk(str(place / "rows"))["input_ids"][:])
    contrast = scorer(tokens, ShortContext(9, 4))
    expected = MILD(contrast.long_nll, contrast.short_nll, prediction_mask(tokens))
    assert scorer.shared_groups > 3
    assert found["key"].tolist() == expected.flatten().tolist()
    assert expected.any()
    (measures,) = ({one["name"]: one for one in model["measures"]} for model in record["models"])
    assert (measures["longppl"]["judge"], sum(measures["longppl"]["num_tokens"])) == ("third", expected.sum())
