"""What stands around a text is found, whatever the alphabet."""

import json

import pytest
from tokenizers import Tokenizer
from tokenizers.models import BPE
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast

from texts import BOS, EOS, trained_tokenizer
from tokenweight.data import Document, load_rows, prepare_rows
from tokenweight.models import special_tokens, text_prefix


def test_special_tokens_are_found_by_the_rule_of_the_tokenizer(framed):
    assert special_tokens(trained_tokenizer(framed=framed)) == (([BOS], [EOS]) if framed else ([], []))


def alphabet(letters, template, *special):
    """Letters that are tokens, and special ones before and after a text; other characters are dropped."""
    vocabulary = {name: number for number, name in enumerate([*special, *letters])}
    inner = Tokenizer(BPE(vocabulary, []))
    names = [(name, vocabulary[name]) for name in special]
    inner.post_processor = TemplateProcessing(single=template, special_tokens=names)
    return PreTrainedTokenizerFast(tokenizer_object=inner)


@pytest.mark.parametrize(
    ("letters", "template", "special", "expected"),
    [
        ("abc", "[gMASK] <sop> $A", ["[gMASK]", "<sop>"], ([0, 1], [])),
        ("ACGT", "<cls> $A <eos>", ["<cls>", "<eos>"], ([0], [1])),
        ("ACGT", "$A <eos> <eos>", ["<eos>"], ([], [0, 0])),
        ("ΩΨ", "<s> $A", ["<s>"], ([0], [])),
        ("01", "$A", [], ([], [])),
    ],
)
def test_special_tokens_are_found_in_any_alphabet(letters, template, special, expected, tmp_path):
    tokenizer = alphabet(letters, template, *special)
    assert special_tokens(tokenizer) == expected
    prepare_rows([Document("a", letters * 20)], tokenizer, 10, tmp_path / "rows")
    rows = load_rows(tmp_path / "rows")["input_ids"]
    assert all(row[: len(expected[0])].tolist() == expected[0] for row in rows)
    assert json.loads((tmp_path / "rows" / "rows.json").read_text())["prefix"] == expected[0]


def test_a_tokenizer_that_makes_nothing_of_any_text_is_refused():
    with pytest.raises(ValueError, match="cannot tell the special tokens"):
        special_tokens(alphabet("", "<s> $A", "<s>"))


def test_the_prefix_of_a_text_is_that_which_prepare_noted_else_that_of_the_tokenizer():
    tokenizer = trained_tokenizer(framed=True)
    assert text_prefix(tokenizer, {"prefix": [5, 6]}) == [5, 6]
    assert text_prefix(tokenizer, {"prefix": []}) == []
    assert text_prefix(tokenizer, {}) == [BOS]
    assert text_prefix(trained_tokenizer(), {}) == [BOS]  # by no rule, but rows of others may begin with it
    assert text_prefix(None, {}) == []
