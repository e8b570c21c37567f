"""How many tokens a model reads, and whether the angles of its positions depend on how long the input is."""

from collections.abc import Iterable
from typing import Any

from transformers import PreTrainedConfig


def context_length(config: PreTrainedConfig) -> Any:
    """Tokens that a model of this config reads, or None if that has no limit.

    This is `max_position_embeddings`, and `factor` times that for "dynamic", where it means the original positions.
    """
    positions = getattr(config, "max_position_embeddings", None)
    if positions is None or not getattr(config, "rope_parameters", None):
        return positions
    parameters = config.rope_parameters.get("full_attention") or config.rope_parameters
    return round(positions * parameters["factor"]) if parameters.get("rope_type") == "dynamic" else positions


def turns_by_length(config: PreTrainedConfig) -> bool:
    """Whether the angles depend on how long the input is ("dynamic", "longrope"): then even the first tokens of a row
    get other losses in a window of their own."""
    return not {"dynamic", "longrope"}.isdisjoint(_types(config))


def refuse_stale_windows(config: PreTrainedConfig, size: int) -> None:
    """Raise a ValueError if windows of `size` tokens would be read with the frequencies of a longer row before them.

    With "dynamic", transformers goes back to the original frequencies only for inputs shorter than the original
    positions; any other input keeps those of the longest one so far.
    """
    if "dynamic" in _types(config) and size >= config.max_position_embeddings:
        raise ValueError(
            f"windows of {size} tokens would keep the dynamic rotary frequencies of longer rows read before: "
            f"expected a size below {config.max_position_embeddings}"
        )


def refuse_stale_rows(config: PreTrainedConfig, lengths: Iterable[int]) -> None:
    """Raise a ValueError if rows of one length would be read with the frequencies of longer ones before them."""
    if "dynamic" not in _types(config):
        return
    longer = sorted({length for length in lengths if length >= config.max_position_embeddings})
    if len(longer) > 1:
        raise ValueError(
            f"rows of {longer[0]} tokens would keep the dynamic rotary frequencies of rows of {longer[-1]}: expected "
            f"one length from {config.max_position_embeddings} tokens on"
        )


def _types(config: PreTrainedConfig) -> set[str | None]:
    found = getattr(config, "rope_parameters", None) or {}
    layers = [value for value in found.values() if isinstance(value, dict)] or [found]
    return {parameters.get("rope_type") for parameters in layers}
