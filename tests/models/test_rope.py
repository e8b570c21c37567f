"""Longer contexts: configs that say what was asked for, and models whose rotary embeddings do it."""

import copy
import re
from pathlib import Path

import pytest
import torch
from crossing import crossed
from transformers import AutoModelForCausalLM

import models
from texts import trained_tokenizer
from tokenweight import NPMI, PPMI, Dense, LongCE, Scorer, ShortContext, Sparse, Uniform, load_model, token_nll
from tokenweight.method import sliding_windows
from tokenweight.models import check_stale_windows, context_length, describe_rope, extend_context, with_weighted_loss
from tokenweight.models.rope_check import verify_rope

METHODS = ["base", "linear", "dynamic", "yarn", "longrope", "llama3"]
# Heads of 16 dimensions; of those, phi and gpt_neox turn some.
SIZES = {"hidden_size": 64, "head_dim": 16}
KINDS = {"llama": 16, "qwen2": 16, "mistral": 16, "gemma2": 16, "phi": 8, "gpt_neox": 4, "phi3": 16, "gemma3": 16}
MIXED = ["sliding_attention", "full_attention"]
models.KINDS |= {"phi3": ("phi3", {"original_max_position_embeddings": 128}), "gemma3": ("gemma3_text", {})}


def config_of(kind="llama", **changes):
    extra = {"layer_types": MIXED, "sliding_window": 8} if kind == "gemma3" else {}
    return models.tiny(kind, **SIZES, **extra, **changes).config


