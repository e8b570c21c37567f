"""Rows of other tools mean here what they mean there, or are refused by column and row."""

import datasets
import numpy as np
import pytest
import torch
from scored import CONTEXT

import models
from models import LENGTH, NUM_ROWS, some_rows
from tokenweight.data import RowScorer, load_rows, load_scores, open_rows, read_contents, score_folder
from tokenweight.train import DataCollatorWithScores

LENGTHS = [24, 3, 17, 24, 9, 2, 12]
PAD = 59
ONES = [[1] * LENGTH] * NUM_ROWS


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def ragged(**columns):
    """The tokens of `some_rows`, of several lengths, without padding."""
    tokens = [row[:length].tolist() for row, length in zip(some_rows()["input_ids"], LENGTHS)]
    return {"input_ids": tokens, **columns}


def padded(side, **columns):
    """The same, padded to one length, with a mask."""
    rows, mask = ragged()["input_ids"], []
    for number, row in enumerate(rows):
        fill = LENGTH - len(row)
        left = fill if side == "left" else fill // 2 if side == "both" else 0
        rows[number] = [PAD] * left + row + [PAD] * (fill - left)
        mask.append([0] * left + [1] * len(row) + [0] * (fill - left))
    return {"input_ids": rows, "attention_mask": mask, **columns}


def saved(path, columns):
    datasets.Dataset.from_dict(columns).save_to_disk(str(path))
    return path


def lists(rows):
    return {name: [np.asarray(value).tolist() for value in rows[name][:]] for name in rows.column_names}


@pytest.mark.parametrize("side", ["left", "right", "both"])
def test_padded_rows_are_opened_as_if_they_were_not_padded(side, tmp_path):
    padded_rows = saved(tmp_path / "padded", padded(side, document=list("abcdefg")))
    expected = ragged(document=list("abcdefg"))
    for _ in range(2):  # from the folder, then from the cache
        assert lists(load_rows(padded_rows)) == expected
    plain = read_contents(saved(tmp_path / "plain", expected))
    assert read_contents(padded_rows) == plain
    assert (plain.tokens, plain.shortest, plain.largest) == (sum(LENGTHS), 2, read_contents(padded_rows).largest)


def test_rows_that_were_replaced_are_not_taken_from_the_cache(tmp_path):
    folder = saved(tmp_path / "rows", padded("right"))
    load_rows(folder)
    other = padded("right")
    other["input_ids"][3][5] = 7
    expected = ragged()
    expected["input_ids"][3][5] = 7
    saved(folder, other)
    assert lists(load_rows(folder)) == expected


def test_padding_is_neither_scored_nor_stored_nor_trained(folders):
    rows, losses = {}, {}
    for name, columns in (("plain", ragged()), ("padded", padded("left"))):
        folder = saved(folders / name, columns)
        summary = score_folder(folder, str(folders / "model"), [CONTEXT], folders / f"{name}-scored", with_long=True)
        assert summary.tokens == sum(LENGTHS)
        rows[name] = load_scores(folders / f"{name}-scored")[0]
        losses[name] = DataCollatorWithScores()(list(rows[name]))
    assert repr(lists(rows["padded"])) == repr(lists(rows["plain"]))  # there are NaN
    for name, value in losses["plain"].items():
        assert torch.equal(losses["padded"][name], value)


def test_masks_that_say_nothing_leave_the_rows_as_they_are(tmp_path):
    zeros = [[0] * LENGTH] * NUM_ROWS
    columns = {"input_ids": some_rows()["input_ids"][:].tolist()}
    said = {"attention_mask": ONES, "completion_mask": ONES, "token_type_ids": zeros, "special_tokens_mask": zeros}
    rows = load_rows(saved(tmp_path / "rows", {**columns, **said}))
    assert lists(rows.remove_columns("special_tokens_mask")) == columns
    assert not (tmp_path / "cache").exists()


