"""What weights do, as numbers: against sums written out token by token, and kinds of tokens against examples."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tokenweight.data import ScoredRow
from tokenweight.method import Dense, ShortContext, sliding_windows
from tokenweight.view.summaries import KINDS, by_kind, by_position, difference_histogram, row_kinds, token_kinds

CLOSE = {"rel": 1e-12}  # a few thousand sums and products in float64


def some_row(length: int, seed: int, documents: tuple[int, ...] = ()) -> ScoredRow:
    """Random losses, NaN where nothing counts; `documents` are the tokens of each, if the row is packed."""
    generator = torch.Generator().manual_seed(seed)
    long, short = 3 * torch.rand(2, 1, length, generator=generator)
    mask = torch.rand(1, length, generator=generator) > 0.2
    positions = torch.cat([torch.arange(num) for num in documents])[None] if documents else None
    mask &= (torch.arange(length)[None] if positions is None else positions) != 0
    long, short = long.masked_fill(~mask, torch.nan), short.masked_fill(~mask, torch.nan)
    return ScoredRow(torch.zeros(1, length, dtype=torch.long), long, short, mask, None, positions)


ROWS = [some_row(100, 0), some_row(70, 1, documents=(30, 1, 39))]
WEIGHTS = [Dense(0.5)(row.long_nll, row.short_nll, row.mask).masked_fill(~row.mask, torch.nan) for row in ROWS]
PLACES = [list(range(100)), [*range(30), 0, *range(39)]]


def counted_tokens():
    """(row, column, position in the document, weight, short - long) of every token that counts."""
    for number, (row, weights, places) in enumerate(zip(ROWS, WEIGHTS, PLACES)):
        for t, place in enumerate(places):
            if row.mask[0, t]:
                difference = row.short_nll[0, t].item() - row.long_nll[0, t].item()
                yield number, t, place, weights[0, t].item(), difference


@pytest.mark.parametrize("num_bins", [1, 7, 40])
def test_the_histogram_counts_every_token_once_and_those_beyond_in_the_outer_bins(num_bins):
    found = difference_histogram(ROWS, limit=1.5, num_bins=num_bins)
    expected = [0] * num_bins
    for *_, difference in counted_tokens():
        place = math.floor((difference + 1.5) / 3 * num_bins)
        expected[min(max(place, 0), num_bins - 1)] += 1
    assert found.counts == expected
    assert found.edges == pytest.approx([-1.5 + 3 * i / num_bins for i in range(num_bins + 1)], abs=1e-12)
    assert any(abs(difference) > 1.5 for *_, difference in counted_tokens())


def test_a_difference_of_zero_lies_in_the_bin_above_zero():
    row = ROWS[0]._replace(short_nll=ROWS[0].long_nll)
    found = difference_histogram([row], limit=2.0, num_bins=4)
    assert found == ([-2, -1, 0, 1, 2], [0, 0, int(row.mask.sum()), 0])


@pytest.mark.parametrize(("num_bins", "width"), [(1, 100), (7, 15), (32, 4), (100, 1), (500, 1)])
def test_means_by_position_are_those_of_the_tokens_at_these_positions_of_their_documents(num_bins, width):
    found = by_position(ROWS, WEIGHTS, num_bins=num_bins)
    there = {place // width for _, _, place, *_ in counted_tokens()}
    assert [(part.first, part.stop) for part in found] == [
        (i * width, min((i + 1) * width, 100)) for i in sorted(there)
    ]
    assert_means(found)


def assert_means(found):
    for part in found:
        own = [
            (weight, abs(difference))
            for *_, place, weight, difference in counted_tokens()
            if part.first <= place < part.stop
        ]
        assert part.num_tokens == len(own)
        assert part.mean_weight == pytest.approx(sum(weight for weight, _ in own) / len(own), **CLOSE)
        assert part.mean_difference == pytest.approx(sum(difference for _, difference in own) / len(own), **CLOSE)


@pytest.mark.parametrize(("size", "stride"), [(16, 12), (30, 7), (99, 50), (100, 50), (300, 1)])
def test_smoothed_means_are_those_of_the_tokens_that_each_window_scores(size, stride):
    found = by_position(ROWS, WEIGHTS, windows=ShortContext(size, stride))
    windows = [(0, min(size, 100)), *((window.first, window.stop) for window in sliding_windows(100, size, stride))]
    there = {place for _, _, place, *_ in counted_tokens()}
    assert [(part.first, part.stop) for part in found] == [
        (first, stop) for first, stop in windows if there & set(range(first, stop))
    ]
    assert_means(found)


def test_a_saw_tooth_of_windows_is_gone_from_smoothed_means():
    size, stride, length = 16, 12, 100
    tooth = [0.0 if t < size else 2.0 - ((t - size) % stride) / stride for t in range(length)]
    row = some_row(length, 0)
    row = row._replace(
        long_nll=torch.zeros(1, length), short_nll=torch.tensor([tooth]), mask=torch.arange(length)[None] > 0
    )
    rough, smooth = (
        [part.mean_difference for part in by_position([row], [row.short_nll], windows=windows) if part.first >= size]
        for windows in (None, ShortContext(size, stride))
    )
    assert max(rough) - min(rough) > 0.5
    assert smooth == pytest.approx([smooth[0]] * 7)


def test_shares_by_kind_are_those_of_the_tokens_of_this_kind_in_each_document():
    generator = torch.Generator().manual_seed(2)
    words = [" whale", " Ahab", ",", " 7", "s", "."]
    pieces = [[words[i] for i in torch.randint(6, (len(places),), generator=generator)] for places in PLACES]
    kinds = [token_kinds(pieces[0]), *(token_kinds(pieces[1][a:b]) for a, b in ((0, 30), (30, 31), (31, 70)))]
    tokens = list(counted_tokens())
    found = {share.kind: share for share in by_kind(ROWS, WEIGHTS, list(map(row_kinds, ROWS, pieces)))}
    assert list(found) == list(KINDS)
    for kind, share in found.items():
        holds = [kinds[0][kind], [holds for part in kinds[1:] for holds in part[kind]]]
        own = [weight for number, t, _, weight, _ in tokens if holds[number][t]]
        assert share.num_tokens == len(own) > 0
        assert share.token_share == pytest.approx(len(own) / len(tokens), **CLOSE)
        assert share.weight_share == pytest.approx(sum(own) / sum(weight for *_, weight, _ in tokens), **CLOSE)
        assert share.mean_weight == pytest.approx(sum(own) / len(own), **CLOSE)
    assert holds[1] != token_kinds(pieces[1])["repeat"]  # a packed document does not repeat words of the one before


def test_what_cannot_be_computed_is_left_out_or_refused():
    none = ROWS[0]._replace(mask=torch.zeros(1, 100, dtype=torch.bool))
    kinds = [row_kinds(none, ["a"] * 100)]
    assert by_position([none], WEIGHTS[:1]) == by_kind([none], WEIGHTS[:1], kinds) == []
    (word,) = by_kind(ROWS[:1], [0 * WEIGHTS[0]], kinds)
    assert (word.kind, word.mean_weight) == ("word rest", 0)
    assert math.isnan(word.weight_share)
    broken = ROWS[0]._replace(short_nll=torch.full((1, 100), torch.nan))
    first = int(broken.mask.int().argmax())
    for call in (
        lambda: difference_histogram([ROWS[1], broken]),
        lambda: by_position([ROWS[1], broken], WEIGHTS[::-1]),
    ):
        with pytest.raises(ValueError, match=f"the short loss of row 1, position {first} is nan"):
            call()
    for settings in ({"limit": 0.0}, {"num_bins": 0}, {"limit": math.nan}):
        with pytest.raises(ValueError, match=r"limit=.*, num_bins=.*: expected"):
            difference_histogram(ROWS, **settings)
    with pytest.raises(ValueError, match="num_bins=0: expected at least 1"):
        by_position(ROWS, WEIGHTS, num_bins=0)


@pytest.mark.parametrize(
    ("text", "kind", "expected"),
    [
        ("Call |me |Ish|mael|. Some |said |Ahab's |gone", "name", "Ish mael Ahab's"),
        ("I |know |that |I'm |not |O'|Brien |or |J|. |Smith", "name", "O' Brien Smith"),
        ("Is |it |Ahab|? Yes|: Ahab|!\n\nThe |End|, |“He |said|”", "name", "Ahab End"),
        ("one\nTwo |v1.|Four |Ünal |ünal", "name", "one\nTwo Four Ünal"),
        ("in |18|51|, |3|.|5 |t|4 |or |4|th", "number", "18 51 3 5 4 th"),
        ("a|, |b|.”\n|$|5| — |c.|d's| '", "punctuation", ", .” $ — '"),
        ("Moby|-|Dick| or|, the| wh|ale| don|'t|", "word start", "Moby Dick or , the wh don"),
        ("Moby|-|Dick| or|, the| wh|ale| don|'t|", "word rest", "ale 't"),
        ("The |big |whale|: the| wh|ale |is |is |WHALE", "repeat", ": the wh ale WHALE"),
        ("naïve |nai\u0308ve |ΣΊΣΥΦΟΣ |σίσυφος |हिन्दी |हिन्|दी", "repeat", "σίσυφος हिन् दी"),
    ],
)
def test_kinds_of_tokens(text, kind, expected):
    pieces = text.split("|")
    found = [piece for piece, holds in zip(pieces, token_kinds(pieces)[kind]) if holds]
    assert " ".join(piece.strip() for piece in found) == expected


def test_every_token_of_a_character_is_of_its_kind():
    kinds = token_kinds(["a", "", "", " 世", "", "界", "", ""])
    assert kinds["word start"] == [True, True, True, True, False, False, False, False]
    assert kinds["word rest"] == [False, False, False, False, True, True, False, False]
    assert token_kinds([]) == {kind: [] for kind in KINDS}


@given(st.lists(st.text(alphabet="aBé\u0301世 '\u2019.\"\n1,-_ ", max_size=4), max_size=12))
def test_kinds_do_not_depend_on_how_the_text_is_cut(pieces):
    """A token is of a kind if one of its characters is, but for punctuation and "word rest", where none begins."""
    found, single = token_kinds(pieces), token_kinds(list("".join(pieces)))
    place = 0
    for t, piece in enumerate(pieces):
        own = {kind: any(single[kind][place : place + len(piece)]) for kind in KINDS}
        is_word = own["word start"] or own["word rest"]
        own["word rest"] &= not own["word start"]
        own["punctuation"] &= not is_word
        if piece:
            assert {kind: found[kind][t] for kind in KINDS} == own
        place += len(piece)
