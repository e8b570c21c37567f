"""Retrieval probes: a long text that hides facts, a question about them, its answers, and decoys. Text only, no model.

The families are those of RULER (needles, variable tracking, word counts), threads, where each fact points to the next,
and pairs of keys and values, asked for after examples. The wording is our own, and so are these rules, so the numbers
are not comparable with published ones:

- Every answer has decoys of the same form. Except for "single" and the word counts, they are what the text says about
  something else, so that copying any fact is not enough: for this, "multi_value" and "multi_query" hide 3 facts that
  are not asked for, and "variable_tracking" hides a second chain.
- Keys and listed words are made of syllables, not taken from a list of English words; keys of threads are not UUIDs.
- Prompts are plain text, only "key_value" with examples, and end within a sentence that the answer completes, as base
  models can.
- The words to count are not numbered, and RULER's most frequent "word" (dots to be ignored) is left out.

Source: Hsieh et al. 2024, "RULER" (arXiv 2404.06654), and the scripts of NVIDIA/RULER for its settings: 4 keys, values
or queries; 4 hops; 10 common words 30 times among others 3 times (6 and 1 below 4096 tokens); 3 frequent words by
Zipf's law with exponent 2. Roberts et al. 2024, "Needle Threading" (arXiv 2411.05000): keys by a condition; threads,
one or several, in three directions. Yen et al. 2024, "HELMET" (arXiv 2410.02694): a list of pairs, with two examples.
Text that grows before a fact at a fixed distance: arXiv 2604.02650.
"""

import math
import random
import re
from bisect import bisect_right
from collections.abc import Callable, Sequence
from itertools import accumulate, pairwise
from string import ascii_lowercase, ascii_uppercase, digits
from typing import Literal, NamedTuple

from transformers import PreTrainedTokenizerBase

from tokenweight.data import text_tokens
from tokenweight.models import special_tokens

NUM_DECOYS = 3
"""Decoys per probe, so that chance accuracy is 1/4 in each family."""
_SYLLABLES = ["bdfghjklmnprstvwz", "aeiou"] * 3
_INITIAL = "z"  # of the keys selected by a condition
_NUM_PAIRS = 2048  # of keys and values; longer lists repeat them
_NOISE = "Rain fell on the roofs. A dog slept by the gate. Somebody closed a window. The kettle sang. Nobody came."
_STOP = re.compile(r"(?<=[.!?])\s|(?<=[.!?][\"'\u201d\u2019)])\s|(?<=[\u3002\uff01\uff1f])")


class Family(NamedTuple):
    """Recipe for the probes of one family; the default is one needle among others."""

    kind: Literal["needle", "pair", "variable", "thread", "word"] = "needle"
    num: int = 1
    """Keys that are asked for, copies of a variable, links of a thread, or words to find."""
    values: int = 1  # of each key
    others: int = NUM_DECOYS  # needles that are not asked for
    by: Literal["name", "condition", "question"] = "name"
    """Naming of keys in the question: one by one; by what they have in common; or, for one key, by a question before
    the sentence that the answer completes."""
    examples: int = 0  # questions that are answered before the one to answer
    threads: int = 1  # asked for together
    direction: Literal["forward", "backward", "random"] = "forward"
    """Order of the links in the text: as they are followed, reversed, or random."""
    zipf: bool = False  # frequencies of words follow Zipf's law, or take only two values
    budget: int = 32
    """Tokens that may be generated for all answers. RULER allows 128 for all needles: enough for a base model to list
    every fact of the text, asked for or not."""

    @property
    def has_depth(self) -> bool:
        """Whether the facts lie in one place; words to count lie everywhere."""
        return self.kind != "word"


_DIRECTIONS: tuple[Literal["forward", "backward", "random"], ...] = ("forward", "backward", "random")
FAMILIES = {
    "single": Family(others=0),
    "multi_key": Family(),
    "multi_value": Family(values=4, budget=128),
    "multi_query": Family(num=4, budget=128),
    "variable_tracking": Family("variable", num=4, budget=64),
    "common_words": Family("word", num=10, budget=128),
    "frequent_words": Family("word", num=3, zipf=True, budget=64),
    "conditional": Family(num=4, by="condition", budget=128),
    "question": Family(by="question"),
    "key_value": Family("pair", examples=2),
    **{f"thread_{way}_{num}": Family("thread", num=num, direction=way) for way in _DIRECTIONS for num in (2, 4, 8)},
    **{f"threads_{way}_4": Family("thread", num=4, threads=3, direction=way, budget=64) for way in _DIRECTIONS},
}
"""The families by name."""


