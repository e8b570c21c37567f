"""Longer contexts for rotary models: what to write into the config before loading (`rope_check` verifies it after).

The methods of `extend_context` and their settings, for s times the length:

    base      theta (default: theta * s^(d / (d - 2)), d rotary dimensions of a head)
    linear    -
    dynamic   -  (max_position_embeddings stays: transformers takes it for the length before the extension)
    yarn      beta_fast=32, beta_slow=1, attention_factor=0.1 ln(s) + 1
    longrope  short_factor and long_factor (d / 2 numbers each, to be given),
              attention_factor=sqrt(1 + ln(s) / ln(original))
    llama3    low_freq_factor=1, high_freq_factor=4, factor=s
    none      -  (for models without positions, whose length is a number in the config and nothing else)
"""

import contextlib
import copy
import inspect
import math
import sys
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.modeling_rope_utils import RopeParameters

SETTINGS: dict[str, tuple[str, ...]] = {
    "base": ("theta",),
    "linear": (),
    "dynamic": (),
    "yarn": ("attention_factor", "beta_fast", "beta_slow"),
    "longrope": ("short_factor", "long_factor", "attention_factor"),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor"),
    "none": (),
}
"""The settings of each method that a user may choose."""
_RECORDS_ORIGINAL = ("yarn", "longrope", "llama3")
"""The values of `rope_type` that read `original_max_position_embeddings`."""
ROPE_TYPES = ("default", "linear", "dynamic", "proportional", *_RECORDS_ORIGINAL)
"""Those whose frequencies `rope_check` computes."""
ANY_LENGTH = "dual_chunk"
"""The attention implementation with which a model reads sequences of any length (`models.attention`)."""


def extend_context(
    config: PreTrainedConfig, length: int, method: str = "base", *, original: int | None = None, **settings: Any
) -> PreTrainedConfig:
    """A config with which `load_model(name, config=...)` returns a rotary model that reads `length` tokens.

    s is `length / original`; for "base" it is `length` over the positions that the model has now. "base" keeps a
    scaling that the model has (a Llama 3.1 stays smoothed); every other method replaces it, never stacks on it. Layers
    with sliding attention that have rotary settings of their own keep them. Settings of a model besides its rotary
    frequencies (`mrope_section`, `llama_4_scaling_beta`) stay, and so do `mscale` and `mscale_all_dim` with "yarn".

    Args:
        config: left unchanged. For a model with several parts, the one that holds `text_config`.
        length: tokens, more than the model has positions.
        method: "base", "linear", "dynamic", "yarn", "longrope" or "llama3"; "none" for models without positions.
        original: positions the model was pretrained with; by default what its config records.

    Raises:
        ValueError: if the model cannot be extended so, or a setting is unknown, missing or invalid.

    Source: docs/models.md has each method's formula, its paper, and what its authors chose.
    """
    if method not in SETTINGS:
        raise ValueError(f"method {method!r}: expected one of {', '.join(SETTINGS)}")
    if not isinstance(length, int) or not isinstance(original, int | None):
        raise ValueError(f"length {length!r}, original {original!r}: expected whole numbers of tokens")
    positions = context_length(config)
    if positions is None or length <= positions:
        known = "sequences of any length" if positions is None else f"{positions} tokens"
        raise ValueError(f"length {length}: the model reads {known} already: expected more")
    whole = copy.deepcopy(config)
    new, now = whole.get_text_config(), config.get_text_config()
    setattr(new, _length_name(now), length)
    if not has_rotary(config):
        _check_no_positions(config, whole)
        if method != "none":
            raise ValueError(
                f"method {method!r}: no layer of {now.model_type} has positions to change: expected method 'none', "
                "which raises the length alone"
            )
        _check_settings(method, settings, 0)
        return whole
    if method == "none":
        raise ValueError(f"method 'none': {now.model_type} has rotary embeddings: expected another method")
    _extend_rotary(config, new, length, method, original, settings)
    return whole


