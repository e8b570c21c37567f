"""Which passage of a scored sequence is shown, under which title, in the terminal and as HTML."""

import re
from html.parser import HTMLParser

import pytest
import torch
from pages import HOSTILE, text_of
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import PreTrainedTokenizerFast

from tokenweight import Dense, Sparse
from tokenweight.data import ScoredRow
from tokenweight.view import choose_passage, notebook, view, write_html
from tokenweight.view.excerpt import LOOKS, look


def some_row(length=40, **fields):
    """Without a tokenizer: the pieces are the ids. The long context helps most from token 25 to 29."""
    generator = torch.Generator().manual_seed(0)
    long = torch.rand(1, length, generator=generator)
    short = long + 0.1 * torch.rand(1, length, generator=generator)
    short[:, 25:30] += 2
    mask = torch.arange(length)[None] > 0
    return ScoredRow(torch.arange(100, 100 + length)[None], long, short, mask, None, **fields)


@pytest.mark.parametrize("num", [5, 12, 40, 99])
def test_the_passage_has_the_most_weight_and_the_title_says_so_unless_it_is_all(num):
    row = some_row(number=3, num_rows=7)
    shown = choose_passage(row, Dense(), num=num, name="book")
    weights = Dense()(row.long_nll, row.short_nll, row.mask)[0]
    sums = [weights[start : start + num].sum().item() for start in range(max(1, 40 - num + 1))]
    first = sums.index(max(sums))
    assert shown.span == slice(first, first + min(num, 40))
    title = f"book · row 3 of 7 · tokens {first} to {first + min(num, 40) - 1} of 40"
    assert shown.title == title + " · the passage with most weight" * (num < 40)


def test_a_passage_that_was_asked_for_and_a_row_of_unknown_number():
    assert choose_passage(some_row(), Dense(), start=35, num=9).title == "tokens 35 to 39 of 40"
    for settings, message in (({"start": 40}, "start 40: the sequence has tokens 0 to 39"), ({"num": 0}, "num 0: ")):
        with pytest.raises(ValueError, match=message):
            choose_passage(some_row(), Dense(), **settings)


def test_what_is_shown_begins_with_the_title():
    title, passage, *_ = view(some_row(), Dense(), start=2, num=3, tinted=False)
    assert title.plain == "tokens 2 to 4 of 40"
    assert re.findall(r"\d+", passage.plain) == ["102", "103", "104"]


class Spans(HTMLParser):
    """Class and title of the tokens in the passage, and every other element's name and attributes."""

    def __init__(self, page):
        super().__init__()
        self.tokens, self.others = [], []
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        known = dict(attrs)
        if "title" in known:
            self.tokens.append((known["class"], known["title"]))
        else:
            self.others.append((tag, sorted(known)))


@pytest.mark.parametrize("weighting", ["sparse:keep=0.2", Sparse(0.2)])
def test_a_notebook_shows_each_token_with_its_look_weight_and_losses(weighting):
    row = some_row(number=0, num_rows=1)
    html = notebook(row, weighting, start=20, num=8, top=2)._repr_html_()
    weights = Sparse(0.2)(row.long_nll, row.short_nll, row.mask)[0].tolist()
    long, short = row.long_nll[0].tolist(), row.short_nll[0].tolist()
    assert Spans(html).tokens == [
        (f"t {LOOKS[look(weights[t])]}", f"{t}: weight {weights[t]:.3g}, long {long[t]:.2f}, short {short[t]:.2f}")
        for t in range(20, 28)
    ]
    assert str(Sparse(0.2)) in html
    listed = html[html.index("<table>") :].split("<tr>")[2:]
    order = sorted(range(1, 40), key=lambda t: (-weights[t], -abs(long[t] - short[t])))[:2]
    assert [int(re.search(r"<td>(\d+)", line)[1]) for line in listed] == order
    assert all(f"[{100 + t}]" in text_of(line) for t, line in zip(order, listed, strict=True))
    assert "not predicted" in notebook(row, start=0, num=1).fragment


def test_html_brings_its_style_and_loads_runs_and_interprets_nothing(tmp_path):
    words = [HOSTILE + "\n", *(f"w{number}" for number in range(40))]
    tokenizer = Tokenizer(WordLevel({word: number for number, word in enumerate(words)}, "w0"))
    row = some_row()._replace(
        tokens=torch.arange(40)[None], tokenizer=PreTrainedTokenizerFast(tokenizer_object=tokenizer)
    )
    shown = notebook(row, name="<b>&amp;")
    write_html(shown, tmp_path / "page.html")
    page = (tmp_path / "page.html").read_text(encoding="utf-8")
    assert shown.fragment in page
    assert "default-src 'none'" in page
    names = {name for name, _ in Spans(page).others}
    assert names <= {
        "html",
        "meta",
        "title",
        "style",
        "div",
        "p",
        "strong",
        "span",
        "i",
        "table",
        "caption",
        "tr",
        "th",
        "td",
    }
    assert {attribute for _, own in Spans(page).others for attribute in own} <= {
        "class", "dir", "lang", "charset", "http-equiv", "content", "name",
    }  # fmt: skip
    assert page.count("&lt;b&gt;&amp;amp;") == 2
    passage = text_of(page.split('class="passage"')[1].partition(">")[2].split("</div>")[0])
    hidden = {"\x00": r"\x00", "\x1b": r"\x1b", "\u202e": r"\u202e", "\u2066": r"\u2066"}
    expected = HOSTILE
    for character, escape in hidden.items():
        expected = expected.replace(character, escape)
    assert f"{expected}\n" in passage
    assert repr(shown) == "<<b>&amp; · tokens 0 to 39 of 40>"
