"""Probes solved from their own text by a reader that knows the wording and nothing else; their lengths and depths."""

import re
from collections import Counter
from itertools import accumulate, pairwise

import hypothesis
import pytest
from hypothesis import strategies

from texts import TEXT, trained_tokenizer
from tokenweight.evaluate import make_probes
from tokenweight.evaluate.probes import FAMILIES, NUM_DECOYS, Probe, prompt_tokens

# Of quite different lengths, so that depth in characters is not depth in sentences.
SENTENCES = [f"The {'very ' * (7 * i % 11)}old ship number {i} sailed." for i in range(40)]
HAYSTACK = "\n".join(SENTENCES)
FACT = re.compile(
    r"A locker code of (\w+) is (\d{7})\.|Variable (\w+) is set to (\d{5})\.|Variable (\w+) copies (\w+)\."
    r"|From (\w+) the path leads to (\w+)\.|\"(\w+)\": (\d{7}),"
)
PLACED = [name for name, family in FAMILIES.items() if family.has_depth]


def make(family, length=900, *, framed=False, depth=0.5, num=2, seed=0, haystack=HAYSTACK, **settings):
    depth = depth if family in PLACED and "distance" not in settings else None
    tokenizer = trained_tokenizer(framed=framed, vocab_size=600)
    return make_probes(family, tokenizer, length=length, depth=depth, num=num, seed=seed, haystack=haystack, **settings)


def facts_of(probe):
    """Pairs (of whom, what) in the order of the text."""
    return [tuple(group for group in fact if group) for fact in FACT.findall(probe.prompt)]


def body_of(probe):
    _, body, question = probe.prompt.split("\n\n")
    return body, question


def solve(probe):
    """The answers to the question, from the text alone, and the facts that they come from."""
    body, question = body_of(probe)
    facts = facts_of(probe)
    if probe.family not in PLACED:
        (num,) = re.findall(r"\d+", question)
        return [word for word, _ in Counter(body.split()).most_common(int(num))], []
    if probe.family == "variable_tracking":
        (value,) = re.findall(r"\d{5}", question)
        found = [value]
        while following := [name for name, source in facts if source == found[-1]]:
            found += following
        return found[1:], list(zip(found[1:], found))
    if probe.family.startswith("thread"):
        starts, num = re.search(r"starts? at ([\w, ]+) and follows? the path (\d) times end", question).groups()
        paths = [[start] for start in starts.split(", ")]
        for path in paths:
            for _ in range(int(num)):
                path.append(dict(facts)[path[-1]])
            assert path[-1] not in dict(facts)
        return [path[-1] for path in paths], [link for path in paths for link in pairwise(path)]
    if probe.family == "conditional":
        (letter,) = re.findall(r"names that begin with (\w)", question)
        asked = [fact for fact in facts if fact[0].startswith(letter)]
        return [code for _, code in asked], asked
    if probe.family == "key_value":
        *examples, (key, _) = re.findall(r'The value of "(\w+)" is( \d{7}\.)?', question)
        assert [dict(facts)[name] for name, _ in examples] == [value[1:-1] for _, value in examples]
        return [dict(facts)[key]], [(key, dict(facts)[key])]
    keys = re.search(r"locker codes? of ([\w, ]+?),? (?:is|in order, are)$", question.split("\n")[-1])[1].split(", ")
    asked = [fact for key in keys for fact in facts if fact[0] == key]
    return [code for _, code in asked], asked


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("depth", [0.0, 0.3, 1.0])
def test_the_answers_follow_from_the_text_and_the_decoys_do_not(family, depth):
    for probe in make(family, depth=depth, num=3):
        answers, _ = solve(probe)
        assert set(answers) == set(probe.answers)
        assert len(answers) == len(probe.answers) == len(set(answers))
        assert len(set(probe.decoys) - set(answers)) == len(probe.decoys) == NUM_DECOYS
        words = [re.sub(r"[a-z]", "a", re.sub(r"[A-Z]", "A", re.sub(r"\d", "0", w))) for w in (*answers, *probe.decoys)]
        assert len({*words}) == 1  # all are of one form


