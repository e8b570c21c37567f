"""The loss of a bound model against the reference numbers, against plain logits and autograd, and whatever calls it."""

import copy
import json
from pathlib import Path

import pytest
import torch
import transformers
from torch.nn.functional import cross_entropy, pad

import models
from models import CLOSE, assert_close
from tokenweight import (
    NPMI,
    PPMI,
    CountScorer,
    Dense,
    LongCE,
    Scorer,
    ShortContext,
    Sparse,
    Uniform,
    load_model,
    token_nll,
    without_weighted_loss,
)
from tokenweight import with_weighted_loss as bind
from tokenweight.method import as_weighting

GOLDEN = Path(__file__).parents[1] / "golden"
CASES = json.loads((GOLDEN / "scoring.json").read_text())
KINDS = {"dense": Dense, "sparse": Sparse, "longce": LongCE}
CONTEXT = ShortContext(8, 5)
EVERY = [Uniform(), Dense(), Sparse(), LongCE(cap=2.0), PPMI(), NPMI(), as_weighting(models.emphasize)]


def results(model, **inputs):
    """The loss and the gradient of every parameter."""
    model.zero_grad()
    loss = model(**inputs).loss
    loss.backward()
    return {"loss": loss.detach()} | {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def batch(*lengths, seed=0):
    """Rows of unequal lengths, padded on the right, and short losses for them."""
    tokens = models.some_tokens(len(lengths), max(lengths), seed=seed)
    present = torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]
    short = 6 * torch.rand(tokens.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    labels = tokens.where(present, -100)
    return {"input_ids": tokens, "labels": labels, "attention_mask": present.long(), "short_nll": short}


@pytest.mark.parametrize("scheme", ["dense_0.75", "sparse_0.2", "longce_5.0"])
@pytest.mark.parametrize("case", range(len(CASES)))
def test_loss_and_gradients_equal_those_of_the_reference_implementation(case, scheme):
    case, (kind, setting) = CASES[case], scheme.split("_")
    model = bind(load_model(GOLDEN / "tiny_llama"), KINDS[kind](float(setting)))
    tokens = torch.tensor(case["tokens"])
    loss = model(tokens, labels=tokens, short_nll=torch.tensor(case["short"])).loss
    loss.backward()
    norm = torch.cat([parameter.grad.flatten() for parameter in model.parameters()]).norm()
    rows = model.lm_head.weight.grad.sum(dim=1)
    # float32 on both sides; weights by small differences of losses turn 1e-6 of a loss into up to 1e-4 of a weight.
    for actual, name in ((loss, "losses"), (norm, "grad_norms"), (rows, "head_grad_row_sums")):
        torch.testing.assert_close(actual.detach(), torch.tensor(case[name][scheme]), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", ["llama", "llama-tied", "qwen3", "gpt2", "phi", "gemma2", "granite", "cohere"])
def test_uniform_weights_give_the_stock_loss_and_every_gradient(kind):
    model, inputs = models.tiny(kind), batch(19, 12)
    del inputs["short_nll"]
    inputs["labels"][0, 4:7] = -100
    expected = results(model, **inputs)
    assert len(expected) == 1 + sum(1 for _ in model.parameters())
    # The stock loss casts the logits to float32, so it and its gradients have an error of 2**-24 of the largest.
    tolerance = {"rtol": 1e-5, "atol": 1e-6, "check_dtype": False}
    assert_close(results(bind(model, Uniform()), **inputs), expected, **tolerance)
    ones = {**inputs, "short_nll": torch.zeros(2, 19)}
    assert_close(results(bind(model, lambda long, short, mask: torch.ones_like(long)), **ones), expected, **tolerance)


@pytest.mark.parametrize("weighting", EVERY, ids=str)
def test_the_loss_is_the_mean_of_weight_times_loss_and_weights_are_constants(weighting):
    model, inputs = models.tiny(), batch(19, 12)
    mask = pad(inputs["labels"][:, 1:] != -100, (1, 0), value=False)
    tokens = inputs["input_ids"]
    logits = model(tokens, attention_mask=inputs["attention_mask"]).logits
    nll = pad(cross_entropy(logits[:, :-1].transpose(1, 2), tokens[:, 1:], reduction="none"), (1, 0)) * mask
    weights = weighting(nll.detach(), inputs["short_nll"] * mask, mask) * mask
    assert (weights[mask] != 1).any() or weighting == Uniform()
    loss = (weights * nll).sum() / mask.sum()
    loss.backward()
    expected = {"loss": loss.detach()} | {n: p.grad.clone() for n, p in model.named_parameters()}
    assert_close(results(bind(model, weighting), **inputs), expected)


@pytest.mark.parametrize("weighting", EVERY, ids=str)
@pytest.mark.parametrize("packed", [False, True])
def test_a_model_that_scores_itself_has_the_loss_of_its_stored_scores(weighting, packed):
    model, tokens = models.tiny(), models.some_tokens(2, 29)
    positions = torch.cat([torch.arange(12), torch.arange(17)]).expand(2, -1) if packed else None
    scorer = Scorer(model, CONTEXT)
    short = scorer(tokens, position_ids=positions, long_nll=token_nll(model, tokens, positions))
    inputs = {"input_ids": tokens, "labels": tokens, "position_ids": positions}
    stored = results(bind(model, weighting), **inputs, short_nll=short)
    output = bind(model, weighting, scorer)(**inputs)
    assert_close(results(model, **inputs), stored)
    if weighting != Uniform():
        torch.testing.assert_close(output.short_nll, short, **CLOSE)


@pytest.mark.parametrize("weighting", EVERY, ids=str)
def test_another_model_may_score(weighting):
    model, other, tokens = models.tiny(), models.tiny("gpt2", seed=1), models.some_tokens(2, 29)
    scorer = Scorer(other, CONTEXT)
    stored = results(bind(model, weighting), input_ids=tokens, labels=tokens, short_nll=scorer(tokens))
    assert_close(results(bind(model, weighting, scorer), input_ids=tokens, labels=tokens), stored)
    assert all(parameter.grad is None for parameter in other.parameters())


# On the left it moves the tokens, and by their position PPMI and NPMI choose among those of score 0.
@pytest.mark.parametrize(
    ("side", "weighting"), [("right", w) for w in EVERY] + [("left", w) for w in (Dense(), Sparse(), LongCE())], ids=str
)
def test_padding_changes_nothing(side, weighting):
    model, padded = bind(models.tiny(), weighting), batch(19, 12)
    parts = [
        results(model, **{name: value[row : row + 1, :length] for name, value in padded.items()}, num_items_in_batch=29)
        for row, length in enumerate((19, 12))  # 18 + 11 predicted tokens
    ]
    if side == "left":
        padded = {name: torch.stack([value[0], value[1].roll(7)]) for name, value in padded.items()}
        padded["labels"][1, 7] = -100  # else predicted from padding, as in the stock loss
    assert_close(results(model, **padded), {name: value + parts[1][name] for name, value in parts[0].items()})


@pytest.mark.parametrize("stored", [True, False])
@pytest.mark.parametrize("weighting", [Dense(), Sparse(), LongCE()], ids=str)
def test_micro_batches_of_unequal_lengths_add_up_to_the_whole_batch(weighting, stored):
    model = models.tiny()
    bind(model, weighting, Scorer(model, CONTEXT))
    whole = batch(25, 9, 17, 2)
    if not stored:
        del whole["short_nll"]
    expected = results(model, **whole)
    model.zero_grad()
    num_items, loss = torch.tensor(24 + 8 + 16 + 1), 0
    for rows in (slice(0, 1), slice(1, 3), slice(3, 4)):
        part = model(**{name: value[rows] for name, value in whole.items()}, num_items_in_batch=num_items).loss
        part.backward()
        loss += part.detach()
    assert_close({"loss": loss} | {name: p.grad for name, p in model.named_parameters()}, expected)


@pytest.mark.parametrize("num_items", [7, torch.tensor(7)])
def test_the_loss_is_divided_by_the_tokens_of_the_step_where_they_are_given(num_items):
    model, inputs = bind(models.tiny(), Sparse()), batch(19, 12)
    whole = model(**inputs).loss * 29
    torch.testing.assert_close(model(**inputs, num_items_in_batch=num_items).loss, whole / 7, rtol=1e-12, atol=0)


def test_packed_documents_have_the_loss_they_have_alone():
    model = models.tiny()
    bind(model, LongCE(), Scorer(model, CONTEXT))
    model.config.use_cache = True
    tokens, expected = models.some_tokens(1, 31), []
    for document in tokens.split([12, 1, 18], dim=1):
        expected.append(results(model, input_ids=document, labels=document, num_items_in_batch=28))
    positions = torch.cat([torch.arange(12), torch.arange(1), torch.arange(18)])[None]
    packed = results(model, input_ids=tokens, labels=tokens, position_ids=positions)
    assert_close(packed, {name: sum(part[name] for part in expected) for name in packed})


@pytest.mark.parametrize("weighting", EVERY, ids=str)
def test_the_output_is_aligned_with_the_tokens(weighting):
    model, inputs = models.tiny(), batch(19, 12)
    inputs["labels"][1, 5] = -100
    output = bind(model, weighting)(**inputs)
    mask = pad(inputs["labels"][:, 1:] != -100, (1, 0), value=False)
    torch.testing.assert_close(output.long_nll, token_nll(model, inputs["input_ids"]) * mask, **CLOSE)
    if weighting != Uniform():
        assert torch.equal(output.short_nll, inputs["short_nll"] * mask)
    for tensor in (output.weights, output.long_nll, output.short_nll):
        assert tensor.shape == mask.shape
        assert not tensor.requires_grad
        assert tensor[~mask].count_nonzero() == 0
    torch.testing.assert_close(output.loss, (output.weights * output.long_nll).sum() / 28, **CLOSE)


@pytest.mark.parametrize("weighting", [Dense(), LongCE()], ids=str)
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"short_nll": None}, "needs the short loss of every token.*a collator"),
        ({"short_nll": torch.full((2, 19), torch.nan)}, "short_nll of row 0, position [01] is nan"),
        ({"short_nll": torch.zeros(2, 18)}, r"short_nll has shape \[2, 18\].*\[2, 19\]"),
        ({"labels": models.some_tokens(1, 19)}, r"labels have shape \[1, 19\].*\[2, 19\]"),
        ({"shift_labels": models.some_tokens(2, 19)}, "found shift_labels"),
        ({"loss_weights": torch.ones(2, 19)}, "found loss_weights"),
        ({"input_ids": None}, "found no input_ids"),
        ({"labels": None}, "labels are missing"),
        ({"input_ids": None, "inputs_embeds": torch.zeros(2, 19, 16)}, "found inputs_embeds"),
    ],
)
def test_what_would_make_weights_wrong_or_absent_is_refused(change, message, weighting):
    model = bind(models.tiny(), weighting)
    with pytest.raises(ValueError, match=message):
        model(**{**batch(19, 19), **change})


