"""What the commands share: numbers of tokens as text."""

import pytest

from tokenweight.cli.common import token_counts


@pytest.mark.parametrize(
    ("text", "expected"), [("512", [512]), ("1,2k,1M", [1, 2048, 1048576]), ("4_096,32K", [4096, 32768])]
)
def test_numbers_of_tokens(text, expected):
    assert token_counts("size", text) == expected


@pytest.mark.parametrize("text", ["", "0", "small", "8,", "1.5k", "-3", "32k,long", "k", "²"])
def test_what_is_no_number_of_tokens_is_named_with_its_option(text):
    with pytest.raises(ValueError, match=r"^--size .*: expected") as caught:
        token_counts("size", text)
    assert text in str(caught.value)
