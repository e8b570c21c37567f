"""Shares of tokens with more context than the short one, against a loop over every token."""

import collections

import datasets
import pytest

import models
from texts import TEXT, some_documents, trained_tokenizer
from tokenweight import ShortContext
from tokenweight.data import Document, context_shares, load_rows, prepare_rows, score_folder, upload


def counted(folder, size, source):
    """By source: [predicted tokens, those with at least `size` tokens of their document before them]."""
    totals = collections.defaultdict(lambda: [0, 0])
    for row in load_rows(folder).with_format(None):
        start, piece = 0, -1
        for place in range(len(row["input_ids"])):
            if place == 0 or row.get("position_ids", range(10**9))[place] == 0:
                start, piece = place, piece + 1
            elif row.get("labels", row["input_ids"])[place] != -100:
                names = row.get("documents") or [row.get("document")]
                name = source(names[min(piece, len(names) - 1)])
                totals[name][0] += 1
                totals[name][1] += place - start >= size
    return {name: tuple(both) for name, both in totals.items()}


def found(folder, size):
    return {share.source: (share.tokens, share.beyond) for share in context_shares(folder, size)}


DOCUMENTS = [
    *(Document(f"books/{number}.txt", TEXT[1000 * number :][: 900 + 50 * number]) for number in range(4)),
    *(Document(f"more.jsonl:{number}", TEXT[70 * number :][:60]) for number in range(9)),
    Document("org/name:3", TEXT[:500]),
]
TEXTS = ["./books/", "more.jsonl", "org/name"]


@pytest.mark.parametrize("short", ["drop", "pack", "decompose"])
@pytest.mark.parametrize("size", [1, 8, 31])
def test_tokens_beyond_the_short_context_are_counted_by_source(short, size, framed, tmp_path):
    given = {"short": short, "provenance": {"texts": TEXTS}, **({"shortest": 8} if short == "decompose" else {})}
    prepare_rows(DOCUMENTS, trained_tokenizer(framed=framed), 32, tmp_path / "rows", **given)

    def source(name):
        return next(text for text in TEXTS if name.startswith(text.strip("./")))

    shares = found(tmp_path / "rows", size)
    assert shares == counted(tmp_path / "rows", size, source)
    assert list(shares) == [text for text in TEXTS if text in shares]
    assert len(shares) > 1


def test_parquet_files_are_read_where_they_are(own_cache, tmp_path):
    given = {"short": "pack", "provenance": {"texts": TEXTS}}
    for format in ("arrow", "parquet"):
        prepare_rows(DOCUMENTS, trained_tokenizer(), 32, tmp_path / format, format=format, **given)
    assert context_shares(tmp_path / "parquet", 8) == context_shares(tmp_path / "arrow", 8)
    assert not (tmp_path / "cache").exists()


def test_only_tokens_that_are_predicted_count(tmp_path):
    rows = {
        "input_ids": [[1, 2, 3, 4, 5, 6], [1, 2, 3, 4]],
        "labels": [[1, 2, -100, 4, 5, -100], [-100, -100, 3, 4]],
        "position_ids": [[0, 1, 2, 0, 1, 2], [0, 1, 2, 3]],
    }
    datasets.Dataset.from_dict(rows).save_to_disk(str(tmp_path / "rows"))
    assert found(tmp_path / "rows", 2) == counted(tmp_path / "rows", 2, lambda name: str(tmp_path / "rows"))
    assert context_shares(tmp_path / "rows", 2)[0].share == 2 / 4


def test_scored_rows_have_the_sources_of_those_that_were_scored(tmp_path):
    models.tiny(vocab_size=300).save_pretrained(tmp_path / "model")
    provenance = {"texts": ["file", "other"]}
    prepare_rows(some_documents(), trained_tokenizer(), 16, tmp_path / "rows", provenance=provenance)
    score_folder(tmp_path / "rows", str(tmp_path / "model"), [ShortContext(4, 3)], tmp_path / "scored")
    assert context_shares(tmp_path / "scored", 4) == context_shares(tmp_path / "rows", 4)
    assert [share.source for share in context_shares(tmp_path / "scored", 4)] == ["file"]


@pytest.mark.parametrize("format", ["arrow", "parquet"])
def test_a_folder_at_a_url_has_the_shares_of_the_one_that_was_sent(format, own_cache, tmp_path):
    given = {"short": "pack", "provenance": {"texts": TEXTS}, "format": format}
    prepare_rows(DOCUMENTS, trained_tokenizer(), 32, tmp_path / "rows", **given)
    url = f"memory://{tmp_path.name}/rows"
    upload(tmp_path / "rows", url)
    assert context_shares(url, 8) == context_shares(tmp_path / "rows", 8)