def _extend_rotary(
    config: PreTrainedConfig,
    new: PreTrainedConfig,
    length: int,
    method: str,
    original: int | None,
    settings: dict[str, Any],
) -> None:
    """Write the rotary parameters of `extend_context` into `new`, a copy of (the part for text of) the config."""
    layers, now = _layers(config), config.get_text_config()
    layer_type = None if None in layers else "full_attention"
    parameters = layers[layer_type]
    dim = _rotary_dim(now, parameters, layer_type)
    _check_settings(method, settings, dim)
    _check_replaced(config, parameters, method)
    if method == "base":
        theta = _raised_base(parameters["rope_theta"], length / context_length(config), dim, **settings)
        changed = {**parameters, "rope_theta": theta}
        if hasattr(new, "rope_theta"):  # cohere2_moe
            new.rope_theta = theta
    else:
        original = _original(config, parameters) if original is None else original
        changed = _scaled(now, parameters, method, length, original, settings)
        if method == "dynamic":
            new.max_position_embeddings = original
        if hasattr(new, "original_max_position_embeddings"):  # phi3
            new.original_max_position_embeddings = original
    changed = changed if None in layers else {**now.rope_parameters, "full_attention": changed}
    new.rope_parameters = copy.deepcopy(changed)
    try:
        new.validate_rope()
    except (ValueError, TypeError, KeyError) as error:
        raise ValueError(f"method {method!r} does not suit {now.model_type}: {error}") from None


def has_rotary(config: PreTrainedConfig) -> bool:
    """Whether a config's model rotates queries and keys: a config may hold `rope_parameters` that no layer reads."""
    if getattr(config.get_text_config(), "alibi", False):  # falcon, which makes the frequencies nevertheless
        return False
    model = _blank_model(config)
    if model is None:
        return bool(getattr(config.get_text_config(), "rope_parameters", None))
    return any(is_rotary(module) for module in model.modules())


def is_rotary(module: nn.Module) -> bool:
    """Whether a module holds rotary frequencies."""
    return any(name.endswith("inv_freq") for name, _ in module.named_buffers(recurse=False))


def _blank_model(config: PreTrainedConfig) -> PreTrainedModel | None:
    """The causal model of a config without memory for its values; None if transformers has none."""
    try:
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(copy.deepcopy(config), attn_implementation="eager")
    except Exception:  # code that is not part of transformers, or no causal language model
        return None


def _check_no_positions(config: PreTrainedConfig, longer: PreTrainedConfig) -> None:
    """Raise a ValueError if a model without rotary embeddings holds something for each of its positions."""
    models = [_blank_model(one) for one in (config, longer)]
    old, new = ({} if m is None else {**dict(m.named_parameters()), **dict(m.named_buffers())} for m in models)
    for name, tensor in old.items():
        if tensor.shape != new[name].shape:
            raise ValueError(
                f"{config.get_text_config().model_type} has no rotary frequencies to change, but a table of "
                f"positions, {name} of shape {list(tensor.shape)}: it cannot be extended"
            )


def _check_replaced(config: PreTrainedConfig, parameters: dict[str, Any], method: str) -> None:
    """Raise a ValueError if a model computes more with its scaling than frequencies, which the method would change."""
    rope_type = parameters["rope_type"]
    if method == "base" and rope_type not in ("dynamic", "longrope"):
        return
    if rope_type == "proportional" or method == "base":
        raise ValueError(f"method {method!r} cannot extend {_describe(config, parameters)}: expected another method")
    # Their attention multiplies its softmax scale by a number made of mscale_all_dim and the factor.
    if parameters.get("mscale_all_dim") and rope_type != "default" and method != "yarn":
        raise ValueError(
            f"method {method!r} would change the scale of attention scores of {_describe(config, parameters)}, "
            "which mscale_all_dim sets: expected 'base' or 'yarn'"
        )
    if parameters.get("llama_4_scaling_beta") and method not in _RECORDS_ORIGINAL:
        raise ValueError(
            f"method {method!r} records no original_max_position_embeddings, from which llama_4_scaling_beta of "
            f"{_describe(config, parameters)} counts: expected 'base' or one of {', '.join(_RECORDS_ORIGINAL)}"
        )


def describe_rope(config: PreTrainedConfig) -> str:
    """The rotary setting in one line, such as "yarn x4 from 8192 to 32768, theta 500000", for logs and model cards."""
    if not has_rotary(config):
        return f"no rotary frequencies, {context_length(config) or 'any number of'} positions"
    lines = {name: _describe(config, parameters) for name, parameters in _layers(config).items()}
    return "; ".join(line if name is None else f"{name}: {line}" for name, line in lines.items())


