"""Counts of earlier occurrences of each context of a few tokens, and of the token after it, within segments of a text.

The *context of order n* of a token is the n tokens before it. Tokens are numbered from 0, over all segments together.
"""

from dataclasses import dataclass

import numpy as np

Array = np.ndarray


@dataclass(frozen=True)
class Order:
    """Counts of one order, at tokens whose context comes at least twice in the segment: elsewhere all of them are 0.

    All arrays have one entry for each of these tokens: grouped by context, within a group as they come.
    """

    tokens: Array
    """Where each of them is."""
    contexts: Array
    """How often its context came before."""
    hits: Array
    """How often it came before, after this context."""
    kinds: Array
    """How many different tokens came before, after this context."""
    kind: Array
    """The number of its kind, a context and the token after it; kinds of one context are numbered consecutively, in the
    order in which they first come."""
    first_kind: Array
    """The number of the first kind of its context."""
    new: Array
    """True where a kind comes for the first time; in the order of the numbers of kinds."""

    def dense(self, values: Array, num: int) -> Array:
        """An array of `num` tokens from one of those above, 0 at tokens that are not among `tokens`."""
        full = np.zeros(num, dtype=np.int64)
        full[self.tokens] = values
        return full


def count_orders(tokens: Array, begins: Array, order: int) -> list[Order]:
    """The counts of order 0 to `order`, each of the tokens before in the same segment.

    Args:
        tokens: ids, at least 0.
        begins: where the segment of each token begins.
    """
    num, places = len(tokens), np.arange(len(tokens))
    targets, groups = places, np.cumsum(begins == places)
    contexts, orders = places - begins, []
    for _ in range(order + 1):
        by_pair, starts = _grouped(groups, tokens[targets], len(tokens))
        ranks = np.arange(len(targets)) - starts
        hits = np.empty_like(ranks)
        hits[by_pair] = ranks
        new = hits == 0
        seen = np.cumsum(new) - new  # kinds before, of all contexts
        first = _run_starts(groups)
        number = np.empty_like(ranks)
        number[by_pair] = seen[by_pair[starts]]
        orders.append(Order(targets, contexts, hits, seen - seen[first], number, seen[first], new))
        # A context of one token more is a pair of this order, one token further on.
        size = np.bincount(starts, minlength=len(starts))[starts]
        following = targets[by_pair] + 1
        kept = (size > 1) & (following < num)
        kept[kept] = begins[following[kept]] < following[kept]
        targets, groups, contexts = following[kept], starts[kept], ranks[kept]
        if not len(targets):
            break
    return orders


def _grouped(groups: Array, tokens: Array, num: int) -> tuple[Array, Array]:
    """Sort pairs of group and token, stably: the order, and where in it the run of each begins."""
    size = int(tokens.max(initial=0)) + 1
    shift = len(groups).bit_length()
    if num * size < 1 << (62 - shift):
        keys = np.sort(((groups * size + tokens) << shift) | np.arange(len(groups)))
        order, pairs = keys & ((1 << shift) - 1), keys >> shift
    else:
        order = np.lexsort((tokens, groups))
        pairs = groups[order] * size + tokens[order]
    return order, _run_starts(pairs)


def _run_starts(values: Array) -> Array:
    """The start of the run of equal values that each value belongs to."""
    places = np.arange(len(values))
    begins = np.ones(len(values), dtype=bool)
    begins[1:] = values[1:] != values[:-1]
    return np.maximum.accumulate(np.where(begins, places, 0))