@pytest.mark.parametrize("name", ["completion_mask", "assistant_masks", "loss_mask"])
@pytest.mark.parametrize("labelled", [False, True])
@pytest.mark.parametrize("unsigned", [False, True])
def test_masks_of_what_is_trained_become_labels(name, labelled, unsigned, tmp_path):
    tokens = np.array(some_rows()["input_ids"][:])
    mask = np.random.default_rng(0).integers(0, 2, tokens.shape)
    labels = np.where(np.arange(LENGTH) % 3 == 0, -100, tokens) if labelled else tokens
    columns = {"input_ids": tokens.tolist(), name: mask.tolist()} | ({"labels": labels.tolist()} if labelled else {})
    data = datasets.Dataset.from_dict(columns)
    if unsigned:
        data = data.cast_column("input_ids", datasets.List(datasets.Value("uint16")))
        data = data.cast_column(name, datasets.List(datasets.Value("bool")))
    data.save_to_disk(str(tmp_path / "rows"))
    expected = np.where(mask, labels, -100).tolist()
    assert lists(load_rows(tmp_path / "rows")) == {"input_ids": tokens.tolist(), "labels": expected}
    batch = DataCollatorWithScores()([{key: values[0] for key, values in columns.items()}])
    assert batch["labels"][0, 1:].tolist() == expected[0][1:]
    assert "attention_mask" not in batch


def test_rows_of_a_fixed_length_lose_their_padding_too(tmp_path):
    fixed = datasets.List(datasets.Value("int32"), length=LENGTH)
    features = datasets.Features({"input_ids": fixed, "attention_mask": fixed})
    datasets.Dataset.from_dict(padded("right"), features=features).save_to_disk(str(tmp_path / "rows"))
    assert lists(load_rows(tmp_path / "rows")) == ragged()


def test_lengths_of_packed_sequences_become_positions(tmp_path):
    tokens = some_rows()["input_ids"][:].tolist()
    lengths = [[24], [20, 4], [1, 23], [8, 8, 8], [2, 22], [23, 1], [12, 12]]
    rows = load_rows(saved(tmp_path / "rows", {"input_ids": tokens, "seq_lengths": lengths}))
    expected = [[t for length in row for t in range(length)] for row in lengths]
    assert lists(rows) == {"input_ids": tokens, "position_ids": expected}


