"""Losses of a model with another tokenizer, against a byte-by-byte walk over both tokenizations."""

import itertools
import json
from functools import cache

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, decoders, normalizers, pre_tokenizers, trainers
from tokenizers import models as kinds
from transformers import PreTrainedTokenizerFast

import models
from texts import BOS, EOS, TEXT, trained_tokenizer
from tokenweight import Scorer, ShortContext
from tokenweight.data import text_tokens
from tokenweight.models import AlignedScorer
from tokenweight.models.scorers.token_bytes import TokenBytes

TEXTS = {
    "prose": TEXT[:400],
    "code": "def f(x):\n\tif x  !=  0x1F:\r\n        return {'a': [1, 22, 333]}  # done\n\n\n",
    "cjk": "漢字かな交じり文。한국어 텍스트, и русский текст 漢字",
    "emoji": "a 😀 b 👩‍🔬🇩🇪 cafe\u0301 naïve ½",
    "spaces": "  two  spaces   and\ttabs \n",
}


@cache
def sentencepiece(*, dummy=True) -> PreTrainedTokenizerFast:
    """BPE over `▁` with a token for each byte, a space before each text, and BOS before it; as Llama 2 has it."""
    inner = Tokenizer(kinds.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    steps = [normalizers.Prepend("▁")] * dummy + [normalizers.Replace(" ", "▁")]
    inner.normalizer = normalizers.Sequence(steps)
    inner.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    special = ["<unk>", "<bos>", "<eos>", *(f"<0x{byte:02X}>" for byte in range(256))]
    trainer = trainers.BpeTrainer(vocab_size=500, special_tokens=special, show_progress=False)
    inner.train_from_iterator(TEXT.splitlines(), trainer)
    whole = json.loads(inner.to_str())
    whole["added_tokens"] = whole["added_tokens"][:3]  # single bytes are pieces like others
    inner = Tokenizer.from_str(json.dumps(whole))
    special = {"unk_token": "<unk>", "bos_token": "<bos>", "eos_token": "<eos>"}
    return PreTrainedTokenizerFast(tokenizer_object=inner, **special)


OTHERS = {
    "bpe": lambda: trained_tokenizer(vocab_size=400),
    "sentencepiece": sentencepiece,
    "no-dummy": lambda: sentencepiece(dummy=False),
}


def model_of(tokenizer, **changes):
    return models.tiny("gpt2", vocab_size=len(tokenizer), max_position_embeddings=1024, **changes)


def aligned(tokenizer, rows_tokenizer, model=None, **options):
    model = model or model_of(tokenizer)
    return AlignedScorer(model, tokenizer, rows_tokenizer, tokenize=text_tokens, **options)


def ids(tokenizer, text):
    return torch.tensor(text_tokens(tokenizer, [text]))


def slow(ours, theirs, losses):
    """Sums over groups, found by writing out the text byte by byte: for each of our tokens the sum, and its share."""
    ours_at, theirs_at = np.cumsum(list(map(len, ours))).tolist(), np.cumsum(list(map(len, theirs))).tolist()
    found, begun, num_ours, num_theirs = [], 0, 0, 0
    for byte in range(1, ours_at[-1] + 1):
        if byte in ours_at and byte in theirs_at:
            mine = ours[num_ours : ours_at.index(byte) + 1]
            total = sum(losses[num_theirs : theirs_at.index(byte) + 1])
            found += [(total, len(piece) / (byte - begun)) for piece in mine]
            begun, num_ours, num_theirs = byte, ours_at.index(byte) + 1, theirs_at.index(byte) + 1
    return found


@pytest.mark.parametrize("context", [ShortContext(16, 12), ShortContext(8, 7), ShortContext(7, 1)])
@pytest.mark.parametrize("framed", [False, True])
@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_with_one_tokenizer_for_both_the_losses_are_those_of_the_scorer_to_the_bit(kind, framed, context):
    tokenizer = trained_tokenizer(framed=framed)
    model = models.tiny(kind, vocab_size=len(tokenizer), dtype=torch.float32)
    text = [BOS] * framed + text_tokens(tokenizer, [TEXT[:300]])[0]
    rows = torch.tensor([[*text[:60], EOS], text[:61]])
    rows[1, 20], rows[1, 40] = EOS, EOS  # in the middle of a text, too
    prefix = [BOS] * framed
    scorer = Scorer(model, context, prefix=prefix)
    long_nll = scorer.long_nll(rows)
    contrast = aligned(tokenizer, tokenizer, model, prefix=prefix)(rows, context)
    torch.testing.assert_close(contrast.long_nll, long_nll, rtol=0, atol=0)
    torch.testing.assert_close(contrast.short_nll, scorer(rows, long_nll=long_nll), rtol=0, atol=0)


@pytest.mark.parametrize("other", OTHERS)
@pytest.mark.parametrize("name", TEXTS)
def test_losses_are_summed_where_both_reach_one_byte_and_shared_by_bytes(name, other):
    rows_tokenizer, tokenizer, text = trained_tokenizer(vocab_size=350), OTHERS[other](), TEXTS[name]
    scorer, rows = aligned(tokenizer, rows_tokenizer, prefix=[tokenizer.bos_token_id]), ids(rows_tokenizer, text)
    read = [tokenizer.bos_token_id, *text_tokens(tokenizer, [text])[0]]
    losses = Scorer(scorer.model, ShortContext(4)).long_nll(torch.tensor([read]))[0].tolist()[1:]
    ours, theirs = TokenBytes(rows_tokenizer).of(rows[0].tolist()), TokenBytes(tokenizer).of(read[1:])
    if other == "sentencepiece" and not text.startswith(" "):
        theirs[0] = theirs[0][1:]
    elif other == "sentencepiece":  # the space that is put there is the first of the text
        read = [tokenizer.bos_token_id, *text_tokens(tokenizer, [text[1:]])[0]]
        losses = Scorer(scorer.model, ShortContext(4)).long_nll(torch.tensor([read]))[0].tolist()[1:]
        theirs = TokenBytes(tokenizer).of(read[1:])
    assert b"".join(ours) == b"".join(theirs) == text.encode()
    expected = slow(ours, theirs, losses)
    contrast = scorer(rows, ShortContext(8))
    torch.testing.assert_close(contrast.long_nll[0, 1:], torch.tensor([a * b for a, b in expected[1:]]).double())
    scorer.whole = True
    whole = scorer(rows, ShortContext(8)).long_nll
    torch.testing.assert_close(whole[0, 1:], torch.tensor([total for total, _ in expected[1:]]).double())


@torch.no_grad()
def test_windows_read_the_text_of_the_same_tokens():
    rows_tokenizer, tokenizer, context = trained_tokenizer(vocab_size=600), sentencepiece(), ShortContext(16, 5)
    scorer, rows = aligned(tokenizer, rows_tokenizer, prefix=[tokenizer.bos_token_id]), ids(rows_tokenizer, TEXT[:300])
    contrast, num = scorer(rows, context), rows.shape[1]
    ours = TokenBytes(rows_tokenizer).of(rows[0].tolist())
    read = text_tokens(tokenizer, [TEXT[:300]])[0]
    theirs = TokenBytes(tokenizer).of(read)
    theirs[0] = theirs[0][1:]
    ends, begins = np.cumsum(list(map(len, ours))), np.cumsum([0, *map(len, theirs)])[:-1]
    their_ends = np.cumsum(list(map(len, theirs)))
    borders = sorted({0, *ends.tolist()} & {0, *their_ends.tolist()})
    checked = 0
    for start, stop in itertools.pairwise(borders):
        group = [t for t in range(num) if start < ends[t] <= stop]
        if group[0] < context.size:
            assert torch.equal(contrast.short_nll[0, group], contrast.long_nll[0, group])
            continue
        first = group[0] - (group[0] - context.size) % context.stride - (context.size - context.stride)
        inside = [t for t in range(len(theirs)) if begins[t] >= ends[first - 1] and their_ends[t] <= stop]
        window = [tokenizer.bos_token_id, *(read[t] for t in inside[1:])]
        logits = scorer.model(torch.tensor([window]), use_cache=False).logits[0].log_softmax(dim=-1)
        scored = [place for place, t in enumerate(inside) if begins[t] >= start]
        total = -sum(logits[place - 1, window[place]] for place in scored)
        torch.testing.assert_close(contrast.short_nll[0, group].sum(), total)
        checked += 1
    assert checked > 20


@pytest.mark.parametrize("text", TEXTS.values(), ids=TEXTS)
def test_the_losses_of_a_text_sum_up_to_those_of_the_model(text):
    rows_tokenizer, tokenizer = trained_tokenizer(vocab_size=350), sentencepiece(dummy=False)
    scorer = aligned(tokenizer, rows_tokenizer, prefix=[tokenizer.bos_token_id])
    read = [tokenizer.bos_token_id, *text_tokens(tokenizer, [text])[0], tokenizer.eos_token_id]
    row = [BOS, *text_tokens(rows_tokenizer, [text])[0], EOS]
    expected = Scorer(scorer.model, ShortContext(4)).long_nll(torch.tensor([read])).sum()
    torch.testing.assert_close(scorer(torch.tensor([row]), ShortContext(8)).long_nll.sum(), expected)


def test_splitting_our_tokens_changes_no_sum_over_a_token():
    coarse, tokenizer, text = trained_tokenizer(vocab_size=600), sentencepiece(), TEXT[:300]
    fine = trained_tokenizer(vocab_size=260)
    model = model_of(tokenizer)
    whole, split = (
        aligned(tokenizer, one, model, prefix=[tokenizer.bos_token_id])(ids(one, text), ShortContext(999)).long_nll[0]
        for one in (coarse, fine)
    )
    cumulated = [
        dict(zip(np.cumsum(list(map(len, TokenBytes(one).of(ids(one, text)[0].tolist())))).tolist(), nll.cumsum(0)))
        for one, nll in ((coarse, whole), (fine, split))
    ]
    theirs = TokenBytes(tokenizer).of(text_tokens(tokenizer, [text])[0])
    theirs[0] = theirs[0][1:]
    common = sorted({*cumulated[0]} & {*np.cumsum(list(map(len, theirs))).tolist()})[1:]
    assert len(common) > 20
    gains = [[by[b] - by[a] for a, b in itertools.pairwise(common)] for by in cumulated]
    torch.testing.assert_close(*map(torch.stack, gains))


def test_each_document_of_a_pack_is_a_text_of_its_own():
    rows_tokenizer, tokenizer = trained_tokenizer(vocab_size=350), sentencepiece()
    scorer = aligned(tokenizer, rows_tokenizer, prefix=[tokenizer.bos_token_id])
    parts = [ids(rows_tokenizer, TEXT[a:b])[0] for a, b in ((0, 150), (150, 350), (350, 380))]
    positions = torch.cat([torch.arange(len(part)) for part in parts])[None]
    packed = scorer(torch.cat(parts)[None], ShortContext(12), position_ids=positions)
    alone = [scorer(part[None], ShortContext(12)) for part in parts]
    for name in ("long_nll", "short_nll"):
        expected = torch.cat([getattr(one, name)[0] for one in alone])
        torch.testing.assert_close(getattr(packed, name)[0], expected)


def test_a_row_that_begins_and_ends_within_a_character_is_read_without_it():
    rows_tokenizer, tokenizer = trained_tokenizer(), sentencepiece()
    scorer = aligned(tokenizer, rows_tokenizer, prefix=[tokenizer.bos_token_id])
    whole, cut = ids(rows_tokenizer, "😀 some text 😀"), ids(rows_tokenizer, " some text ")
    assert whole.shape[1] - cut.shape[1] == 8
    found = scorer(whole[:, 2:-1], ShortContext(4)).long_nll
    torch.testing.assert_close(found[:, 2:-3][:, 1:], scorer(cut, ShortContext(4)).long_nll[:, 1:])
    assert not found[:, :2].any()
    assert not found[:, -3:].any()


def test_rows_that_are_no_text_or_whose_text_is_changed_are_refused_by_number():
    rows_tokenizer, tokenizer = trained_tokenizer(), sentencepiece()
    byte = {value: token for token, value in TokenBytes(rows_tokenizer).spelled.items() if len(value) == 1}
    letter, half = byte[b"a"], byte["é".encode()[:1]]
    rows = torch.tensor([[letter] * 4, [letter, half, letter, letter]])
    with pytest.raises(ValueError, match=r"row 1: position 1: .*UTF-8"):
        aligned(tokenizer, rows_tokenizer)(rows, ShortContext(2))
    lower = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    lower.normalizer = normalizers.Sequence([normalizers.Lowercase(), lower.normalizer])
    lower = PreTrainedTokenizerFast(tokenizer_object=lower, unk_token="<unk>")
    rows = torch.tensor([[letter] * 4, [letter, byte[b"B"], letter, letter]])
    with pytest.raises(ValueError, match=r"row 1: .*'baa'.*'Baa'"):
        aligned(lower, rows_tokenizer)(rows, ShortContext(2))


def test_characters_that_a_tokenizer_would_compose_are_read_as_they_stand():
    rows_tokenizer, text = trained_tokenizer(), "cafe\u0301 and more"
    tokenizer = Tokenizer.from_str(trained_tokenizer(vocab_size=350).backend_tokenizer.to_str())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")
    assert aligned(tokenizer, rows_tokenizer)(ids(rows_tokenizer, text), ShortContext(4)).long_nll[0, 1:].all()
    assert ids(tokenizer, text).shape < ids(trained_tokenizer(vocab_size=350), text).shape


def test_control_tokens_are_those_of_the_same_use_and_others_are_not_read():
    rows_tokenizer, tokenizer = trained_tokenizer(), sentencepiece()
    scorer = aligned(tokenizer, rows_tokenizer, prefix=[tokenizer.bos_token_id])
    text = ids(rows_tokenizer, "some text")[0].tolist()
    framed = scorer(torch.tensor([[BOS, *text, EOS]]), ShortContext(4)).long_nll[0]
    plain = scorer(torch.tensor([text]), ShortContext(4)).long_nll[0]
    torch.testing.assert_close(framed[2 : len(text) + 1], plain[1:])
    assert framed[0] == 0
    assert framed[1] > 0
    assert framed[-1] > 0


def test_tokenizers_that_do_not_say_their_bytes_are_refused():
    inner = Tokenizer(kinds.WordLevel({"<unk>": 0, "a": 1}, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    with pytest.raises(ValueError, match="bytes"):
        aligned(PreTrainedTokenizerFast(tokenizer_object=inner), trained_tokenizer(), models.tiny())


def test_groups_with_several_of_our_tokens_are_counted():
    fine, coarse = trained_tokenizer(vocab_size=260), trained_tokenizer(vocab_size=600)
    scorer, text = aligned(coarse, fine), TEXT[:200]
    scorer(ids(fine, text), ShortContext(4))
    pieces = TokenBytes(coarse).of(ids(coarse, text)[0].tolist())
    assert scorer.groups == len(pieces)
    assert scorer.shared_groups == sum(len(piece) > 1 for piece in pieces)


def test_a_text_that_is_too_long_for_the_model_is_refused_by_row():
    tokenizer = trained_tokenizer(vocab_size=260)
    model = models.tiny("gpt2", vocab_size=len(tokenizer))
    with pytest.raises(ValueError, match=r"row 0: .*200 tokens.*128 positions"):
        aligned(tokenizer, trained_tokenizer(vocab_size=600), model)(
            ids(trained_tokenizer(vocab_size=600), "\x01" * 200), ShortContext(4)
        )
