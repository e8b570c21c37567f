"""How fast rotary embeddings turn, by the formulas of the papers. Plain float64; knows no framework."""

import math
from typing import Any


def frequencies(parameters: dict[str, Any], dim: int, positions: int, length: int) -> tuple[list[float], float]:
    """Angle per position of each pair of dimensions, and the factor of cosine and sine.

    Slow, and written without the functions of transformers that it is to judge.

    Args:
        parameters: those of one layer type, in the names of transformers (`rope_parameters`).
        dim: dimensions of a head that are turned.
        positions: `max_position_embeddings`; only "dynamic", and a scaling that records no factor, depend on it.
        length: tokens of the input; only "dynamic" and "longrope" depend on it.

    Returns:
        `dim / 2` angles in radians, fastest first; and the factor.

    Source: docs/context-extension.md has the formulas with their papers.
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
    scaling = 0.1 * math.log(max(factor, 1)) + 1
    return _blend(plain, shares, factor), _given(parameters, "attention_factor", scaling)


def _yarn_shares(parameters: dict[str, Any], dim: int, original: int) -> list[float]:
    """1 for pairs that turn often in `original` positions, 0 for those that hardly do, and below or above beyond.

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
    """Each frequency as it is by its share, and divided by `factor` by the rest."""
    shares = [min(max(share, 0.0), 1.0) for share in shares]
    return [f * (share + (1 - share) / factor) for f, share in zip(plain, shares)]


def _given(parameters: dict[str, Any], name: str, default: Any) -> Any:
    value = parameters.get(name)
    return default if value is None else value