def settings_of(method, dim=16):
    """What longrope cannot do without."""
    factors = {"short_factor": [1 + i / 10 for i in range(dim // 2)], "long_factor": [1 + i for i in range(dim // 2)]}
    return factors if method == "longrope" else {}


def extended_model(method, dtype=torch.float64, **changes):
    config = extend_context(config_of(**changes), 512, method, **settings_of(method))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return AutoModelForCausalLM.from_config(config, dtype=dtype).eval()


@crossed("kind, method", list(KINDS), METHODS)
def test_every_method_reaches_the_rotary_embeddings_and_survives_saving(kind, method, tmp_path):
    config = config_of(kind)
    before = copy.deepcopy(config.to_dict())
    if kind == "phi3" and method not in ("base", "longrope"):  # transformers would save it, and not load it again
        with pytest.raises(ValueError, match=f"method '{method}' does not suit phi3: .*longrope"):
            extend_context(config, 512, method)
        return
    extended = extend_context(config, 512, method, **settings_of(method, KINDS[kind]))
    assert config.to_dict() == before
    assert context_length(extended) == 512
    model = models.tiny(kind, **SIZES).__class__(extended)
    verify_rope(model, extended)
    with pytest.raises(ValueError, match=r"inv_freq.* is "):
        verify_rope(model, config)
    model.save_pretrained(tmp_path)
    loaded = load_model(tmp_path, dtype=torch.bfloat16)
    assert loaded.dtype == torch.bfloat16
    verify_rope(loaded, extended)
    verify_rope(loaded, loaded.config)
    assert describe_rope(loaded.config) == describe_rope(extended)


@pytest.mark.parametrize("method", METHODS)
def test_a_model_saved_before_is_loaded_with_the_extended_config(method, tmp_path):
    models.tiny(**SIZES, dtype=torch.float32).save_pretrained(tmp_path)
    extended = extend_context(load_model(tmp_path).config, 512, method, **settings_of(method))
    verify_rope(load_model(tmp_path, config=extended), extended)


def test_sliding_layers_with_settings_of_their_own_keep_them():
    config = config_of("gemma3")
    extended = extend_context(config, 512, "linear")
    assert extended.rope_parameters["sliding_attention"] == config.rope_parameters["sliding_attention"]
    assert extended.rope_parameters["full_attention"]["factor"] == 4
    assert describe_rope(extended) == (
        "full_attention: linear x4, 512 positions, theta 1e+06; sliding_attention: default, 512 positions, theta 10000"
    )


LLAMA31 = {
    "rope_type": "llama3",
    "rope_theta": 5e5,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}


def test_a_model_that_is_extended_already_is_scaled_from_its_original_positions_and_never_twice():
    config = config_of(rope_parameters=dict(LLAMA31))
    yarn = extend_context(config, 512, "yarn").rope_parameters
    assert (yarn["rope_type"], yarn["factor"], yarn["original_max_position_embeddings"]) == ("yarn", 16, 32)
    assert "low_freq_factor" not in yarn
    assert extend_context(config, 512, "linear", original=64).rope_parameters["factor"] == 8
    base = extend_context(config, 512).rope_parameters
    assert base == {**LLAMA31, "rope_theta": pytest.approx(5e5 * 4 ** (16 / 14))}  # 128 to 512, and still smoothed
    again = extend_context(extend_context(config, 256, "dynamic", original=128), 512, "dynamic")
    assert (again.max_position_embeddings, again.rope_parameters["factor"]) == (128, 4)
    with pytest.raises(ValueError, match=r"linear x2, 256 positions.* does not say from how many positions"):
        extend_context(extend_context(config_of(), 256, "linear"), 512, "yarn")


@pytest.mark.parametrize(
    ("method", "settings", "line"),
    [
        ("base", {"theta": 15.3e6}, "default, 512 positions, theta 1.53e+07"),
        ("linear", {}, "linear x4, 512 positions, theta 10000"),
        ("dynamic", {}, "dynamic x4 from 128 to 512, theta 10000"),
        ("yarn", {}, "yarn x4 from 128 to 512, theta 10000"),
        ("llama3", {"factor": 8}, "llama3 x8 from 128 to 512, theta 10000"),
    ],
)
def test_one_line_describes_what_a_config_says(method, settings, line):
    assert describe_rope(extend_context(config_of(), 512, method, **settings)) == line
    assert describe_rope(models.tiny("gpt2").config) == "no rotary frequencies, 128 positions"


@pytest.mark.parametrize(
    ("arguments", "settings", "message"),
    [
        ((512, "ntk"), {}, "method 'ntk': expected one of base, linear, dynamic, yarn, longrope, llama3, none"),
        ((128,), {}, "length 128: the model reads 128 tokens already: expected more"),
        ((512, "linear"), {"theta": 1e6}, "method 'linear' has no setting 'theta': it has none"),
        ((512, "yarn"), {"beta": 1}, "method 'yarn' has no setting 'beta': it has attention_factor, beta_fast"),
        ((512,), {"theta": -1e6}, "base: theta=-1000000.0 is not a finite number above 0"),
        ((512,), {"theta": 1e4}, "theta=10000 is not above the model's base, 10000"),
        ((512, "yarn"), {"beta_slow": 40}, "yarn: beta_slow=40 is not below beta_fast=32"),
        ((512, "llama3"), {"factor": 0.5}, "llama3: factor=0.5 is below 1"),
        ((512, "llama3"), {"low_freq_factor": 4}, "low_freq_factor=4 is not below high_freq_factor=4"),
        ((512, "longrope"), {}, "longrope needs short_factor and long_factor, 8 numbers each"),
        ((512, "longrope"), {**settings_of("longrope"), "long_factor": [1.0] * 7}, "is not a list of 8 finite numbers"),
        ((512, "longrope"), {**settings_of("longrope"), "short_factor": [0.0] * 8}, "is not a list of 8 finite"),
        ((512, "yarn"), {"original": 512}, "original=512: expected positions above 1 and below length, 512"),
    ],
)
def test_settings_that_make_no_sense_are_refused_by_name(arguments, settings, message):
    with pytest.raises(ValueError, match=message) as refusal:
        extend_context(config_of(), *arguments, **settings)
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rope_theta": 1e6}, "config.rope_theta is 1000000.0, which transformers ignores: rope_parameters say 10000"),
        ({"partial_rotary_factor": 0.5}, "config.partial_rotary_factor is 0.5, which transformers ignores"),
        ({"rope_parameters": {"rope_type": "linear", "factor": 8}}, "rope_parameters of llama have no rope_theta"),
        (
            {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "factor": 8}},
            "hold factor, which default ig",
        ),
        ({"rope_parameters": {"rope_type": "axial", "rope_theta": 1e4}}, "rope_type of llama is 'axial': expected one"),
        ({"rope_parameters": {"main": {}, "compress": {}}}, "rope_parameters of llama are those of main, compress"),
    ],
)
def test_settings_that_transformers_would_ignore_are_refused(changes, message):
    config = config_of()
    model = AutoModelForCausalLM.from_config(config)
    for name, value in changes.items():
        config.__dict__[name] = value  # past the conversions of transformers, as an older or newer one may do it
    for refuse in (lambda: extend_context(config, 512), lambda: verify_rope(model, config)):
        with pytest.raises(ValueError, match=message):
            refuse()


