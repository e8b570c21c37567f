"""Rotary frequencies by the formulas of the papers, in plain float64, and the check of a loaded model against them."""

import copy
import math
from typing import Any

import torch
from transformers import PreTrainedConfig, PreTrainedModel

from tokenweight.models.rope import (
    _describe,
    _layers,
    _rotary_dim,
    context_length,
    describe_rope,
    has_rotary,
    is_rotary,
)


def frequencies(parameters: dict[str, Any], dim: int, positions: int, length: int) -> tuple[list[float], float]:
    """Angle per position of each pair of dimensions, and the factor of cosine and sine.

    Slow, and written without the functions of transformers that it checks.

    Args:
        parameters: those of one layer type, in the names of transformers (`rope_parameters`).
        dim: dimensions of a head that are rotated; with "proportional", all of them.
        positions: `max_position_embeddings`; only "dynamic", and a scaling that records no factor, depend on it.
        length: tokens of the input; only "dynamic" and "longrope" depend on it.

    Returns:
        `dim / 2` angles in radians, fastest first; and the factor.

    Source: docs/models.md has the formulas with their papers.
    """
    rope_type, theta = parameters["rope_type"], parameters["rope_theta"]
    factor: Any = parameters.get("factor")
    if rope_type == "dynamic":
        theta *= (1 + factor * max(length / positions - 1, 0)) ** (dim / (dim - 2))
    plain = [theta ** (-i / dim) for i in range(0, dim, 2)]
    if rope_type in ("default", "dynamic"):
        return plain, 1.0
    if rope_type == "linear":
        return [f / factor for f in plain], 1.0
    if rope_type == "proportional":
        turned = int(parameters.get("partial_rotary_factor", 1.0) * dim // 2)
        return [f / (factor or 1.0) if i < turned else 0.0 for i, f in enumerate(plain)], 1.0
    original = parameters["original_max_position_embeddings"]
    factor = positions / original if factor is None else factor
    if rope_type == "longrope":
        divisors = parameters["long_factor" if length > original else "short_factor"]
        scaling = math.sqrt(1 + math.log(max(factor, 1)) / math.log(original))
        return [f / divisor for f, divisor in zip(plain, divisors)], _given(parameters, "attention_factor", scaling)
    if rope_type == "llama3":
        low, high = parameters["low_freq_factor"], parameters["high_freq_factor"]
        return _blend(plain, [(original * f / math.tau - low) / (high - low) for f in plain], factor), 1.0
    shares = _yarn_shares(parameters, dim, original)
    grown = 0.1 * math.log(max(factor, 1))
    mscale, all_dim = parameters.get("mscale"), parameters.get("mscale_all_dim")
    scaling = (mscale * grown + 1) / (all_dim * grown + 1) if mscale and all_dim else grown + 1
    return _blend(plain, shares, factor), _given(parameters, "attention_factor", scaling)


def _yarn_shares(parameters: dict[str, Any], dim: int, original: int) -> list[float]:
    """1 for pairs that turn often in `original` positions, 0 for those that hardly do; not clamped beyond.

    The paper's ramp is linear in the number of turns; the authors' code, which every model with YaRN was trained with,
    has it linear in the index of the pair, between the indices at which a pair would make so many turns.
    """
    turns = (_given(parameters, "beta_fast", 32), _given(parameters, "beta_slow", 1))
    first, last = (
        dim * math.log(original / (math.tau * turn)) / (2 * math.log(parameters["rope_theta"])) for turn in turns
    )
    if _given(parameters, "truncate", True):
        first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, dim - 1)
    if first == last:
        last += 0.001
    return [(last - i) / (last - first) for i in range((dim + 1) // 2)]


def _blend(plain: list[float], shares: list[float], factor: float) -> list[float]:
    """Mix each frequency, by its share, with the same divided by `factor`."""
    shares = [min(max(share, 0.0), 1.0) for share in shares]
    return [f * (share + (1 - share) / factor) for f, share in zip(plain, shares)]


def _given(parameters: dict[str, Any], name: str, default: Any) -> Any:
    value = parameters.get(name)
    return default if value is None else value


_TOLERANCE = 2e-4
"""Relative. transformers computes in float32: a power of base b errs by at most (ln b + 10) 2^-24, 2e-6 for b = 1e9; a
blend of f and f / factor (yarn, llama3) multiplies that by up to factor, so 64 gives 1e-4. Frequencies rounded to
bfloat16 err by up to 2^-9 = 2e-3, to float16 by up to 2^-11 = 5e-4."""


def verify_rope(model: PreTrainedModel, config: PreTrainedConfig) -> None:
    """Verify that a loaded model rotates queries and keys by the frequencies that `config` asks for.

    Every rotary frequency in the model, and the factor of cosine and sine, is compared with the formula of the method,
    computed here in float64, when the model reads a short input, one of the full length, and a short one after that
    ("dynamic" and "longrope" change with the length). `model.config`, which is saved with the model, must ask for the
    same.

    Args:
        model: left as it is.
        config: the requested one, such as the result of `extend_context`.

    Raises:
        ValueError: naming the module, what was found and what was expected.
    """
    modules = {name: module for name, module in model.named_modules() if is_rotary(module)}
    if not modules and not has_rotary(config):
        if context_length(model.config) != context_length(config):
            raise ValueError(f"model.config says {describe_rope(model.config)}: expected {describe_rope(config)}")
        return
    longest = max(context_length(config), context_length(model.config) or 0)
    for origin, asked in {"config": config, "model.config": model.config}.items():
        for layer_type, parameters in _layers(asked).items():
            if not modules:
                raise ValueError(f"{type(model).__name__} has no module with rotary frequencies (inv_freq)")
            wanted = f"{origin} asks for {_describe(asked, parameters)}"
            for name, module in modules.items():
                # A copy, because reading a long input may change it.
                _verify(name, copy.deepcopy(module), layer_type, asked.get_text_config(), parameters, longest, wanted)


def _verify(
    name: str,
    module: Any,
    layer_type: str | None,
    config: PreTrainedConfig,
    parameters: dict[str, Any],
    longest: int,
    wanted: str,
) -> None:
    prefix = "" if layer_type is None else f"{layer_type}_"
    name, buffer = f"{name}.{prefix}inv_freq", getattr(module, f"{prefix}inv_freq", None)
    if buffer is None or buffer.is_meta:
        raise ValueError(f"{name} {'is absent' if buffer is None else 'has no values'}: {wanted}")
    if buffer.dtype not in (torch.float32, torch.float64):
        raise ValueError(
            f"{name} was rounded to {buffer.dtype}: load the model with dtype=..., and do not cast it after"
        )
    dim = _rotary_dim(config, parameters, layer_type)
    for length in (1, longest, 1):
        positions = torch.tensor([[0, length - 1]], device=buffer.device)
        module(positions.float(), positions, **({"layer_type": layer_type} if layer_type else {}))
        expected, scaling = frequencies(parameters, dim, config.max_position_embeddings, length)
        expected.append(scaling)
        found = getattr(module, f"{prefix}inv_freq").double().tolist()
        found.append(getattr(module, f"{prefix}attention_scaling", 1.0))
        if len(found) != len(expected):
            raise ValueError(f"{name} has {len(found) - 1} frequencies: {wanted}, which has {len(expected) - 1}")
        for i, (one, other) in enumerate(zip(found, expected)):
            if not abs(one - other) <= _TOLERANCE * other:  # also for NaN
                part = f"{name}[{i}]" if i < len(found) - 1 else name.replace("inv_freq", "attention_scaling")
                raise ValueError(f"{part} is {one:.6g}: {wanted}, which gives {other:.6g} at {length} tokens")
