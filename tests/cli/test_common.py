"""What the commands share: numbers of tokens as text, and how far they are."""

import collections
import contextlib
import json
import time

import pytest

from texts import TEXT, trained_tokenizer
from tokenweight import cli
from tokenweight.cli.common import progress_bar, token_counts


def test_the_log_of_a_job_gets_a_line_a_minute(monkeypatch, capsys):
    now = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    with progress_bar("tokens") as advance:
        for seconds in (30, 61, 100, 150):
            now[0] = float(seconds)
            advance(3000, 12_000)
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.splitlines() == ["6,000 of 12,000 tokens, 98.4 a second", "12,000 of 12,000 tokens, 80 a second"]


def test_an_order_by_similarity_has_a_bar_that_ends_before_that_of_the_characters(monkeypatch, tmp_path):
    trained_tokenizer().save_pretrained(tmp_path / "model")
    texts = [TEXT[400 * number :][:300] for number in range(9)]
    (tmp_path / "texts.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    seen, done = [], collections.Counter()

    @contextlib.contextmanager
    def bar(unit):
        seen.append(f"begin {unit}")
        yield lambda more, total=None: done.update(
            {unit: more, f"{unit} in all": (total or 0) - done[f"{unit} in all"]}
        )
        seen.append(f"end {unit}")

    monkeypatch.setattr("tokenweight.cli.prepare.progress_bar", bar)
    words = ["--tokenizer", str(tmp_path / "model"), "--length", "32", "--short", "pack", "--order", "similar"]
    assert cli.main(["prepare", str(tmp_path / "texts.jsonl"), *words, "--out", str(tmp_path / "rows")]) == 0
    order = "documents read and compared"
    assert seen == [f"begin {order}", f"end {order}", "begin characters", "end characters"]
    assert done[order] == done[f"{order} in all"] == 18
    assert done["characters"] == sum(map(len, texts))


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