def test_models_without_rotary_embeddings_are_refused():
    model = models.tiny("gpt2")
    with pytest.raises(ValueError, match="gpt2 has no rotary frequencies to change"):
        extend_context(model.config, 512)
    with pytest.raises(ValueError, match="GPT2LMHeadModel has no module with rotary frequencies"):
        verify_rope(model, config_of())


@pytest.mark.parametrize("method", METHODS)
def test_a_config_changed_after_loading_is_caught(method):
    model = models.tiny(**SIZES)
    wanted = extend_context(model.config, 512, method, **settings_of(method))
    model.config.rope_parameters = wanted.rope_parameters
    model.config.max_position_embeddings = wanted.max_position_embeddings
    for config in (wanted, model.config):
        with pytest.raises(ValueError, match=r"model.rotary_emb.inv_freq\[\d\] is .* config asks for .* which gives"):
            verify_rope(model, config)


def test_a_config_that_would_be_saved_with_other_settings_is_caught():
    model = extended_model("yarn")
    wanted = copy.deepcopy(model.config)
    verify_rope(model, wanted)
    model.config.rope_parameters = {"rope_type": "default", "rope_theta": 1e4}
    with pytest.raises(ValueError, match=r"model.config asks for default"):
        verify_rope(model, wanted)


def test_dynamic_with_the_new_length_as_its_positions_does_nothing_and_is_caught():
    extended = extend_context(config_of(), 512, "dynamic")
    naive = copy.deepcopy(extended)
    naive.max_position_embeddings = 512
    with pytest.raises(ValueError, match="asks for dynamic x4 from 128 to 512, theta 10000, which gives"):
        verify_rope(AutoModelForCausalLM.from_config(naive), extended)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda model: model.to(torch.bfloat16), "was rounded to torch.bfloat16: load the model with dtype"),
        (lambda model: model.half(), "was rounded to torch.float16"),
        (lambda model: model.to(torch.bfloat16).float(), r"inv_freq\[\d\] is "),
        (lambda model: model.to(torch.float16).float(), r"inv_freq\[\d\] is "),
        (lambda model: model.to("meta"), "has no values"),
        (lambda model: model.model.rotary_emb.inv_freq.zero_(), r"inv_freq\[0\] is 0:"),
        (lambda model: model.model.rotary_emb.inv_freq[-1:].fill_(torch.nan), r"inv_freq\[7\] is nan:"),
        (lambda model: setattr(model.model.rotary_emb, "attention_scaling", 1.0), "attention_scaling is 1: .* 1.13863"),
        (lambda model: setattr(model.model.rotary_emb, "inv_freq", torch.ones(4)), "has 4 frequencies: .* has 8"),
    ],
)
def test_frequencies_damaged_after_loading_are_caught(damage, message):
    model = extended_model("yarn")
    config = copy.deepcopy(model.config)
    verify_rope(model, config)
    damage(model)
    with pytest.raises(ValueError, match=message):
        verify_rope(model, config)


