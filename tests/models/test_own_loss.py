"""The loss of a bound model is the model's own, weighted, with all that the model adds to it; else it is refused."""

import copy
import gc
import io
import types
import weakref

import accelerate
import pytest
import torch
import transformers
from torch import nn

import models
from models import assert_close
from tokenweight import Dense, LongCE, Scorer, Uniform, without_weighted_loss
from tokenweight import with_weighted_loss as bind
from tokenweight.models import causal_parts

EXPERTS = {"num_local_experts": 4, "num_experts": 4, "num_experts_per_tok": 2, "n_routed_experts": 4, "n_group": 1}
EXPERTS |= {"moe_intermediate_size": 8, "shared_expert_intermediate_size": 8, "topk_group": 1}
EXPERTS |= {"router_aux_loss_coef": 0.5, "router_jitter_noise": 0.0, "input_jitter_noise": 0.0}
MIXTURES = ["mixtral", "qwen2_moe", "qwen3_moe", "olmoe", "phimoe"]  # granitemoe cannot in old versions


def mixture(kind, **changes):
    """A small mixture of experts in float32, whose router is not balanced."""
    config = transformers.AutoConfig.for_model(kind, **{**models.COMMON, **EXPERTS, **changes})
    torch.manual_seed(0)
    return transformers.AutoModelForCausalLM.from_config(config)


def results(model, **inputs):
    model.zero_grad()
    output = model(**inputs)
    output.loss.backward()
    return {"loss": output.loss.detach()} | {
        n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None
    }


def inputs_of(num_rows=2):
    tokens = models.some_tokens(num_rows, 19)
    return {"input_ids": tokens, "labels": tokens}


@pytest.mark.parametrize("asked", ["by the config", "by the call", "not"])
@pytest.mark.parametrize("kind", MIXTURES)
def test_the_balancing_loss_of_experts_is_in_the_loss_where_the_model_adds_it(kind, asked):
    model = mixture(kind, output_router_logits=asked == "by the config").train()
    inputs = inputs_of() | ({"output_router_logits": True} if asked == "by the call" else {})
    expected, aux_loss = results(model, **inputs), getattr(model(**inputs), "aux_loss", None)
    bind(model, Uniform())
    assert_close(results(model, **inputs), expected, rtol=1e-5, atol=1e-6)
    if asked == "not":
        assert model(**inputs).aux_loss is None
    else:
        torch.testing.assert_close(model(**inputs).aux_loss, aux_loss)
        weighted = model(**inputs)
        assert weighted.loss - weighted.weighted_loss > 0.1


def test_the_balancing_loss_is_there_whatever_the_weights_and_beside_padding():
    model = mixture("mixtral", output_router_logits=True)
    inputs = inputs_of()
    inputs["attention_mask"] = torch.ones_like(inputs["labels"])
    inputs["attention_mask"][1, 12:] = 0
    inputs["labels"] = inputs["labels"].where(inputs["attention_mask"] == 1, -100)
    added = model(**inputs).loss - without_router(model, inputs)
    bind(model, Dense(), Scorer(model, size=8))
    output = model(**inputs)
    torch.testing.assert_close(output.loss - output.weighted_loss, added, rtol=1e-4, atol=1e-5)
    assert (output.weights[output.mask] != 1).any()


def without_router(model, inputs):
    return model(**inputs, output_router_logits=False).loss


def changed(kind, change):
    """A model of a class of somebody's own, whose forward changes its output."""

    class Changed(type(models.tiny(kind))):
        def forward(self, *arguments, labels=None, **named):
            return change(self, super().forward(*arguments, labels=labels, **named))

    model = models.tiny(kind, dtype=torch.float32)
    model.__class__ = Changed
    return model


