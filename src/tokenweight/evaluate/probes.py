"""Retrieval probes: a long text that hides facts, a question about them, its answers, and decoys. Text only, no model.

The kinds are those of RULER (needles, variable tracking, word counts) and threads, where each fact points to the next.
The wording is our own, and so are these rules; numbers are therefore not comparable with published ones:

- Every answer has decoys of the same form. Except for "single" and the word counts they are what the text says of
  something else, so that copying any fact is not enough: for this, "multi_value" and "multi_query" hide 3 facts nobody
  asks for, and "variable_tracking" hides a second chain.
- Keys and listed words are made of syllables, not taken from a list of English words; those of threads are no UUIDs.
- Prompts are plain text without examples, and end within a sentence that the answer completes: base models can do it.
- The words to count are not numbered, and RULER's most frequent "word" (dots to be ignored) is left out.

Source: Hsieh et al. 2024, "RULER" (arXiv 2404.06654), and the scripts of NVIDIA/RULER for its settings: 4 keys, values
or queries; 4 hops; 10 common words 30 times among others 3 times (6 and 1 below 4096 tokens); 3 frequent words by
Zipf's law with exponent 2. Roberts et al. 2024, "Needle Threading" (arXiv 2411.05000).
"""

import math
import random
import re
from bisect import bisect_right
from collections.abc import Callable, Sequence
from functools import partial
from itertools import accumulate, pairwise
from string import ascii_lowercase, ascii_uppercase, digits
from typing import NamedTuple

from transformers import PreTrainedTokenizerBase

from tokenweight.data import special_tokens

NUM_DECOYS = 3
"""Of every probe, so that the chance level is 1/4 for each family."""
_SYLLABLES = ["bdfghjklmnprstvwz", "aeiou"] * 3
_NOISE = "Rain fell on the roofs. A dog slept by the gate. Somebody closed a window. The kettle sang. Nobody came."
_STOP = re.compile(r"(?<=[.!?])\s|(?<=[.!?][\"'\u201d\u2019)])\s|(?<=[\u3002\uff01\uff1f])")


class Probe(NamedTuple):
    """A question about a long text. `prompt` ends where the first answer begins (with a space)."""

    prompt: str
    answers: tuple[str, ...]
    """All are asked for."""
    decoys: tuple[str, ...]
    """Wrong in the place of any answer."""
    family: str
    length: int
    """Tokens that it was made to fill, special tokens and answers included."""
    depth: float | None
    """Share of the text (in characters) before the fact asked for, or the middle of several; None for word lists."""

    def continuations(self) -> list[list[str]]:
        """For each answer, what may follow the prompt: the earlier answers, and then the answer, or each decoy.

        The first of a list is right. All of a list end in the same mark, which no candidate contains: they exclude each
        other, and their probabilities can be compared whatever their numbers of tokens.
        """
        groups = []
        for number, answer in enumerate(self.answers, 1):
            earlier = "".join(f" {found}," for found in self.answers[: number - 1])
            mark = "." if number == len(self.answers) else ","
            groups.append([f"{earlier} {candidate}{mark}" for candidate in (answer, *self.decoys)])
        return groups


class _Draft(NamedTuple):
    """A probe of any length: `body(n)` is its text with n units of filling (sentences, or words), at least `least`."""

    opening: str
    closing: str
    answers: Sequence[str]
    decoys: Sequence[str]
    body: Callable[[int], str]
    least: int = 1

    def prompt(self, num_units: int) -> str:
        return f"{self.opening}\n\n{self.body(num_units)}\n\n{self.closing}"


class _Request(NamedTuple):
    """What the draft of a probe depends on."""

    rng: random.Random
    length: int
    depth: float | None
    text: str
    sentences: list[str]


def make_probes(
    family: str,
    tokenizer: PreTrainedTokenizerBase,
    *,
    length: int,
    depth: float | None,
    num: int,
    seed: int,
    haystack: str | None = None,
    room: int = 0,
) -> list[Probe]:
    """Make probes of one family, length and depth: the same ones on every machine.

    At each length and depth, the probes of one family and seed ask for the same facts: compare them in pairs. A prompt
    with its longest continuation, and with what the tokenizer puts before a text, has at most `length` tokens; one more
    sentence of the haystack (or one more of the rarest words) would be too much.

    Args:
        family: one of `FAMILIES`.
        tokenizer: of the model that will read them.
        length: tokens.
        depth: where the fact asked for lies, 0 (beginning) to 1 (end), at the nearest border of two sentences; several
            lie evenly around it, as far apart as they can. Facts nobody asks for lie anywhere, so that a model that
            copies the last fact does well at depth 1 only. None for a family in `WITHOUT_DEPTH`.
        num: how many.
        seed: another seed gives other facts and another piece of the haystack.
        haystack: a text, read from any of its sentences on, and again from its start; by default sentences of noise.
        room: tokens that a prompt leaves free, if its continuations need less.

    Raises:
        ValueError: if a setting makes no sense, or `length` is too short, naming the least.
    """
    drafts = _drafts(family, length, depth, num, seed, haystack)
    probes = [Probe("", tuple(draft.answers), tuple(draft.decoys), family, length, depth) for draft in drafts]
    sizes = [_needed(draft, probe, tokenizer, room) for draft, probe in zip(drafts, probes)]
    least = max(size(draft.least) for size, draft in zip(sizes, drafts))
    if least > length:
        raise ValueError(f"length {length} is too short for probes {family!r}: they need at least {least} tokens")
    units = [_most_units(size, draft.least, length) for size, draft in zip(sizes, drafts)]
    return [probe._replace(prompt=draft.prompt(num)) for probe, draft, num in zip(probes, drafts, units)]


