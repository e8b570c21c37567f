"""Scores by counts within a document, against all probabilities by their definition."""

import counts
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import models
from tokenweight import ShortContext
from tokenweight.models.scorers import ContrastScorer, CountScorer
from tokenweight.models.scorers.ngrams import count_orders

# Both sides add up the same numbers in float64, here some dozens of them of at most 2**18 / 1e-18 nats.
SAME = {"rtol": 1e-9, "atol": 1e-12}
# Found, other than expected, in float32.
ROUNDED = {"rtol": 1e-6, "atol": 1e-6}


def columns(contrast):
    return np.stack([values.numpy() for values in contrast])


def scored(tokens, context, position_ids=None, **given):
    return columns(CountScorer(**given)(torch.tensor(tokens), context, position_ids=position_ids))


@settings(max_examples=60, deadline=None)
@given(
    tokens=st.lists(st.integers(0, 4), min_size=1, max_size=40),
    order=st.integers(0, 5),
    size=st.integers(2, 16),
    data=st.data(),
)
def test_losses_and_divergence_are_those_of_all_probabilities_of_a_vocabulary_of_five(tokens, order, size, data):
    """`counts.scores` sums up both distributions, and asserts that each adds up to 1."""
    context = ShortContext(size, data.draw(st.integers(1, size - 1)))
    expected = counts.scores(tokens, context, order, 5)
    exact = CountScorer(order, vocab_size=5)._score(np.array(tokens), [0], context)
    np.testing.assert_allclose(exact, expected, **SAME)
    np.testing.assert_allclose(scored([tokens], context, order=order, vocab_size=5)[:, 0], expected, **ROUNDED)


@pytest.mark.parametrize("vocab_size", [7, 300, 5000])
@pytest.mark.parametrize("order", [0, 4])
def test_a_row_of_many_windows_and_few_or_many_kinds_of_tokens_agrees_with_the_definition(order, vocab_size):
    random = np.random.default_rng(vocab_size + order)
    tokens = np.where(
        random.random(200) < 0.8, random.integers(0, 6, 200), random.integers(0, min(vocab_size, 64), 200)
    )
    context = ShortContext(40, 30)
    expected = counts.scores(tokens.tolist(), context, order, vocab_size)
    exact = CountScorer(order, vocab_size=vocab_size)._score(tokens, [0], context)
    np.testing.assert_allclose(exact, expected, **SAME)


def test_counts_are_those_of_a_dictionary():
    tokens = np.random.default_rng(0).integers(0, 4, 200)
    seen: dict[tuple, dict[int, int]] = {}
    orders = count_orders(tokens, np.zeros(200, dtype=np.int64), 3)
    found = [(one.dense(one.contexts, 200), one.dense(one.hits, 200), one.dense(one.kinds, 200)) for one in orders]
    for t, token in enumerate(tokens.tolist()):
        for n, (contexts, hits, kinds) in enumerate(found):
            if n <= t:
                after = seen.setdefault(tuple(tokens[t - n : t].tolist()), {})
                assert (contexts[t], hits[t], kinds[t]) == (sum(after.values()), after.get(token, 0), len(after))
                after[token] = after.get(token, 0) + 1


def test_no_token_is_read_before_its_time():
    tokens = np.random.default_rng(1).integers(0, 9, 120)
    changed = tokens.copy()
    changed[70:] = (changed[70:] + 1 + np.arange(50) % 8) % 9
    before, after = (scored([one.tolist()], ShortContext(32, 20), vocab_size=9)[:, 0] for one in (tokens, changed))
    assert np.array_equal(before[:, :70], after[:, :70])
    assert before[2, 70] == after[2, 70]  # the divergence does not see its own token
    assert (before[:2, 70:] != after[:2, 70:]).mean() > 0.8


@pytest.mark.parametrize("size", [50, 64])
def test_a_window_of_the_whole_row_makes_no_difference_to_the_bit(size):
    tokens = np.random.default_rng(2).integers(0, 6, (2, 50)).tolist()
    long, short, divergence = scored(tokens, ShortContext(size, 1), vocab_size=6)
    assert np.array_equal(long, short)
    assert not divergence.any()


def test_the_first_window_of_a_document_makes_no_difference_to_the_bit():
    tokens = np.random.default_rng(3).integers(0, 6, (1, 90)).tolist()
    long, short, divergence = scored(tokens, ShortContext(32, 8), vocab_size=6)
    assert np.array_equal(long[:, :32], short[:, :32])
    assert not divergence[:, :32].any()
    assert (long[:, 32:] != short[:, 32:]).mean() > 0.8
    assert (divergence[:, 32:] > 0).mean() > 0.8


