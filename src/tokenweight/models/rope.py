"""Longer contexts for rotary models: what to write into the config before loading (`rope_check` verifies it after).

The methods of `extend_context` and their settings, for s times the length:

    base      theta (default: theta * s^(d / (d - 2)), d rotary dimensions of a head)
    linear    -
    dynamic   -  (max_position_embeddings stays: transformers takes it for the length before the extension)
    yarn      beta_fast=32, beta_slow=1, attention_factor=0.1 ln(s) + 1
    longrope  short_factor and long_factor (d / 2 numbers each, to be given),
              attention_factor=sqrt(1 + ln(s) / ln(original))
    llama3    low_freq_factor=1, high_freq_factor=4, factor=s
"""

import copy
import math
from collections.abc import Iterable
from typing import Any

from transformers import PreTrainedConfig

SETTINGS: dict[str, tuple[str, ...]] = {
    "base": ("theta",),
    "linear": (),
    "dynamic": (),
    "yarn": ("attention_factor", "beta_fast", "beta_slow"),
    "longrope": ("short_factor", "long_factor", "attention_factor"),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor"),
}
"""The settings of each method that a user may choose."""
_READ: dict[str, tuple[str, ...]] = {
    "default": (),
    "linear": ("factor",),
    "dynamic": ("factor",),
    "yarn": ("factor", "original_max_position_embeddings", *SETTINGS["yarn"], "truncate"),
    "longrope": ("factor", "original_max_position_embeddings", *SETTINGS["longrope"]),
    "llama3": ("original_max_position_embeddings", *SETTINGS["llama3"]),
}
"""The settings each `rope_type` of transformers reads besides base and rotary share; others are silently ignored."""


def extend_context(
    config: PreTrainedConfig, length: int, method: str = "base", *, original: int | None = None, **settings: Any
) -> PreTrainedConfig:
    """A config with which `load_model(name, config=...)` gives a rotary model that reads `length` tokens.

    s is `length / original`; for "base" it is `length` over the positions that the model has now. "base" keeps a
    scaling that the model has (a Llama 3.1 stays smoothed); every other method replaces it, never stacks on it. Layers
    with sliding attention that have rotary settings of their own keep them.

    Args:
        config: left as it is.
        length: tokens, more than the model has positions.
        method: "base", "linear", "dynamic", "yarn", "longrope" or "llama3".
        original: positions the model was pretrained with; by default what its config records.

    Raises:
        ValueError: if the model has no rotary embeddings, or a setting is unknown, missing or senseless.

    Source: docs/models.md has each method's formula, its paper, and what its authors chose.
    """
    if method not in SETTINGS:
        raise ValueError(f"method {method!r}: expected one of {', '.join(SETTINGS)}")
    if not isinstance(length, int) or not isinstance(original, int | None):
        raise ValueError(f"length {length!r}, original {original!r}: expected whole numbers of tokens")
    layers, positions = _layers(config), context_length(config)
    if length <= positions:
        raise ValueError(f"length {length}: the model reads {positions} tokens already: expected more")
    parameters = layers.get("full_attention") or layers[None]
    dim, new = _rotary_dim(config, parameters), copy.deepcopy(config)
    _check_settings(method, settings, dim)
    new.max_position_embeddings = length
    if method == "base":
        if parameters["rope_type"] in ("dynamic", "longrope"):
            raise ValueError(f"method 'base' cannot extend {_describe(config, parameters)}: expected another method")
        theta = _raised_base(parameters["rope_theta"], length / positions, dim, **settings)
        changed = {**parameters, "rope_theta": theta}
    else:
        original = _original(config, parameters) if original is None else original
        changed = _scaled(parameters, method, length, original, settings)
        if method == "dynamic":
            new.max_position_embeddings = original
        if hasattr(new, "original_max_position_embeddings"):  # phi3
            new.original_max_position_embeddings = original
    changed = changed if None in layers else {**config.rope_parameters, "full_attention": changed}
    new.rope_parameters = copy.deepcopy(changed)
    try:
        new.validate_rope()
    except ValueError as error:
        raise ValueError(f"method {method!r} does not suit {config.model_type}: {error}") from None
    return new


