"""A compiled decoder: the same losses and gradients, one graph where it trains and one where it scores."""

import pytest
import torch
import transformers
from torch._dynamo.utils import counters

import models
from tokenweight import Scorer, ShortContext, parse_weighting, with_weighted_loss

BOTH = {"short_nll", "ref_nll"}


def losses_of(model, weighting, *, compiled, self_scored=False, **given):
    """Losses of three steps and gradients of the last, and numbers of graphs after each."""
    model.train()
    scorer = Scorer(model, ShortContext(8, 4)) if self_scored else None
    with_weighted_loss(model, parse_weighting(weighting), scorer)
    if compiled:
        model.get_decoder().compile(backend="eager")
    losses, graphs = [], []
    for number in range(3):
        tokens, draw = models.some_tokens(2, 24, seed=number), torch.Generator().manual_seed(number)
        columns = {} if self_scored else {name: 5 * torch.rand(tokens.shape, generator=draw) for name in BOTH}
        model.zero_grad()
        loss = model(input_ids=tokens, labels=tokens, **columns, **given).loss
        loss.backward()
        losses.append(loss.item())
        graphs.append(counters["stats"]["unique_graphs"])
    return losses, [one.grad for one in model.parameters()], graphs


@pytest.fixture(autouse=True)
def nothing_compiled():
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()
    counters.clear()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("weighting", "self_scored"),
    [
        ("longce", False),
        ("sparse", False),
        ("dense", True),
        ("expected(gain)", True),
    ],
)
def test_a_compiled_decoder_has_the_same_losses_and_breaks_and_is_compiled_nowhere_else(weighting, self_scored):
    plain, gradients, none = losses_of(models.tiny(), weighting, compiled=False, self_scored=self_scored)
    losses, found, graphs = losses_of(models.tiny(), weighting, compiled=True, self_scored=self_scored)
    torch.testing.assert_close(losses, plain, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(found, gradients, rtol=1e-10, atol=1e-12)
    assert none == [0, 0, 0]
    assert graphs == [1 + self_scored] * 3
    assert not counters["graph_break"]


@pytest.mark.slow
def test_a_compiled_mixture_of_experts_keeps_its_balancing_loss():
    settings = {"num_local_experts": 4, "num_experts_per_tok": 2, "router_aux_loss_coef": 0.5}
    config = transformers.AutoConfig.for_model(
        "mixtral", **{**models.COMMON, **settings}, experts_implementation="eager"
    )
    results = []
    for compiled in (False, True):
        torch.manual_seed(0)
        model = transformers.AutoModelForCausalLM.from_config(config)
        results.append(losses_of(model, "dense", compiled=compiled, output_router_logits=True))
    (plain, gradients, _), (losses, found, graphs) = results
    torch.testing.assert_close(losses, plain)
    torch.testing.assert_close(found, gradients)
    assert graphs[1] == graphs[2]
