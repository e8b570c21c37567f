"""What is read of scored rows, and what is refused because it is not what was scored."""

import pytest
import torch

import models
from models import LENGTH, NUM_ROWS, some_rows
from test_store import CONTEXT, OTHER_BATCH
from tokenweight import token_nll
from tokenweight.rows import load_rows
from tokenweight.scored import load_scores, read_row
from tokenweight.store import score_folder


def test_an_unscored_folder_holds_no_scores(folders):
    with pytest.raises(ValueError, match="rows has no column short_nll: score it with `tokenweight"):
        load_scores(folders / "rows")


@pytest.mark.parametrize("with_long", [True, False])
def test_a_row_is_read_with_stored_long_losses_or_those_of_the_scoring_model(with_long, folders):
    score_folder(folders / "rows", str(folders / "model"), [CONTEXT], folders / "scored", with_long=with_long)
    if with_long:
        (folders / "model" / "model.safetensors").unlink()  # not needed then
    row = read_row(folders / "scored", 4)
    scored = load_rows(folders / "scored")
    assert row.tokens.tolist() == [scored[4]["input_ids"].tolist()]
    assert torch.equal(row.short_nll[0], torch.tensor(scored[4]["short_nll"]))
    expected = token_nll(models.tiny(dtype=torch.float32), row.tokens)
    torch.testing.assert_close(row.long_nll, expected, **OTHER_BATCH)
    assert row.mask.tolist() == [[False] + [True] * (LENGTH - 1)]
    assert row.tokenizer is None


def test_a_row_is_read_with_the_long_losses_of_the_model_that_is_named(folders):
    score_folder(folders / "rows", str(folders / "model"), [CONTEXT], folders / "scored", with_long=True)
    other = models.tiny(seed=1, dtype=torch.float32)
    other.save_pretrained(folders / "other")
    row = read_row(folders / "scored", 2, str(folders / "other"))
    torch.testing.assert_close(row.long_nll, token_nll(other, row.tokens), **OTHER_BATCH)


@pytest.mark.parametrize("number", [-1, NUM_ROWS])
def test_a_row_that_is_not_there_is_refused_with_those_that_are(number, folders):
    score_folder(folders / "rows", str(folders / "model"), [CONTEXT], folders / "scored")
    with pytest.raises(ValueError, match=f"--row {number}: .*scored has rows 0 to 6"):
        read_row(folders / "scored", number)


def test_long_losses_that_nobody_stored_need_a_model(folders):
    some_rows(short_nll=[[0.0] * LENGTH] * NUM_ROWS).save_to_disk(str(folders / "foreign"))
    with pytest.raises(ValueError, match=r"--model: .*foreign stores no long losses"):
        read_row(folders / "foreign", 0)
    assert read_row(folders / "foreign", 0, str(folders / "model")).short_nll.tolist() == [[0.0] * LENGTH]
