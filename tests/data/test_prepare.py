"""Rows against the tokens of their documents, for tokenizers that frame a text with BOS and EOS and that do not; going
on after an interruption; packed rows are scored as their documents alone."""

import json
import multiprocessing
import os
import shutil
from itertools import groupby, pairwise

import datasets
import pytest
import torch

import models
from texts import BOS, EOS, TEXT, of_tokens, plain_ids, some_documents, trained_tokenizer
from tokenweight import token_nll
from tokenweight.data import Document, load_rows, prepare, prepare_rows, tokenize


@pytest.fixture
def documents():
    return some_documents()


@pytest.fixture
def small_shards(monkeypatch):
    """Shards of few rows, from batches of one document."""
    monkeypatch.setattr(prepare, "BATCH_CHARACTERS", 1)
    monkeypatch.setattr(prepare, "SHARD_TOKENS", 100)


def contents(folder):
    return {file.name: file.read_bytes() for file in folder.iterdir()}


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
    assert note == {**vars(summary), "length": length, "short": "drop", "max_rows": None, "format": "arrow", **framing}


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
    message = f"^length 16: none of 2 documents is that long; the longest has {longest} tokens"
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


@pytest.mark.parametrize("format", ["arrow", "parquet"])
def test_a_complete_folder_is_not_made_again_and_other_settings_are_named(format, documents, tmp_path):
    settings = {"tokenizer": trained_tokenizer(), "out": tmp_path / "rows", "format": format}
    made = prepare_rows(documents, length=16, provenance={"texts": ["a"]}, **settings)
    kept = {file.name: file.stat().st_mtime_ns for file in (tmp_path / "rows").iterdir()}
    unread = (pytest.fail("a document was read") for _ in range(1))
    assert prepare_rows(unread, length=16, provenance={"texts": ["a"], "environment": 1}, **settings) == made
    with pytest.raises(ValueError, match=r"^out .*rows: already holds rows .*length is 16 there, 17 now"):
        prepare_rows(unread, length=17, provenance={"texts": ["a"]}, **settings)
    with pytest.raises(ValueError, match=r"texts is \['a'\] there, \['b'\] now"):
        prepare_rows(unread, length=16, provenance={"texts": ["b"]}, **settings)
    assert {file.name: file.stat().st_mtime_ns for file in (tmp_path / "rows").iterdir()} == kept


@pytest.fixture
def forked(monkeypatch):
    """Processes that need not import everything again."""
    monkeypatch.setattr(tokenize, "START_METHOD", "fork")


@pytest.mark.parametrize("settings", [{}, {"short": "pack"}, {"max_rows": 5}, {"format": "parquet"}], ids=str)
def test_rows_are_the_same_bytes_however_many_processes_tokenize(settings, documents, small_shards, forked, tmp_path):
    for name, num_proc in (("one", 1), ("three", 3)):
        prepare_rows(documents * 2, trained_tokenizer(framed=True), 16, tmp_path / name, num_proc=num_proc, **settings)
    assert contents(tmp_path / "one") == contents(tmp_path / "three")
    assert len(contents(tmp_path / "one")) > 4 or "max_rows" in settings


@pytest.mark.slow  # each process imports transformers
def test_processes_that_are_spawned_make_the_same_rows_and_end(documents, small_shards, tmp_path):
    others = multiprocessing.active_children()
    for name, num_proc in (("one", 1), ("two", 2)):
        prepare_rows(documents, trained_tokenizer(framed=True), 16, tmp_path / name, num_proc=num_proc)
    assert contents(tmp_path / "one") == contents(tmp_path / "two")
    assert multiprocessing.active_children() == others


def test_with_several_processes_an_interrupted_call_goes_on_after_what_was_written(
    documents, small_shards, forked, tmp_path
):
    tokenizer = trained_tokenizer()
    prepare_rows(documents * 2, tokenizer, 16, tmp_path / "whole")

    def broken():
        yield from documents[:7]
        raise ValueError("file:7: no text")

    with pytest.raises(ValueError, match="file:7"):
        prepare_rows(broken(), tokenizer, 16, tmp_path / "rows", num_proc=2)
    kept = set(contents(tmp_path / "rows.unfinished"))
    with pytest.raises(ValueError, match="file:7"):
        prepare_rows(broken(), tokenizer, 16, tmp_path / "alone")
    assert kept == set(contents(tmp_path / "alone.unfinished")) >= {"rows-00000.arrow"}
    prepare_rows(documents * 2, tokenizer, 16, tmp_path / "rows", num_proc=2)
    assert contents(tmp_path / "rows") == contents(tmp_path / "whole")