def _default(config: PreTrainedConfig, name: str) -> Any:
    """The default in a config of transformers 5.13, whatever `rope_parameters` say; newer ones have none."""
    try:
        return getattr(type(config)(), name, None)
    except Exception:  # code that came with a model
        return None


def _layers(config: PreTrainedConfig) -> dict[str | None, dict[str, Any]]:
    """`rope_parameters` by layer type, or under None if they hold for all layers, without any that would be ignored."""
    config = config.get_text_config()
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
        if late is not None and late not in values and late != _default(config, name):
            raise ValueError(f"config.{name} is {late}, which transformers ignores: rope_parameters say {values[0]}")
    for parameters in layers.values():
        rope_type, theta = parameters.get("rope_type"), parameters.get("rope_theta")
        if rope_type not in ROPE_TYPES:
            raise ValueError(f"rope_type of {kind} is {rope_type!r}: expected one of {', '.join(ROPE_TYPES)}")
        if theta is None:
            raise ValueError(f"rope_parameters of {kind} have no rope_theta: expected the rotary base")
        if ignored := [name for name in _unread(config, parameters) if parameters[name] is not None]:
            raise ValueError(f"rope_parameters hold {', '.join(ignored)}, which {rope_type} ignores")
    # As transformers reads it: phi3 keeps it beside rope_parameters.
    own = getattr(config, "original_max_position_embeddings", None)
    for layer_type, parameters in layers.items():
        if parameters["rope_type"] in _RECORDS_ORIGINAL:
            recorded = own or parameters.get("original_max_position_embeddings") or config.max_position_embeddings
            layers[layer_type] = {**parameters, "original_max_position_embeddings": recorded}
    return layers


class _Unread(Exception):
    """Carries the names of settings out of the validation of transformers, before it warns of what follows."""


def _unread(config: PreTrainedConfig, parameters: dict[str, Any]) -> list[str]:
    """The settings of one layer type that the installed transformers does not read with this `rope_type` and model."""

    def received(
        _: str, names: set[str], required: set[str], optional_keys: Any = None, ignore_keys: Any = None
    ) -> None:
        known = {*required, *(optional_keys or ()), *(ignore_keys or ()), "partial_rotary_factor", "type"}
        raise _Unread(*sorted(set(names) - known))

    validating = copy.copy(config)
    validating.__dict__["_check_received_keys"] = received
    try:
        validate = getattr(validating, f"_validate_{parameters['rope_type']}_rope_parameters")
        validate(dict(parameters), ignore_keys=config.ignore_keys_at_rope_validation)
    except _Unread as found:
        # What only one model has (phimoe: short_mscale), its own code validates.
        code = inspect.getsource(sys.modules[type(config).__module__])
        return [name for name in found.args if name in RopeParameters.__annotations__ or f'"{name}"' not in code]
    return []


def _rotary_dim(config: PreTrainedConfig, parameters: dict[str, Any], layer_type: str | None) -> int:
    # A ValueError if layers are all alike; older versions of transformers know no layers that differ.
    with contextlib.suppress(ValueError, AttributeError):
        config = config if layer_type is None else config.per_layer_config[layer_type]
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    # "proportional" turns a part of the pairs, by the frequencies of all.
    share = 1.0 if parameters["rope_type"] == "proportional" else parameters.get("partial_rotary_factor", 1.0)
    return int(head_dim * share)


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
    return parameters.get("original_max_position_embeddings", config.get_text_config().max_position_embeddings)


