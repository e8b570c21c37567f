"""What a weighting keeps of the batches that were trained on: counted once each, and not in an evaluation."""

import copy
import json

import pytest
import torch

import models
from tokenweight import with_weighted_loss
from tokenweight.method import ESLM, EXACT, Mix, Rho1, Uniform, Warmup, parse_weighting
from tokenweight.models import load_weighting_state, weighting_state

TOKENS = models.some_tokens(4, 19)


def answer(model, tokens):
    return model(input_ids=tokens, labels=tokens)


@pytest.mark.parametrize(
    "weighting", [EXACT(threshold=8), ESLM(keep=0.5), Warmup(ESLM(keep=0.5), tokens=100.0)], ids=str
)
def test_a_batch_is_weighed_by_itself_and_where_it_is_remembered_by_all_before(weighting):
    model = with_weighted_loss(models.tiny(), weighting)
    mask = torch.ones_like(TOKENS[:2], dtype=torch.bool).index_fill(1, torch.tensor([0]), False)
    history = torch.zeros(weighting.history, dtype=torch.float64)
    for tokens in (TOKENS[:2], TOKENS[2:], TOKENS[:2]):
        output = answer(model, tokens)
        given = {"positions": torch.arange(19).expand(2, 19)} if "positions" in weighting.uses else {}
        losses = (output.long_nll, output.long_nll, mask)
        history *= torch.tensor(weighting.remembered)
        history += weighting.observe(*losses, **given)
        torch.testing.assert_close(output.weights, weighting(*losses, history=history, **given), rtol=1e-12, atol=1e-12)
    assert weighting_state(model) == {"weighting": str(weighting), "history": history.tolist()}
    assert output.weights[:, 1:].unique().numel() > 1


@pytest.mark.parametrize("weighting", [EXACT(threshold=8), ESLM(keep=0.5)], ids=str)
def test_an_evaluation_reads_the_history_and_adds_nothing(weighting):
    model = with_weighted_loss(models.tiny(), weighting)
    weights = answer(model, TOKENS[:2]).weights
    state = weighting_state(model)
    with torch.no_grad():
        assert torch.equal(answer(model, TOKENS[:2]).weights, weights)
        answer(model, TOKENS[2:])
    assert weighting_state(model) == state


@pytest.mark.parametrize("weighting", [ESLM(keep=0.5), Rho1(keep=0.5, over="batch")], ids=str)
def test_a_batch_keeps_its_share_whatever_the_losses_were_before(weighting):
    model = with_weighted_loss(models.tiny(), weighting)
    for scale in (0.0, 3.0, -3.0):
        ref_nll = torch.rand(4, 19, dtype=torch.float64, generator=torch.Generator().manual_seed(1)) + scale
        given = {"ref_nll": ref_nll} if "ref_nll" in weighting.uses else {}
        output = model(input_ids=TOKENS, labels=TOKENS, **given)
        assert output.weights.sum() / output.mask.sum() == pytest.approx(1, abs=0.06)
        with torch.no_grad():
            model.lm_head.weight *= 0.5


def test_a_model_bound_anew_goes_on_with_a_state_that_was_json():
    first = with_weighted_loss(models.tiny(), "mix(warmup(eslm(keep=0.5), tokens=200), exact(threshold=4), share=0.25)")
    answer(first, TOKENS[:2])
    state = json.loads(json.dumps(weighting_state(first)))
    second = with_weighted_loss(
        models.tiny(), Mix(Warmup(ESLM(keep=0.5), tokens=200.0), EXACT(threshold=4), share=0.25)
    )
    load_weighting_state(second, state)
    assert torch.equal(answer(second, TOKENS[2:]).weights, answer(first, TOKENS[2:]).weights)
    alone = answer(with_weighted_loss(models.tiny(), parse_weighting(state["weighting"])), TOKENS[2:])
    assert not torch.equal(alone.weights, answer(first, TOKENS[2:]).weights)


def test_a_copy_of_a_model_has_a_history_of_its_own():
    model = with_weighted_loss(models.tiny(), EXACT())
    answer(model, TOKENS[:2])
    copied = copy.deepcopy(model)
    answer(copied, TOKENS[2:])
    assert sum(weighting_state(model)["history"]) == 2 * 18
    assert sum(weighting_state(copied)["history"]) == 4 * 18


@pytest.mark.parametrize("weighting", ["eslm:keep=0.5", "uniform"])
def test_the_history_of_another_weighting_is_refused(weighting):
    model = with_weighted_loss(models.tiny(), weighting)
    with pytest.raises(ValueError, match=f"found the history of eslm:keep=0.9: expected that of {weighting}"):
        load_weighting_state(model, {"weighting": "eslm:keep=0.9", "history": [0.0] * 512})
    with pytest.raises(ValueError, match="without a weighted loss"):
        weighting_state(models.tiny())


def test_a_weighting_without_history_has_an_empty_state():
    model = with_weighted_loss(models.tiny(), Uniform())
    answer(model, TOKENS)
    assert weighting_state(model) == {"weighting": "uniform", "history": []}
