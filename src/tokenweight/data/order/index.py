"""An index of the words of texts: which texts are alike, by hashed TF-IDF, and which answer a question, by BM25."""

import collections
import re
import zlib
from collections.abc import Callable, Iterable, Sequence

import numpy as np
from jaxtyping import Float, Int

_WORD = re.compile(r"[\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff]|\w+")
"""A run of letters and digits; for Chinese and Japanese, which have no spaces, a character."""
_POSTINGS = 1 << 14
"""Most occurrences that are read to find the neighbours of a text: of its rarest words, by weight."""


class TextIndex:
    """Counts of each word in each text. A word is the CRC-32 of its lower case, so that no vocabulary is kept.

    Memory grows with the sum, over texts, of their different words: 24 bytes for each. Texts are not kept.

    Args:
        texts: read one at a time.
        num_words: number of words that can be distinguished; a power of two.

    Example:
        >>> index = TextIndex(["Whales are mammals.", "Ships sail.", "A whale is a mammal; whales sing."])
        >>> index.bm25("Do whales sing?").round(2).tolist()
        [0.52, 0.0, 1.11]
        >>> index.neighbors(2).tolist()
        [[2, -1], [-1, -1], [0, -1]]
    """

    def __init__(self, texts: Iterable[str], *, num_words: int = 1 << 20) -> None:
        self.num_words = num_words
        found = [self._counts(text) for text in texts]
        words, counts = (np.concatenate([np.zeros(0, np.int32), *(one[part] for one in found)]) for part in (0, 1))
        sizes = np.array([len(part) for part, _ in found], dtype=np.int64)
        self.lengths: Int[np.ndarray, " texts"] = np.array([part.sum() for _, part in found], dtype=np.int64)
        texts_of = np.repeat(np.arange(len(found), dtype=np.int32), sizes)
        self._starts = np.concatenate([[0], np.cumsum(sizes)])
        self._words, self._counts_of = words, counts
        order = np.argsort(words, kind="stable")
        self._texts, self._occurrences = texts_of[order], counts[order]
        present, frequencies = np.unique(words, return_counts=True)
        self._present, self._postings = present, np.concatenate([[0], np.cumsum(frequencies)])
        inverse = np.log(max(len(found), 1) / np.maximum(frequencies, 1))
        weights = (1 + np.log(counts)) * inverse[np.searchsorted(present, words)]
        norms = np.sqrt(np.bincount(texts_of, weights**2, minlength=len(found)))
        weights /= np.maximum(norms[texts_of], np.finfo(np.float64).tiny)
        self._weights = weights.astype(np.float32)
        self._posted = self._weights[order]

    def __len__(self) -> int:
        """The number of texts."""
        return len(self.lengths)

    def bm25(self, question: str, *, k1: float = 1.2, b: float = 0.75) -> Float[np.ndarray, " texts"]:
        """Score of each text as an answer: the sum, over the question's words, of Okapi's BM25 with the idf
        ln(1 + (N - n + 0.5) / (n + 0.5)), which is never negative.

        Args:
            question: words that no text has count for nothing.
            k1: saturation of repeated occurrences of a word.
            b: penalty for long texts, from 0 to 1.

        Source: Robertson and Zaragoza 2009, The Probabilistic Relevance Framework; the retriever of ACER, arXiv
        2410.09141.
        """
        scores = np.zeros(len(self))
        mean = max(self.lengths.mean(), 1.0) if len(self) else 1.0
        for word, times in zip(*self._counts(question)):
            postings = self._of_word(int(word))
            texts, counts = self._texts[postings], self._occurrences[postings]
            inverse = np.log1p((len(self) - len(texts) + 0.5) / (len(texts) + 0.5))
            damped = counts + k1 * (1 - b + b * self.lengths[texts] / mean)
            scores[texts] += times * inverse * counts * (k1 + 1) / damped
        return scores

    def neighbors(
        self, num: int, *, progress: Callable[[int, int], object] = lambda done, total: None
    ) -> Int[np.ndarray, "texts num"]:
        """The numbers of the texts that are most like each text, the nearest first; -1 where there are fewer.

        Similarity is the cosine of vectors (1 + ln count) * ln(N / n). The heaviest words of the text are looked up
        until they have occurred in 16,384 texts: so the time is linear, too.

        Args:
            num: neighbors of each text, at most.
            progress: called for each text that is done, with the number of all.
        """
        found = np.full((len(self), num), -1, dtype=np.int32)
        for text in range(len(self)):
            texts, weights = self._alike(text)
            best = np.lexsort((texts, -weights))[:num]
            found[text, : len(best)] = texts[best]
            progress(1, len(self))
        return found

    def _alike(self, text: int) -> tuple[np.ndarray, np.ndarray]:
        """The texts that share an informative word with a text, and their similarity."""
        own = slice(self._starts[text], self._starts[text + 1])
        heaviest = np.argsort(-self._weights[own], kind="stable")
        places, weights, left = [], [], _POSTINGS
        for word, weight in zip(self._words[own][heaviest], self._weights[own][heaviest]):
            postings = self._of_word(int(word))
            left -= postings.stop - postings.start
            if weight <= 0 or left < 0:
                break
            places.append(self._texts[postings])
            weights.append(weight * self._posted[postings])
        if not places:
            return np.zeros(0, np.int32), np.zeros(0)
        texts, inverse = np.unique(np.concatenate(places), return_inverse=True)
        alike = np.bincount(inverse, np.concatenate(weights))
        return texts[texts != text], alike[texts != text]

    def _of_word(self, word: int) -> slice:
        place = int(np.searchsorted(self._present, word))
        if place == len(self._present) or self._present[place] != word:
            return slice(0, 0)
        return slice(self._postings[place], self._postings[place + 1])

    def _counts(self, text: str) -> tuple[Int[np.ndarray, " words"], Int[np.ndarray, " words"]]:
        """The different words of a text, in order of their numbers, and how often each is in it."""
        counts: collections.Counter[int] = collections.Counter()
        for word, count in collections.Counter(_WORD.findall(text.lower())).items():
            counts[zlib.crc32(word.encode("utf-8", "surrogatepass")) % self.num_words] += count
        words = np.array(sorted(counts), dtype=np.int32)
        return words, np.array([counts[word] for word in words.tolist()], dtype=np.int32)


def rank_chunks(
    question: str, chunks: Sequence[str], *, k1: float = 1.2, b: float = 0.75
) -> Int[np.ndarray, " chunks"]:
    """The numbers of chunks, those that answer a question best first, by BM25; of equals, the first comes first.

    This is the retrieval step by which ACER makes training data for long contexts: a long text is cut into chunks, and
    a model with a short context answers from the best of them. For several questions, make a `TextIndex` once.

    Args:
        question: words to look for.
        chunks: parts of a text.
        k1: as in `TextIndex.bm25`.
        b: likewise.

    Source: Gao, Zhang, Callan 2024, ACER, arXiv 2410.09141.

    Example:
        >>> chunks = ["The ship left Nantucket.", "Ahab lost his leg to the whale.", "Whales breathe air."]
        >>> rank_chunks("Who lost a leg to a whale?", chunks).tolist()
        [1, 0, 2]
    """
    return np.argsort(-TextIndex(chunks).bm25(question, k1=k1, b=b), kind="stable")
