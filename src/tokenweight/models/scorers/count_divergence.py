"""The exact Kullback-Leibler divergence between predictions by counts in the whole document and in a window.

Both distributions are p_n = (c_n + u_n p_{n-1}) / (N_n + u_n) (`CountScorer`), so p_n is a multiple of p_{n-1} but at
tokens that came after the context before. With s for the escape u_n / (N_n + u_n), K for the long distribution, Q for
the short one, D_n for their divergence, and sums over these tokens alone,

    D_n = s_K [(1 - sum K_{n-1}) log(s_K / s_Q) + D_{n-1} - sum K_{n-1} log(K_{n-1} / Q_{n-1})]
          + sum K_n log(K_n / Q_n).

For orders above 0 the sums are made term by term. D_0 is over all tokens of the document, and is updated from each
token to the next (count_unigrams.py).
"""

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from tokenweight.method import Window
from tokenweight.models.scorers.count_unigrams import order_zero
from tokenweight.models.scorers.ngrams import Array, Order

_TERMS = 1 << 17  # held at once; more, if one token has more
_TOKENS = 256  # most tokens whose terms are held at once


@dataclass(frozen=True)
class Windows:
    """Windows of documents, with the tokens that they read concatenated."""

    windows: Sequence[Window]
    read: Array
    """The place of each of these tokens in the documents."""
    begins: Array
    """The place among them at which its window begins."""
    scored: Array
    """Whether the window scores it."""

    @classmethod
    def of(cls, windows: Sequence[Window]) -> "Windows":
        """Collect the tokens of windows."""
        starts, firsts, stops = np.array(windows).T
        sizes = stops - starts
        begins = np.repeat(np.cumsum(sizes) - sizes, sizes)
        read = np.repeat(starts, sizes) + np.arange(len(begins)) - begins
        return cls(windows, read, begins, read >= np.repeat(firsts, sizes))


class Divergences:
    """KL(long || short) of each token that windows score, in nats; of windows in the order of the documents.

    Args:
        long: counts in whole documents, concatenated.
        begins: where the document of each token begins.
        vocab_size: tokens over which the last probability is uniform.
    """

    def __init__(self, long: Sequence[Order], begins: Array, vocab_size: int) -> None:
        self._orders: list[_Counts] = []
        for n, order in enumerate(long):
            lower = self._orders[-1].kind if self._orders else np.zeros(len(begins), dtype=np.int64)
            self._orders.append(_Counts(n, order, lower))
        self._hits, self._begins, self._vocab_size = long[0].hits, begins, vocab_size

    def of(self, windows: Windows, short: Sequence[Order]) -> Array:
        """The divergences of the tokens that these windows score, given the counts in them."""
        num = len(windows.read)
        found = self._lowest(windows, short[0])
        sides = [
            np.stack([one.dense(one.kinds, num)[windows.scored], one.dense(one.contexts, num)[windows.scored]])
            for one in short
        ]
        none = np.zeros((2, len(found)), dtype=np.int64)
        sides += [none] * (len(self._orders) - len(sides))
        done = 0
        for window in windows.windows:
            for counts in self._orders:
                counts.advance(window.first)
                counts.enter(window.start)
            for first, stop in self._parts(window):
                here = slice(done, done + stop - first)
                found[here] = self._higher(first, stop, found[here], [side[:, here] for side in sides])
                done = here.stop
        return np.maximum(found, 0)  # rounding may leave -1e-16

    def _lowest(self, windows: Windows, short: Order) -> Array:
        """The divergences of order 0, document by document."""
        document = self._begins[windows.read]
        edges = np.flatnonzero(np.diff(document, prepend=-1, append=-1))
        found = []
        for first, stop in itertools.pairwise(edges):
            begin, end = document[first], np.searchsorted(self._begins, document[first], side="right")
            found.append(
                order_zero(
                    (self._hits[begin:end], self._orders[0].kinds[begin:end]),
                    (short.hits[first:stop], short.kinds[first:stop]),
                    windows.read[first:stop] - begin,
                    windows.begins[first:stop] - first,
                    windows.scored[first:stop],
                    self._vocab_size,
                )
            )
        return np.concatenate(found)

    def _parts(self, window: Window) -> Iterator[tuple[int, int]]:
        """Ranges of the scored tokens of a window, with about `_TERMS` terms and at most `_TOKENS` tokens each."""
        first = window.first
        while first < window.stop:
            stop = min(first + _TOKENS, window.stop)
            if len(self._orders) > 1:
                terms = np.cumsum(self._orders[1].kinds[first:stop])
                stop = first + max(1, int(np.searchsorted(terms, _TERMS, side="right")))
            yield first, stop
            first = stop

    def _higher(self, first: int, stop: int, divergence: Array, sides: list[Array]) -> Array:
        """The divergences of the highest order at tokens [first, stop), given those of order 0.

        Args:
            sides: for each order and token: different tokens after its context in the window; and all of them.
        """
        found, below = divergence, None
        for n, counts in enumerate(self._orders[1:], 1):
            kinds, contexts = counts.kinds[first:stop], counts.contexts[first:stop]
            some = np.flatnonzero(kinds)
            if not len(some):
                break
            terms = counts.terms(first, stop)
            if below is None:
                lower = self._unigrams(first, stop, terms, sides[0])
            else:
                offsets = below.begins - self._orders[n - 1].first_kind[first:stop]
                places = counts.lower.take(terms.kind) + offsets.take(terms.token)
                lower = below.long.take(places), below.short.take(places), below.summand.take(places)
            (short_kinds, short_contexts), size = sides[n], np.maximum(contexts + kinds, 1)
            short_kinds = np.where(short_contexts, short_kinds, 1)
            short_size = short_contexts + short_kinds
            token = terms.token
            terms.long = terms.hits * (1 / size).take(token) + (kinds / size).take(token) * lower[0]
            terms.short = terms.short_hits * (1 / short_size).take(token)
            terms.short += (short_kinds / short_size).take(token) * lower[1]
            terms.summand = terms.long * np.log(terms.long / terms.short)
            edges = terms.begins[some]
            mass, under, over = (np.add.reduceat(of, edges) for of in (lower[0], lower[2], terms.summand))
            escape, short_escape = kinds[some] / size[some], short_kinds[some] / short_size[some]
            found[some] = escape * ((1 - mass) * np.log(escape / short_escape) + found[some] - under) + over
            below = terms
        for counts in self._orders:
            counts.advance(stop)
        return found

    def _unigrams(self, first: int, stop: int, terms: "_Terms", short: Array) -> tuple[Array, Array, Array]:
        """Long and short probability, of order 0, of the token of each term, and its summand."""
        counts, (short_kinds, short_contexts) = self._orders[0], short
        kinds, contexts = counts.kinds[first:stop], counts.contexts[first:stop]
        kind, token = self._orders[1].lower.take(terms.kind), terms.token
        hits, short_hits = counts.hits_of(kind, token, first, stop)
        size, short_size = contexts + kinds, short_contexts + short_kinds
        long = (hits + (kinds / self._vocab_size).take(token)) * (1 / size).take(token)
        short = (short_hits + (short_kinds / self._vocab_size).take(token)) * (1 / short_size).take(token)
        return long, short, long * np.log(long / short)


