"""Windows cover what a short context cannot see: each token once, with a context that depends on the token alone."""

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tokenweight.method import Window, check_window_setting, sliding_windows

SETTINGS = st.integers(2, 40).flatmap(lambda size: st.tuples(st.just(size), st.integers(1, size - 1)))
LENGTHS = st.integers(0, 200)


def test_the_drawing_in_the_docstring_is_right():
    assert sliding_windows(10, size=4, stride=2) == [Window(2, 4, 6), Window(4, 6, 8), Window(6, 8, 10)]


def test_a_length_that_the_stride_does_not_divide_ends_in_a_shorter_window():
    assert sliding_windows(9, size=4, stride=3) == [Window(3, 4, 7), Window(6, 7, 9)]


@given(LENGTHS, SETTINGS)
def test_scored_parts_tile_the_tokens_from_size_on_exactly_once_and_in_order(length, setting):
    size, stride = setting
    scored = [token for window in sliding_windows(length, size, stride) for token in range(window.first, window.stop)]
    assert scored == list(range(size, length))


@given(LENGTHS, SETTINGS)
def test_the_context_of_a_token_depends_on_the_token_alone(length, setting):
    size, stride = setting
    for window in sliding_windows(length, size, stride):
        for token in range(window.first, window.stop):
            assert token - window.start == size - stride + (token - size) % stride


@given(LENGTHS, SETTINGS)
def test_a_window_reads_at_most_size_tokens_all_of_them_inside_the_document(length, setting):
    size, stride = setting
    for window in sliding_windows(length, size, stride):
        assert 0 <= window.start < window.first < window.stop <= length
        assert window.stop - window.start <= size


@given(LENGTHS, LENGTHS, SETTINGS)
def test_windows_of_a_prefix_are_a_prefix_of_the_windows(one, other, setting):
    prefix, length = sorted([one, other])
    cut = [w._replace(stop=min(w.stop, prefix)) for w in sliding_windows(length, *setting) if w.first < prefix]
    assert sliding_windows(prefix, *setting) == cut


@pytest.mark.parametrize(("size", "stride"), [(4, 0), (4, -1), (4, 4), (4, 9), (1, 1), (0, 0), (-4, -5)])
@pytest.mark.parametrize("check", [check_window_setting, lambda size, stride: sliding_windows(10, size, stride)])
def test_a_setting_that_leaves_a_token_without_context_is_refused_by_both_values(check, size, stride):
    with pytest.raises(ValueError, match=rf"stride={re.escape(str(stride))}\b.*size={re.escape(str(size))}\b"):
        check(size, stride)