def describe_rope(config: PreTrainedConfig) -> str:
    """The rotary setting in one line, such as "yarn x4 from 8192 to 32768, theta 500000", for logs and model cards."""
    if not getattr(config, "rope_parameters", None):
        return f"no rotary embeddings, {context_length(config)} positions"
    lines = {name: _describe(config, parameters) for name, parameters in _layers(config).items()}
    return "; ".join(line if name is None else f"{name}: {line}" for name, line in lines.items())


def _layers(config: PreTrainedConfig) -> dict[str | None, dict[str, Any]]:
    """`rope_parameters` by layer type, or under None if they hold for all layers, without any that would be ignored."""
    kind, found = config.model_type, getattr(config, "rope_parameters", None)
    if not found:
        raise ValueError(f"{kind} has no rope_parameters: it has no rotary embeddings that transformers could extend")
    layers: dict[str | None, dict[str, Any]] = {None: found}
    if any(isinstance(value, dict) for value in found.values()):
        present = getattr(config, "layer_types", None) or ()
        layers = {name: found[name] for name in sorted(found) if name in present}
        if "full_attention" not in layers or not found.keys() <= {"full_attention", "sliding_attention"}:
            raise ValueError(
                f"rope_parameters of {kind} are those of {', '.join(found)}: expected one setting for all layers, or "
                "those of full_attention and sliding_attention, the first of which a layer has"
            )
    for name in ("rope_theta", "partial_rotary_factor"):
        late, values = getattr(config, name, None), [parameters.get(name) for parameters in layers.values()]
        if late is not None and late not in values:
            raise ValueError(f"config.{name} is {late}, which transformers ignores: rope_parameters say {values[0]}")
    for parameters in layers.values():
        rope_type, theta = parameters.get("rope_type"), parameters.get("rope_theta")
        if rope_type not in _READ:
            raise ValueError(f"rope_type of {kind} is {rope_type!r}: expected one of {', '.join(_READ)}")
        if theta is None:
            raise ValueError(f"rope_parameters of {kind} have no rope_theta: expected the rotary base")
        known = ("rope_type", "type", "rope_theta", "partial_rotary_factor", *_READ[rope_type])
        if ignored := [name for name, value in parameters.items() if name not in known and value is not None]:
            raise ValueError(f"rope_parameters hold {', '.join(ignored)}, which {rope_type} ignores")
    # As transformers reads it: phi3 keeps it beside rope_parameters.
    own = getattr(config, "original_max_position_embeddings", None)
    for layer_type, parameters in layers.items():
        if "original_max_position_embeddings" in _READ[parameters["rope_type"]]:
            recorded = own or parameters.get("original_max_position_embeddings") or config.max_position_embeddings
            layers[layer_type] = {**parameters, "original_max_position_embeddings": recorded}
    return layers


def _rotary_dim(config: PreTrainedConfig, parameters: dict[str, Any]) -> int:
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return int(head_dim * parameters.get("partial_rotary_factor", 1.0))


def _check_settings(method: str, settings: dict[str, Any], dim: int) -> None:
    for name, value in settings.items():
        if name not in SETTINGS[method]:
            known = ", ".join(SETTINGS[method]) or "none"
            raise ValueError(f"method {method!r} has no setting {name!r}: it has {known}")
        count, values = None, (value,)
        if name in ("short_factor", "long_factor"):
            count, values = dim // 2, tuple(value) if isinstance(value, list | tuple) else ()
        finite = all(isinstance(v, int | float) and not isinstance(v, bool) and 0 < v < math.inf for v in values)
        if not finite or len(values) != (count or 1):
            expected = "a finite number above 0" if count is None else f"a list of {count} finite numbers above 0"
            raise ValueError(f"{method}: {name}={value!r} is not {expected}")
    if method == "longrope" and not {"short_factor", "long_factor"} <= settings.keys():
        raise ValueError(f"longrope needs short_factor and long_factor, {dim // 2} numbers each: found {[*settings]}")
    if method in ("base", "dynamic") and dim <= 2 and "theta" not in settings:
        raise ValueError(f"method {method!r}: the rule for the base needs more than {dim} rotary dimensions")


