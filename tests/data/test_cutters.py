"""Pieces of 2^k + 1 tokens, and rows in the order of documents, against slow and plain ways to make them."""

import collections
import copy
from itertools import groupby

import datasets
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import processors

from texts import BOS, EOS, TEXT, plain_ids, trained_tokenizer
from tokenweight.data import Document, prepare, prepare_rows
from tokenweight.data.order import Decomposer, InOrder


def decomposed(sizes, shortest, longest, *, framed=False):
    """For each document of so many tokens, which are numbered through, its tokens and its rows."""
    prefix, suffix = [BOS] * framed, [EOS] * framed
    cutter, found = Decomposer(longest, prefix, suffix, shortest=shortest), []
    for number, size in enumerate(sizes):
        tokens = np.arange(size, dtype=np.int32) + 2000
        rows = list(cutter.rows(str(number), tokens))
        found.append(([*tokens.tolist(), *(suffix if size else [])], rows))
    assert list(cutter.last_rows()) == []
    return found, cutter


@settings(max_examples=40)
@given(st.lists(st.integers(0, 200), max_size=4), st.sampled_from([2, 4, 8]), st.integers(0, 3), st.booleans())
def test_pieces_are_a_prefix_of_their_document_and_have_a_token_more_than_a_power_of_two(sizes, shortest, more, framed):
    longest = shortest << more
    found, cutter = decomposed(sizes, shortest, longest, framed=framed)
    dropped = 0
    for number, (tokens, rows) in enumerate(found):
        read = 0
        for row in rows:
            own = row["input_ids"][int(framed) :].tolist()
            assert row["input_ids"][: int(framed)].tolist() == [BOS] * framed
            assert (row["document"], row["offset"]) == (str(number), read)
            assert own == tokens[read : read + len(own)]
            left, size = len(tokens) - read, len(row["input_ids"]) - 1
            assert size in [shortest << k for k in range(more + 1)]
            if left < 2 * longest + 1 - framed:  # no choice: the longest that fits
                assert size == longest or left < 2 * size + 1 - framed
            read += len(own)
        assert len(tokens) - read < shortest + 1 - framed
        dropped += len(tokens) - read
    rows = [row for _, part in found for row in part]
    assert cutter.summary.dropped_tokens == dropped
    assert (cutter.summary.rows, cutter.summary.tokens) == (len(rows), sum(len(row["input_ids"]) for row in rows))
    assert cutter.summary.short_documents == sum(not part for _, part in found)


def test_each_length_is_expected_to_hold_as_many_tokens_of_long_documents():
    ((_, rows),), _ = decomposed([60_000], 4, 64)
    tokens = collections.Counter()
    for row in rows:
        tokens[len(row["input_ids"]) - 1] += len(row["input_ids"]) - 1
    assert tokens.keys() == {4, 8, 16, 32, 64}
    # About 190 pieces of the longest: a standard error of 7 % of its fifth.
    assert [part / sum(tokens.values()) for part in tokens.values()] == pytest.approx([0.2] * 5, abs=0.04)


def test_another_document_is_cut_at_other_places():
    found, _ = decomposed([2000, 2000], 4, 64)
    first, second = ([len(row["input_ids"]) for row in rows] for _, rows in found)
    assert first != second


