"""BM25 and the similarity of texts, against the formulas word by word."""

import doctest
import math
import re
from collections import Counter

import numpy as np
import pytest

from texts import TEXT
from tokenweight.data import TextIndex, rank_chunks
from tokenweight.data.order import index as index_module

CHUNKS = [TEXT[start : start + 400] for start in range(0, 12_000, 400)]


def test_the_examples_of_the_docstrings_are_true():
    assert doctest.testmod(index_module).attempted > 3
    assert doctest.testmod(index_module).failed == 0


def words(text):
    return Counter(re.findall(r"\w+", text.lower()))


def test_bm25_is_the_sum_of_its_formula_over_the_words_of_a_question():
    question, k1, b = "Did the whale, the white whale, sink the ship? Quidditch", 0.9, 0.4
    counts = [words(chunk) for chunk in CHUNKS]
    mean = sum(one.total() for one in counts) / len(counts)
    scores = []
    for one in counts:
        score = 0.0
        for word, times in words(question).items():
            having = sum(word in other for other in counts)
            inverse = math.log(1 + (len(counts) - having + 0.5) / (having + 0.5))
            score += times * inverse * one[word] * (k1 + 1) / (one[word] + k1 * (1 - b + b * one.total() / mean))
        scores.append(score)
    np.testing.assert_allclose(TextIndex(CHUNKS).bm25(question, k1=k1, b=b), scores, rtol=1e-12)
    assert rank_chunks(question, CHUNKS, k1=k1, b=b).tolist() == np.argsort(-np.array(scores), kind="stable").tolist()


def test_neighbors_are_the_texts_of_the_highest_cosine():
    counts = [words(chunk) for chunk in CHUNKS]
    having = Counter(word for one in counts for word in one)
    vectors = [
        {word: (1 + math.log(count)) * math.log(len(counts) / having[word]) for word, count in one.items()}
        for one in counts
    ]
    norms = [math.sqrt(sum(weight**2 for weight in vector.values())) for vector in vectors]
    found = TextIndex(CHUNKS).neighbors(4)
    for number, vector in enumerate(vectors):
        cosines = [
            sum(weight * other.get(word, 0) for word, weight in vector.items()) / (norms[number] * norm)
            for other, norm in zip(vectors, norms)
        ]
        cosines[number] = -1.0
        best = sorted(cosines, reverse=True)[:4]
        assert [cosines[one] for one in found[number]] == pytest.approx(best, abs=1e-6)  # of float32 weights


def test_only_so_many_occurrences_are_looked_at_the_heaviest_words_first(monkeypatch):
    texts = ["whale harpoon common"] + ["harpoon common"] * 2 + ["whale common"] + ["ship common"] * 4
    assert TextIndex(texts).neighbors(3)[0].tolist() == [3, 1, 2]
    monkeypatch.setattr(index_module, "_POSTINGS", 2)  # those of the whale
    assert TextIndex(texts).neighbors(3)[0].tolist() == [3, -1, -1]


@pytest.mark.parametrize("texts", [[], [""], ["", "!?"], ["one text", ""]], ids=str)
def test_texts_without_words_are_like_none_and_answer_nothing(texts):
    index = TextIndex(texts)
    assert len(index) == len(texts)
    assert index.bm25("whale ship").tolist() == [0.0] * len(texts)
    assert index.neighbors(2).tolist() == [[-1, -1]] * len(texts)


def test_texts_without_spaces_are_compared_by_their_characters():
    texts = ["鯨は海の哺乳類である", "海には鯨がいる", "電車は駅に着いた", "駅で電車を待つ"]
    assert TextIndex(texts).neighbors(1)[:, 0].tolist() == [1, 0, 3, 2]