def _scaled(
    config: PreTrainedConfig,
    parameters: dict[str, Any],
    method: str,
    length: int,
    original: int,
    settings: dict[str, Any],
) -> dict[str, Any]:
    """The parameters that a method other than "base" writes, with every default written out."""
    if not 1 < original < length:
        raise ValueError(f"original={original}: expected positions above 1 and below length, {length}")
    factor = length / original
    own = config.ignore_keys_at_rope_validation  # which it reads besides those of its `rope_type`
    stay = {"rope_theta", "partial_rotary_factor", *own, *(("mscale", "mscale_all_dim") if method == "yarn" else ())}
    kept = {name: value for name, value in parameters.items() if name in stay}
    record = {} if method in ("linear", "dynamic") else {"original_max_position_embeddings": original}
    defaults: dict[str, dict[str, Any]] = {
        "yarn": {"beta_fast": 32.0, "beta_slow": 1.0, "attention_factor": 0.1 * math.log(factor) + 1},
        "longrope": {"attention_factor": math.sqrt(1 + math.log(factor) / math.log(original))},
        "llama3": {"low_freq_factor": 1.0, "high_freq_factor": 4.0},
    }
    if kept.get("mscale") and kept.get("mscale_all_dim"):  # from which transformers makes it
        del defaults["yarn"]["attention_factor"]
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
    span, factor = f", {longest or 'any number of'} positions", parameters.get("factor")
    if rope_type not in ("default", "linear", "proportional"):
        start = _original(config, parameters)
        span, factor = f" from {start} to {longest}", factor or longest / start
    return f"{rope_type}{f' x{factor:g}' if factor else ''}{span}, theta {parameters['rope_theta']:g}"


def context_length(config: PreTrainedConfig) -> Any:
    """Tokens that a model of this config reads, or None if that has no limit, as with Dual Chunk Attention.

    Otherwise it is `max_position_embeddings` (MPT: `max_seq_len`), and `factor` times that for "dynamic", where it
    means the original positions.
    """
    config = config.get_text_config()
    if config._attn_implementation == ANY_LENGTH:
        return None
    positions = getattr(config, _length_name(config), None)
    if positions is None or not getattr(config, "rope_parameters", None):
        return positions
    parameters = config.rope_parameters.get("full_attention") or config.rope_parameters
    return round(positions * parameters["factor"]) if parameters.get("rope_type") == "dynamic" else positions


def _length_name(config: PreTrainedConfig) -> str:
    """The name under which a config keeps its context length."""
    return "max_seq_len" if hasattr(config, "max_seq_len") else "max_position_embeddings"


def rope_depends_on_length(config: PreTrainedConfig) -> bool:
    """Whether rotary frequencies depend on the length of the input ("dynamic", "longrope"): then even the first tokens
    of a sequence get other losses in a window of their own."""
    return not {"dynamic", "longrope"}.isdisjoint(_types(config))


def predicts_one_more(config: PreTrainedConfig) -> bool:
    """Whether a model of n positions may read n + 1 tokens of which the last is only predicted: no loss depends on how
    it is read.

    A table of positions has no place for it, and with frequencies that depend on the length, the others would be read
    differently.
    """
    rotary = getattr(config.get_text_config(), "rope_parameters", None)
    return bool(rotary) and not rope_depends_on_length(config)


def check_stale_windows(config: PreTrainedConfig, size: int) -> None:
    """Raise a ValueError if windows of `size` tokens would be read with the frequencies of a longer row before them.

    With "dynamic", transformers goes back to the original frequencies only for inputs shorter than the original
    positions; any other input keeps those of the longest one so far.
    """
    positions = config.get_text_config().max_position_embeddings if "dynamic" in _types(config) else None
    if positions is not None and size >= positions:
        raise ValueError(
            f"windows of {size} tokens would keep the dynamic rotary frequencies of longer rows read before: "
            f"expected a size below {positions}"
        )


def check_stale_rows(config: PreTrainedConfig, lengths: Iterable[int]) -> None:
    """Raise a ValueError if rows of one length would be read with the frequencies of longer ones before them."""
    if "dynamic" not in _types(config):
        return
    positions = config.get_text_config().max_position_embeddings
    longer = sorted({length for length in lengths if length >= positions})
    if len(longer) > 1:
        raise ValueError(
            f"rows of {longer[0]} tokens would keep the dynamic rotary frequencies of rows of {longer[-1]}: expected "
            f"one length from {positions} tokens on"
        )


def _types(config: PreTrainedConfig) -> set[str | None]:
    found = getattr(config.get_text_config(), "rope_parameters", None) or {}
    layers = [value for value in found.values() if isinstance(value, dict)] or [found]
    return {parameters.get("rope_type") for parameters in layers}
