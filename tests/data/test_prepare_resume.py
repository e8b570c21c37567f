"""Preparing rows goes on after an interruption; packed rows are scored as their documents alone."""

from itertools import pairwise

import pytest
import torch

import models
from texts import TEXT, some_documents, trained_tokenizer
from tokenweight import token_nll
from tokenweight.data import Document, load_rows, prepare, prepare_rows


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
        ({"documents": [Document("file:0", TEXT[:1999])]}, "the texts have changed since .*rows.unfinished was begun"),
        ({"documents": [Document("other", TEXT[:2000])]}, "the texts have changed"),
        ({"documents": []}, "the texts have changed"),
        (
            {"length": 17},
            "rows.unfinished was begun otherwise .length is 16 there, 17 now.; go on with that, or remove",
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
