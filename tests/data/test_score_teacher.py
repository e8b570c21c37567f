"""Stored teachers: their likeliest tokens beside other scores, and the median by which SALT selects documents."""

import numpy as np
import pytest
import torch

import models
from tokenweight import ShortContext, load_model
from tokenweight.data import RowScorer, load_rows, load_scores, score_folder
from tokenweight.records import read_json

K = 4


@pytest.fixture
def place(tmp_path):
    """A folder with a teacher, and rows of two lengths whose first tokens are not predicted."""
    models.tiny(seed=3, dtype=torch.float32).save_pretrained(tmp_path / "teacher")
    tokens = [models.some_tokens(1, length, seed=length)[0].tolist() for length in (20, 20, 13, 4)]
    labels = [[token if t >= 5 else -100 for t, token in enumerate(row)] for row in tokens]
    rows = models.datasets.Dataset.from_dict({"input_ids": tokens, "labels": labels})
    rows.save_to_disk(str(tmp_path / "rows"))
    return tmp_path


def test_a_teacher_is_stored_beside_other_scores_in_either_order(place):
    teacher, context = str(place / "teacher"), [ShortContext(8, 6)]
    score_folder(place / "rows", teacher, None, place / "taught", top_k=K)
    score_folder(place / "taught", teacher, context, place / "taught-scored")
    score_folder(place / "rows", teacher, context, place / "scored")
    score_folder(place / "scored", teacher, None, place / "scored-taught", top_k=K, format="parquet")
    first, second = load_scores(place / "taught-scored")[0], load_scores(place / "scored-taught")[0]
    model = load_model(teacher)
    for one, other in zip(first, second, strict=True):
        tokens = torch.tensor(one["input_ids"])[None]
        expected = model(input_ids=tokens).logits[0, :-1].log_softmax(-1)
        kept = expected.topk(K, dim=-1)
        for row in (one, other):
            assert np.stack(row["teacher_ids"]).shape == (len(row["input_ids"]), K)
            assert torch.equal(torch.tensor(np.stack(row["teacher_ids"]))[1:], kept.indices.int())
            torch.testing.assert_close(torch.tensor(np.stack(row["teacher_logprobs"]))[1:], kept.values)
        assert one["short_nll"].tolist() == other["short_nll"].tolist()
        nll = -expected.gather(-1, tokens[0, 1:, None])[:, 0]
        known = (kept.indices == tokens[0, 1:, None]).any(-1) & (torch.tensor(one["labels"])[1:] != -100)
        assert one["topk_median_nll"] == pytest.approx(
            np.median(nll[known].detach()) if known.any() else np.nan, nan_ok=True
        )
    notes = [read_json(place / name / "scores.json") for name in ("taught-scored", "scored-taught")]
    for note in notes:
        assert note["teacher"]["top_k"] == K
        assert note["contexts"] == [{"size": 8, "stride": 6}]
    selected = load_rows(place / "taught").filter(lambda row: row["topk_median_nll"] > 0)
    assert 0 < len(selected) < 4


def test_what_does_not_go_with_a_teacher_is_refused(place):
    teacher = str(place / "teacher")
    score_folder(place / "rows", teacher, None, place / "taught", top_k=K)
    with pytest.raises(ValueError, match="the rows have a column teacher_ids already"):
        score_folder(place / "taught", teacher, None, place / "again", top_k=K)
    with pytest.raises(ValueError, match="size 8: a teacher reads whole sequences: leave it out"):
        score_folder(place / "rows", teacher, [ShortContext(8, 6)], place / "other", top_k=K)
    with pytest.raises(ValueError, match="as teacher: count scores without a model: leave it out"):
        score_folder(place / "rows", "count", None, place / "other", top_k=K)
    with pytest.raises(ValueError, match="top_k 99: expected 1 to 61"):
        score_folder(place / "rows", teacher, None, place / "other", top_k=99)
    with pytest.raises(ValueError, match="top_k: found other scores beside it"):
        RowScorer(load_model(teacher), [], with_long=True, top_k=K)
    with pytest.raises(ValueError, match=r"other settings .*top_k"):
        score_folder(place / "rows", teacher, None, place / "taught", top_k=K + 1)
    flat = models.datasets.Dataset.from_dict({"input_ids": [[3, 4]], "teacher_ids": [[3, 4]]})
    flat.save_to_disk(str(place / "flat"))
    with pytest.raises(ValueError, match=r"teacher_ids holds list.*: expected lists of numbers in each row"):
        load_rows(place / "flat")
