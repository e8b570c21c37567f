"""Adapters of PEFT around a model with a weighted loss: the same loss, the gradients of the adapter, no silent head."""

import pytest
import torch
from torch.nn.functional import cross_entropy
from transformers import Trainer, TrainingArguments

import models
from tokenweight import Dense, LongCE, Scorer, ShortContext, Sparse, with_weighted_loss
from tokenweight.train import DataCollatorWithScores

peft = pytest.importorskip("peft")
KINDS = ["llama", "gpt2", "gemma2"]
TARGETS = {"gpt2": ["c_attn", "c_proj"]}

# PEFT asks transformers by an older name whether activations are recomputed.
pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")


def adapted(model, kind="llama", **settings):
    """LoRA whose second factor is not 0, as at its start."""
    targets = TARGETS.get(kind, ["q_proj", "v_proj", "down_proj"])
    settings = {"target_modules": targets, "task_type": "CAUSAL_LM", **settings}
    wrapped = peft.get_peft_model(model, peft.LoraConfig(r=2, **settings))
    torch.manual_seed(1)
    for name, parameter in wrapped.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    return wrapped


def scores(tokens):
    return 6 * torch.rand(tokens.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(2))


def assert_weighted(wrapped, tokens, short_nll=None):
    """The loss of a bound model in PEFT, and its gradients, are those of the weights times plain cross-entropy."""
    trained = [parameter for parameter in wrapped.parameters() if parameter.requires_grad]
    output = wrapped(input_ids=tokens, labels=tokens, **({} if short_nll is None else {"short_nll": short_nll}))
    found = torch.autograd.grad(output.loss, trained)
    logits = wrapped(input_ids=tokens).logits[:, :-1]
    nll = cross_entropy(logits.transpose(1, 2), tokens[:, 1:], reduction="none")
    loss = (output.weights[:, 1:] * nll).sum() / nll.numel()
    # Sums in float64 of at most some thousand numbers below 100, in another order.
    torch.testing.assert_close(output.loss, loss, rtol=1e-11, atol=1e-11)
    torch.testing.assert_close(found, torch.autograd.grad(loss, trained), rtol=1e-10, atol=1e-10)
    assert all(gradient.count_nonzero() for gradient in found)
    assert len(output.weights[:, 1:].unique()) > 1


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("first", ["bound", "adapted"])
def test_lora_around_a_bound_model_trains_by_the_weighted_loss(kind, first):
    model, tokens = models.tiny(kind), models.some_tokens(2, 24)
    wrapped = adapted(with_weighted_loss(model, Sparse(keep=0.3)) if first == "bound" else model, kind)
    if first == "adapted":
        with_weighted_loss(wrapped.get_base_model(), Sparse(keep=0.3))
    short_nll = scores(tokens)
    assert_weighted(wrapped, tokens, short_nll)


def test_a_model_with_an_adapter_scores_itself_with_it():
    model, tokens = models.tiny(), models.some_tokens(2, 24)
    context = ShortContext(8, 3)
    wrapped = adapted(with_weighted_loss(model, Dense(interpolation=0.5), Scorer(model, context)))
    assert_weighted(wrapped, tokens)
    output = wrapped(input_ids=tokens, labels=tokens)
    with wrapped.disable_adapter():
        plain = wrapped(input_ids=tokens, labels=tokens)
    assert not torch.allclose(output.short_nll[:, 9:], plain.short_nll[:, 9:])
    assert not torch.allclose(output.long_nll[:, 1:], plain.long_nll[:, 1:])


def test_a_head_trained_whole_is_trained_by_the_loss():
    tokens = models.some_tokens(2, 24)
    wrapped = adapted(models.tiny(), modules_to_save=["lm_head"])
    with_weighted_loss(wrapped.get_base_model(), LongCE(cap=5.0))
    short_nll = scores(tokens)
    trained = [name for name, parameter in wrapped.named_parameters() if parameter.requires_grad]
    assert any("lm_head.modules_to_save" in name for name in trained)
    assert_weighted(wrapped, tokens, short_nll)


def test_a_head_that_an_adapter_replaces_later_is_refused():
    tokens = models.some_tokens(2, 24)
    wrapped = adapted(with_weighted_loss(models.tiny(), Sparse()), modules_to_save=["lm_head"])
    with pytest.raises(ValueError, match="the output head was replaced after with_weighted_loss or Scorer"):
        wrapped(input_ids=tokens, labels=tokens, short_nll=scores(tokens))


def test_a_scorer_made_before_its_head_was_replaced_is_refused():
    model, tokens = models.tiny(), models.some_tokens(2, 24)
    scorer = Scorer(model, ShortContext(8, 3))
    wrapped = adapted(model, modules_to_save=["lm_head"])
    with_weighted_loss(wrapped.get_base_model(), Dense(), scorer)
    with pytest.raises(ValueError, match="the output head was replaced after with_weighted_loss or Scorer"):
        wrapped(input_ids=tokens, labels=tokens)
    with pytest.raises(ValueError, match="the output head was replaced"):
        scorer.long_nll(tokens)


def test_an_adapter_of_the_head_is_refused(unchecked):
    wrapped = adapted(models.tiny(), target_modules=["q_proj", "lm_head"])
    with pytest.raises(ValueError, match=r"head trains lora_A\.default\.weight besides weight and bias: take the head"):
        with_weighted_loss(wrapped.get_base_model(), Sparse())
    with pytest.raises(ValueError, match=r"not a model of transformers: use model\.get_base_model"):
        with_weighted_loss(wrapped, Sparse())