def _drafts(family: str, length: int, depth: float | None, num: int, seed: int, haystack: str | None) -> list[_Draft]:
    if family not in FAMILIES:
        raise ValueError(f"family {family!r}: expected one of {', '.join(FAMILIES)}")
    if num < 1:
        raise ValueError(f"num {num}: expected at least 1 probe")
    if family in WITHOUT_DEPTH and depth is not None:
        raise ValueError(f"depth {depth} of probes {family!r}: expected None, for the words to count lie everywhere")
    if family not in WITHOUT_DEPTH and (depth is None or not 0 <= depth <= 1):
        raise ValueError(f"depth {depth} of probes {family!r}: expected a number from 0 (beginning) to 1 (end)")
    text = " ".join((_NOISE if haystack is None else haystack).split())
    sentences = [sentence for sentence in _STOP.split(text) if sentence]
    if not sentences:
        raise ValueError("the haystack is empty: expected a text, or None for sentences of noise")
    # Python seeds by the SHA-512 of a string: the same on every machine.
    draws = (random.Random(f"tokenweight probe {number} of {family}, seed {seed}") for number in range(num))
    return [FAMILIES[family](_Request(rng, length, depth, text, sentences)) for rng in draws]


def prompt_tokens(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """A text after what the tokenizer, by its own rule, puts before it (BOS), but without what it puts after it."""
    return special_tokens(tokenizer)[0] + tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]


def _most_units(size: Callable[[int], int], least: int, length: int) -> int:
    """The largest number of units, from `least` on (which fits), that needs at most `length` tokens."""
    beyond = 2 * least
    while size(beyond) <= length:
        beyond *= 2
    return bisect_right(range(least, beyond), length, key=size) + least - 1


def _needed(draft: _Draft, probe: Probe, tokenizer: PreTrainedTokenizerBase, room: int) -> Callable[[int], int]:
    """Tokens that the draft needs, as a function of its units."""
    longest = max(probe.continuations()[-1], key=lambda text: len(prompt_tokens(tokenizer, draft.closing + text)))

    def size(num_units: int) -> int:
        prompt = draft.prompt(num_units)
        free = room + len(prompt_tokens(tokenizer, prompt)) if room else 0
        return max(free, len(prompt_tokens(tokenizer, prompt + longest)))

    return size


def _distinct(rng: random.Random, pattern: Sequence[str], num: int, text: str = "") -> list[str]:
    """So many different words, none of them in `text`, made of one letter of each string of the pattern. Being of one
    length, they do not hold each other: if one is found in an output, it is meant."""
    found: dict[str, None] = {}
    while len(found) < num:
        word = "".join(rng.choice(letters) for letters in pattern)
        if word not in text:
            found[word] = None
    return list(found)


def _hide(request: _Request, asked: Sequence[str], others: Sequence[Sequence[str]]) -> Callable[[int], str]:
    """The text of n sentences with facts between them: those asked for around the depth, in order; others, each in a
    sequence that keeps its order, anywhere."""
    rng, depth, sentences = request.rng, request.depth, request.sentences
    assert depth is not None
    reach = min(depth, 1 - depth) if len(asked) > 1 else 0.0
    facts = [(depth + reach * (2 * i / max(1, len(asked) - 1) - 1), fact) for i, fact in enumerate(asked)]
    for sequence in others:
        facts += zip(sorted(rng.random() for _ in sequence), sequence)
    start = rng.randrange(len(sentences))

    def body(num_sentences: int) -> str:
        chosen = [sentences[(start + i) % len(sentences)] for i in range(num_sentences)]
        borders = [0, *accumulate(len(sentence) + 1 for sentence in chosen)]
        before: list[list[str]] = [[] for _ in borders]
        for place, fact in facts:
            nearest = min(range(len(borders)), key=lambda border: abs(borders[border] - place * borders[-1]))
            before[nearest].append(fact)
        pairs = zip(before, [[sentence] for sentence in chosen] + [[]])
        return " ".join(part for pair in pairs for parts in pair for part in parts)

    return body


