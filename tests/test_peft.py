"""Adapters of PEFT around a model with a weighted loss: the same loss, the gradients of the adapter, no silent head."""

import pytest
import torch
from torch.nn.functional import cross_entropy
from transformers import Trainer, TrainingArguments

import models
from tokenweight import Dense, LongCE, Scorer, ShortContext, Sparse, with_weighted_loss
from tokenweight.training import collate

peft = pytest.importorskip("peft")

KINDS = ["llama", "gpt2", "gemma2"]
TARGETS = {"gpt2": ["c_attn", "c_proj"]}


def adapted(model, kind="llama", **settings):
    """LoRA whose second factor is not 0, as at its start."""
    targets = TARGETS.get(kind, ["q_proj", "v_proj", "down_proj"])
    wrapped = peft.get_peft_model(model, peft.LoraConfig(r=2, **{"target_modules": targets, **settings}))
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
    with pytest.raises(ValueError, match="the output head was replaced after with_weighted_loss, as by modules_to_"):
        wrapped(input_ids=tokens, labels=tokens, short_nll=scores(tokens))


def test_an_adapter_of_the_head_is_refused(unchecked):
    wrapped = adapted(models.tiny(), target_modules=["q_proj", "lm_head"])
    with pytest.raises(ValueError, match=r"head trains lora_A\.default\.weight besides weight and bias: take the head"):
        with_weighted_loss(wrapped.get_base_model(), Sparse())
    with pytest.raises(ValueError, match=r"not a model of transformers: use model\.get_base_model"):
        with_weighted_loss(wrapped, Sparse())


def test_a_stock_trainer_trains_the_adapter_alone_and_keeps_the_scores(tmp_path):
    rows = models.some_rows()
    rows = rows.add_column("short_nll", list(scores(torch.empty(len(rows), models.LENGTH)).float().numpy()))
    model = models.tiny(dtype=torch.float32)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    wrapped = adapted(with_weighted_loss(model, Dense(interpolation=0.5)))
    expected = wrapped(**collate([rows[i] for i in range(2)])).loss.item()
    arguments = TrainingArguments(
        str(tmp_path), per_device_train_batch_size=2, max_steps=2, logging_steps=1, report_to="none", use_cpu=True,
        learning_rate=1e-2, train_sampling_strategy="sequential",
    )  # fmt: skip
    trainer = Trainer(wrapped, arguments, data_collator=collate, train_dataset=rows)
    trainer.train()
    assert trainer.state.log_history[0]["loss"] == pytest.approx(expected, rel=1e-4)
    after = {name.replace(".base_layer", ""): tensor for name, tensor in model.state_dict().items()}
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
    assert trainer.state.log_history[1]["loss"] != trainer.state.log_history[0]["loss"]
