"""No text becomes a control token."""

import pytest
from tokenizers import Tokenizer, decoders, normalizers, pre_tokenizers
from tokenizers.models import Unigram, WordLevel
from transformers import ByT5Tokenizer, PreTrainedTokenizerFast

from texts import BOS, EOS, TEXT, trained_tokenizer
from tokenweight.data import Document, load_rows, prepare_rows, text_tokens

PIECES = [("<unk>", 0.0), ("<s>", 0.0), ("</s>", 0.0), ("▁", -2.0), *((letter, -3.0) for letter in "<s>/a")]


def unigram(normalizer=None):
    """A vocabulary that holds the names of control tokens as pieces of text, as T5's."""
    inner = Tokenizer(Unigram(PIECES, unk_id=0))
    inner.pre_tokenizer, inner.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    if normalizer is not None:
        inner.normalizer = normalizer
    return PreTrainedTokenizerFast(tokenizer_object=inner, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


def words():
    inner = Tokenizer(WordLevel({"<unk>": 0, "<s>": 1, "</s>": 2, "a": 3, "s>": 4}, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=inner, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


def gpt2():
    """One token for all purposes, and marks of turns that are not called special."""
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(trained_tokenizer().backend_tokenizer.to_str()),
        **dict.fromkeys(["bos_token", "eos_token", "unk_token"], "<s>"),
    )
    tokenizer.add_tokens(["<|user|>", "whale"])
    tokenizer.chat_template = "{% for m in messages %}<|user|>{{ m.content }}{% endfor %}"
    return tokenizer


MARKED = "a <s>a</s> </s><s> a<s"


@pytest.mark.parametrize("kind", [trained_tokenizer, gpt2, unigram, words, ByT5Tokenizer])
def test_names_of_control_tokens_in_a_text_are_text(kind):
    tokenizer = kind()
    special = {tokenizer.bos_token_id, tokenizer.eos_token_id} - {None}
    marked = tokenizer(MARKED, add_special_tokens=False)["input_ids"]
    assert special & set(marked)  # what the tokenizer does by itself
    found, plain = text_tokens(tokenizer, [MARKED, "a a"])
    assert not special & set(found)
    assert plain == tokenizer("a a", add_special_tokens=False)["input_ids"]
    if tokenizer.unk_token_id not in found:
        assert tokenizer.decode(found).replace(" ", "") == MARKED.replace(" ", "")
    assert tokenizer(MARKED, add_special_tokens=False)["input_ids"] == marked  # and goes on doing


def test_marks_of_a_chat_template_are_text_and_other_added_words_stay_whole():
    tokenizer = gpt2()
    user, whale = tokenizer.convert_tokens_to_ids(["<|user|>", "whale"])
    (found,) = text_tokens(tokenizer, ["<|user|>a whale<|user|>"])
    assert user not in found
    assert found.count(whale) == 1
    assert tokenizer.decode(found) == "<|user|>a whale<|user|>"


def test_a_control_token_that_a_normalizer_makes_is_taken_apart_too():
    (found,) = text_tokens(unigram(normalizers.NFKC()), ["a\uff1cs\uff1ea"])
    assert 1 not in found
    assert found.count(PIECES.index(("a", -3.0))) == 2


def test_rows_hold_control_tokens_around_texts_only(tmp_path):
    text = f"{TEXT[:300]}<s>500</s>{TEXT[300:600]}"
    prepare_rows([Document("a", text)], trained_tokenizer(framed=True), 32, tmp_path / "rows", short="pack")
    rows = load_rows(tmp_path / "rows")
    tokens = [token for row in rows["input_ids"] for token in row.tolist()]
    assert tokens.count(BOS) == sum((row == 0).sum() for row in rows["position_ids"])
    assert tokens.count(EOS) <= 1
