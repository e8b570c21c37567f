"""Scores of a model with another tokenizer on disk: what the scorer itself says, resumed, and read by commands."""

import json

import datasets
import numpy as np
import pytest
import torch
from scored import arrow_bytes

import models
from texts import TEXT, trained_tokenizer
from tokenweight import ShortContext, cli, load_tokenizer
from tokenweight.data import load_scores, read_row, score_folder, text_tokens
from tokenweight.models import AlignedScorer, load_model, tokenizer_note
from tokenweight.records import read_json

CONTEXTS = [ShortContext(8, 5), ShortContext(12, 9)]
LENGTH = 40


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Rows of a tokenizer whose name they note, and a model with another one."""
    monkeypatch.chdir(tmp_path)
    ours, theirs = trained_tokenizer(vocab_size=350), trained_tokenizer(vocab_size=500, framed=True)
    ours.save_pretrained("ours")
    theirs.save_pretrained("other")
    settings = {"vocab_size": len(theirs), "max_position_embeddings": 128, "dtype": torch.float32}
    models.tiny("llama", **settings).save_pretrained("other")
    ids = text_tokens(ours, [TEXT])[0]
    rows = [ids[start : start + LENGTH] for start in range(0, 6 * LENGTH, LENGTH)]
    datasets.Dataset.from_dict({"input_ids": rows}).save_to_disk("rows")
    note = tokenizer_note(load_tokenizer("ours"), "ours")
    (tmp_path / "rows" / "rows.json").write_text(json.dumps({**note, "prefix": []}))
    return tmp_path


def test_every_column_is_what_the_scorer_says_and_the_folder_says_what_it_is(folder):
    told = []
    summary = score_folder("rows", "other", CONTEXTS, "scored", announce=told.append)
    rows = datasets.load_from_disk("scored").with_format("numpy")
    tokenizer = load_tokenizer("other")
    options = {"tokenize": text_tokens, "prefix": [tokenizer.bos_token_id]}
    scorer = AlignedScorer(load_model("other"), tokenizer, load_tokenizer("ours"), **options)
    tokens = torch.as_tensor(np.stack(rows["input_ids"]))
    for context in CONTEXTS:
        found = scorer(tokens, context)
        assert np.array_equal(np.stack(rows["long_nll"]), found.long_nll)
        assert np.array_equal(np.stack(rows[f"short_nll_{context.size}"]), found.short_nll)
        assert np.isfinite(rows[f"gain_mean_{context.size}"]).all()
    assert scorer.groups > scorer.shared_groups > 0
    assert summary.groups == [scorer.groups, scorer.shared_groups]
    assert f"{scorer.shared_groups / scorer.groups:.1%} of the groups" in str(summary)
    assert told == ["other has another tokenizer than rows: their tokens are aligned by bytes"]
    noted = read_json(folder / "scored" / "scores.json")
    assert (noted["contrast"], noted["scorer"], noted["prefix"]) == ("scorer", "aligned", [tokenizer.bos_token_id])
    assert noted["tokenizer"] == "ours"
    assert noted["scorer_tokenizer_fingerprint"] == tokenizer_note(tokenizer, "")["tokenizer_fingerprint"]
    assert noted["scorer_tokenizer_fingerprint"] != noted["tokenizer_fingerprint"]
    assert read_row("scored", 0, size=8).tokenizer.vocab_size == load_tokenizer("ours").vocab_size
    assert load_scores("scored", size=12)[1]["context"]["stride"] == 9


def test_what_was_scored_is_found_again_and_the_groups_of_all_shards_are_counted(folder):
    whole = score_folder("rows", "other", CONTEXTS, "scored", shard_tokens=2 * LENGTH)
    before = arrow_bytes(folder / "scored")
    (folder / "scored" / min(before)).unlink()
    again = score_folder("rows", "other", CONTEXTS, "scored", shard_tokens=2 * LENGTH)
    assert again.new_tokens == 2 * LENGTH
    assert again.groups == whole.groups
    assert arrow_bytes(folder / "scored") == before


def test_the_command_scores_with_another_tokenizer(folder, capsys):
    assert cli.main(["score", "rows", "--model", "other", "--size", "8", "--stride", "5", "--out", "scored"]) == 0
    assert "of the groups of aligned tokens hold several of ours" in capsys.readouterr().out
    assert cli.main(["stats", "scored"]) == 0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tokenizer": "/no/such"}, "make that of the rows available to align the two"),
        ({"tokenizer_fingerprint": "0123456789abcdef"}, r"rows was made with the tokenizer of ours \(0123456789abcdef"),
    ],
)
def test_rows_whose_tokenizer_is_not_there_are_refused_before_any_work(change, message, folder):
    note = read_json(folder / "rows" / "rows.json")
    (folder / "rows" / "rows.json").write_text(json.dumps({**note, **change}))
    with pytest.raises(ValueError, match=message):
        score_folder("rows", "other", CONTEXTS, "scored")
    assert not (folder / "scored").exists()


def test_a_row_that_is_too_long_for_the_model_in_its_tokens_is_refused_by_number(folder):
    ids = text_tokens(load_tokenizer("ours"), ["some text " + "\x01" * 150])[0]
    rows = datasets.Dataset.from_dict({"input_ids": [ids[:LENGTH], ids]})
    note = (folder / "rows" / "rows.json").read_text()
    rows.save_to_disk("longer")
    (folder / "longer" / "rows.json").write_text(note)
    with pytest.raises(
        ValueError, match=r"row 1: a text of 1[56]. tokens of the scoring model, which has 128 positions"
    ):
        score_folder("longer", "other", CONTEXTS, "scored")