@pytest.mark.parametrize("given", [{"use_cache": False}, {"return_dict": True}, {"shift_labels": None}], ids=str)
def test_an_option_that_asks_for_nothing_else_is_accepted(given):
    model, inputs = bind(models.tiny(), Dense()), batch(19, 12)
    assert torch.equal(model(**inputs, **given).loss, model(**inputs).loss)


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_without_labels_the_model_answers_and_generates_as_before(kind):
    model, tokens = models.tiny(kind), models.some_tokens(2, 9)

    def answers():
        generated = model.generate(tokens, max_new_tokens=6, do_sample=False, pad_token_id=0)
        return model(tokens).logits, model(tokens, use_cache=False, logits_to_keep=2).logits, generated

    expected = answers()
    bind(model, Dense(), Scorer(model, CONTEXT))
    assert all(torch.equal(one, other) for one, other in zip(answers(), expected))


@pytest.mark.parametrize("self_scored", [True, False])
def test_training_a_deep_copy_leaves_the_original_alone(self_scored):
    model, inputs = models.tiny(), batch(19, 12)
    bind(model, Dense(), Scorer(model, CONTEXT) if self_scored else None)
    if self_scored:
        del inputs["short_nll"]
    expected, before = results(model, **inputs), copy.deepcopy(model.state_dict())
    model.zero_grad()
    trained = copy.deepcopy(model)
    optimizer = torch.optim.SGD(trained.parameters(), lr=0.1)
    assert_close(results(trained, **inputs), expected, rtol=0, atol=0)
    optimizer.step()
    assert all(parameter.grad is None for parameter in model.parameters())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert_close(results(model, **inputs), expected, rtol=0, atol=0)
    fresh = models.tiny()
    fresh.load_state_dict(trained.state_dict())
    bind(fresh, Dense(), Scorer(fresh, CONTEXT) if self_scored else None)
    assert_close(results(trained, **inputs), results(fresh, **inputs), rtol=0, atol=0)