HOLE = [*ONES[:3], [1] * 5 + [0] + [1] * (LENGTH - 6), *ONES[4:]]
TWO = [*ONES[:5], [1] * 12 + [2] * 12, ONES[0]]


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"attention_mask": HOLE}, "row 3: attention_mask is 0 for token 5"),
        ({"attention_mask": TWO}, "row 5: attention_mask holds 2"),
        ({"attention_mask": [*ONES[1:], [0] * LENGTH]}, "row 6: attention_mask is 0 for every token"),
        ({"loss_mask": [[0.5] * LENGTH, *ONES[1:]]}, r"row 0: loss_mask holds 0\.5"),
        ({"attention_mask": [[[1] * LENGTH] * LENGTH] * NUM_ROWS}, "attention_mask holds list"),
        ({"token_type_ids": [*ONES]}, "row 0: token_type_ids"),
        ({"seq_lengths": [[24]] * 6 + [[20, 3]]}, "row 6: seq_lengths add up to 23: expected 24"),
        ({"seq_lengths": [[12, 12]] * 7, "position_ids": [list(range(24))] * 7}, "row 0: seq_lengths and position_ids"),
        ({"completion_mask": [*ONES[:2], [1, 0], *ONES[3:]]}, "row 2 has 2 values in completion_mask"),
        ({"labels": [*ONES[:4], None, *ONES[5:]]}, "row 4 has null in labels"),
        (
            {"position_ids": [*ONES[:4], [0, *[None] * 23], *ONES[5:]]},
            "row 4 has null among the values of position_ids",
        ),
        ({"labels": [3] * NUM_ROWS}, "labels holds int64"),
        ({"loss_weights": [[0.5] * LENGTH] * NUM_ROWS}, "a column loss_weights"),
        ({"loss_weight": [0.5] * NUM_ROWS}, "a column loss_weight,"),
        ({"weights": [[0.5] * LENGTH] * NUM_ROWS}, "a column weights"),
        ({"segment_ids": ONES}, "a column segment_ids"),
        ({"response_mask": ONES}, "a column response_mask"),
        ({"pixel_values": [[[0.1]]] * NUM_ROWS}, "a column pixel_values"),
        ({"inputs_embeds": [[[0.1]]] * NUM_ROWS}, "a column inputs_embeds"),
    ],
)
def test_what_cannot_be_read_rightly_is_refused_by_column_and_row(columns, message, tmp_path):
    folder = saved(tmp_path / "rows", {"input_ids": some_rows()["input_ids"][:].tolist(), **columns})
    with pytest.raises(ValueError, match=f"^{folder}.*{message}") as refusal:
        load_rows(folder)
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize(
    ("tokens", "message"),
    [
        ([[[5, 6]], [[5, 6]]], "input_ids holds list<"),
        ([[5.0, 6.0], [5.0, 6.0]], "input_ids holds list<"),
        (["5 6", "7"], "input_ids holds string"),
        ([5, 6], "input_ids holds int"),
        ([[5, 6], None], "row 1 has null in input_ids"),
        ([[5, 6], [5, None]], "row 1 has null among the values of input_ids"),
        ([[5, 6], []], "row 1 is empty"),
    ],
)
def test_rows_that_are_no_rows_are_refused_by_number(tokens, message, tmp_path):
    with pytest.raises(ValueError, match=f"^{tmp_path / 'rows'}.*{message}"):
        load_rows(saved(tmp_path / "rows", {"input_ids": tokens}))


def test_other_columns_of_values_for_each_token_are_warned_of(tmp_path, caplog):
    columns = {"input_ids": [[5, 6, 7]], "entropy": [[0.1, 0.2, 0.3]], "quality": [3.0], "tags": [["a", "b", "c"]]}
    rows = load_rows(saved(tmp_path / "rows", columns))
    assert rows.column_names == list(columns)
    assert [record.getMessage().endswith("not used: entropy") for record in caplog.records] == [True]


def test_rows_without_a_token_to_predict_are_counted_and_named(tmp_path, caplog):
    tokens = some_rows()["input_ids"][:].tolist()
    silent, spoken = [-100] * LENGTH, [*[-100] * (LENGTH - 1), 5]
    first = [5, *[-100] * (LENGTH - 1)]  # nothing predicts the first token
    columns = {"input_ids": tokens, "labels": [spoken, spoken, silent, spoken, first, spoken, silent]}
    _, contents = open_rows(saved(tmp_path / "rows", columns))
    assert (contents.unpredicted, contents.first_unpredicted) == (3, 2)
    assert "3 of 7 rows, first in row 2" in caplog.text
    columns["position_ids"] = [[*range(LENGTH - 1), 0]] * NUM_ROWS  # the only label begins a document
    with pytest.raises(ValueError, match="packed: no token is predicted in any row"):
        open_rows(saved(tmp_path / "packed", columns))


def test_a_callable_scorer_hears_masks_and_refuses_padding():
    scorer = RowScorer(models.tiny(dtype=torch.float32), [CONTEXT], with_long=True)
    tokens = some_rows()["input_ids"][:2]
    masks = np.array([[1] * 12 + [0] * 12] * 2)
    found = scorer({"input_ids": tokens, "completion_mask": masks})
    expected = scorer({"input_ids": tokens, "labels": np.where(masks, tokens, -100)})
    for name in scorer.features:
        np.testing.assert_array_equal(found[name], expected[name])
    with pytest.raises(ValueError, match="row 0 is padded"):
        scorer({"input_ids": tokens, "attention_mask": masks})
