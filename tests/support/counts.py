"""What `CountScorer` computes, from its definition: a dictionary of counts for each token, all probabilities of it."""

from collections import Counter

import numpy as np

from tokenweight import ShortContext
from tokenweight.method import sliding_windows


def distribution(before: list[int], order: int, vocab_size: int) -> np.ndarray:
    """The probability of every token after the tokens `before`."""
    probability = np.full(vocab_size, 1 / vocab_size)
    for n in range(min(order, len(before)) + 1):
        context = before[len(before) - n :]
        counts = Counter(before[t] for t in range(n, len(before)) if before[t - n : t] == context)
        if counts:
            hits = np.array([counts[token] for token in range(vocab_size)])
            probability = (hits + len(counts) * probability) / (hits.sum() + len(counts))
    return probability


def scores(document: list[int], context: ShortContext, order: int, vocab_size: int) -> np.ndarray:
    """Long loss, short loss and KL divergence of each token of one document, each in a row."""
    begin = np.zeros(len(document), dtype=int)
    for window in sliding_windows(len(document), context.size, context.stride):
        begin[window.first : window.stop] = window.start
    found = np.zeros((3, len(document)))
    for t in range(1, len(document)):
        long = distribution(document[:t], order, vocab_size)
        short = distribution(document[begin[t] : t], order, vocab_size)
        assert np.isclose([long.sum(), short.sum()], 1).all()
        losses = -np.log(long[document[t]]), -np.log(short[document[t]])
        found[:, t] = *losses, (long * np.log(long / short)).sum()
    return found
