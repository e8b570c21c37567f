"""Weights of the scorer's own pair, or of other stored columns, written out by hand; and without noise."""

import pytest
import torch
from crossing import crossed
from peft import LoraConfig, get_peft_model
from torch.nn.functional import cross_entropy, pad
from transformers.integrations.neftune import neftune_post_forward_hook

import models
from models import CLOSE
from tokenweight import Dense, LongCE, Scorer, ShortContext, Sparse, token_nll
from tokenweight import with_weighted_loss as bind
from tokenweight.method import (
    ESLM,
    EXACT,
    NPMI,
    BoundedGain,
    Expected,
    FirstWindow,
    Gain,
    Head,
    KeyTokens,
    Mix,
    Weighting,
    weighted_loss,
)
from tokenweight.method import loss as head_loss
from tokenweight.method.windows import Window, sliding_windows

CONTEXT = ShortContext(8, 5)
TOKENS = models.some_tokens(2, 19)


class ByColumns(Weighting):
    """Reads stored columns and positions; the first tokens of a document weigh nothing."""

    uses = frozenset({"ref_nll", "divergence", "positions"})

    def weigh(self, long, short, mask, *, ref_nll, divergence, positions):
        return (long - ref_nll).abs() * (positions > 2) + divergence


class ByDivergence(Weighting):
    """Reads no loss."""

    uses = frozenset({"divergence"})
    of_losses = False
    pointwise = True

    def weigh(self, long, short, mask, *, divergence):
        return divergence * (divergence > 2)


def some_scores(*names):
    draw = torch.Generator().manual_seed(3)
    return {name: 5 * torch.rand(TOKENS.shape, generator=draw, dtype=torch.float64) for name in names}


def by_hand(model, weights):
    """The loss with these weights from plain logits, and the gradient of every parameter."""
    logits = model(TOKENS).logits
    nll = cross_entropy(logits[:, :-1].transpose(1, 2), TOKENS[:, 1:], reduction="none")
    loss = (weights[:, 1:] * nll).sum() / nll.numel()
    return loss.detach(), torch.autograd.grad(loss, [*model.parameters()]), pad(nll.detach(), (1, 0))


