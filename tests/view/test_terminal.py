"""Shared by tests."""

import io
import re

import pytest
import torch
from rich.console import Console
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from tokenweight.data import token_pieces
from tokenweight.method import Dense
from tokenweight.view import passage, top_tokens
from tokenweight.view.terminal import legend, summary, tint

TEXT = 'The naïve café — "déjà vu" — 🙂👩‍🚀 says 你好。世界 and [bold]ünïcode[/bold].\n\n  Größe: 日本語 😀 end \ufffd.'


def byte_level(vocab_size: int) -> PreTrainedTokenizerFast:
    """Trained on English only, so that other characters are split into their bytes."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=vocab_size, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(["The naive cafe says and end. Size. " * 9, "日本 café 🙂 "], trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


def sentencepiece_like() -> PreTrainedTokenizerFast:
    """Drops the space before the first token, and falls back to bytes, as Llama 2 does."""
    words = ["<unk>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", "▁The", "▁says", "▁end", "T", "h", "e", "."]
    tokenizer = Tokenizer(models.Unigram([(word, -1.0) for word in words], unk_id=0, byte_fallback=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", left=1)]
    tokenizer.decoder = decoders.Sequence(steps)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


def ansi(renderable, *, no_color=False, color_system="truecolor") -> str:
    settings = {"no_color": no_color, "color_system": color_system}
    console = Console(file=io.StringIO(), width=100, height=50, force_terminal=True, **settings)
    console.print(renderable)
    return console.file.getvalue()


@pytest.mark.parametrize("tokenizer", [byte_level(256), byte_level(300), sentencepiece_like()])
def test_pieces_join_to_the_text(tokenizer):
    tokens = tokenizer(TEXT)["input_ids"]
    pieces = token_pieces(tokens, tokenizer)
    assert len(pieces) == len(tokens)
    assert "".join(pieces) == TEXT
    assert "".join(pieces).count("\ufffd") == 1  # its own
    assert pieces.count("") > 9, "no character was split"
    place = next(place for place, piece in enumerate(pieces) if "世" in piece)
    assert pieces[place - 1] == ""  # the last of the tokens of a character has it


def test_pieces_of_words_and_of_a_cut_character():
    tokenizer = sentencepiece_like()
    words = tokenizer("The end says The")["input_ids"]
    assert token_pieces(words, tokenizer) == ["The", " end", " says", " The"]
    cut = byte_level(256)("a 世")["input_ids"][:-1]
    assert "".join(token_pieces(cut, byte_level(256))) == "a \ufffd"
    assert token_pieces([12, 7, 99], None) == ["12", " 7", " 99"]
    assert token_pieces([], tokenizer) == []


def test_tint():
    never, half, one, two, eight = (tint(weight) for weight in (0.0, 0.5, 1.0, 2.0, 8.0))
    assert never.dim
    assert not never.bgcolor
    assert not one
    assert half.bgcolor.triplet.blue > half.bgcolor.triplet.red
    assert two.bgcolor.triplet.red > two.bgcolor.triplet.blue
    assert (half.bold, two.bold, two.underline, tint(1.9).underline) == (None, True, True, None)
    assert eight == tint(4.0) != two
    assert tint(0.1) == tint(0.25) != half
    for bad in (-1.0, float("nan"), float("inf")):
        with pytest.raises(ValueError, match="expected a finite number"):
            tint(bad)


def test_passage_keeps_the_text_and_interprets_nothing():
    pieces = ["A", " [bold]b[/bold]", " :smile:", "\n", "\x1b[31m", "\u202e", "\r", "\x9b", " end"]
    text = passage(pieces, torch.tensor([0.0, 1, 1, 1, 1, 1, 1, 1, 4]))
    assert text.plain == r"A [bold]b[/bold] :smile:" + "\n" + r"\x1b[31m\u202e\r\x9b end"
    assert ansi(text, no_color=True) == "\x1b[2mA\x1b[0m" + text.plain[1:-3] + "\x1b[1;4mend\x1b[0m\n"
    assert passage(["a", "\n"], torch.tensor([1.0, 2])).plain == "a⏎\n"


def test_without_color_bold_underline_and_dim_remain():
    line = ansi(passage(["no", " plain", " up", " far"], torch.tensor([0.0, 1, 1.5, 3])), no_color=True)
    assert line == "\x1b[2mno\x1b[0m plain \x1b[1mup\x1b[0m \x1b[1;4mfar\x1b[0m\n"
    assert "\x1b[1;4m4 or more" in ansi(legend(), no_color=True)
    assert ansi(passage(["a"], torch.tensor([3.0]))).count(";48;2;") == 1


def test_where_nothing_can_be_tinted_marks_tell_the_same():
    pieces = ["A", " tale", " of", " the", "\n", " sea", ":", " Ahab", "'s", " \n"]
    weights = torch.tensor([0.0, 0, 0.5, 0.8, 1, 1.5, 1, 3, 9, 0])
    assert passage(pieces, weights, tinted=False).plain == "((A tale)) (of the)\n [sea]: [[Ahab's]] \n"
    assert str(passage(["\x1b", "⟦"], torch.tensor([2.0, 1]), tinted=False)) == r"[[\x1b]]⟦"
    assert "[[2 or more]]" in legend(tinted=False).plain
    with pytest.raises(ValueError, match="expected a finite number"):
        passage(["a"], torch.tensor([-1.0]), tinted=False)


def test_summary():
    weights, mask = torch.tensor([9.0, 0, 1, 1, 2]), torch.tensor([False, True, True, True, True])
    line = summary(Dense(), weights, mask).plain  # effective (0 + 1 + 1 + 2)^2 / (1 + 1 + 4)
    assert line == "dense:interpolation=0.75 · mean weight 1.00 · 25.0% weigh 0 · effective tokens 2.7 of 4 (66.7%)"
    assert "effective tokens 0.0 of 4" in summary(Dense(), torch.zeros(5), mask).plain
    assert "no token" in summary(Dense(), weights, mask & False).plain


def test_top_tokens_order_and_numbers():
    pieces = ["Ahab", " saw", "\n", " [i]", " Ahab", ",", " saw", ",", " never"]
    weights = torch.tensor([9.0, 1, 1, 1, 3, 3, 1, 0, 1])
    long = torch.tensor([float("nan"), 1, 1, 1, 0.25, 2, 3, 9, 1])
    short = torch.tensor([float("nan"), 1.5, 2, 1.5, 2.5, 1, 2, 0, 1])
    mask = torch.tensor([False] + [True] * 8)
    table = top_tokens(pieces, weights, long, short, mask, num=6)
    lines = ansi(table, color_system=None).splitlines()[4:12]
    earlier = [lines.pop(1), lines.pop(4)]  # below tokens 4 and 6: where Ahab was, and where he saw
    assert [line.strip() for line in earlier] == ["Ahab saw⏎ [i] Ah", "Ahab saw⏎ [i] Ahab,"]
    assert earlier[0].index("Ahab saw") == lines[0].index("Ahab, saw")
    assert earlier[1].index("saw") == lines[3].index("saw, never")
    assert [int(line.split()[0]) for line in lines] == [4, 5, 2, 6, 1, 3]  # weight, then difference, then position
    assert [line.split()[-6:] for line in lines[:2]] == [
        ["0.25", "2.50", "+2.25", "3.00", "0", "4"],
        ["2.00", "1.00", "-1.00", "3.00", "-", "-"],
    ]
    assert lines[3].split()[-2:] == ["1", "5"]
    assert "Ahab saw⏎ [i] Ahab, saw, never" in lines[0]
    columns = [line.index(word) for line, word in zip(lines, ["Ahab, saw", ", saw", "⏎", "saw, n", "saw⏎", "[i]"])]
    assert len(set(columns)) == 1
    assert re.search(r"\x1b\[1;4mAhab\x1b\[0m, saw", ansi(table, no_color=True))
    assert len(ansi(top_tokens(pieces, weights, long, short, mask), color_system=None).splitlines()) == 4 + 7 + 2 + 2


def test_without_color_the_listed_token_and_where_it_was_before_stand_between_marks():
    pieces = ["Ahab", " saw", ",", " Ahab", "!", " is"]
    weights = torch.tensor([1.0, 1, 0.5, 3, 1.5, 1])
    losses = torch.zeros(6), torch.tensor([0.0, 0, 9, 3, 2, 1])
    mask = torch.tensor([False, False, True, True, True, True])
    marked = ansi(top_tokens(pieces, weights, *losses, mask, tinted=False), color_system=None).splitlines()[4:9]
    plain = ansi(top_tokens(pieces, weights, *losses, mask), color_system=None).splitlines()[4:9]
    shown = ["Ahab saw, [[Ahab]]! is", "|Ahab| saw, Ahab", "Ahab saw, Ahab[!] is", "Ahab! |is|", "Ahab saw(,) Ahab!"]
    for line, unmarked, text in zip(marked, plain, shown, strict=True):
        assert text in line
        token = next(word for word in ("[[", "|", "[", "(") if word in line)
        start = line.index(token) + len(token)
        assert line[start] == unmarked[start]  # the token begins in the same column
