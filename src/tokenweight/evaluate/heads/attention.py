"""Hooks that record or change attention, at the attention interface that every layer of transformers calls."""

import contextlib
import functools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformers import AttentionInterface

Attend = Callable[..., tuple[Tensor, Any]]


@contextlib.contextmanager
def around_attention(around: Callable[..., tuple[Tensor, Any]]) -> Iterator[None]:
    """Call `around(attend, module, query, key, value, mask, **settings)` in place of every attention function `attend`.

    Projections, rotary embeddings, norms, masks and kernels stay those of the model, since a layer looks up its
    function after all of them, and its config does not change. Not thread-safe: all models of the process are affected.
    Breaks when layers no longer call `AttentionInterface.get_interface`, as in transformers 5.13 to 5.24.
    """
    original = AttentionInterface.get_interface

    def get_interface(self: AttentionInterface, name: str, default: Attend) -> Attend:
        return functools.partial(_call, around, original(self, name, default))

    AttentionInterface.get_interface = get_interface
    try:
        yield
    finally:
        AttentionInterface.get_interface = original


def _call(
    around: Callable[..., tuple[Tensor, Any]],
    attend: Attend,
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Any = None,
    **settings: Any,
) -> tuple[Tensor, Any]:
    return around(attend, module, query, key, value, attention_mask, **settings)


def layer_number(module: nn.Module) -> int:
    """Layer number of an attention module.

    Raises:
        ValueError: if it has none.
    """
    number = getattr(module, "layer_idx", None)
    if not isinstance(number, int):
        raise ValueError(f"heads: {type(module).__name__} does not know the number of its layer (layer_idx)")
    return number


def attention_rows(
    query: Float[Tensor, "1 heads seq dim"],
    key: Float[Tensor, "1 kv_heads seq dim"],
    mask: Any,
    first: int,
    settings: Mapping[str, Any],
) -> Float[Tensor, "heads rows columns"]:
    """Attention probabilities of the queries from `first` on, in float32 or better.

    Args:
        query: after rotary embedding and norms, as the attention function gets it.
        key: likewise; each of its heads serves an equal number of consecutive query heads.
        mask: what the attention function gets: True or 0 where a key is seen, or None for causal attention.
        first: the first of the queries whose probabilities are needed.
        settings: further arguments of the attention function: `scaling`, `softcap`, `sliding_window`, `s_aux`.

    Returns:
        A column for each key and, if the layer has sinks (`s_aux`), one more for the sink of the head.

    Raises:
        ValueError: if the mask is not a tensor, as with flex_attention.
    """
    dtype = torch.promote_types(query.dtype, torch.float32)
    heads, seq, dim = query.shape[1:]
    rows = query[0, :, first:].to(dtype).reshape(key.shape[1], -1, seq - first, dim)
    scaling, cap, sinks = (settings.get(name) for name in ("scaling", "softcap", "s_aux"))
    logits = rows @ key[0, :, None].to(dtype).mT * (dim**-0.5 if scaling is None else scaling)
    logits = logits.reshape(heads, seq - first, seq)
    logits = logits if cap is None else cap * torch.tanh(logits / cap)
    if mask is None:
        places = torch.arange(seq, device=query.device)
        behind = places[first:, None] - places
        window = settings.get("sliding_window") or seq
        logits = logits.masked_fill((behind < 0) | (behind >= window), -math.inf)
    elif not isinstance(mask, Tensor) or mask.dim() != 4:
        raise ValueError("attn_implementation: heads are watched with sdpa, eager or a flash kernel, without padding")
    elif mask.dtype == torch.bool:
        logits = logits.masked_fill(~mask[0, :, first:, :seq], -math.inf)
    else:
        logits = logits + mask[0, :, first:, :seq]
    if sinks is not None:
        logits = torch.cat([logits, sinks.to(dtype)[:, None, None].expand(-1, seq - first, 1)], dim=2)
    return logits.softmax(dim=2)


def check_rows(
    rows: Float[Tensor, "heads rows columns"],
    value: Float[Tensor, "1 kv_heads seq dim"],
    output: Float[Tensor, "rows heads dim"],
    module: nn.Module,
) -> None:
    """Raise a ValueError unless the probabilities, times the values, match the output of the layer's own function.

    This catches anything unexpected, such as a position bias, which the probabilities would miss.
    """
    grouped = rows[..., : value.shape[2]].reshape(value.shape[1], -1, rows.shape[1], value.shape[2])
    ours = (grouped @ value[0, :, None].to(rows.dtype)).reshape(*rows.shape[:2], -1).transpose(0, 1)
    error, largest = (ours - output).abs().max(), output.abs().max()
    eps = max(torch.finfo(dtype).eps for dtype in (output.dtype, torch.float32))  # softmax of float64 may be float32
    if not error <= math.sqrt(eps) * largest:
        raise ValueError(
            f"heads: the attention of {type(module).__name__} is not the softmax of queries times keys (by {error:.2g})"
        )


@contextlib.contextmanager
def without_heads(heads: Sequence[tuple[int, int]]) -> Iterator[None]:
    """Zero the output of some heads before the output projection: they add nothing to the residual stream.

    Args:
        heads: layer and head, both from 0.
    """

    def around(attend: Attend, module: nn.Module, *inputs: Any, **settings: Any) -> tuple[Tensor, Any]:
        output, weights = attend(module, *inputs, **settings)
        layer = layer_number(module)
        masked = [head for own, head in heads if own == layer]
        if masked:
            output = output.clone()
            output[:, :, masked] = 0
        return output, weights

    with around_attention(around):
        yield
