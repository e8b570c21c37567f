"""Documents in an order in which similar ones are neighbours."""

import logging
import os
import tempfile
from array import array
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import numpy as np
from jaxtyping import Int

from tokenweight.data.documents import Document
from tokenweight.data.order.index import TextIndex
from tokenweight.records import counted

logger = logging.getLogger(__name__)
NEIGHBORS, CHAIN = 9, 21
"""Neighbours among which the next document is looked for, and documents of a chain: `sort/sort.py` of the source."""
BEGINNING, NGRAM, ALIKE = 100, 3, 0.85
"""Characters by which two documents are compared, in n-grams of so many, and the Jaccard index of near duplicates."""


def by_similarity(
    documents: Iterable[Document],
    *,
    seed: int = 0,
    folder: str | os.PathLike[str] | None = None,
    progress: Callable[..., object] = lambda done, total=None: None,
) -> Iterator[Document]:
    """Each document beside those that are most like it, by TF-IDF of their words: `similar_path` of a `TextIndex`.

    A document whose first 100 characters are nearly those of the one before (Jaccard index of their 3-grams above
    0.85) is left out. A warning says how many are.

    All documents are read before the first one comes. Their texts are kept in a temporary file; what memory holds of
    them is their index and their names. The same documents and seed give the same order.

    Args:
        documents: read once.
        seed: decides the documents that chains begin with.
        folder: for the temporary file, with room for all texts; by default that of the system.
        progress: called before the first document comes: for each that is read, and again for each whose neighbors
            are found, then with the number of these calls as its total.

    Source: Shi et al. 2024, In-Context Pretraining, arXiv 2310.10638; `sort/sort.py` of its code. There, documents are
    compared by an encoder (Contriever) and an approximate search.
    """
    names: list[str] = []
    stops = array("q", [0])
    with tempfile.TemporaryFile(dir=None if folder is None else Path(folder)) as file:

        def texts() -> Iterator[str]:
            for name, text in documents:
                names.append(name)
                file.write(text.encode("utf-8", "surrogatepass"))
                stops.append(file.tell())
                progress(1)
                yield text

        neighbors = TextIndex(texts()).neighbors(NEIGHBORS, progress=lambda done, total: progress(done, 2 * total))
        previous, left_out = None, array("q")
        for number in similar_path(neighbors, seed=seed):
            file.seek(stops[number])
            text = file.read(stops[number + 1] - stops[number]).decode("utf-8", "surrogatepass")
            if previous is not None and _begin_alike(previous, text[:BEGINNING]):
                left_out.append(number)
                continue
            previous = text[:BEGINNING]
            yield Document(names[number], text)
    if left_out:
        how_many, example = counted(len(left_out), "document"), names[left_out[0]]
        logger.warning("left out %s that begin like the one before, such as %s", how_many, example)


def similar_path(neighbors: Int[np.ndarray, "documents neighbors"], *, seed: int = 0) -> list[int]:
    """The numbers of all documents, each once, in an order in which neighbours stand side by side.

    A chain begins with a random document and continues with the nearest neighbour that is in no chain yet, until there
    is none or the chain has 21. Then shorter chains are dissolved, one after the other: each of their documents is put
    before its nearest neighbour in another chain; one without such a neighbour stays.

    Args:
        neighbors: those of each document, the nearest first; -1 for none.
        seed: decides the beginnings.
    """
    chains = _Chains(neighbors)
    for start in np.random.default_rng(seed).permutation(len(neighbors)).tolist():
        chains.begin(start)
    for chain in range(len(chains.first)):
        if chains.size[chain] < CHAIN:
            chains.dissolve(chain)
    return [document for chain in range(len(chains.first)) for document in chains.documents(chain)]


class _Chains:
    """Linked lists of documents: one is put before another without moving those after it."""

    def __init__(self, neighbors: np.ndarray) -> None:
        self.neighbors = neighbors
        num = len(neighbors)
        self.chain, self.before, self.after = ([-1] * num for _ in range(3))
        self.first: list[int] = []
        self.size: list[int] = []

    def begin(self, document: int) -> None:
        """Make a chain that begins with a document, unless that is in one."""
        if self.chain[document] >= 0:
            return
        chain, last = len(self.first), -1
        self.first.append(document)
        self.size.append(0)
        while document >= 0 and self.size[chain] < CHAIN:
            self._link(chain, last, document)
            last = document
            document = next((one for one in self._near(document) if self.chain[one] < 0), -1)

    def dissolve(self, chain: int) -> None:
        """Put each document of a chain before its nearest neighbour elsewhere; those that have none are left."""
        documents = list(self.documents(chain))
        self.first[chain], self.size[chain], last = -1, 0, -1
        for document in documents:
            place = next((one for one in self._near(document) if self.chain[one] != chain), -1)
            self.before[document] = self.after[document] = -1
            if place < 0:
                self.first[chain] = document if last < 0 else self.first[chain]
                self._link(chain, last, document)
                last = document
            else:
                self._insert(document, place)

    def documents(self, chain: int) -> Iterator[int]:
        """The documents of a chain, in order."""
        document = self.first[chain]
        while document >= 0:
            yield document
            document = self.after[document]

    def _near(self, document: int) -> list[int]:
        return [one for one in self.neighbors[document].tolist() if one >= 0]

    def _link(self, chain: int, last: int, document: int) -> None:
        self.chain[document], self.before[document] = chain, last
        if last >= 0:
            self.after[last] = document
        self.size[chain] += 1

    def _insert(self, document: int, place: int) -> None:
        chain, before = self.chain[place], self.before[place]
        self.chain[document], self.before[document], self.after[document] = chain, before, place
        self.before[place] = document
        if before >= 0:
            self.after[before] = document
        else:
            self.first[chain] = document
        self.size[chain] += 1


def _begin_alike(one: str, other: str) -> bool:
    """Whether two beginnings share more than 85 % of the n-grams of both; without any, whether they are equal."""
    grams = [{text[start : start + NGRAM] for start in range(len(text) - NGRAM + 1)} for text in (one, other)]
    either = len(grams[0] | grams[1])
    return len(grams[0] & grams[1]) > ALIKE * either if either else one == other