@pytest.mark.parametrize("trained", [False, True])
def test_an_adapter_of_the_head_is_refused_where_only_its_numbers_or_only_its_gradient_give_it_away(trained):
    wrapped = adapted(models.tiny(), target_modules=["lm_head"])
    for name, parameter in wrapped.named_parameters():
        parameter.requires_grad_(trained)
        if trained and "lora_B" in name:
            parameter.data.zero_()
    with pytest.raises(ValueError, match="besides weight and bias" if trained else "are not its output head times its"):
        Scorer(wrapped.get_base_model(), ShortContext(8, 3))


def test_some_rows_of_a_tied_head_are_trained_by_the_loss():
    tokens = models.some_tokens(2, 24)
    wrapped = adapted(models.tiny("llama-tied"), trainable_token_indices=sorted({*tokens[0, :9].tolist()}))
    with_weighted_loss(wrapped.get_base_model(), Sparse(keep=0.3))
    assert_weighted(wrapped, tokens, scores(tokens))


def test_a_stock_trainer_trains_the_adapter_alone_by_the_tokens_of_the_whole_step(tmp_path):
    rows = models.some_rows()
    short_nll = scores(torch.empty(len(rows), models.LENGTH)).float()
    labels = torch.as_tensor(rows["input_ids"][:]).clone()
    labels[0, :15] = -100  # so that the two micro-batches have unequal numbers of tokens
    rows = rows.add_column("short_nll", list(short_nll.numpy())).add_column("labels", list(labels.numpy()))
    model = models.tiny(dtype=torch.float32)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    wrapped = adapted(with_weighted_loss(model, Dense(interpolation=0.5)))
    adapter = {name: parameter.clone() for name, parameter in wrapped.named_parameters() if "lora_" in name}
    num_tokens = (labels[:2, 1:] != -100).sum()
    expected = sum(
        wrapped(**DataCollatorWithScores()([rows[i]]), num_items_in_batch=num_tokens).loss.item() for i in range(2)
    )
    arguments = TrainingArguments(
        str(tmp_path), per_device_train_batch_size=1, gradient_accumulation_steps=2, max_steps=1, logging_steps=1,
        report_to="none", use_cpu=True, learning_rate=1e-2, train_sampling_strategy="sequential",
    )  # fmt: skip
    trainer = Trainer(wrapped, arguments, data_collator=DataCollatorWithScores(), train_dataset=rows)
    trainer.train()
    assert trainer.state.log_history[0]["loss"] == pytest.approx(expected, rel=1e-4)
    after = {name.replace(".base_layer", ""): tensor for name, tensor in model.state_dict().items()}
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
    trained = dict(wrapped.named_parameters())
    assert not any(torch.equal(trained[name], parameter) for name, parameter in adapter.items())


@pytest.mark.parametrize("contrast", ["trained", "scorer"])
@pytest.mark.parametrize("settings", [{}, {"modules_to_save": ["lm_head"]}, {"lora_dropout": 0.5}], ids=str)
@pytest.mark.parametrize("weighting", ["dense:interpolation=0.5", "expected(gain)"])
def test_the_base_of_an_adapter_is_a_frozen_scorer_without_a_second_copy(contrast, settings, weighting):
    tokens, context = models.some_tokens(2, 24), ShortContext(8, 3)
    wrapped = adapted(models.tiny(), **settings).train()
    model = wrapped.get_base_model()
    with_weighted_loss(model, weighting, Scorer(models.tiny(), context), contrast=contrast)
    torch.manual_seed(0)
    expected = wrapped(input_ids=tokens, labels=tokens)
    with_weighted_loss(model, weighting, Scorer(model, context, adapters=False), contrast=contrast)
    torch.manual_seed(0)
    found = wrapped(input_ids=tokens, labels=tokens)
    torch.testing.assert_close(found.weights, expected.weights, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(found.long_nll, expected.long_nll, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(found.loss, expected.loss, rtol=1e-6, atol=1e-6)
    with_weighted_loss(model, weighting, Scorer(model, context), contrast=contrast)
    other = wrapped(input_ids=tokens, labels=tokens)
    assert (other.weights - expected.weights).abs().max() > 0.01
    trained = [parameter for parameter in wrapped.parameters() if parameter.requires_grad]
    assert all(gradient.count_nonzero() for gradient in torch.autograd.grad(found.loss, trained))


def test_a_scorer_without_adapters_leaves_them_as_they_were():
    wrapped, tokens = adapted(models.tiny()), models.some_tokens(2, 24)
    model = wrapped.get_base_model()
    scorer, base = Scorer(model, ShortContext(8, 3), adapters=False), Scorer(models.tiny(), ShortContext(8, 3))
    before, trained = wrapped(tokens).logits, [one.requires_grad for one in wrapped.parameters()]
    torch.testing.assert_close(scorer(tokens), base(tokens))
    torch.testing.assert_close(scorer.long_nll(tokens), base.long_nll(tokens))
    assert torch.equal(wrapped(tokens).logits, before)
    assert [one.requires_grad for one in wrapped.parameters()] == trained
    with wrapped.disable_adapter():
        scorer(tokens)
        assert torch.equal(wrapped(tokens).logits, models.tiny()(tokens).logits)


def test_a_scorer_without_adapters_needs_a_model_that_has_some_and_a_base_that_stays_as_it_is():
    model = models.tiny()
    for bias in ("all", "lora_only"):
        trained = models.tiny("gpt2")
        peft.get_peft_model(trained, peft.LoraConfig(task_type="CAUSAL_LM", r=2, bias=bias))
        with pytest.raises(ValueError, match=r"adapters=False: .*bias of the base is trained"):
            Scorer(trained, ShortContext(8, 3), adapters=False)
    with pytest.raises(ValueError, match="adapters=False: the model has no adapter"):
        Scorer(model, ShortContext(8, 3), adapters=False)(models.some_tokens(1, 24))
