"""The divergence of order 0: between the token counts of a document and those of a window in it.

With e = u / V, the long distribution is (c + e) / (N + u), and the divergence needs the sums over all V tokens of
(c + e) log(c + e) and of (c + e) log(c' + e'), where ' marks the window. From one token to the next a single count
changes; but so may e, and with it all terms. So the sums over tokens that were seen are kept as polynomials in e:
log(c + e) with c >= 1 and 0 <= e <= 1 is one, to rounding, of 21 terms at most, of fewer if e stays small.
"""

import math

import numpy as np
from numpy.polynomial import chebyshev

from tokenweight.models.scorers.ngrams import Array

_DIGITS = 37.0  # nats to which polynomials are exact: 1e-16


class Polynomials:
    """Functions of e from 0 to `limit`, as Chebyshev coefficients."""

    def __init__(self, limit: float) -> None:
        # log(1 + e) is singular at -1: coefficients fall by this factor from each to the next.
        singular = 1 + 2 / limit
        self.num = math.ceil(_DIGITS / math.log(singular + math.sqrt(singular**2 - 1)))
        self.limit = limit
        angles = (np.arange(self.num) + 0.5) * math.pi / self.num
        self.nodes = (np.cos(angles) + 1) * limit / 2
        self._transform = 2 / self.num * np.cos(np.outer(angles, np.arange(self.num)))
        self._transform[:, 0] /= 2

    def coefficients(self, values: Array) -> Array:
        """Coefficients of functions with the given values at the nodes, one function per row."""
        return values @ self._transform

    def at(self, e: Array) -> Array:
        """The factors of the coefficients at each e."""
        return chebyshev.chebvander(2 * e / self.limit - 1, self.num - 1)


def _before(changes: Array, begins: Array) -> Array:
    """The sum of the rows before each row, from that of its number in `begins` on."""
    sums = np.cumsum(changes, axis=0)
    sums -= changes
    return sums - sums[begins]


def order_zero(
    long: tuple[Array, Array], short: tuple[Array, Array], read: Array, begins: Array, scored: Array, vocab_size: int
) -> Array:
    """The divergence at the scored tokens of the windows in one document.

    Args:
        long: for each token of the document, how often it came before, and how many different tokens did.
        short: the same for each token of the windows, one window after the other.
        read: the place of each token of the windows in the document.
        begins: where its window begins.
        scored: which are scored.
        vocab_size: tokens over which the last probability is uniform.
    """
    hits, kinds = long
    polynomials = Polynomials((kinds[-1] + 1) / vocab_size)
    counts = np.arange(1, int(hits.max()) + 2)
    logs = np.log(counts[:, None] + polynomials.nodes)
    xlogx = np.diff((counts[:, None] + polynomials.nodes) * logs, axis=0, prepend=0)
    places, e = read[scored], kinds[read[scored]] / vocab_size
    own = _before(polynomials.coefficients(xlogx)[hits], np.zeros(1, dtype=np.int64))[places]
    own_sum = (own * polynomials.at(e)).sum(axis=1) + (vocab_size - kinds[places]) * e * np.log(e)

    short_hits, short_kinds = short
    table = np.concatenate([np.zeros((1, polynomials.num)), polynomials.coefficients(logs)])  # of 0, 1, …
    was, now = table[short_hits], table[short_hits + 1]
    count, seen = hits[read], short_hits > 0
    total = _before((count + 1) - count * seen, begins)[scored]
    weighted = _before((count + 1)[:, None] * now - count[:, None] * was, begins)[scored]
    plain = _before(now - was, begins)[scored]
    short_e = short_kinds[scored] / vocab_size
    crossed = ((weighted + e[:, None] * plain) * polynomials.at(short_e)).sum(axis=1)
    crossed += (places - total + e * (vocab_size - short_kinds[scored])) * np.log(short_e)
    long_size = places + kinds[places]
    short_size = np.arange(len(read))[scored] - begins[scored] + short_kinds[scored]
    return (own_sum - crossed) / long_size + np.log(short_size / long_size)
