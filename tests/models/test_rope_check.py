"""Rotary frequencies: the formulas, each written out once more, and what transformers puts into a model."""

import math

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from tokenweight.models import extend_context
from tokenweight.models.rope_check import frequencies

DIM, THETA, ORIGINAL, FACTOR = 16, 1e4, 8192, 4.0
PAIRS = torch.arange(DIM // 2, dtype=torch.float64)
PLAIN = THETA ** (-2 * PAIRS / DIM)
SHORT, LONG = [1.0 + 0.01 * i for i in range(8)], [1.0 + 0.7 * i for i in range(8)]
PARAMETERS = {
    "default": {},
    "linear": {"factor": FACTOR},
    "dynamic": {"factor": FACTOR},
    "yarn": {"factor": FACTOR, "original_max_position_embeddings": ORIGINAL},
    "longrope": {"original_max_position_embeddings": ORIGINAL, "short_factor": SHORT, "long_factor": LONG},
    "llama3": {
        "factor": FACTOR,
        "original_max_position_embeddings": ORIGINAL,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
    },
}


def smoothed(wavelength):
    """The rule of the code of Llama 3.1, case by case: a wavelength in tokens -> what the frequency is divided by."""
    if wavelength < ORIGINAL / 4:
        return 1.0
    if wavelength > ORIGINAL / 1:
        return FACTOR
    smooth = (ORIGINAL / wavelength - 1) / (4 - 1)
    return 1 / ((1 - smooth) / FACTOR + smooth)


def written_out(rope_type, length):
    """Frequencies and the factor of cosine and sine, as the papers (for yarn: the authors' code) have them."""
    if rope_type == "linear":
        return PLAIN / 4, 1.0
    if rope_type == "dynamic" and length > ORIGINAL:
        scale = FACTOR * length / ORIGINAL - (FACTOR - 1)
        return (THETA * scale ** (16 / 14)) ** (-2 * PAIRS / DIM), 1.0
    if rope_type == "yarn":
        # 8192 tokens make 32 turns at pair 16 ln(8192 / (2 pi 32)) / (2 ln 10^4) = 3.22, 1 turn at 6.23: 3 to 7.
        kept = torch.tensor([1, 1, 1, 1, 0.75, 0.5, 0.25, 0], dtype=torch.float64)
        return PLAIN * kept + PLAIN / 4 * (1 - kept), 1.1386294361  # 0.1 ln 4 + 1
    if rope_type == "longrope":
        scaling = math.sqrt(1 + math.log(4) / math.log(8192))
        return PLAIN / torch.tensor(LONG if length > ORIGINAL else SHORT, dtype=torch.float64), scaling
    if rope_type == "llama3":
        return PLAIN / torch.tensor([smoothed(2 * math.pi / f) for f in PLAIN.tolist()], dtype=torch.float64), 1.0
    return PLAIN, 1.0


@pytest.mark.parametrize("length", [1, 8192, 8193, 20000, 32768])
@pytest.mark.parametrize("rope_type", PARAMETERS)
def test_frequencies_are_those_of_the_formula_written_out(rope_type, length):
    parameters = {"rope_type": rope_type, "rope_theta": THETA, **PARAMETERS[rope_type]}
    positions = ORIGINAL if rope_type == "dynamic" else 32768
    found, scaling = frequencies(parameters, DIM, positions, length)
    expected, expected_scaling = written_out(rope_type, length)
    # Both in float64; the constant of yarn is written with eleven digits.
    torch.testing.assert_close(torch.tensor(found, dtype=torch.float64), expected, rtol=1e-13, atol=0)
    assert scaling == pytest.approx(expected_scaling, rel=1e-10)


@pytest.mark.parametrize("theta", [1e4, 5e5, 1e9])
@pytest.mark.parametrize("factor", [1.5, 4, 64])
@pytest.mark.parametrize("method", ["base", "linear", "dynamic", "yarn", "longrope", "llama3"])
def test_transformers_computes_the_same_within_float32(method, factor, theta):
    config = LlamaConfig(
        vocab_size=8, hidden_size=128, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1,
        max_position_embeddings=ORIGINAL, rope_parameters={"rope_type": "default", "rope_theta": theta},
    )  # fmt: skip
    settings = {"short_factor": [1.0] * 64, "long_factor": [1.0 + i / 3 for i in range(64)]}
    length = int(factor * ORIGINAL)
    extended = extend_context(config, length, method, **(settings if method == "longrope" else {}))
    module = AutoModelForCausalLM.from_config(extended).model.rotary_emb
    module(torch.zeros(1), torch.tensor([[0, length - 1]]))
    expected, scaling = frequencies(extended.rope_parameters, 128, extended.max_position_embeddings, length)
    # The bound that `verify_rope` explains, and halves the tolerance of: 2^-24 (ln theta + 10), times the factor where
    # frequencies are blended; dynamic also rounds the base itself, by as much.
    bound = 2**-24 * (math.log(theta) + 10) * (factor if method in ("yarn", "llama3") else 2)
    torch.testing.assert_close(module.inv_freq.double(), torch.tensor(expected).double(), rtol=bound, atol=0)
    assert module.attention_scaling == pytest.approx(scaling, rel=1e-12)


def test_the_default_rule_for_the_base_slows_the_slowest_pair_down_by_the_factor_and_leaves_the_fastest():
    config = LlamaConfig(hidden_size=16, num_attention_heads=1, max_position_embeddings=ORIGINAL)
    extended = extend_context(config, 32768)
    assert extended.rope_parameters["rope_theta"] == pytest.approx(1e4 * 4 ** (16 / 14), rel=1e-12)
    before, after = (frequencies(c.rope_parameters, DIM, ORIGINAL, 1)[0] for c in (config, extended))
    assert after[0] == before[0] == 1
    assert before[-1] / after[-1] == pytest.approx(4, rel=1e-12)


def test_yarn_blends_between_indices_that_are_not_whole_if_the_model_says_so():
    parameters = {"rope_type": "yarn", "rope_theta": THETA, **PARAMETERS["yarn"], "truncate": False}
    found = torch.tensor(frequencies(parameters, DIM, 32768, 1)[0], dtype=torch.float64)
    first, last = (16 * math.log(8192 / (2 * math.pi * turns)) / (2 * math.log(1e4)) for turns in (32, 1))
    kept = ((last - PAIRS) / (last - first)).clamp(0, 1)
    torch.testing.assert_close(found, PLAIN * kept + PLAIN / 4 * (1 - kept), rtol=1e-12, atol=0)