@pytest.mark.parametrize("method", ["dynamic", "longrope"])
def test_the_proof_leaves_a_model_as_it_was_and_holds_also_after_long_inputs(method):
    model = extended_model(method)
    rotary = model.model.rotary_emb
    short = rotary.inv_freq.clone()
    model(models.some_tokens(1, 200))
    long = rotary.inv_freq.clone()
    assert not torch.equal(long, short)
    verify_rope(model, model.config)
    assert torch.equal(rotary.inv_freq, long)
    rotary.original_inv_freq *= 1.01  # what a short input goes back to
    with pytest.raises(ValueError, match=r"inv_freq\[0\] is 1.01: .* which gives 1 at 1 tokens"):
        verify_rope(model, model.config)


def test_windows_that_would_keep_the_dynamic_frequencies_of_longer_rows_are_refused():
    model, tokens = extended_model("dynamic"), models.some_tokens(1, 200)
    with torch.no_grad():
        fresh = {size: copy.deepcopy(model)(tokens[:, :size]).logits for size in (127, 128)}
        model(tokens)
        stale = model(tokens[:, :128]).logits
        assert torch.equal(model(tokens[:, :127]).logits, fresh[127])
    check_stale_windows(model.config, 127)
    assert not torch.equal(stale, fresh[128])  # once transformers resets here too, there is nothing left to refuse
    with pytest.raises(ValueError, match=r"windows of 128 tokens would keep .* expected a size below 128"):
        check_stale_windows(model.config, 128)
    for config in (extended_model("yarn").config, models.tiny("gpt2").config):
        check_stale_windows(config, 128)


WEIGHTINGS = [Uniform(), Dense(), Sparse(), LongCE(), PPMI(), NPMI()]


@crossed("method, weighting", METHODS, WEIGHTINGS)
def test_every_weighting_trains_with_every_method_and_scores_windows_as_if_they_stood_alone(method, weighting):
    model, tokens, context = extended_model(method), models.some_tokens(2, 200), ShortContext(size=64, stride=48)
    alone = copy.deepcopy(model)
    with_weighted_loss(model, weighting, Scorer(model, context))
    output = model(input_ids=tokens, labels=tokens)
    output.loss.backward()
    assert torch.isfinite(output.loss)
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters())
    assert model.model.layers[0].self_attn.q_proj.weight.grad.abs().max() > 0
    # The row is longer than the original 128 positions: with dynamic and longrope its frequencies are not the windows'.
    torch.testing.assert_close(output.long_nll, token_nll(alone, tokens).to(output.long_nll), rtol=1e-5, atol=1e-5)
    if not weighting.uses_short:
        return
    for start, first, stop in sliding_windows(200, context.size, context.stride):
        expected = token_nll(alone, tokens[:, start:stop])[:, first - start :]
        # Some sums of these models are in float32, in other orders for batches of other sizes.
        torch.testing.assert_close(output.short_nll[:, first:stop], expected.to(output.short_nll), rtol=1e-5, atol=1e-5)


def test_phi3_counts_from_the_positions_it_keeps_beside_rope_parameters():
    config = extend_context(config_of("phi3"), 512, "longrope", **settings_of("longrope"))
    config.original_max_position_embeddings = 64
    assert describe_rope(config) == "longrope x4 from 64 to 512, theta 10000"
    verify_rope(AutoModelForCausalLM.from_config(config), config)


def test_the_example_of_the_page_runs(tmp_path):
    models.tiny(**SIZES).save_pretrained(tmp_path / "MODEL")
    trained_tokenizer().save_pretrained(tmp_path / "MODEL")
    page = (Path(__file__).parents[2] / "docs" / "models.md").read_text()
    (example,) = [part for part in re.findall(r"```python\n(.*?)```", page, re.DOTALL) if "MODEL-32k" in part]
    exec(example.replace("MODEL", str(tmp_path / "MODEL")), {})
    longer = load_model(tmp_path / "MODEL-32k")
    assert describe_rope(longer.config) == "default, 32768 positions, theta 1.53e+07"
    verify_rope(longer, longer.config)
