"""Rows against the tokens of their documents, for tokenizers that frame a text with BOS and EOS and that do not."""

import json
import shutil
from itertools import groupby

import datasets
import pytest

from texts import BOS, EOS, of_tokens, plain_ids, some_documents, trained_tokenizer
from tokenweight.data import Document, load_rows, prepare, prepare_rows


@pytest.fixture
def documents():
    return some_documents()


def expected_tokens(documents, framed):
    return {name: plain_ids(text) + [EOS] * (framed and bool(text)) for name, text in documents}


@pytest.mark.parametrize("length", [3, 16, 57])
def test_rows_are_the_documents_cut_with_nothing_lost_between(documents, framed, length, tmp_path):
    prepare_rows(documents, trained_tokenizer(framed=framed), length, tmp_path / "rows")
    rows = list(datasets.load_from_disk(str(tmp_path / "rows")))
    assert {len(row["input_ids"]) for row in rows} == {length}
    prefix = [BOS] * framed
    step = length - len(prefix)
    expected = expected_tokens(documents, framed)
    long_enough = [name for name in expected if len(expected[name]) >= step]
    assert [name for name, _ in groupby(row["document"] for row in rows)] == long_enough
    for name in long_enough:
        own = [row for row in rows if row["document"] == name]
        kept = len(expected[name]) // step * step
        assert all(row["input_ids"][: len(prefix)] == prefix for row in own)
        assert [t for row in own for t in row["input_ids"][len(prefix) :]] == expected[name][:kept]
        assert [row["offset"] for row in own] == list(range(0, kept, step))


def test_the_last_token_of_a_framed_document_that_fills_its_rows_is_eos(tmp_path):
    prepare_rows([Document("a", of_tokens(29))], trained_tokenizer(framed=True), 16, tmp_path / "rows")
    rows = load_rows(tmp_path / "rows")["input_ids"]
    letter = plain_ids(of_tokens(1))
    assert [list(row) for row in rows] == [[BOS, *letter * 15], [BOS, *letter * 14, EOS]]


def test_summary_counts_every_document_and_token(documents, framed, tmp_path):
    length, step = 16, 16 - framed
    summary = prepare_rows(documents, trained_tokenizer(framed=framed), length, tmp_path / "rows")
    lengths = [len(tokens) for tokens in expected_tokens(documents, framed).values()]
    assert summary.documents == len(documents)
    assert summary.rows == sum(length // step for length in lengths) == len(load_rows(tmp_path / "rows"))
    assert summary.tokens == summary.rows * length
    assert summary.dropped_tokens == sum(length % step for length in lengths)
    assert summary.rows * step + summary.dropped_tokens == sum(lengths)
    assert summary.short_documents == sum(length < step for length in lengths) > 1
    assert summary.empty_documents == 1
    assert summary.longest_document == max(lengths)
    note = json.loads((tmp_path / "rows" / "rows.json").read_text())
    framing = {"prefix": [BOS] * framed, "suffix": [EOS] * framed}
    assert note == {**vars(summary), "length": length, "short": "drop", "max_rows": None, **framing}


@pytest.mark.parametrize("max_rows", [1, 7, 1000])
def test_max_rows_gives_the_first_rows_and_reads_no_further(documents, framed, max_rows, tmp_path, monkeypatch):
    monkeypatch.setattr(prepare, "BATCH_CHARACTERS", 1)
    tokenizer, read = trained_tokenizer(framed=framed), []
    prepare_rows(documents, tokenizer, 16, tmp_path / "all")
    summary = prepare_rows(
        (read.append(d.name) or d for d in documents), tokenizer, 16, tmp_path / "some", max_rows=max_rows
    )
    every, some = load_rows(tmp_path / "all"), load_rows(tmp_path / "some")
    assert len(some) == summary.rows == min(max_rows, len(every))
    assert some.to_dict() == every.select(range(len(some))).to_dict()
    assert (len(read) == 1) == (max_rows < 1000)


@pytest.mark.parametrize("max_rows", [0, -1])
def test_max_rows_below_one_is_refused_by_name(documents, max_rows, tmp_path):
    with pytest.raises(ValueError, match="max_rows"):
        prepare_rows(documents, trained_tokenizer(), 16, tmp_path / "rows", max_rows=max_rows)


@pytest.mark.parametrize("texts", [[], [""], ["", ""]])
def test_empty_text_is_refused_and_leaves_nothing(texts, framed, tmp_path):
    documents = [Document("a", text) for text in texts]
    with pytest.raises(ValueError, match="empty"):
        prepare_rows(documents, trained_tokenizer(framed=framed), 16, tmp_path / "rows")
    assert list(tmp_path.iterdir()) == []


def test_documents_that_are_all_too_short_are_refused_with_the_longest(framed, tmp_path):
    documents = [Document("a", of_tokens(5)), Document("b", of_tokens(9))]
    longest = 9 + framed
    message = f"^length 16: none of the 2 documents is that long; the longest has {longest} tokens"
    with pytest.raises(ValueError, match=message):
        prepare_rows(documents, trained_tokenizer(framed=framed), 16, tmp_path / "rows")
    assert list(tmp_path.iterdir()) == []


def test_a_length_without_room_for_a_prediction_is_refused(framed, documents, tmp_path):
    with pytest.raises(ValueError, match=f"^length {1 + framed}: expected at least {2 + framed} tokens"):
        prepare_rows(documents, trained_tokenizer(framed=framed), 1 + framed, tmp_path / "rows")


def test_a_failure_in_the_first_shard_leaves_nothing_behind(documents, tmp_path):
    def interrupted():
        yield from documents
        assert [file.name for file in tmp_path.iterdir()] == ["rows.unfinished"]
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        prepare_rows(interrupted(), trained_tokenizer(), 16, tmp_path / "rows")
    assert list(tmp_path.iterdir()) == []


def test_an_existing_folder_is_refused_and_kept(documents, tmp_path):
    (tmp_path / "rows").mkdir()
    (tmp_path / "rows" / "notes").write_text("mine")
    with pytest.raises(ValueError, match=r"^out .*rows: exists already"):
        prepare_rows(documents, trained_tokenizer(), 16, tmp_path / "rows")
    assert (tmp_path / "rows" / "notes").read_text() == "mine"


def folder_of(columns, folder):
    datasets.Dataset.from_dict(columns).save_to_disk(str(folder))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda folder: None, "no such folder of rows; make one with `tokenweight prepare`"),
        (lambda folder: folder.mkdir(), "is not a finished `datasets` folder"),
        (lambda folder: folder_of({"tokens": [[1]], "b": [1]}, folder), "no column input_ids: found tokens, b"),
        (
            lambda folder: datasets.DatasetDict(
                {name: datasets.Dataset.from_dict({"input_ids": [[1]]}) for name in ("train", "test")}
            ).save_to_disk(str(folder)),
            r"holds several splits \(train, test\)",
        ),
    ],
    ids=["missing", "empty", "column", "splits"],
)
def test_what_is_no_folder_of_rows_is_refused_by_name(make, message, tmp_path):
    make(tmp_path / "rows")
    with pytest.raises(ValueError, match=message) as refusal:
        load_rows(tmp_path / "rows")
    assert str(tmp_path / "rows") in str(refusal.value)
    assert "\n" not in str(refusal.value)


def test_rows_are_opened_where_they_were_moved(documents, tmp_path):
    prepare_rows(documents, trained_tokenizer(), 16, tmp_path / "rows")
    before = load_rows(tmp_path / "rows").to_dict()
    shutil.move(tmp_path / "rows", tmp_path / "moved")
    assert load_rows(tmp_path / "moved").to_dict() == before