class _Terms:
    """The tokens that came after the contexts of some tokens: one term for each, token by token."""

    def __init__(self, token: Array, begins: Array, kind: Array, hits: Array, short_hits: Array) -> None:
        self.token, self.begins, self.kind = token, begins, kind
        self.hits, self.short_hits = hits, short_hits
        self.long, self.short, self.summand = hits, hits, hits


class _Counts:
    """The counts of one order at every token; and those of its kinds, as the documents are read from start to end."""

    def __init__(self, n: int, order: Order, lower: Array) -> None:
        num = len(lower)
        self.n = n
        self.kind = np.full(num, -1)
        self.kind[order.tokens] = order.kind
        self.first_kind, self.kinds = order.dense(order.first_kind, num), order.dense(order.kinds, num)
        self.contexts = order.dense(order.contexts, num)
        self.lower = lower[order.tokens[order.new]]
        """The kind of order n - 1 of each kind."""
        self._long, self._before = np.zeros((2, len(self.lower)), dtype=np.int64)
        self._read = self._entered = 0

    def _add(self, counts: Array, first: int, stop: int) -> None:
        kind = self.kind[first:stop]
        np.add.at(counts, kind[kind >= 0], 1)

    def advance(self, stop: int) -> None:
        """Count the tokens before `stop`."""
        self._add(self._long, self._read, stop)
        self._read = max(self._read, stop)

    def enter(self, start: int) -> None:
        """Begin a window: what comes before, or has a context that begins before, does not count in it."""
        self._add(self._before, self._entered, start + self.n)
        self._entered = max(self._entered, start + self.n)

    def terms(self, first: int, stop: int) -> _Terms:
        """The terms of tokens [first, stop), after all before them were counted."""
        kinds, first_kind = self.kinds[first:stop], self.first_kind[first:stop]
        begins = np.cumsum(kinds) - kinds
        token = np.repeat(np.arange(stop - first), kinds)
        kind = np.arange(len(token)) + (first_kind - begins).take(token)
        hits = self._long.take(kind)
        # What comes within [first, stop) counts for later tokens with the same context.
        known = np.flatnonzero(self.kind[first:stop] >= 0)
        known = known[np.argsort(first_kind[known], kind="stable")]
        edges = np.flatnonzero(np.diff(first_kind[known], prepend=-1, append=-1))
        later = np.repeat(edges[1:], np.diff(edges)) - np.arange(len(known)) - 1
        earlier = np.repeat(np.arange(len(known)), later)
        after = earlier + 1 + np.arange(len(earlier)) - np.repeat(np.cumsum(later) - later, later)
        earlier, after = known[earlier], known[after]
        np.add.at(hits, begins[after] + self.kind[first:stop][earlier] - first_kind[after], 1)
        return _Terms(token, begins, kind, hits, np.maximum(hits - self._before.take(kind), 0))

    def hits_of(self, kind: Array, token: Array, first: int, stop: int) -> tuple[Array, Array]:
        """Counts of kinds of order 0, in the document and in the window, before tokens `first + token`."""
        own, columns = np.unique(self.kind[first:stop], return_inverse=True)
        place = np.full(len(self._long), len(own))
        place[own] = np.arange(len(own))
        came = np.zeros((stop - first, len(own) + 1), dtype=np.int16)  # the last column for all that do not come
        came[np.arange(1, stop - first), columns[:-1]] = 1
        came = np.cumsum(came, axis=0, dtype=np.int16)
        hits = self._long.take(kind) + came.ravel().take(token * came.shape[1] + place.take(kind))
        return hits, hits - self._before.take(kind)
