"""Rotary settings beside the usual ones: scales of attention, sections of pictures, layers without positions."""

import math

import pytest
import torch
from architectures import MROPE, VOCABULARY, YARN, build, picture_config, some_tokens, tiny_config
from transformers import AutoModelForCausalLM

from tokenweight import load_model
from tokenweight.models import (
    SETTINGS,
    check_length,
    check_stale_rows,
    check_stale_windows,
    check_tokens,
    context_length,
    describe_rope,
    extend_context,
    rope_depends_on_length,
)
from tokenweight.models.rope_check import frequencies, verify_rope

SCALED = {**YARN, "mscale": 1.0, "mscale_all_dim": 0.5}
FACTORS = {"short_factor": [1.0] * 2, "long_factor": [2.0] * 2}


def extended(config, method, length=256, **settings):
    """A model extended and verified, which reads the whole length."""
    longer = extend_context(config, length, method, **settings)
    model = build(longer)
    verify_rope(model, longer)
    with torch.no_grad():
        assert model(some_tokens(1, 100)).logits.isfinite().all()
    return model


def test_yarn_with_mscale_scales_by_the_ratio_of_both():
    _, found = frequencies(SCALED, 16, 64, 1)
    # The formula of DeepSeek: 0.1 m ln(4) + 1, for both m.
    assert found == pytest.approx((0.1 * math.log(4) + 1) / (0.05 * math.log(4) + 1), rel=1e-12)
    assert frequencies({**SCALED, "attention_factor": 1.5}, 16, 64, 1)[1] == 1.5
    assert frequencies({**YARN, "mscale": 1.0}, 16, 64, 1)[1] == pytest.approx(0.1 * math.log(4) + 1, rel=1e-12)


@pytest.mark.parametrize("kind", ["deepseek_v2", "deepseek_v3", "glm4_moe_lite", "ministral3"])
@pytest.mark.parametrize("method", ["base", "yarn"])
def test_models_with_mscale_are_extended_and_keep_it(method, kind):
    own = {"llama_4_scaling_beta": 0.1} if kind == "ministral3" else {}
    model = extended(tiny_config(kind, rope_parameters=SCALED | own), method)
    found = model.config.rope_parameters
    assert (found["mscale"], found["mscale_all_dim"]) == (1.0, 0.5)
    assert found["factor"] == (4 if method == "base" else 16)
    assert found.get("attention_factor") is None


def test_the_scale_of_attention_scores_follows_the_factor_of_yarn():
    scale = extended(tiny_config("deepseek_v3"), "yarn").model.layers[0].self_attn.scaling
    assert scale == pytest.approx(8**-0.5 * (0.05 * math.log(16) + 1) ** 2, rel=1e-12)


@pytest.mark.parametrize("method", ["linear", "dynamic", "longrope", "llama3"])
def test_methods_that_would_change_the_scale_of_attention_scores_are_refused(method):
    settings = FACTORS if method == "longrope" else {}
    with pytest.raises(ValueError, match=f"method '{method}' would change .* mscale_all_dim .* 'base' or 'yarn'"):
        extend_context(tiny_config("deepseek_v3"), 256, method, **settings)
    # Nothing scales before it is extended.
    extended(tiny_config("deepseek_v2"), method, **settings)


@pytest.mark.parametrize("method", ["base", "yarn", "llama3"])
def test_queries_scaled_by_position_stay_so(method):
    model = extended(tiny_config("ministral3"), method)
    assert model.config.rope_parameters["llama_4_scaling_beta"] == 0.1
    assert model.config.rope_parameters["original_max_position_embeddings"] == 16
    for other in ("linear", "dynamic"):
        with pytest.raises(ValueError, match="llama_4_scaling_beta"):
            extend_context(tiny_config("ministral3"), 256, other)


@pytest.mark.parametrize("method", [method for method in SETTINGS if method not in ("none", "longrope")])
def test_sections_for_pictures_stay(method):
    model = extended(tiny_config("qwen3_5_text"), method)
    found = model.config.rope_parameters
    assert (found["mrope_section"], found["mrope_interleaved"]) == (MROPE["mrope_section"], True)


def test_a_setting_of_another_model_is_ignored_and_refused():
    config = tiny_config("qwen3")
    config.rope_parameters["mrope_section"] = [1, 1, 2]
    with pytest.raises(ValueError, match="rope_parameters hold mrope_section, which default ignores"):
        extend_context(config, 256)
    own = {"short_mscale": 1.2, "long_mscale": 1.3, "short_factor": [1.0] * 8, "long_factor": [2.0] * 8}
    own |= {"rope_type": "longrope", "original_max_position_embeddings": 16, "rope_theta": 1e4}
    assert describe_rope(tiny_config("phimoe", rope_parameters=own)) == "longrope x4 from 16 to 64, theta 10000"