class Probe(NamedTuple):
    """A question about a long text. `prompt` ends where the first answer begins (with a space)."""

    prompt: str
    answers: tuple[str, ...]
    """All of them are asked for."""
    decoys: tuple[str, ...]
    """Wrong in place of any answer."""
    family: str
    length: int
    """Target length in tokens, special tokens and answers included."""
    depth: float | None
    """Fraction of the text (in characters) before the fact asked for, or the middle of several; None for words."""
    distance: int | None = None
    """Tokens between the fact and the question, instead of a depth."""

    def continuations(self) -> list[list[str]]:
        """For each answer, the continuations of the prompt: the earlier answers, then the answer or a decoy.

        The first of a list is correct. All of a list end in the same mark, which no candidate contains: they exclude
        each other, and their probabilities can be compared regardless of their numbers of tokens.
        """
        groups = []
        for number, answer in enumerate(self.answers, 1):
            earlier = "".join(f" {found}," for found in self.answers[: number - 1])
            mark = "." if number == len(self.answers) else ","
            groups.append([f"{earlier} {candidate}{mark}" for candidate in (answer, *self.decoys)])
        return groups


def make_probes(
    family: str,
    tokenizer: PreTrainedTokenizerBase,
    *,
    length: int,
    depth: float | None = None,
    distance: int | None = None,
    num: int,
    seed: int,
    haystack: str | None = None,
    room: int = 0,
) -> list[Probe]:
    """Make probes of one family, length and depth or distance, the same ones on every machine.

    At each length and place, the probes of one family and seed ask for the same facts: compare them in pairs. A prompt
    with its longest continuation, and with the tokenizer's prefix, has at most `length` tokens; one more sentence of
    the haystack (or one more of the rarest words) would be too much.

    Args:
        family: one of `FAMILIES`.
        tokenizer: of the model that will read them.
        length: tokens.
        depth: position of the fact asked for, 0 (beginning) to 1 (end), between two sentences; several are spread
            evenly around it. Other facts lie anywhere: copying the last one works at depth 1 only. None for no depth.
        distance: instead of a depth, the most tokens of text between the facts asked for, which are then together, and
            the question, filled with as many full sentences as fit. All other facts come before. Of two lengths at one
            distance, the longer text ends like the shorter one: text is added before the facts.
        num: number of probes.
        seed: another seed gives other facts and another piece of the haystack.
        haystack: a text, read from any of its sentences on, and again from its start; by default sentences of noise.
        room: tokens to reserve after the prompt, if its continuations need less.

    Raises:
        ValueError: if a setting is invalid, or `length` is too short, naming the shortest possible.

    Example:
        >>> (probe,) = make_probes("single", tokenizer, length=200, depth=0.5, num=1, seed=0)
        >>> probe.prompt[-26:], probe.answers
        ('A locker code of hidalu is', ('5760908',))
    """
    before = len(special_tokens(tokenizer)[0])  # the same for all of the many texts tried
    _check_place(family, depth, distance)

    def count(text: str) -> int:
        return len(text_tokens(tokenizer, [text])[0])

    fits = None if distance is None else lambda text: count(text) <= distance
    drafts = _drafts(family, length, depth, num, seed, haystack, fits)
    probes = [Probe("", tuple(draft.answers), tuple(draft.decoys), family, length, depth, distance) for draft in drafts]
    return _filled(probes, drafts, lambda text: before + count(text), room)