def test_a_name_that_comes_again_beyond_the_window_has_the_largest_benefit():
    size, name = 32, [100, 101, 102]
    filler = np.random.default_rng(4).permutation(90)
    tokens = [*filler[:10], *name, *filler[10:60], *name, *filler[60:]]
    long, short, divergence = scored([[int(token) for token in tokens]], ShortContext(size, 24), vocab_size=128)
    assert set(np.argsort((short - long)[0])[-2:]) == {64, 65}  # the first of its tokens does not say that it begins
    assert set(np.argsort(divergence[0])[-3:]) == {64, 65, 66}  # the name also says what came after it


def packs(*documents):
    return [token for document in documents for token in document], [t for one in documents for t in range(len(one))]


def test_documents_of_a_pack_do_not_see_each_other_and_their_order_changes_nothing():
    random, context = np.random.default_rng(5), ShortContext(12, 8)
    documents = [random.integers(0, 5, length).tolist() for length in (30, 1, 17, 12, 44)]
    alone = [scored([document], context, vocab_size=5)[:, 0] for document in documents]
    for order in (range(5), random.permutation(5)):
        tokens, positions = packs(*(documents[i] for i in order))
        packed = scored([tokens], context, torch.tensor([positions]), vocab_size=5)[:, 0]
        assert np.array_equal(packed, np.concatenate([alone[i] for i in order], axis=1))


def test_rows_of_a_batch_are_scored_as_one_by_one_however_many_are_counted_at_once(monkeypatch):
    tokens = np.random.default_rng(6).integers(0, 5, (4, 60)).tolist()
    together = scored(tokens, ShortContext(16, 10), vocab_size=5)
    monkeypatch.setattr("tokenweight.models.scorers.count._TOKENS", 50)
    monkeypatch.setattr("tokenweight.models.scorers.count_divergence._TERMS", 7)
    assert np.array_equal(together, scored(tokens, ShortContext(16, 10), vocab_size=5))
    alone = [scored([row], ShortContext(16, 10), vocab_size=5) for row in tokens]
    assert np.array_equal(together, np.concatenate(alone, axis=1))


def test_skipped_positions_begin_no_document():
    tokens = np.random.default_rng(7).integers(0, 5, (1, 40)).tolist()
    skips = torch.tensor([[*range(20), *range(1000, 1020)]])
    context = ShortContext(16, 10)
    assert np.array_equal(scored(tokens, context, skips, vocab_size=5), scored(tokens, context, vocab_size=5))


def test_ids_of_any_size_are_counted():
    """Pairs are sorted as one number, or, where these would not fit into 64 bits, by two keys."""
    tokens = np.random.default_rng(8).integers(0, 5, 80)
    small, large = (scored([ids.tolist()], ShortContext(20, 9), vocab_size=1 << 60) for ids in (tokens, tokens << 55))
    assert np.array_equal(small, large)


def test_without_divergence_the_losses_are_the_same():
    tokens = np.random.default_rng(9).integers(0, 5, (1, 50)).tolist()
    with_it, without = (
        CountScorer(vocab_size=5, divergence=asked)(torch.tensor(tokens), ShortContext(16)) for asked in (True, False)
    )
    assert without.divergence is None
    assert all(torch.equal(*pair) for pair in zip(with_it[:2], without[:2]))
    assert with_it.long_nll.dtype == torch.float32


def test_it_is_a_scorer_that_says_what_its_scores_depend_on():
    scorer = CountScorer(2, vocab_size=99)
    assert isinstance(scorer, ContrastScorer)
    assert not isinstance(models.tiny(), ContrastScorer)
    assert scorer.provenance == {"model": "count:order=2,vocab_size=99", "contrast": "scorer", "divergence": "kl"}


@pytest.mark.parametrize(("given", "named"), [({"order": -1}, "order=-1"), ({"vocab_size": 0}, "vocab_size=0")])
def test_settings_that_make_no_sense_are_refused(given, named):
    with pytest.raises(ValueError, match=named):
        CountScorer(**given)


@pytest.mark.parametrize("token", [-1, 5])
def test_a_token_beyond_the_vocabulary_is_named_with_row_and_position(token):
    with pytest.raises(ValueError, match=rf"token {token}.*row 1.*position 2"):
        scored([[1, 2, 3], [1, 2, token]], ShortContext(2, 1), vocab_size=5)