@pytest.mark.parametrize("family", FAMILIES)
def test_decoys_are_what_the_text_says_of_something_else(family):
    (probe,) = make(family, num=1)
    body, _ = body_of(probe)
    occurring = [decoy in body for decoy in probe.decoys]
    assert occurring == [family != "single"] * NUM_DECOYS
    if family not in PLACED:
        times = Counter(body.split())
        assert max(times[decoy] for decoy in probe.decoys) < min(times[answer] for answer in probe.answers)


def test_orders_of_answers_are_those_that_the_questions_ask_for():
    for seed in range(5):
        (values,) = make("multi_value", num=1, seed=seed)
        assert list(values.answers) == solve(values)[0]  # that of the text
        (queries,) = make("multi_query", num=1, seed=seed)
        assert list(queries.answers) == solve(queries)[0]  # that of the question
    in_text = [[code for _, code in facts_of(probe) if code in probe.answers] for probe in make("multi_query", num=5)]
    assert in_text != [list(probe.answers) for probe in make("multi_query", num=5)]


@pytest.mark.parametrize("direction", [1, -1])
@pytest.mark.parametrize("depth", [0.0, 1.0])
@pytest.mark.parametrize("num_links", [2, 4, 8])
def test_links_of_a_thread_lie_in_its_direction(direction, depth, num_links):
    family = f"thread_{'forward' if direction == 1 else 'backward'}_{num_links}"
    for probe in make(family, depth=depth):
        _, links = solve(probe)
        places = [probe.prompt.index(f"From {key} the") for key, _ in links]
        assert len(links) == num_links
        assert places == sorted(places, reverse=direction == -1)
        order = [key for key, _ in facts_of(probe)]
        assert all(
            (order.index(end) - order.index(key)) * direction > 0 for key, end in facts_of(probe) if end in order
        )


def test_links_of_several_threads_take_turns_and_those_of_a_random_one_lie_anyhow():
    for probe in make("threads_backward_4"):
        assert len(probe.answers) == 3
        _, links = solve(probe)
        last = [links[4 * i + 3] for i in range(3)]  # backward: the last links come first
        order = [fact for fact in facts_of(probe) if fact in links]
        assert order[:3] == last
    places = []
    for probe in make("thread_random_8", 1300, num=4):
        order = facts_of(probe)
        places.append([order.index(link) for link in solve(probe)[1]])
    assert all(own not in (sorted(own), sorted(own, reverse=True)) for own in places)


@pytest.mark.parametrize("family", ["single", "threads_forward_4", "key_value"])
def test_at_a_distance_so_much_text_follows_the_facts_and_longer_texts_only_grow_before_them(family):
    tokenizer = trained_tokenizer(vocab_size=600)
    for distance in (0, 400):
        ends = {}
        for length in (1200, 1900):
            for number, probe in enumerate(make(family, length, distance=distance)):
                assert (probe.depth, probe.distance) == (None, distance)
                body, question = body_of(probe)
                answers, asked = solve(probe)
                assert set(answers) == set(probe.answers)
                found = list(FACT.finditer(body))
                last = [fact for fact in found if tuple(g for g in fact.groups() if g) in asked][-1]
                after = body[last.end() :].strip()
                if family != "key_value":
                    assert not FACT.search(after)  # decoys lie before
                used = len(tokenizer(after, add_special_tokens=False)["input_ids"])
                assert distance - 60 < used <= distance
                ends.setdefault(number, []).append((last[0], after, question))
        assert all(first == second for first, second in ends.values())


def test_a_variable_is_set_before_it_is_copied_in_every_chain():
    for probe in make("variable_tracking", num=3):
        order = [name for name, _ in facts_of(probe)]
        copies = [(name, source) for name, source in facts_of(probe) if source in order]
        assert len(copies) == 8
        assert all(order.index(source) < order.index(name) for name, source in copies)