def test_a_second_binding_replaces_the_first():
    model, inputs = models.tiny(), batch(19, 12)
    expected = {str(weighting): results(bind(models.tiny(), weighting), **inputs) for weighting in (Dense(), Sparse())}
    logits = model(inputs["input_ids"]).logits
    for weighting in (Dense(), Sparse(), Dense()):
        assert_close(results(bind(model, weighting), **inputs), expected[str(weighting)], rtol=0, atol=0)
        assert torch.equal(model(inputs["input_ids"]).logits, logits)


def test_a_weighting_may_be_given_by_its_text():
    inputs = batch(19, 12)
    expected = results(bind(models.tiny(), Sparse(keep=0.3)), **inputs)
    assert_close(results(bind(models.tiny(), "sparse:keep=0.3"), **inputs), expected, rtol=0, atol=0)
    with pytest.raises(ValueError, match="did you mean 'sparse'"):
        bind(models.tiny(), "spars")


def test_a_binding_that_is_refused_leaves_the_earlier_one():
    model, inputs = bind(models.tiny(), Sparse()), batch(19, 12)
    expected = results(model, **inputs)
    with pytest.raises(ValueError, match="expected an instance"):
        bind(model, Dense)
    assert_close(results(model, **inputs), expected, rtol=0, atol=0)