@pytest.mark.parametrize("num_proc", [1, 2])
def test_a_document_that_cannot_be_tokenized_is_named(num_proc, documents, forked, tmp_path, monkeypatch):
    def text_tokens(tokenizer, texts):
        if "short" in texts:
            raise RuntimeError("no such\nword")
        return [[5]] * len(texts)

    monkeypatch.setattr(tokenize, "text_tokens", text_tokens)
    with pytest.raises(ValueError, match=r"^file:2: cannot be tokenized: no such word"):
        prepare_rows(documents, trained_tokenizer(), 16, tmp_path / "rows", num_proc=num_proc)


def test_a_killed_process_is_said_and_leaves_nothing(documents, forked, tmp_path, monkeypatch):
    monkeypatch.setattr(tokenize, "text_tokens", lambda tokenizer, texts: os._exit(9))
    with pytest.raises(ValueError, match=r"^num_proc 2: a process was killed at file:0"):
        prepare_rows(documents, trained_tokenizer(), 16, tmp_path / "rows", num_proc=2)
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


def interrupted(documents, num):
    yield from documents[:num]
    raise KeyboardInterrupt


def test_what_is_written_is_not_tokenized_again(documents, small_shards, tmp_path, monkeypatch):
    tokenizer, seen = trained_tokenizer(), []
    with pytest.raises(KeyboardInterrupt):
        prepare_rows(interrupted(documents * 2, 9), tokenizer, 16, tmp_path / "rows")
    call = type(tokenizer).__call__
    monkeypatch.setattr(type(tokenizer), "__call__", lambda self, text, **k: seen.append(text) or call(self, text, **k))
    prepare_rows(documents * 2, tokenizer, 16, tmp_path / "rows")
    assert [TEXT[:2000]] not in seen[:3]
    assert len(seen) < 3 + 2 * len(documents) - 6  # special_tokens asks twice


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"documents": [Document("file:0", TEXT[:1999])]},
            "the texts have changed since .*rows.unfinished was started",
        ),
        ({"documents": [Document("other", TEXT[:2000])]}, "the texts have changed"),
        ({"documents": []}, "the texts have changed"),
        (
            {"length": 17},
            "rows.unfinished was started with other settings .length is 16 there, 17 now.; resume with those",
        ),
        ({"short": "pack"}, "short is 'drop' there, 'pack' now"),
        ({"provenance": {"tokenizer_fingerprint": "b"}}, "tokenizer_fingerprint is 'a' there, 'b' now"),
    ],
)
def test_going_on_with_something_else_is_refused_by_name(change, message, documents, small_shards, tmp_path):
    settings = {"tokenizer": trained_tokenizer(), "length": 16, "provenance": {"tokenizer_fingerprint": "a"}}
    with pytest.raises(KeyboardInterrupt):
        prepare_rows(interrupted(documents, 8), out=tmp_path / "rows", **settings)
    kept = contents(tmp_path / "rows.unfinished")
    with pytest.raises(ValueError, match=message):
        prepare_rows(**{"documents": documents, **settings, **change}, out=tmp_path / "rows")
    assert contents(tmp_path / "rows.unfinished") == kept


def test_short_documents_share_rows_and_are_scored_as_if_alone(tmp_path):
    documents = [Document(str(number), TEXT[100 * number : 100 * number + 40 + number]) for number in range(40)]
    tokenizer = trained_tokenizer(framed=True)
    summary = prepare_rows(documents, tokenizer, 64, tmp_path / "rows", short="pack")
    assert summary.short_documents == 40
    model = models.tiny(vocab_size=300)
    for row in load_rows(tmp_path / "rows"):
        tokens, positions = (torch.tensor(row[name])[None].long() for name in ("input_ids", "position_ids"))
        together = token_nll(model, tokens, positions)[0]
        starts = [*(positions[0] == 0).nonzero()[:, 0].tolist(), 64]
        for start, stop in pairwise(starts):
            alone = token_nll(model, tokens[:, start:stop])[0]
            torch.testing.assert_close(together[start:stop], alone, rtol=0, atol=1e-12)  # float64, losses up to 16
