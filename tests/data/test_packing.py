"""The cutter against what a row must be, whatever the documents."""

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tokenweight.data.packing import HELD_ROWS, Cutter

BOS, EOS = 1000, 1001


def cut(lengths, length, *, framed, pack, restart_at=None):
    """The rows of documents whose tokens are numbered through, and the cutter after them."""
    cutter = Cutter(length, [BOS] * framed, [EOS] * framed, pack=pack)
    rows, held, start = [], [], 0
    for number, size in enumerate(lengths):
        if number == restart_at:
            state = cutter.state()
            cutter = Cutter(length, [BOS] * framed, [EOS] * framed, pack=pack)
            cutter.restore(state)
        tokens = np.arange(start, start + size, dtype=np.int32) + 2000
        rows += list(cutter.rows(str(number), tokens))
        held.append(cutter._num_held())
        start += size
    return rows + list(cutter.last_rows()), cutter, held


def pieces(row, length):
    """(document, offset, tokens) of each document of a packed row, by its positions; fillers left out."""
    starts = [*np.flatnonzero(row["position_ids"] == 0), length]
    parts = [row["input_ids"][a:b] for a, b in pairwise(starts)]
    for part, a in zip(parts, starts):
        assert row["position_ids"][a : a + len(part)].tolist() == list(range(len(part)))
    fillers = parts[len(row["documents"]) :]
    assert all(len(part) == 1 for part in fillers)
    assert len(fillers) <= 1 + (row["input_ids"][0] == BOS)
    return list(zip(row["documents"], row["offsets"], parts))


LENGTHS = st.lists(st.integers(0, 70), max_size=25)


@given(LENGTHS, st.integers(4, 20), st.booleans())
def test_packed_rows_hold_every_token_of_every_document_once(lengths, length, framed):
    rows, cutter, _ = cut(lengths, length, framed=framed, pack=True)
    found = {}
    for row in rows:
        assert len(row["input_ids"]) == len(row["position_ids"]) == length
        assert row["input_ids"].dtype == row["position_ids"].dtype == np.int32
        for document, offset, tokens in pieces(row, length):
            assert not framed or tokens[0] == BOS
            found.setdefault(int(document), {})[offset] = tokens[int(framed) :].tolist()
    kept = sum(len(tokens) for document in found.values() for tokens in document.values())
    start = 0
    for number, size in enumerate(lengths):
        whole = [*range(start + 2000, start + size + 2000), *([EOS] * (framed and size > 0))]
        for offset, tokens in found.get(number, {}).items():
            assert tokens == whole[offset : offset + len(tokens)]
        start += size
    counted = sum(size + (framed and size > 0) for size in lengths)
    assert cutter.summary.dropped_tokens == counted - kept < length
    assert cutter.summary.dropped_tokens == sum(len(piece.tokens) for piece in cutter.held)
    assert (cutter.summary.rows, cutter.summary.tokens) == (len(rows), len(rows) * length)
    assert cutter.summary.empty_documents == lengths.count(0)


@given(LENGTHS, st.integers(4, 20), st.booleans())
def test_a_piece_is_cut_only_where_none_fits(lengths, length, framed):
    rows, _, _ = cut(lengths, length, framed=framed, pack=True)
    sizes = {number: size + (framed and size > 0) for number, size in enumerate(lengths)}
    for row in rows:
        room = length
        for document, offset, tokens in pieces(row, length):
            room -= len(tokens)
            ends = offset + len(tokens) - framed == sizes[int(document)]
            # A piece that does not end its document fills the row, but for a token or two.
            assert ends or room < 2 + framed


@given(LENGTHS, st.integers(4, 20), st.booleans(), st.integers(0, 24), st.booleans())
def test_a_restored_cutter_goes_on_as_if_nothing_had_happened(lengths, length, framed, restart_at, pack):
    rows, cutter, _ = cut(lengths, length, framed=framed, pack=pack)
    again, other, _ = cut(lengths, length, framed=framed, pack=pack, restart_at=restart_at)
    assert str(again) == str(rows)
    assert other.summary == cutter.summary


@given(st.lists(st.integers(0, 70), min_size=1, max_size=60), st.integers(4, 20))
def test_few_tokens_are_held_back(lengths, length):
    _, _, held = cut(lengths, length, framed=True, pack=True)
    assert max(held) < HELD_ROWS * length


def test_the_longest_piece_that_fits_goes_in_first():
    rows, _, _ = cut([6, 3, 4, 9, 5, 7, 2, 6], 10, framed=False, pack=True)
    assert [row["documents"] for row in rows] == [["3"], ["5", "1"], ["7", "2"], ["0", "6", "4"]]
    # The first row has a token left over. The last has room for 2 of the 5 tokens of "4", when nothing else is left.
    assert rows[0]["input_ids"].tolist() == [*range(2013, 2022), 2013]
    assert rows[-1]["input_ids"].tolist()[8:] == [2022, 2023]


@pytest.mark.parametrize("pack", [False, True])
def test_a_document_of_exactly_a_row_is_a_row(pack):
    rows, cutter, _ = cut([8], 10, framed=True, pack=pack)
    assert [row["input_ids"].tolist() for row in rows] == [[BOS, *range(2000, 2008), EOS]]
    assert (cutter.summary.short_documents, cutter.summary.dropped_tokens) == (0, 0)
