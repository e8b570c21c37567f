"""The columns of scored rows against the scorer, the model and the context gain of each row."""

import math

import datasets
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import models
from models import LENGTH, NUM_ROWS, some_rows
from tokenweight import Scorer, ShortContext, token_nll
from tokenweight.data import RowScorer
from tokenweight.data.row_scorer import gains_of_rows
from tokenweight.method import document_positions, prediction_mask

LADDER = [ShortContext(4, 2), ShortContext(8, 5), ShortContext(16, 4)]
POSITIONS = [[*range(10), *range(14)]] * 3 + [list(range(24))] * 4
LABELS = [[-100] * 6 + [5] * 18] * 2 + [[5] * 24] * 5


def tensor(values):
    return torch.tensor(np.stack(values))


@pytest.mark.parametrize("columns", [{}, {"position_ids": POSITIONS}, {"labels": LABELS}], ids=list)
@pytest.mark.parametrize("contexts", [LADDER, LADDER[1:2]], ids=["ladder", "one"])
def test_every_column_is_what_the_scorer_of_its_context_says(contexts, columns):
    model, rows = models.tiny(), some_rows(**columns)
    scored = RowScorer(model, contexts, with_long=True)(rows[:])
    tokens = tensor(rows["input_ids"])
    positions = torch.tensor(columns["position_ids"]) if "position_ids" in columns else None
    long_nll = token_nll(model, tokens, positions)
    assert torch.equal(tensor(scored["long_nll"]), long_nll.float())
    for context in contexts:
        suffix = f"_{context.size}"
        short_nll = Scorer(model, context)(tokens, position_ids=positions, long_nll=long_nll)
        assert torch.equal(tensor(scored[f"short_nll{suffix}"]), short_nll.float())
        mask = prediction_mask(torch.tensor(columns["labels"]) if "labels" in columns else tokens, positions)
        mask &= document_positions(tokens, positions) >= context.size
        for name, expected in gains_of_rows(long_nll, short_nll, mask)._asdict().items():
            assert np.array_equal(scored[f"{name}{suffix}"], expected, equal_nan=True)


def test_beyond_the_window_is_where_the_losses_differ():
    """So that a summary over these tokens leaves out no difference, and counts no token that cannot have one."""
    rows, context = some_rows(position_ids=POSITIONS), LADDER[1]
    scored = RowScorer(models.tiny(), [context], with_long=True)(rows[:])
    differs = tensor(scored["long_nll"]) != tensor(scored["short_nll_8"])
    tokens, positions = tensor(rows["input_ids"]), torch.tensor(POSITIONS)
    assert torch.equal(differs, document_positions(tokens, positions) >= context.size)


def test_totals_add_up_to_the_differences_of_all_rows():
    rows = some_rows()
    columns, totals = RowScorer(models.tiny(), LADDER, with_long=True).score(rows[:])
    assert totals.keys() == {"_4", "_8", "_16"}
    for suffix, (number, total, above) in totals.items():
        difference = tensor(columns["long_nll"]) - tensor(columns[f"short_nll{suffix}"])
        assert number == NUM_ROWS * (LENGTH - int(suffix[1:]))
        assert total == pytest.approx(difference.double().abs().sum().item(), rel=1e-6)  # the columns are float32
        assert above == (difference.abs() > 2).sum().item()
    assert RowScorer(models.tiny(), LADDER).score(rows[:])[1] == {}


def test_the_features_are_those_of_the_columns():
    scorer = RowScorer(models.tiny(), LADDER, with_long=True)
    rows = some_rows()
    features = datasets.Features({**rows.features, **scorer.features})
    scored = rows.map(scorer, batched=True, batch_size=3, features=features)
    assert set(scored.column_names) == {*rows.column_names, *scorer.features}
    expected = scorer(rows[:])
    for name in scorer.features:
        # Other rows in the same pass round float64 sums differently, far below float32.
        np.testing.assert_allclose(np.stack(scored[name]), np.stack(expected[name]), rtol=1e-6, atol=1e-7)


def test_rows_of_unequal_lengths_are_scored_as_alone():
    lengths = [24, 24, 9, 30, 2, 24]
    rows = [models.some_tokens(1, length, seed=seed)[0].numpy() for seed, length in enumerate(lengths)]
    scorer = RowScorer(models.tiny(), LADDER[1:2], with_long=True)
    together = scorer({"input_ids": rows})
    for number, row in enumerate(rows):
        alone = scorer({"input_ids": [row]})
        for name in ("long_nll", "short_nll_8"):
            np.testing.assert_allclose(together[name][number], alone[name][0], rtol=0, atol=1e-6)


@pytest.mark.parametrize(("contexts", "found"), [([], "none"), ([LADDER[0], LADDER[0]], "4, 4")])
def test_contexts_that_cannot_be_told_apart_are_refused(contexts, found):
    with pytest.raises(ValueError, match=f"size: expected different sizes, found {found}"):
        RowScorer(models.tiny(), contexts)


def test_a_bad_loss_is_refused_by_the_number_of_its_row():
    model = models.tiny()
    model.get_input_embeddings().weight.data[60] = torch.nan
    tokens = models.some_tokens(NUM_ROWS, LENGTH).clamp(max=59)
    tokens[3, 11] = 60
    for with_long, name in ((False, "short"), (True, "long")):
        with pytest.raises(ValueError, match=rf"the {name} loss of row 3, position \d+ is nan"):
            RowScorer(model, LADDER, with_long=with_long).score({"input_ids": tokens.numpy()})


LOSSES = st.floats(0, 8, width=32)


@given(st.lists(st.tuples(LOSSES, LOSSES, st.booleans()), min_size=1, max_size=30))
def test_the_gain_of_a_row_is_that_of_its_tokens_under_the_mask(rows):
    long, short, mask = (torch.tensor(column)[None] for column in zip(*rows))
    found = gains_of_rows(long.double(), short.double(), mask)
    gains = [short - long for long, short, counts in rows if counts]
    if not gains:
        assert all(math.isnan(value.item()) for value in found)
        return
    num_keys = sum(short - long > 2 and long < 2 for long, short, counts in rows if counts)
    assert found.gain_mean.item() == pytest.approx(np.mean(gains), abs=1e-12)
    assert found.gain_positive.item() == sum(b > 0 for b in gains) / len(gains)
    assert found.gain_p90.item() == pytest.approx(np.percentile(gains, 90), abs=1e-12)
    assert found.key_token_ratio.item() == num_keys / len(gains)