def test_a_saved_model_is_a_plain_one(tmp_path):
    model, tokens = models.tiny(), models.some_tokens(2, 9)
    model.save_pretrained(tmp_path / "plain")
    bind(model, Dense(), Scorer(model, CONTEXT)).save_pretrained(tmp_path / "bound")
    for name in ("config.json", "generation_config.json", "model.safetensors"):
        assert (tmp_path / "bound" / name).read_bytes() == (tmp_path / "plain" / name).read_bytes()
    assert torch.equal(load_model(tmp_path / "bound")(tokens).logits, model(tokens).logits)


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing_changes_no_gradient(kind, reentrant):
    model, inputs, calls = models.tiny(kind).train(), batch(19, 12), []
    bind(model, Dense(), Scorer(model, CONTEXT))
    del inputs["short_nll"]
    norm = model.get_submodule({"llama": "model.layers.0.input_layernorm", "gpt2": "transformer.h.0.ln_1"}[kind])
    norm.register_forward_hook(lambda *_: calls.append(torch.is_grad_enabled()))
    expected, plain_calls = results(model, **inputs), len(calls)
    models.enable_checkpointing(model, {"use_reentrant": reentrant})
    assert_close(results(model, **inputs), expected)
    assert len(calls) == 2 * plain_calls + 1  # once more, in the backward pass


@pytest.mark.parametrize("self_scored", [False, True])
def test_without_the_weighted_loss_a_model_is_what_it_was(self_scored):
    model, untouched = models.tiny(), models.tiny()
    tokens = models.some_tokens(2, 19)
    bind(model, Dense(), Scorer(model, size=8) if self_scored else None)
    assert without_weighted_loss(model) is model
    assert "forward" not in vars(model)
    assert not model._forward_pre_hooks
    for one in (model, untouched):
        one(input_ids=tokens, labels=tokens).loss.backward()
    for ours, theirs in zip(model.parameters(), untouched.parameters()):
        assert torch.equal(ours.grad, theirs.grad)
    with pytest.raises(ValueError, match=type(model).__name__):
        without_weighted_loss(model)


def test_a_wrapper_that_was_around_forward_before_is_there_again():
    model = models.tiny()
    forward = model.forward
    model.forward = lambda *arguments, **named: forward(*arguments, **named)
    wrapper = model.forward
    assert without_weighted_loss(bind(model, Uniform())).forward is wrapper


def test_a_model_is_verified_once_however_often_it_is_bound_and_read():
    model, calls = models.tiny(), []
    model.model.register_forward_hook(lambda *_: calls.append(1))
    tokens = models.some_tokens(1, 9)
    token_nll(model, tokens)
    first = len(calls)
    assert first > 1
    for weighting in (Dense(), Sparse()):
        bind(model, weighting, Scorer(model, size=4))
    token_nll(model, tokens)
    assert len(calls) == first + 3  # its own loss and ours
    model.resize_token_embeddings(len(models.some_tokens(1, 9)) + 200)
    token_nll(model, tokens)
    assert len(calls) == 2 * first + 3
    model.set_attn_implementation("eager" if model.config._attn_implementation != "eager" else "sdpa")
    token_nll(model, tokens)
    assert len(calls) == 3 * first + 3


def test_a_model_that_would_let_the_trainer_divide_by_accumulation_steps_does_not(tmp_path):
    class Denies(type(models.tiny())):
        accepts_loss_kwargs = False

    arguments = transformers.TrainingArguments(str(tmp_path), use_cpu=True, report_to="none")
    model = Denies(models.tiny().config)
    assert not transformers.Trainer(model, arguments).model_accepts_loss_kwargs
    assert transformers.Trainer(bind(model, Uniform()), arguments).model_accepts_loss_kwargs


def test_a_scorer_that_gives_both_losses_itself_is_for_the_collator(unchecked):
    with pytest.raises(ValueError, match=r"scorer count:order=4.*: expected a Scorer; .*DataCollatorWithScores"):
        bind(models.tiny(), Dense(), CountScorer(), contrast="scorer")
