"""No step of training, and no loss of an evaluation, holds a tensor that grows with the square of a sequence."""

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import models
from tokenweight import Scorer, ShortContext, parse_weighting, token_nll, with_weighted_loss
from tokenweight.models import CountScorer, DualChunk, with_dual_chunk

LENGTH, CONTEXT = 1000, ShortContext(32, 24)
DENSE = "dense:interpolation=0.75"


class Largest(TorchDispatchMode):
    """Elements of the largest tensor that was made."""

    found = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        sizes = [
            leaf.untyped_storage().nbytes() // leaf.itemsize for leaf in tree_leaves(result) if isinstance(leaf, Tensor)
        ]
        self.found = max(self.found, *sizes, 0)
        return result


def frozen(model, tokens):
    with_weighted_loss(model, parse_weighting(DENSE))
    model(input_ids=tokens, labels=tokens, short_nll=torch.rand(tokens.shape)).loss.backward()


def self_scored(model, tokens):
    with_weighted_loss(model, parse_weighting(DENSE), Scorer(model, CONTEXT))
    model(input_ids=tokens, labels=tokens).loss.backward()


def counted(model, tokens):
    found = CountScorer(vocab_size=models.VOCABULARY)(tokens, CONTEXT)
    with_weighted_loss(model, parse_weighting(DENSE), contrast="scorer")
    model(input_ids=tokens, labels=tokens, long_nll=found.long_nll, short_nll=found.short_nll).loss.backward()


def evaluated(model, tokens):
    scorer = Scorer(model, CONTEXT)
    scorer(tokens, long_nll=scorer.long_nll(tokens))


def dual_chunk(model, tokens):
    token_nll(with_dual_chunk(model, DualChunk(64, 8)), tokens)


@pytest.mark.parametrize("step", [frozen, self_scored, counted, evaluated, dual_chunk])
def test_the_largest_tensor_is_far_from_the_square_of_the_length(step, monkeypatch):
    monkeypatch.setattr("tokenweight.models.attention.pieces._SCORES_CPU", 100 * LENGTH)
    model, tokens = models.tiny(dtype=torch.float32, max_position_embeddings=LENGTH), models.some_tokens(1, LENGTH)
    with Largest() as largest:
        step(model, tokens)
    assert 0 < largest.found < LENGTH**2 / 10