@settings(max_examples=40)
@given(st.lists(st.integers(0, 40), max_size=20), st.integers(4, 16), st.booleans())
def test_documents_in_order_share_rows_with_those_beside_them(sizes, length, framed):
    cutter = InOrder(length, [BOS] * framed, [EOS] * framed, pack=True)
    rows, expected = [], []
    for number, size in enumerate(sizes):
        tokens = np.full(size, 2000 + number, np.int32)
        own = [*tokens.tolist(), *([EOS] * framed if size else [])]
        expected += own[len(own) // cutter.step * cutter.step :]  # what fills no row of its own
        rows += list(cutter.rows(str(number), tokens))
    rows += list(cutter.last_rows())
    found = []
    for row in rows:
        assert len(row["input_ids"]) == length
        starts = np.flatnonzero(row["position_ids"] == 0).tolist()
        stops = [*starts[1:], length][: len(row["documents"])]
        pieces = [row["input_ids"][start + framed : stop].tolist() for start, stop in zip(starts, stops)]
        if len(pieces) > 1 or len(pieces[0]) < cutter.step or row["offsets"][0] % cutter.step:
            found += [token for piece in pieces for token in piece]
        assert [int(name) for name in row["documents"]] == sorted(map(int, row["documents"]))
    whole = collections.Counter(expected)
    assert all(count <= whole[token] for token, count in collections.Counter(found).items())
    names = [name for name, _ in groupby(token for token in found if token >= 2000)]
    assert names == sorted(names)
    assert cutter.summary.dropped_tokens < length


def pieces_of(folder):
    return list(datasets.load_from_disk(str(folder)))


def test_a_text_is_decomposed_with_its_tokenizer_and_an_interrupted_call_goes_on(framed, tmp_path, monkeypatch):
    monkeypatch.setattr(prepare, "BATCH_CHARACTERS", 1)
    monkeypatch.setattr(prepare, "SHARD_TOKENS", 300)
    documents = [Document("a", TEXT[:3000]), Document("b", "short"), Document("c", TEXT[3000:8000])]
    given_ = {"tokenizer": trained_tokenizer(framed=framed), "length": 128, "short": "decompose", "shortest": 16}
    prepare_rows(documents, out=tmp_path / "whole", **given_)

    def broken():
        yield from documents[:2]
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        prepare_rows(broken(), out=tmp_path / "rows", **given_)
    prepare_rows(documents, out=tmp_path / "rows", **given_)
    files = [{file.name: file.read_bytes() for file in (tmp_path / name).iterdir()} for name in ("whole", "rows")]
    assert files[0] == files[1]
    assert len(files[0]) > 6
    for name, text in documents:
        own = [row["input_ids"][int(framed) :] for row in pieces_of(tmp_path / "rows") if row["document"] == name]
        tokens = [*plain_ids(text), *([EOS] * framed)]
        read = [token for piece in own for token in piece]
        assert read == tokens[: len(read)]
        assert len(tokens) - len(read) < 17


@given(st.lists(st.integers(0, 40), max_size=12), st.integers(4, 16), st.integers(0, 12))
@settings(max_examples=30)
def test_a_cutter_in_order_goes_on_from_its_state(sizes, length, restart_at):
    rows = []
    for at in (None, restart_at):
        cutter = InOrder(length, [BOS], [EOS], pack=True)
        rows.append([])
        for number, size in enumerate(sizes):
            if number == at:
                state, cutter = cutter.state(), InOrder(length, [BOS], [EOS], pack=True)
                cutter.restore(state)
            rows[-1] += list(cutter.rows(str(number), np.full(size, 2000 + number, np.int32)))
        rows[-1] += list(cutter.last_rows())
    assert str(rows[0]) == str(rows[1])


def test_pieces_shorter_than_what_stands_before_a_text_are_refused(tmp_path):
    tokenizer = copy.deepcopy(trained_tokenizer())
    twice = processors.TemplateProcessing(single="<s> <s> $A", special_tokens=[("<s>", BOS)])
    tokenizer.backend_tokenizer.post_processor = twice
    with pytest.raises(ValueError, match=r"^shortest 2: expected more than the 2 tokens before"):
        prepare_rows([Document("a", "ab")], tokenizer, 8, tmp_path / "rows", short="decompose", shortest=2)
    assert prepare_rows([Document("a", "whale" * 9)], tokenizer, 8, tmp_path / "rows", short="decompose", shortest=4)


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"short": "decompose", "length": 100}, "^length 100: expected a power of two with short decompose"),
        ({"short": "decompose", "shortest": 12}, "^shortest 12: expected a power of two"),
        ({"short": "decompose", "shortest": 128}, "^shortest 128: expected at most length, 64"),
        ({"short": "decompose", "shortest": 64}, "^shortest 64: none of 1 document is that long; the longest has 5 t"),
        ({"short": "pack", "shortest": 16}, "^shortest 16: only with short decompose, found pack"),
        ({"short": "drop", "in_order": True}, "^in_order: rows of short drop hold one document each"),
        ({"short": "pack", "in_order": True, "chat": True}, "^in_order: chats are packed as they fit: expected texts"),
        ({"short": "split"}, "^short split: expected drop or pack or decompose of texts"),
    ],
    ids=str,
)
def test_settings_that_cannot_be_meant_are_refused_and_leave_nothing(setting, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        prepare_rows(
            [Document("a", "\x01" * 5)], trained_tokenizer(), out=tmp_path / "rows", **{"length": 64, **setting}
        )
    assert list(tmp_path.iterdir()) == []