def test_a_term_that_the_model_always_adds_is_added():
    def penalty(model, output):
        if output.loss is not None:
            output.loss = output.loss + 0.01 * model.model.embed_tokens.weight.square().mean()
        return output

    model, inputs = changed("llama", penalty), inputs_of()
    expected = results(model, **inputs)
    assert_close(results(bind(model, Uniform()), **inputs), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", ["loss", "gradient"])
def test_a_loss_that_is_not_the_cross_entropy_of_the_logits_is_refused(name):
    class Other(type(models.tiny())):
        def forward(self, input_ids, labels=None, **named):
            output = super().forward(input_ids, **named)
            if labels is not None:
                nll = nn.functional.cross_entropy(output.logits[:, :-1].transpose(1, 2), labels[:, 1:])
                output.loss = nll * 1.01 if name == "loss" else nll + 2 * (nll - nll.detach())
            return output

    model = models.tiny(dtype=torch.float32)
    model.__class__ = Other
    with pytest.raises(ValueError, match=f"Other is not supported.*the {name} would not be that of the model itself"):
        bind(model, Uniform())
    assert not hasattr(model, "_token_weighting")


def test_a_loss_of_heads_that_predict_several_tokens_ahead_is_refused_by_name():
    class Ahead(type(models.tiny())):
        def forward(self, input_ids, labels=None, **named):
            output = super().forward(input_ids, labels=labels, **named)
            if labels is not None:
                further = self.loss_function(output.logits, labels.roll(-1, 1), vocab_size=models.VOCABULARY)
                output.loss = output.loss + 0.3 * further
            return output

    model = models.tiny(dtype=torch.float32)
    model.__class__ = Ahead
    with pytest.raises(ValueError, match="Ahead is not supported: its loss holds 2 cross-entropies"):
        bind(model, Uniform())


def test_a_head_that_reads_several_states_of_a_token_is_refused_by_name():
    sizes = {"num_decoder_layers": 1, "num_decoder_attention_heads": 2, "decoder_ffn_dim": 24, "ngram": 3}
    config = transformers.AutoConfig.for_model("prophetnet", vocab_size=61, hidden_size=16, is_decoder=True, **sizes)
    with pytest.raises(ValueError, match="ProphetNetForCausalLM is not supported: its output head reads 3 states"):
        bind(transformers.AutoModelForCausalLM.from_config(config), Uniform())


def test_the_verification_leaves_modes_random_numbers_and_gradients_as_they_were():
    model = models.tiny("gpt2", dropout=0.3, dtype=torch.float32).train()
    model.transformer.h[0].eval()
    modes, state = [part.training for part in model.modules()], torch.get_rng_state()
    bind(model, LongCE(), Scorer(model, size=8))
    assert [part.training for part in model.modules()] == modes
    assert torch.equal(torch.get_rng_state(), state)
    assert all(parameter.grad is None for parameter in model.parameters())


def test_a_model_that_reads_ahead_is_refused():
    model = models.tiny()
    for layer in model.model.layers:
        layer.self_attn.is_causal = False
    model.set_attn_implementation("sdpa")
    model.model.forward = types.MethodType(unmasked, model.model)
    with pytest.raises(ValueError, match="is not supported: its attention is not causal"):
        causal_parts(model)


def unmasked(self, input_ids=None, **named):
    """The forward of a decoder whose tokens see all others."""
    length = input_ids.shape[1]
    named["attention_mask"] = torch.zeros(len(input_ids), 1, length, length, dtype=torch.float64)
    return type(self).forward(self, input_ids=input_ids, **named)


@pytest.mark.parametrize("kind", ["mixtral", "qwen3_moe", "olmoe"])
def test_packed_documents_are_apart_though_the_sums_of_experts_are_rounded_otherwise(kind):
    for seed in range(3):
        torch.manual_seed(seed)
        model = mixture(kind)
        assert causal_parts(model).max_packed_rows == float("inf")


@pytest.mark.parametrize("kind", ["opt", "llama"])
def test_the_decoder_is_found_where_the_model_itself_calls_it(kind):
    config = transformers.AutoConfig.for_model(kind, **{**models.COMMON, "ffn_dim": 24, "dropout": 0.0})
    model = transformers.AutoModelForCausalLM.from_config(config)
    expected = results(model, **inputs_of())
    assert_close(results(bind(model.train(), Uniform()), **inputs_of()), expected, rtol=1e-4, atol=1e-5)


# Whoever puts a forward over the bound one: Liger, TRL, a script of one's own.
def test_a_forward_put_over_the_bound_one_is_noticed_at_the_first_call():
    model, inputs = bind(models.tiny(), LongCE()), inputs_of()
    kind = type(models.tiny())

    def lce_forward(self, *arguments, **named):
        return kind.forward(self, *arguments, **{k: v for k, v in named.items() if k != "short_nll"})

    model.forward = types.MethodType(lce_forward, model)
    with pytest.raises(ValueError, match=r"lce_forward replaces its forward"):
        model(**inputs, short_nll=torch.zeros(2, 19))
    assert model(inputs["input_ids"]).logits.shape == (2, 19, models.VOCABULARY)
    del model.forward
    assert model(**inputs, short_nll=torch.zeros(2, 19)).weights is not None


def test_replicas_of_data_parallel_are_refused():
    replica = bind(models.tiny(), Uniform())._replicate_for_data_parallel()
    with pytest.raises(ValueError, match=r"DataParallel.*torchrun"):
        replica(**inputs_of())


def test_a_bound_model_is_freed_with_its_last_reference():
    model = models.tiny()
    bind(model, Dense(), Scorer(model, size=8))
    reference = weakref.ref(model)
    gc.disable()
    try:
        del model
        assert reference() is None
    finally:
        gc.enable()


@pytest.mark.parametrize("self_scored", [True, False])
def test_a_pickled_model_is_bound_when_it_is_loaded(self_scored):
    model, inputs = models.tiny(), inputs_of()
    bind(model, Dense(), Scorer(model if self_scored else models.tiny("gpt2", seed=1), size=8))
    expected = results(model, **inputs)
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=False)
    assert_close(results(loaded, **inputs), expected, rtol=0, atol=0)
    assert type(without_weighted_loss(loaded)) is type(models.tiny())
    assert_close(results(model, **inputs), results(copy.deepcopy(model), **inputs), rtol=0, atol=0)


def test_binding_again_keeps_the_mixed_precision_of_accelerate():
    seen, inputs = [], inputs_of()
    model = bind(models.tiny(dtype=torch.float32), Uniform())
    model.model.layers[0].mlp.down_proj.register_forward_hook(lambda module, given, result: seen.append(result.dtype))
    accelerate.state.AcceleratorState._reset_state(True)
    prepared = accelerate.Accelerator(mixed_precision="bf16", cpu=True).prepare(model)
    prepared(**inputs)
    bind(prepared, LongCE())
    prepared(**inputs, short_nll=torch.zeros(2, 19))
    accelerate.state.AcceleratorState._reset_state(True)
    assert set(seen) == {torch.bfloat16}
    with pytest.raises(ValueError, match=r"Accelerator\.prepare has wrapped its forward"):
        bind(accelerate.Accelerator(mixed_precision="bf16", cpu=True).prepare(models.tiny()), Uniform())
    accelerate.state.AcceleratorState._reset_state(True)