WITHOUT_POSITIONS = ["granitemoehybrid nope", "jamba", "nemotron_h", "zamba2", "mpt", "falcon alibi", "rwkv"]


@pytest.mark.parametrize("kind", WITHOUT_POSITIONS)
def test_a_model_without_positions_is_extended_by_its_length_alone(kind, tmp_path):
    config = tiny_config(kind)
    assert describe_rope(config) == "no rotary frequencies, 64 positions"
    with pytest.raises(ValueError, match=r"method 'base': no layer of .* expected method 'none'"):
        extend_context(config, 256)
    with pytest.raises(ValueError, match="rows of 100 tokens: the model has 64 positions"):
        check_length(config, 100, "rows")
    build(config).save_pretrained(tmp_path)
    model = load_model(tmp_path, extend={"length": 256, "method": "none"})
    assert context_length(model.config) == 256
    assert describe_rope(model.config) == "no rotary frequencies, 256 positions"
    before = getattr(config, "rope_parameters", None)
    assert getattr(model.config, "rope_parameters", None) == before
    with torch.no_grad():
        assert model(some_tokens(1, 100)).logits.isfinite().all()


def test_a_length_that_was_not_raised_in_the_loaded_model_is_caught():
    config = tiny_config("jamba")
    with pytest.raises(ValueError, match=r"model.config says no rotary frequencies, 64 positions: expected"):
        verify_rope(build(config), extend_context(config, 256, "none"))


@pytest.mark.parametrize("kind", ["gpt2", "opt", "gptj", "xglm", "gpt_neo"])
@pytest.mark.parametrize("method", ["base", "none"])
def test_a_table_of_positions_is_not_extended(method, kind):
    with pytest.raises(ValueError, match=f"{kind} has no rotary frequencies to change, but a table of positions, "):
        extend_context(tiny_config(kind), 256, method)


@pytest.mark.parametrize("kind", ["bloom", "mamba", "recurrent_gemma"])
def test_a_model_that_reads_any_length_is_not_extended(kind):
    assert "any number of positions" in describe_rope(tiny_config(kind))
    with pytest.raises(ValueError, match="the model reads sequences of any length already"):
        extend_context(tiny_config(kind), 256)


def test_a_model_with_rotary_embeddings_is_not_extended_by_its_length_alone():
    with pytest.raises(ValueError, match="method 'none': llama has rotary embeddings"):
        extend_context(tiny_config("llama"), 256, "none")


def test_to_look_at_a_config_draws_no_random_numbers():
    state = torch.get_rng_state()
    describe_rope(tiny_config("llama"))
    assert torch.equal(torch.get_rng_state(), state)


def test_frequencies_of_a_part_of_the_pairs_are_extended_by_their_base():
    model = extended(tiny_config("gemma4_text"), "base")
    found = model.config.rope_parameters["full_attention"]
    assert (found["rope_type"], found["partial_rotary_factor"]) == ("proportional", 0.25)
    angles, factor = frequencies(found, 16, 256, 1)
    theta = 1e6 * 4 ** (16 / 14)
    assert (angles, factor) == (pytest.approx([1.0, theta ** (-2 / 16)] + [0.0] * 6, rel=1e-12), 1.0)
    with pytest.raises(ValueError, match="method 'yarn' cannot extend proportional"):
        extend_context(tiny_config("gemma4_text"), 256, "yarn")


@pytest.mark.parametrize("method", ["base", "yarn", "dynamic"])
def test_a_config_with_a_part_for_text_is_described_extended_and_verified(method):
    config = picture_config()
    assert context_length(config) == 64
    assert describe_rope(config).startswith("full_attention: default, 64 positions")
    with pytest.raises(ValueError, match="64 positions"):
        check_length(config, 65, "rows")
    longer = extend_context(config, 512, method)
    assert type(longer) is type(config)
    assert context_length(config) == 64
    assert context_length(longer) == 512
    assert rope_depends_on_length(longer) == (method == "dynamic")
    if method == "dynamic":
        for refuse in (lambda: check_stale_windows(longer, 64), lambda: check_stale_rows(longer, [200, 300])):
            with pytest.raises(ValueError, match="dynamic"):
                refuse()
    model = AutoModelForCausalLM.from_config(longer)
    verify_rope(model, longer)
    with pytest.raises(ValueError, match=r"inv_freq\[\d+\] is .* config asks for"):
        verify_rope(AutoModelForCausalLM.from_config(config), longer)


def test_the_vocabulary_of_a_config_with_a_part_for_text_is_that_of_its_text():
    check_tokens(picture_config(), 0, VOCABULARY - 1, "rows")
    with pytest.raises(ValueError, match=f"rows: token {VOCABULARY} is not in the vocabulary"):
        check_tokens(picture_config(), 0, VOCABULARY, "rows")
