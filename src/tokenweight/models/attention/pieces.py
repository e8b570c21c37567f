"""Attention of a few queries at a time, which never holds the scores of a whole sequence against itself."""

import itertools
import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

_SCORES, _SCORES_CPU = 2**25, 2**22
"""Attention scores held at a time; fewer on a CPU, so that its caches hold them."""


class Scores(NamedTuple):
    """Transformation of the products of queries and keys before the softmax."""

    scaling: float
    softcap: float | None = None
    sinks: Float[Tensor, " heads"] | None = None
    """Attention sinks: scores of what each head may attend to instead of a token."""

    def scaled(self, factor: float) -> "Scores":
        """The same with another scale."""
        return self._replace(scaling=self.scaling * factor)

    def mix(
        self,
        parts: list[tuple[Float[Tensor, "batch heads queries dim"], Float[Tensor, "batch key_heads _ dim"]]],
        value: Float[Tensor, "batch key_heads keys dim_v"],
        hidden: Bool[Tensor, "... queries _"],
    ) -> Float[Tensor, "batch queries heads dim_v"]:
        """Attention-weighted means of the values. Keys come in parts, each with the queries that see it.

        Args:
            hidden: True where a query does not see a key of the last part; those of the others are seen by all.
        """
        (batch, heads, num, _), groups = parts[0][0].shape, value.shape[1]
        products = [_grouped(query * self.scaling, groups) @ key.transpose(-1, -2) for query, key in parts]
        if self.softcap is not None:
            products = [self.softcap * torch.tanh(product / self.softcap) for product in products]
        *others, last = (product.unflatten(2, (heads // groups, num)) for product in products)
        scores = torch.cat([*others, last.masked_fill(hidden, -math.inf)], dim=-1)
        if self.sinks is not None:
            sinks = self.sinks.to(scores.dtype).view(1, groups, -1, 1, 1).expand(batch, -1, -1, num, -1)
            scores = torch.cat([scores, sinks], dim=-1)
        wide = torch.promote_types(scores.dtype, torch.float32)
        weights = scores.softmax(dim=-1, dtype=wide)[..., : value.shape[2]].to(value.dtype)
        return (weights.flatten(2, 3) @ value).view(batch, heads, num, -1).transpose(1, 2)


def _grouped(query: Tensor, groups: int) -> Float[Tensor, "batch key_heads rows dim"]:
    """Queries of the heads that share a key head, one after the other."""
    return query.unflatten(1, (groups, -1)).flatten(2, 3)


def masked(
    scores: Scores, query: Tensor, key: Tensor, value: Tensor, seen: Bool[Tensor, "batch 1 queries keys"]
) -> Float[Tensor, "batch queries heads dim_v"]:
    """Attention under a mask."""
    pieces = [
        scores.mix([(query[:, :, piece], key)], value, ~seen[:, :, None, piece])
        for piece in _slices(0, query.shape[2], _at_a_time(query, key.shape[2]))
    ]
    return torch.cat(pieces, dim=1)


def chunked(
    scores: Scores,
    queries: tuple[Tensor, ...],
    key: Tensor,
    value: Tensor,
    positions: Int[Tensor, " keys"],
    step: int,
) -> Float[Tensor, "batch queries heads dim_v"]:
    """Causal attention of one document, with different queries for keys of other chunks.

    Args:
        queries: for the keys of their own chunk, and if there are any others, of the chunk before, and of older ones.
        key: the document's, up to the last query.
        positions: those of the keys, rising; the queries are the last ones.
        step: tokens of a chunk.
    """
    keys, num = key.shape[2], queries[0].shape[2]
    if len(queries) == 1 and keys == num and scores.softcap is None and scores.sinks is None:
        options: dict[str, Any] = {"is_causal": True, "scale": scores.scaling, "enable_gqa": True}
        return nn.functional.scaled_dot_product_attention(queries[0], key, value, **options).transpose(1, 2)
    own, before, older = queries * 3 if len(queries) == 1 else queries
    pieces, first = [], keys - num
    chunks, lengths = (positions[first:] // step).unique_consecutive(return_counts=True)
    for chunk, length in zip(chunks.tolist(), lengths.tolist()):
        starts = torch.searchsorted(positions, positions.new_tensor([(chunk - 1) * step, chunk * step])).tolist()
        for piece in _slices(first, first + length, _at_a_time(own, keys)):
            here, edges = slice(piece.start - keys + num, piece.stop - keys + num), [0, *starts, piece.stop]
            spans = [slice(*pair) for pair in itertools.pairwise(edges)]
            parts = [(query[:, :, here], key[:, :, span]) for query, span in zip((older, before, own), spans)]
            own_keys = torch.arange(starts[-1], piece.stop, device=key.device)
            hidden = own_keys > own_keys[piece.start - piece.stop :, None]
            pieces.append(scores.mix(parts, value[:, :, : piece.stop], hidden))
        first += length
    return torch.cat(pieces, dim=1)


def _at_a_time(query: Tensor, keys: int) -> int:
    batch, heads = query.shape[:2]
    scores = _SCORES_CPU if query.device.type == "cpu" else _SCORES
    return max(1, scores // (batch * heads * keys))


def _slices(start: int, stop: int, most: int) -> Iterator[slice]:
    return (slice(at, min(at + most, stop)) for at in range(start, stop, most))
