"""Numbers of tokens as people type them."""

import pytest

from tokenweight.records import counted, token_count


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("512", 512),
        (4096, 4096),
        ("32k", 32768),
        ("32K", 32768),
        ("8M", 8 * 1024**2),
        ("1_000", 1000),
        (" 1_0k ", 10240),
    ],
)
def test_numbers_of_tokens_are_read_with_their_unit(text, expected):
    assert token_count(text) == expected


@pytest.mark.parametrize("text", ["", "0", 0, -3, "-3", "1.5k", "k", "8m", "1__0", "_1", "²", "32 k", "8MB", True, 1.0])
def test_what_is_no_number_of_tokens_is_refused(text):
    with pytest.raises(ValueError, match=r"^expected a number of tokens, as in 4096, 32k or 8M, found"):
        token_count(text)


def test_one_thing_has_a_name_of_its_own():
    assert [counted(number, "step") for number in (0, 1, 1024)] == ["0 steps", "1 step", "1,024 steps"]