def _filled(probes: list[Probe], drafts: "list[_Draft]", count: Callable[[str], int], room: int) -> list[Probe]:
    """The probes, each with as much text as fits its length."""
    sizes = [_needed(draft, probe, count, room) for draft, probe in zip(drafts, probes)]
    least, length = max(size(draft.least) for size, draft in zip(sizes, drafts)), probes[0].length
    if least > length:
        where = "" if probes[0].distance is None else f" at distance {probes[0].distance}"
        raise ValueError(
            f"length {length} is too short for probes {probes[0].family!r}{where}: they need at least {least} tokens"
        )
    units = [_most_units(size, draft.least, length) for size, draft in zip(sizes, drafts)]
    return [probe._replace(prompt=draft.prompt(num)) for probe, draft, num in zip(probes, drafts, units)]


def prompt_tokens(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Tokens of a text with the tokenizer's own prefix (BOS), but without its suffix."""
    return special_tokens(tokenizer)[0] + text_tokens(tokenizer, [text])[0]


class _Draft(NamedTuple):
    """A probe of any length: `body(n)` is its text with n units of filler (sentences, or words), at least `least`."""

    opening: str
    closing: str
    answers: Sequence[str]
    decoys: Sequence[str]
    body: Callable[[int], str]
    least: int = 1

    def prompt(self, num_units: int) -> str:
        return f"{self.opening}\n\n{self.body(num_units)}\n\n{self.closing}"


def _drafts(
    name: str,
    length: int,
    depth: float | None,
    num: int,
    seed: int,
    haystack: str | None,
    fits: Callable[[str], bool] | None,
) -> list[_Draft]:
    if num < 1:
        raise ValueError(f"num {num}: expected at least 1 probe")
    family = FAMILIES[name]
    text = " ".join((_NOISE if haystack is None else haystack).split())
    sentences = [sentence for sentence in _STOP.split(text) if sentence]
    if not sentences:
        raise ValueError("haystack: it is empty: expected a text, or None for sentences of noise")
    # Python seeds by the SHA-512 of a string, which is the same on every machine.
    draws = [random.Random(f"tokenweight probe {number} of {name}, seed {seed}") for number in range(num)]
    if family.kind == "word":
        return [_count(family, rng, length) for rng in draws]
    make = {"needle": _needles, "pair": _pairs, "variable": _variables, "thread": _threads}[family.kind]
    return [make(family, _Haystack(rng, 1.0 if depth is None else depth, text, sentences, fits)) for rng in draws]


def _check_place(name: str, depth: float | None, distance: int | None) -> None:
    if name not in FAMILIES:
        raise ValueError(f"family {name!r}: expected one of {', '.join(FAMILIES)}")
    if not FAMILIES[name].has_depth:
        for what, value in (("depth", depth), ("distance", distance)):
            if value is not None:
                raise ValueError(f"{what} {value} of probes {name!r}: expected None, for the words lie everywhere")
    elif distance is None and (depth is None or not 0 <= depth <= 1):
        raise ValueError(f"depth {depth} of probes {name!r}: expected a number from 0 (beginning) to 1 (end)")
    elif distance is not None and (distance < 0 or depth is not None):
        raise ValueError(f"distance {distance} of probes {name!r}: expected 0 or more tokens, and no depth")


def _most_units(size: Callable[[int], int], least: int, length: int) -> int:
    """The largest number of units, at least `least` (which fits), that needs at most `length` tokens."""
    beyond = 2 * least
    while size(beyond) <= length:
        beyond *= 2
    return bisect_right(range(least, beyond), length, key=size) + least - 1


def _needed(draft: _Draft, probe: Probe, count: Callable[[str], int], room: int) -> Callable[[int], int]:
    """The number of tokens that the draft needs, as a function of its units; `count` counts those of a text."""
    longest = max(probe.continuations()[-1], key=lambda text: count(draft.closing + text))

    def size(num_units: int) -> int:
        prompt = draft.prompt(num_units)
        return max(room + count(prompt) if room else 0, count(prompt + longest))

    return size


def _distinct(rng: random.Random, pattern: Sequence[str], num: int, text: str = "") -> list[str]:
    """Draw distinct words, none of them in `text`, made of one letter from each string of the pattern.

    They have the same length, so none contains another: a match in an output is unambiguous.
    """
    found: dict[str, None] = {}
    while len(found) < num:
        word = "".join(rng.choice(letters) for letters in pattern)
        if word not in text:
            found[word] = None
    return list(found)


class _Haystack(NamedTuple):
    """A text to hide facts in, the depth of those asked for, and the random state of one probe."""

    rng: random.Random
    depth: float
    text: str
    sentences: list[str]
    fits: Callable[[str], bool] | None
    """Whether a text may lie between the facts and the question; None if a depth is given."""

    def words(self, pattern: Sequence[str], num: int) -> list[str]:
        return _distinct(self.rng, pattern, num, self.text)

    def hide(self, asked: Sequence[str], others: Sequence[Sequence[str]]) -> tuple[Callable[[int], str], int]:
        """The text of n sentences with facts between them, and the smallest n: facts asked for are around the depth, in
        order; others, each in a sequence that keeps its order, anywhere before the last sentence that `fits`."""
        rng, depth, _, sentences, fits = self
        reach = min(depth, 1 - depth) if len(asked) > 1 else 0.0
        places = [depth + reach * (2 * i / max(1, len(asked) - 1) - 1) for i in range(len(asked))]
        others_at = [place for sequence in others for place in sorted(rng.random() for _ in sequence)]
        facts = [*zip(others_at, (fact for sequence in others for fact in sequence)), *zip(places, asked)]
        start = rng.randrange(len(sentences))

        def piece(first: int, stop: int) -> list[str]:
            return [sentences[(start + i) % len(sentences)] for i in range(first, stop)]

        def body(num_sentences: int) -> str:
            # With a distance, a longer text begins earlier; with a depth, it ends later.
            chosen = piece(0, num_sentences) if fits is None else piece(-num_sentences, 0)
            borders = [0, *accumulate(len(sentence) + 1 for sentence in chosen)]
            before: list[list[str]] = [[] for _ in borders]
            last = num_sentences - after
            for place, fact in facts:
                nearest = min(range(last + 1), key=lambda border: abs(borders[border] - place * borders[last]))
                before[nearest].append(fact)
            pairs = zip(before, [[sentence] for sentence in chosen] + [[]])
            return " ".join(part for pair in pairs for parts in pair for part in parts)

        after = 0 if fits is None else _most_that_fit(lambda num: fits(" ".join(piece(-num, 0))))
        return body, after + 1


def _most_that_fit(fits: Callable[[int], bool]) -> int:
    """The largest number that fits; 0 does."""
    beyond = 1
    while fits(beyond):
        beyond *= 2
    return bisect_right(range(beyond), False, key=lambda num: not fits(num)) - 1


def _needles(family: Family, haystack: _Haystack) -> _Draft:
    num, values = family.num, family.values
    if family.by == "condition":
        letters = _SYLLABLES[0].replace(_INITIAL, "")
        keys = haystack.words([_INITIAL, *_SYLLABLES[1:]], num) + haystack.words([letters, *_SYLLABLES[1:]], NUM_DECOYS)
    else:
        keys = haystack.words(_SYLLABLES, num + NUM_DECOYS)
    codes = haystack.words([digits] * 7, num * values + NUM_DECOYS)
    facts = [f"A locker code of {keys[i // values]} is {codes[i]}." for i in range(num * values)]
    decoys = codes[-NUM_DECOYS:]
    others = [[f"A locker code of {key} is {code}."] for key, code in zip(keys[num:], decoys[: family.others])]
    hidden = haystack.hide(facts, others)
    # The question has another order than the text, unless it names no key.
    order = range(num) if family.by == "condition" else haystack.rng.sample(range(num), num)
    answers = [codes[i * values + j] for i in order for j in range(values)]
    closing = f"A locker code of {keys[0]} is"
    if family.by == "question":
        closing = f"Question: What is a locker code of {keys[0]}?\nAnswer: {closing}"
    if len(answers) > 1:
        named = f"names that begin with {_INITIAL}" if family.by == "condition" else ", ".join(keys[i] for i in order)
        closing = f"The {len(answers)} locker codes of {named}, in order, are"
    return _Draft("Remember the locker codes that this text mentions.", closing, answers, decoys, *hidden)


def _pairs(family: Family, haystack: _Haystack) -> _Draft:
    """A question for one of many pairs of keys and values; decoys are other values, except those of the examples."""
    num = 1 + family.examples + NUM_DECOYS
    keys, values = (_distinct(haystack.rng, pattern, _NUM_PAIRS) for pattern in (_SYLLABLES, [digits] * 7))
    pairs = [f'"{key}": {value},' for key, value in zip(keys, values)]
    hidden = haystack._replace(sentences=pairs[num:]).hide(pairs[:1], [[pair] for pair in pairs[1:num]])
    questions = [f'The value of "{key}" is' for key in keys]
    examples = [f"{questions[i]} {values[i]}." for i in range(1, 1 + family.examples)]
    closing = "\n".join([*examples, questions[0]])
    return _Draft("Remember the values of this list.", closing, values[:1], values[num - NUM_DECOYS : num], *hidden)


def _variables(family: Family, haystack: _Haystack) -> _Draft:
    each = family.num + 1
    names, numbers = haystack.words([ascii_uppercase] * 5, 2 * each), haystack.words([digits] * 5, 2)
    chains = [names[:each], names[each:]]
    asked, other = (
        [f"Variable {chain[0]} is set to {number}."] + [f"Variable {new} copies {old}." for old, new in pairwise(chain)]
        for chain, number in zip(chains, numbers)
    )
    closing = f"The {each} variables that have the value {numbers[0]}, directly or as copies, are"
    hidden = haystack.hide(asked, [other])
    return _Draft("Remember the variables of this text.", closing, chains[0], chains[1][:NUM_DECOYS], *hidden)


def _threads(family: Family, haystack: _Haystack) -> _Draft:
    """Threads; decoys are where the first link leads (stopping too early), and the ends of two other threads."""
    num = family.threads + NUM_DECOYS - 1
    words = haystack.words(_SYLLABLES, num * (family.num + 1))
    threads = [words[i::num] for i in range(num)]
    order = list(range(family.num))[:: -1 if family.direction == "backward" else 1]
    if family.direction == "random":
        haystack.rng.shuffle(order)
    links = [[f"From {key} the path leads to {value}." for key, value in pairwise(thread)] for thread in threads]
    asked, others = threads[: family.threads], links[family.threads :]
    # If several threads are asked for, they alternate.
    hidden = haystack.hide(
        [own[i] for i in order for own in links[: family.threads]], [[own[i] for i in order] for own in others]
    )
    answers = [thread[-1] for thread in asked]
    decoys = [asked[0][1], *(thread[-1] for thread in threads[family.threads :])]
    starts = ", ".join(thread[0] for thread in asked)
    closing = f"Who starts at {starts} and follows the path {family.num} times ends at"
    if len(asked) > 1:
        closing = f"Those who start at {starts} and follow the path {family.num} times end, in order, at"
    return _Draft("Remember the paths that this text mentions.", closing, answers, decoys, *hidden)


def _count(family: Family, rng: random.Random, length: int) -> _Draft:
    """Shuffled words, of which the first ones occur most often; the next ones are decoys."""
    source, pattern = f"{rng.random()}", [ascii_lowercase] * 6 if family.zipf else _SYLLABLES
    often, seldom = (30, 3) if length >= 4096 else (6, 1)

    def body(num_units: int) -> str:
        """The text, whose units are the rare words, or the scale of Zipf's law."""
        times = [often] * family.num + [seldom] * num_units
        if family.zipf:
            times = [num_units // rank**2 for rank in range(2, math.isqrt(num_units) + 1)]
        again = random.Random(source)
        words = _distinct(again, pattern, len(times))  # the first ones are the same for any number
        listed = [word for word, n in zip(words, times) for _ in range(n)]
        return " ".join(again.sample(listed, len(listed)))

    known = _distinct(random.Random(source), pattern, family.num + NUM_DECOYS)
    closing = f"The {family.num} words that occur most often in the list are"
    # From scale 49 on the last decoy (rank 7) occurs, and rank 4 occurs more often than rank 5.
    least = 49 if family.zipf else NUM_DECOYS
    answers, decoys = known[: family.num], known[family.num :]
    return _Draft("Some words of this list are frequent.", closing, answers, decoys, body, least)
