"""What is in an exported folder: its rows, its note; and what is refused."""

import json

import datasets
import numpy as np
import pytest
import torch

from test_export import LENGTHS, STORED, exported, packed, references
from tokenweight import Dense, LongCE, ShortContext, Sparse, Uniform
from tokenweight.export import export_weights, weigh_rows
from tokenweight.scored import load_scores
from tokenweight.store import score_folder
from tokenweight.weighting import Custom

__all__ = ["packed"]  # a fixture


def test_weights_and_labels_stand_at_their_tokens(packed):
    folder, columns = packed
    rows = exported(folder, Dense(0.25), "hf")
    for number, (weights, _, mask) in enumerate(references(columns, Dense(0.25))):
        assert rows[number]["input_ids"] == columns["input_ids"][number]
        assert rows[number]["position_ids"] == columns["position_ids"][number]
        assert rows[number]["labels"] == np.where(mask, columns["input_ids"][number], -100).tolist()
        assert rows[number]["loss_weights"][0] == 0
        np.testing.assert_allclose(rows[number]["loss_weights"], weights, **STORED)
        assert len(np.unique(weights[mask])) == mask.sum()  # a shift would show


@pytest.mark.parametrize("format", ["llamafactory", "ms-swift", "tinker"])
def test_documents_get_rows_of_their_own_where_positions_are_not_read(format, packed):
    folder, columns = packed
    rows = exported(folder, Uniform(), format)
    found = [
        row["model_input"] + row["target_tokens"][-1:]
        if format == "tinker"
        else row["messages"][0]["content"]["token_ids"]
        if format == "ms-swift"
        else row["input_ids"]
        for row in rows
    ]
    first, second, _, last = columns["input_ids"]
    assert found == [first[:10], first[11:], second, last[:5], last[5:]]
    note = json.loads((folder.with_name("weighted") / "weights.json").read_text())
    assert note["left_out"] == 3  # of one token each


def test_ms_swift_counts_a_predicted_token_of_weight_zero_and_no_other(packed):
    folder, columns = packed
    rows = exported(folder, Sparse(0.5), "ms-swift")
    scale = np.concatenate([row["messages"][0]["content"]["loss_scale"] for row in rows])
    masks = [mask for *_, mask in references(columns, Sparse(0.5))]
    assert (scale > 0).sum() == np.concatenate(masks).sum()
    assert 0 < ((scale > 0) & (scale < 1e-20)).sum() < (scale > 0).sum()


def test_the_note_says_which_scores_and_weighting_made_the_weights(packed):
    folder, _ = packed
    summary = export_weights(folder, LongCE(3.0), folder.with_name("weighted"), format="trl")
    note = json.loads((folder.with_name("weighted") / "weights.json").read_text())
    assert (note["format"], note["weighting"], note["scores"]) == ("trl", "longce:cap=3.0", {})
    assert "torch" in note["environment"]["versions"]
    assert (note["rows"], note["tokens"], note["predicted"]) == (4, sum(LENGTHS), 38)
    assert str(summary).startswith("4 rows, 52 tokens, 38 of them predicted, with a mean weight of ")
    assert f"{summary.sum_weights / 38:.4g}" in str(summary)


def test_of_several_contexts_the_one_that_is_named_makes_the_weights(folders):
    contexts = [ShortContext(4, 2), ShortContext(8, 5)]
    score_folder(folders / "rows", str(folders / "model"), contexts, folders / "scored", with_long=True)
    export_weights(folders / "scored", LongCE(), folders / "out", format="hf", size=8)
    found = datasets.load_from_disk(str(folders / "out"))["loss_weights"]
    rows, _ = load_scores(folders / "scored", size=8)
    for weights, row in zip(found, weigh_rows(rows, LongCE()), strict=True):
        assert weights == row.weights.tolist()
    note = json.loads((folders / "out" / "weights.json").read_text())
    assert (note["size"], note["scores"]["size"]) == (8, [4, 8])
    with pytest.raises(ValueError, match=r"size: .*scored holds scores with contexts of 4, 8 tokens: name one"):
        export_weights(folders / "scored", LongCE(), folders / "again", format="hf")