def _needles(request: _Request, *, num_keys: int = 1, num_values: int = 1, num_others: int = NUM_DECOYS) -> _Draft:
    rng = request.rng
    keys = _distinct(rng, _SYLLABLES, num_keys + NUM_DECOYS, request.text)
    codes = _distinct(rng, [digits] * 7, num_keys * num_values + NUM_DECOYS, request.text)
    codes, decoys = codes[:-NUM_DECOYS], codes[-NUM_DECOYS:]
    fact = "A locker code of {} is {}.".format
    owners = [key for key in keys[:num_keys] for _ in range(num_values)]
    others = [[fact(key, code)] for key, code in zip(keys[num_keys:], decoys[:num_others])]
    body = _hide(request, [fact(owner, code) for owner, code in zip(owners, codes)], others)
    order = rng.sample(range(num_keys), num_keys)  # that of the question is not that of the text
    answers = [codes[i * num_values + j] for i in order for j in range(num_values)]
    closing = f"A locker code of {keys[0]} is"
    if len(answers) > 1:
        closing = f"The {len(answers)} locker codes of {', '.join(keys[i] for i in order)}, in order, are"
    return _Draft("Remember the locker codes that this text mentions.", closing, answers, decoys, body)


def _variables(request: _Request, *, num_hops: int = 4) -> _Draft:
    names = _distinct(request.rng, [ascii_uppercase] * 5, 2 * (num_hops + 1), request.text)
    numbers = _distinct(request.rng, [digits] * 5, 2, request.text)
    chains = [names[: num_hops + 1], names[num_hops + 1 :]]
    asked, other = (
        [f"Variable {chain[0]} is set to {number}."] + [f"Variable {new} copies {old}." for old, new in pairwise(chain)]
        for chain, number in zip(chains, numbers)
    )
    closing = f"The {num_hops + 1} variables that have the value {numbers[0]}, directly or as copies, are"
    body = _hide(request, asked, [other])
    return _Draft("Remember the variables of this text.", closing, chains[0], chains[1][:NUM_DECOYS], body)


def _thread(request: _Request, *, num_links: int, backward: bool) -> _Draft:
    """Decoys: where the first link leads, for one who stops there, and the ends of two other threads."""
    words = _distinct(request.rng, _SYLLABLES, NUM_DECOYS * (num_links + 1), request.text)
    threads = [words[i::NUM_DECOYS] for i in range(NUM_DECOYS)]
    told = [[f"From {key} the path leads to {value}." for key, value in pairwise(thread)] for thread in threads]
    told = [facts[::-1] if backward else facts for facts in told]
    start, first, *_, end = threads[0]
    decoys = [first, *(thread[-1] for thread in threads[1:])]
    closing = f"Who starts at {start} and follows the path {num_links} times ends at"
    return _Draft(
        "Remember the paths that this text mentions.", closing, [end], decoys, _hide(request, told[0], told[1:])
    )


def _counts(
    request: _Request, pattern: Sequence[str], occurrences: Callable[[int], list[int]], *, num: int, least: int
) -> _Draft:
    """Shuffled words, of which the first `num` occur more often than any other; the next ones are decoys."""
    source = f"{request.rng.random()}"

    def body(num_units: int) -> str:
        rng, times = random.Random(source), occurrences(num_units)
        words = _distinct(rng, pattern, len(times))  # begin alike whatever their number
        listed = [word for word, n in zip(words, times) for _ in range(n)]
        return " ".join(rng.sample(listed, len(listed)))

    known = _distinct(random.Random(source), pattern, num + NUM_DECOYS)
    closing = f"The {num} words that occur most often in the list are"
    return _Draft("Some words of this list are frequent.", closing, known[:num], known[num:], body, least)


def _common_words(request: _Request) -> _Draft:
    often, seldom = (30, 3) if request.length >= 4096 else (6, 1)
    return _counts(request, _SYLLABLES, lambda num_rare: [often] * 10 + [seldom] * num_rare, num=10, least=NUM_DECOYS)


def _frequent_words(request: _Request) -> _Draft:
    def occurrences(scale: int) -> list[int]:
        return [scale // rank**2 for rank in range(2, math.isqrt(scale) + 1)]

    # From scale 49 on the last decoy (rank 7) occurs, and rank 4 occurs more often than rank 5.
    return _counts(request, [ascii_lowercase] * 6, occurrences, num=3, least=49)


FAMILIES: dict[str, Callable[[_Request], _Draft]] = {
    "single": partial(_needles, num_others=0),
    "multi_key": _needles,
    "multi_value": partial(_needles, num_values=4),
    "multi_query": partial(_needles, num_keys=4),
    "variable_tracking": _variables,
    "common_words": _common_words,
    "frequent_words": _frequent_words,
    **{f"thread_forward_{num}": partial(_thread, num_links=num, backward=False) for num in (2, 4, 8)},
    **{f"thread_backward_{num}": partial(_thread, num_links=num, backward=True) for num in (2, 4, 8)},
}
"""The kinds of probes by name. "single" hides one fact, "multi_key" 3 others beside it; "multi_value" asks for 4 values
of one key, "multi_query" for the values of 4 keys; the links of a forward thread lie in the order in which they are
followed, those of a backward thread in the opposite one."""
WITHOUT_DEPTH = ("common_words", "frequent_words")
"""The kinds whose facts lie everywhere."""