@pytest.mark.parametrize("family", PLACED)
@pytest.mark.parametrize("depth", [0.0, 0.5, 0.77])
def test_facts_lie_at_the_depth_asked_for_between_whole_sentences(family, depth):
    if family == "key_value":
        return  # its text is facts only
    for probe in make(family, 1400, depth=depth):
        body, _ = body_of(probe)
        pieces = re.findall(r"[^.]+\.", body)  # sentences and facts
        kept = [piece.strip() for piece in pieces if not FACT.fullmatch(piece.strip())]
        start = SENTENCES.index(kept[0])
        assert kept == [SENTENCES[(start + i) % len(SENTENCES)] for i in range(len(kept))]
        ends = [0, *accumulate(len(sentence) + 1 for sentence in kept)]
        _, asked = solve(probe)
        read, depths = 0, []
        for piece in pieces:
            if not (found := FACT.fullmatch(piece.strip())):
                read += 1
            elif tuple(group for group in found.groups() if group) in asked:
                depths.append(ends[read] / ends[-1])
        assert len(depths) == len(asked)
        # Each of them lies at the border that is nearest: at most half a sentence away.
        near = max(map(len, SENTENCES)) / 2 / ends[-1]
        assert sum(depths) / len(depths) == pytest.approx(depth, abs=near)
        assert max(depths) - min(depths) == pytest.approx(2 * min(depth, 1 - depth) * (len(depths) > 1), abs=2 * near)


@pytest.mark.parametrize("framed", [False, True], ids=["plain", "framed"])
@hypothesis.given(family=strategies.sampled_from([*FAMILIES]), length=strategies.integers(700, 1300))
@hypothesis.settings(max_examples=20)
def test_a_probe_fills_its_length_but_for_less_than_a_sentence_and_never_exceeds_it(framed, family, length):
    tokenizer = trained_tokenizer(framed=framed, vocab_size=600)
    unit = max(len(tokenizer(f" {s}", add_special_tokens=False)["input_ids"]) for s in SENTENCES)
    unit *= 1 + (family == "frequent_words")  # a step of its scale may add words of several ranks at once
    for probe in make(family, length, framed=framed):
        texts = [probe.prompt + continuation for group in probe.continuations() for continuation in group]
        # What `framed` puts after a text is not read.
        longest = max(len(tokenizer(text)["input_ids"]) - framed for text in texts)
        assert length - unit < longest <= length


def test_a_prompt_begins_and_does_not_end_with_what_the_tokenizer_puts_around_a_text():
    plain, framed = (trained_tokenizer(framed=framed) for framed in (False, True))
    assert prompt_tokens(plain, "Call me") == plain("Call me")["input_ids"]
    assert prompt_tokens(framed, "Call me") == framed("Call me")["input_ids"][:-1] != prompt_tokens(plain, "Call me")


def test_room_is_left_free_if_the_answers_need_less():
    tokenizer = trained_tokenizer(vocab_size=600)
    tight, free, needless = (make("single", 700, room=room)[0] for room in (0, 200, 3))
    assert len(prompt_tokens(tokenizer, free.prompt)) <= 500 < len(prompt_tokens(tokenizer, tight.prompt))
    assert needless == tight


def test_probes_are_the_same_ones_everywhere_and_ask_for_the_same_at_every_length_and_depth():
    first, second = make("multi_key", 900)
    assert (first.answers, first.decoys) == (("5249389",), ("1082405", "7835737", "9798985"))
    for length, depth, haystack in [(900, 0.5, HAYSTACK), (500, 0.0, HAYSTACK), (1100, 1.0, TEXT), (800, 0.7, None)]:
        again = make("multi_key", length, depth=depth, haystack=haystack)
        assert [probe[1:3] for probe in again] == [first[1:3], second[1:3]]
    assert make("multi_key", num=3)[:2] == [first, second]
    assert not {*first.answers} & {*second.answers, *make("multi_key", seed=1)[0].answers}


def test_lists_below_4096_tokens_repeat_common_words_6_times_and_from_there_on_30_times():
    for length, often, seldom in [(4095, 6, 1), (4096, 30, 3)]:
        (probe,) = make("common_words", length, num=1)
        times = Counter(body_of(probe)[0].split())
        assert {times.pop(word) for word in probe.answers} == {often}
        assert {*times.values()} == {seldom}