def expect(model, weights, output, reference):
    assert weights[:, 1:].unique().numel() > 1
    loss, gradients, nll = by_hand(reference, weights)
    output.loss.backward()
    torch.testing.assert_close(output.loss.detach(), loss, **CLOSE)
    torch.testing.assert_close(output.weights, weights, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(output.long_nll, nll, **CLOSE)
    for parameter, gradient in zip(model.parameters(), gradients):
        torch.testing.assert_close(parameter.grad, gradient, **CLOSE)


MASK = torch.ones_like(TOKENS, dtype=torch.bool).index_fill(1, torch.tensor([0]), False)


def zero_at_first(weights):
    """Weights as they are, and of the first predicted token 0."""
    return weights * (torch.arange(weights.shape[1]) != 1)


@pytest.mark.parametrize("weighting", [Dense(), Sparse(0.3), LongCE()], ids=str)
def test_weights_of_the_scorers_pair_are_those_written_out_by_hand(weighting):
    model, scores = models.tiny(), some_scores("short_nll", "long_nll", "ref_nll")

    def first_is_0(long, short, mask):
        return zero_at_first(weighting(long, short, mask))

    bind(model, first_is_0, contrast="scorer")
    weights = zero_at_first(weighting(scores["long_nll"], scores["short_nll"], MASK))
    expect(model, weights, model(input_ids=TOKENS, labels=TOKENS, **scores), models.tiny())


def test_a_weighting_reads_the_columns_that_it_uses_and_positions_in_the_document():
    model, scores = models.tiny(), some_scores("ref_nll", "divergence")
    documents = torch.cat([torch.arange(7), torch.arange(12)]).expand(2, -1)
    mask = MASK & (documents != 0)
    labels = TOKENS.where(documents != 0, -100)
    output = bind(model, ByColumns())(input_ids=TOKENS, labels=labels, position_ids=documents, **scores)
    long = token_nll(models.tiny(), TOKENS, documents)
    expected = ((long - scores["ref_nll"]).abs() * (documents > 2) + scores["divergence"]).where(mask, 0)
    torch.testing.assert_close(output.weights, expected, **CLOSE)
    real = pad(torch.ones_like(TOKENS), (5, 0))
    left = {name: pad(values, (5, 0), value=torch.nan) for name, values in scores.items()}
    left |= {"input_ids": pad(TOKENS, (5, 0)), "attention_mask": real, "labels": pad(TOKENS, (5, 0), value=-100)}
    left["labels"][:, 5] = -100
    alone = model(input_ids=TOKENS, labels=TOKENS, **scores).weights
    torch.testing.assert_close(model(**left).weights[:, 5:], alone, **CLOSE)


def test_weights_that_read_no_loss_are_known_before_it():
    model, scores = models.tiny(), some_scores("divergence", "long_nll")
    weights = (scores["divergence"] * (scores["divergence"] > 2)).where(MASK, 0)
    for contrast in ("trained", "scorer"):
        model.zero_grad()
        output = bind(model, ByDivergence(), contrast=contrast)(
            input_ids=TOKENS, labels=TOKENS, divergence=scores["divergence"]
        )
        expect(model, weights, output, models.tiny())


@pytest.mark.parametrize("scoring", ["self", "another"])
def test_a_scorer_gives_both_losses(scoring):
    model = models.tiny()
    other = models.tiny("qwen3", seed=1) if scoring == "another" else model
    scorer = Scorer(other, CONTEXT)
    long = scorer.long_nll(TOKENS)
    short = scorer(TOKENS, long_nll=long)
    weights = Dense()(long, short, MASK)
    bind(model, Dense(), scorer, contrast="scorer")
    expect(model, weights, model(input_ids=TOKENS, labels=TOKENS), models.tiny())


def distributions(model, tokens, context=None):
    """-log p of all of the vocabulary at each token, from plain logits of whole rows, or of windows."""
    found = torch.zeros(*tokens.shape, model.config.vocab_size, dtype=torch.float64)
    windows = [Window(0, 1, tokens.shape[1])]
    if context is not None:
        windows = [Window(0, 1, context.size), *sliding_windows(tokens.shape[1], context.size, context.stride)]
    for start, first, stop in windows:
        nll = -model(tokens[:, start:stop]).logits.log_softmax(dim=-1)
        found[:, first:stop] = nll[:, first - start - 1 : -1]
    return found.detach()


def expected_scores(weighting, long, short):
    return ((-long).exp() * weighting.score(long, short)).sum(dim=-1)


@pytest.mark.parametrize("contrast", ["trained", "scorer"])
@crossed(
    "weighting, scoring",
    [Gain(0.5), BoundedGain(), Dense(), LongCE(), NPMI(0.5, shift=0.5), KeyTokens(-1.0, -5.0)],
    ["self", "another"],
)
def test_a_scorer_gives_the_divergence_of_its_own_predictions(weighting, scoring, contrast):
    model = models.tiny()
    other = models.tiny("qwen3", seed=1) if scoring == "another" else model
    long, short = distributions(other, TOKENS), distributions(other, TOKENS, CONTEXT)
    scores = expected_scores(weighting, long, short)
    assert scores[:, CONTEXT.size :].min() > 0
    if isinstance(weighting, Dense):  # its score is 0 where both losses are the same
        scores[:, : CONTEXT.size] = 0
    bind(model, Expected(weighting), Scorer(other, CONTEXT), contrast=contrast)
    expect(model, weighting.weights(scores, MASK).where(MASK, 0), model(input_ids=TOKENS, labels=TOKENS), models.tiny())


@pytest.mark.parametrize("weighting", [EXACT(1.0, threshold=8), FirstWindow(LongCE(), 4, 0.5)], ids=str)
def test_positions_do_not_depend_on_a_mask_that_says_who_sees_whom(weighting):
    model, scores = bind(models.tiny(), weighting), some_scores("short_nll")
    expected = model(input_ids=TOKENS, labels=TOKENS, **scores).weights
    seen = torch.ones(19, 19, dtype=torch.bool).tril()[None, None].expand(2, 1, 19, 19)
    again = bind(models.tiny(), weighting)
    torch.testing.assert_close(again(input_ids=TOKENS, labels=TOKENS, attention_mask=seen, **scores).weights, expected)
    assert expected[:, 1:].unique().numel() > 1


def test_a_scorer_reads_whole_rows_once_for_losses_and_divergence():
    model, other, read = models.tiny(), models.tiny("qwen3", seed=1), []
    bind(model, Mix(Expected(Gain()), Dense()), Scorer(other, CONTEXT), contrast="scorer")
    other.model.register_forward_hook(lambda *given, **named: read.append(tuple(given[-1].last_hidden_state.shape)))
    model(input_ids=TOKENS, labels=TOKENS)
    assert [shape[1] for shape in read].count(TOKENS.shape[1]) == 1


@pytest.mark.parametrize("scoring", ["self", "another"])
def test_a_divergence_and_losses_are_scored_together(scoring):
    model = models.tiny()
    other = models.tiny("qwen3", seed=1) if scoring == "another" else model
    bind(model, Mix(Expected(Gain()), Dense(), share=0.25), Scorer(other, CONTEXT))
    output = model(input_ids=TOKENS, labels=TOKENS)
    long = token_nll(models.tiny(), TOKENS)
    short = Scorer(other, CONTEXT)(TOKENS, long_nll=long if scoring == "self" else None)
    alone = bind(other if scoring == "self" else models.tiny(), Expected(Gain()), Scorer(other, CONTEXT))
    weights = 0.25 * alone(input_ids=TOKENS, labels=TOKENS).weights + 0.75 * Dense()(long, short, MASK)
    torch.testing.assert_close(output.weights, weights, **CLOSE)
    torch.testing.assert_close(output.short_nll, short, **CLOSE)


@pytest.mark.parametrize(
    ("weighting", "contrast", "given", "missing"),
    [
        (Dense(), "scorer", ["short_nll"], "no long_nll column.*tokenweight score --long"),
        (Dense(), "scorer", ["long_nll"], "no short_nll column"),
        (ByColumns(), "trained", ["ref_nll"], "no divergence column.*--divergence"),
        (ByColumns(), "trained", ["divergence", "short_nll"], "no ref_nll column.*--as reference"),
    ],
)
def test_a_column_that_is_used_and_missing_or_not_finite_is_named(weighting, contrast, given, missing):
    model, scores = bind(models.tiny(), weighting, contrast=contrast), some_scores(*given)
    with pytest.raises(ValueError, match=missing):
        model(input_ids=TOKENS, labels=TOKENS, **scores)
    with torch.no_grad():
        assert model(input_ids=TOKENS, labels=TOKENS, **scores).weights is None
    every = some_scores("short_nll", "long_nll", "ref_nll", "divergence")
    every[given[0]][1, 4] = torch.nan
    with pytest.raises(ValueError, match=f"{given[0]} of row 1, position 4 is nan"):
        model(input_ids=TOKENS, labels=TOKENS, **every)


def test_a_column_that_is_not_used_is_not_read():
    model, scores = bind(models.tiny(), Dense()), some_scores("short_nll")
    expected = model(input_ids=TOKENS, labels=TOKENS, **scores).loss
    others = {"long_nll": torch.full((2, 1), torch.nan), "divergence": torch.zeros(3, dtype=torch.bfloat16)}
    assert torch.equal(model(input_ids=TOKENS, labels=TOKENS, **scores, **others).loss, expected)


def test_a_contrast_that_is_none_is_refused():
    with pytest.raises(ValueError, match="contrast 'long': expected one of trained, scorer"):
        bind(models.tiny(), Dense(), contrast="long")


@pytest.mark.parametrize("kept", [0.0, 0.25, 1.0])
def test_weights_that_are_known_cost_a_product_for_each_token_and_two_more_for_each_with_a_weight(kept, monkeypatch):
    rows = []
    multiply, add = head_loss.multiply_into, head_loss.add_product
    monkeypatch.setattr(head_loss, "multiply_into", lambda out, a, b: (rows.append(len(a)), multiply(out, a, b)))
    monkeypatch.setattr(
        head_loss,
        "add_product",
        lambda out, a, b: (rows.append(len(a) if b.shape[0] == 11 else a.shape[1]), add(out, a, b)),
    )
    draw = torch.Generator().manual_seed(0)
    hidden = torch.randn(2, 9, 5, generator=draw).requires_grad_()
    head = Head(torch.randn(11, 5, generator=draw).requires_grad_())
    targets, mask = torch.randint(11, (2, 9), generator=draw), torch.ones(2, 9, dtype=torch.bool)
    divergence = (torch.arange(18) < 18 * kept).view(2, 9) * 3.0
    found = weighted_loss(hidden, head, targets, mask, ByDivergence(), None, {"divergence": divergence})
    found.loss.backward()
    num = int((divergence > 0).sum())
    assert sum(rows) == 18 + 2 * num
    assert found.long_nll.count_nonzero() == 18


def noisy(noise):
    """A model that trains with noise, and what stands around it."""
    model = models.tiny("gpt2", dropout=0.3) if noise == "dropout" else models.tiny()
    if noise == "adapter":
        settings = LoraConfig(task_type="CAUSAL_LM", r=2, lora_dropout=0.5, init_lora_weights=False)
        return model, get_peft_model(model, settings)
    if noise == "neftune":
        embeddings = model.get_input_embeddings()
        embeddings.neftune_noise_alpha = 5.0
        embeddings.register_forward_hook(neftune_post_forward_hook)
    return model, model


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("self_scored", [True, False])
@crossed("weighting, noise", [Dense(), LongCE(), Expected(Gain()), ESLM(0.5)], ["dropout", "adapter", "neftune"])
def test_noise_of_the_trained_pass_is_in_the_loss_and_never_in_the_weights(weighting, noise, self_scored, caplog):
    model, around = noisy(noise)
    scores = {} if self_scored else some_scores("short_nll")
    if isinstance(weighting, Expected):
        scores = {} if self_scored else some_scores("divergence")
    bind(model, weighting, Scorer(model, CONTEXT) if self_scored else None)
    assert ("without this noise" in caplog.text) == (self_scored or not isinstance(weighting, Expected))
    expected = around.eval()(input_ids=TOKENS, labels=TOKENS, **scores)
    around.train()
    outputs = [around(input_ids=TOKENS, labels=TOKENS, **scores) for _ in range(2)]
    for output in outputs:
        torch.testing.assert_close(output.weights, expected.weights, rtol=1e-10, atol=1e-10)
        if weighting.uses_short:
            torch.testing.assert_close(output.short_nll, expected.short_nll, rtol=1e-11, atol=1e-11)
        torch.testing.assert_close(output.loss, (output.weights * output.long_nll).sum() / 36, rtol=1e-12, atol=0)
    assert (outputs[0].long_nll - outputs[1].long_nll).abs().max() > 1e-3