def test_a_size_that_was_not_scored_is_refused(folders):
    score_folder(folders / "rows", str(folders / "model"), [ShortContext(8, 5)], folders / "scored", with_long=True)
    with pytest.raises(ValueError, match=r"--size 4: .*scored was scored with 8"):
        export_weights(folders / "scored", LongCE(), folders / "out", format="hf", size=4)


def without(column):
    return lambda rows: rows.remove_columns(column)


def changed(column, row, place, value):
    def change(found, number):
        if number == row:
            found[column][place] = value
        return found

    return lambda rows: rows.map(change, with_indices=True)


def shorter(row):
    return {"short_nll": row["short_nll"][:-1]}


REFUSALS = [
    (without("long_nll"), "hf", r"scored has no column long_nll: score its rows anew, with `tokenweight score --long`"),
    (without("short_nll"), "hf", r"scored has no column short_nll"),
    (changed("long_nll", 1, 5, float("inf")), "hf", "^long_nll of row 1, position 5 is inf: expected a finite number"),
    (changed("short_nll", 3, 7, float("nan")), "trl", "^short_nll of row 3, position 7 is nan"),
    (changed("labels", 3, 7, 5), "hf", "^row 3: label and token 7 differ: expected the token, or -100"),
    (changed("position_ids", 0, 9, 40), "trl", "^row 0: position_ids skip positions, which only --format hf can"),
    (changed("position_ids", 3, 0, 1), "tinker", "^row 3: position_ids skip positions"),
    (lambda rows: rows.map(shorter), "hf", "^row 0 has 24 tokens and 23 values short_nll"),
    (lambda rows: rows.select([2]), "ms-swift", "^no token is predicted in any row: expected labels other than -100"),
]


@pytest.mark.parametrize(("change", "format", "message"), REFUSALS)
def test_rows_that_cannot_be_weighed_or_written_are_refused(change, format, message, packed, tmp_path):
    change(datasets.load_from_disk(str(packed[0]))).save_to_disk(str(tmp_path / "changed" / "scored"))
    with pytest.raises(ValueError, match=message):
        export_weights(tmp_path / "changed" / "scored", Dense(), tmp_path / "out", format=format)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["changed", "scored"]


def test_skipped_positions_are_kept_for_transformers(packed, tmp_path):
    rows = changed("position_ids", 0, 9, 40)(datasets.load_from_disk(str(packed[0])))
    rows.save_to_disk(str(tmp_path / "skipping"))
    assert exported(tmp_path / "skipping", Dense(), "hf")[0]["position_ids"][9] == 40


def negative(long, short, mask):
    return short - long


def infinite(long, short, mask):
    return torch.full_like(long, torch.inf)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"format": "axolotl"}, "^--format axolotl: expected one of hf, trl, llamafactory, ms-swift, tinker$"),
        ({"out": "scored"}, "^--out .*scored: exists already; name a new folder$"),
        (
            {"weighting": Custom(infinite)},
            "^row 0, weighed alone: the weight by .*infinite of row 0, position 1 is inf",
        ),
        ({"weighting": Custom(negative), "format": "ms-swift"}, "^row 0 has a negative weight, which ms-swift takes"),
    ],
)
def test_settings_that_make_no_sense_are_refused(settings, message, packed, tmp_path):
    settings = {"weighting": Dense(), "out": "out", "format": "hf", **settings}
    weighting, out = settings.pop("weighting"), tmp_path / settings.pop("out")
    with pytest.raises(ValueError, match=message):
        export_weights(packed[0], weighting, out, **settings)
    assert [path.name for path in tmp_path.iterdir()] == ["scored"]