def _raised_base(now: float, ratio: float, dim: int, theta: float | None = None) -> float:
    """The base that slows the slowest rotation down by `ratio`, unless one is given."""
    theta = now * ratio ** (dim / (dim - 2)) if theta is None else theta
    if theta <= now:
        raise ValueError(f"theta={theta:g} is not above the model's base, {now:g}")
    return float(theta)


def _original(config: PreTrainedConfig, parameters: dict[str, Any]) -> int:
    """The positions that the model was pretrained with, if its config says so."""
    if parameters["rope_type"] == "linear":
        raise ValueError(f"{describe_rope(config)} does not say from how many positions: give original=")
    return parameters.get("original_max_position_embeddings", config.max_position_embeddings)


def _scaled(
    parameters: dict[str, Any], method: str, length: int, original: int, settings: dict[str, Any]
) -> dict[str, Any]:
    """The parameters that a method other than "base" writes, with every default written out."""
    if not 1 < original < length:
        raise ValueError(f"original={original}: expected positions above 1 and below length, {length}")
    factor = length / original
    kept = {name: value for name, value in parameters.items() if name in ("rope_theta", "partial_rotary_factor")}
    record = {} if method in ("linear", "dynamic") else {"original_max_position_embeddings": original}
    defaults: dict[str, dict[str, Any]] = {
        "yarn": {"beta_fast": 32.0, "beta_slow": 1.0, "attention_factor": 0.1 * math.log(factor) + 1},
        "longrope": {"attention_factor": math.sqrt(1 + math.log(factor) / math.log(original))},
        "llama3": {"low_freq_factor": 1.0, "high_freq_factor": 4.0},
    }
    chosen: dict[str, Any] = {
        "rope_type": method,
        **kept,
        "factor": factor,
        **record,
        **defaults.get(method, {}),
        **settings,
    }
    for low, high in (("beta_slow", "beta_fast"), ("low_freq_factor", "high_freq_factor")):
        if low in chosen and not chosen[low] < chosen[high]:
            raise ValueError(f"{method}: {low}={chosen[low]:g} is not below {high}={chosen[high]:g}")
    if chosen["factor"] < 1:
        raise ValueError(f"{method}: factor={chosen['factor']:g} is below 1")
    return {name: list(value) if isinstance(value, tuple) else value for name, value in chosen.items()}


def _describe(config: PreTrainedConfig, parameters: dict[str, Any]) -> str:
    rope_type, longest = parameters["rope_type"], context_length(config)
    span, factor = f", {longest} positions", parameters.get("factor")
    if rope_type not in ("default", "linear"):
        start = _original(config, parameters)
        span, factor = f" from {start} to {longest}", factor or longest / start
    return f"{rope_type}{f' x{factor:g}' if factor else ''}{span}, theta {parameters['rope_theta']:g}"


def context_length(config: PreTrainedConfig) -> Any:
    """Tokens that a model of this config reads, or None if that has no limit.

    This is `max_position_embeddings`, and `factor` times that for "dynamic", where it means the original positions.
    """
    positions = getattr(config, "max_position_embeddings", None)
    if positions is None or not getattr(config, "rope_parameters", None):
        return positions
    parameters = config.rope_parameters.get("full_attention") or config.rope_parameters
    return round(positions * parameters["factor"]) if parameters.get("rope_type") == "dynamic" else positions


def rope_depends_on_length(config: PreTrainedConfig) -> bool:
    """Whether rotary frequencies depend on the length of the input ("dynamic", "longrope"): then even the first tokens
    of a sequence get other losses in a window of their own."""
    return not {"dynamic", "longrope"}.isdisjoint(_types(config))


def check_stale_windows(config: PreTrainedConfig, size: int) -> None:
    """Raise a ValueError if windows of `size` tokens would be read with the frequencies of a longer row before them.

    With "dynamic", transformers goes back to the original frequencies only for inputs shorter than the original
    positions; any other input keeps those of the longest one so far.
    """
    if "dynamic" in _types(config) and size >= config.max_position_embeddings:
        raise ValueError(
            f"windows of {size} tokens would keep the dynamic rotary frequencies of longer rows read before: "
            f"expected a size below {config.max_position_embeddings}"
        )


def check_stale_rows(config: PreTrainedConfig, lengths: Iterable[int]) -> None:
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