def test_occurrences_of_frequent_words_fall_with_the_square_of_the_rank():
    (probe,) = make("frequent_words", 3000, num=1)
    times = Counter(body_of(probe)[0].split())
    ranked = [times[word] for word in (*probe.answers, *probe.decoys)]
    # Ranks 2 to 7; each count is rounded down, that of rank 2 included.
    assert ranked == [pytest.approx(4 * ranked[0] / rank**2, abs=1) for rank in range(2, 8)]


def test_a_short_haystack_is_repeated_and_by_default_there_is_noise():
    (probe,) = make("single", num=1, haystack="Only this.\n\nAnd “that!” Then 3.5 more.")
    pieces = Counter(re.split(r"(?<=\.) |(?<=”) ", body_of(probe)[0]))
    assert {*pieces} - {"Only this.", "And “that!”", "Then 3.5 more."} == {
        f"A locker code of {facts_of(probe)[0][0]} is {probe.answers[0]}."
    }
    assert len({count for count in pieces.values() if count > 1}) <= 2
    assert "The kettle sang." in make("single", num=1, haystack=None)[0].prompt


def test_keys_and_answers_are_new_to_the_haystack():
    (plain,) = make("multi_key", num=1)
    (key, *_), *_ = (fact for fact in facts_of(plain) if fact[1] in plain.answers)
    (other,) = make("multi_key", num=1, haystack=f"Once {key} was here. Then {plain.answers[0]} was there.")
    assert key not in [name for name, _ in facts_of(other)]
    assert plain.answers != other.answers


def test_continuations_of_an_answer_stand_after_the_earlier_ones_and_exclude_each_other():
    probe = Probe("Say", ("a", "b"), ("x", "yz"), "multi_value", 9, 0.5)
    assert probe.continuations() == [[" a,", " x,", " yz,"], [" a, b.", " a, x.", " a, yz."]]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"family": "needle"}, r"^family 'needle': expected one of single, multi_key, .*, threads_random_4$"),
        ({"depth": 1.1}, r"^depth 1.1 of probes 'single': expected a number from 0 \(beginning\) to 1 \(end\)$"),
        ({"depth": None}, r"^depth None of probes 'single': expected a number"),
        ({"distance": 9}, r"^distance 9 of probes 'single': expected 0 or more tokens, and no depth$"),
        ({"distance": -1, "depth": None}, r"^distance -1 of probes 'single': expected 0 or more tokens"),
        ({"distance": 880, "depth": None}, r"^length 900 is too short for probes 'single' at distance 880: they need"),
        ({"family": "common_words", "depth": None, "distance": 5}, r"^distance 5 of probes 'common_words': expected"),
        ({"depth": float("nan")}, r"^depth nan of probes 'single': expected a number"),
        ({"family": "common_words", "depth": 0.5}, r"^depth 0.5 of probes 'common_words': expected None"),
        ({"num": 0}, r"^num 0: expected at least 1 probe$"),
        ({"haystack": " \n"}, r"^haystack: it is empty: expected a text"),
    ],
)
def test_settings_that_make_no_sense_are_refused_by_name(settings, message):
    usual = {"family": "single", "length": 900, "depth": 0.5, "num": 1, "seed": 0}
    with pytest.raises(ValueError, match=message):
        make_probes(tokenizer=trained_tokenizer(), **{**usual, **settings})


@pytest.mark.parametrize("family", FAMILIES)
def test_a_length_that_is_too_short_is_refused_and_the_one_named_is_not(family):
    with pytest.raises(
        ValueError, match=f"^length 20 is too short for probes '{family}': they need at least"
    ) as caught:
        make(family, 20)
    least = int(re.search(r"at least (\d+) tokens$", str(caught.value))[1])
    assert len(make(family, least)) == 2
    with pytest.raises(ValueError, match=f"at least {least} tokens$"):
        make(family, least - 1)
