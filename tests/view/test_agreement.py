"""Agreement of scorers: against sets and sums in plain Python, and averages over all orders of equal values."""

import itertools
import json
import math
import random
import statistics
from fractions import Fraction

import datasets
import numpy as np
import pytest

from texts import trained_tokenizer
from tokenweight import ShortContext, cli
from tokenweight.data import score_folder
from tokenweight.view import Comparison, Losses, agreement_view, compare_scores
from tokenweight.view.agreement.measure import SHARES, picked

SIZE, NUM = 4, 24  # of the tokens beyond the window, 20 % are 4, and 5 % are one


def losses_of(seed, *, rows=3, divergence=False):
    """Rows of losses that float32 holds exactly, without equal differences, and some key tokens."""
    draw = random.Random(seed)
    found = []
    for _ in range(rows):
        gains = draw.sample(range(-150, 250), NUM)
        long = [draw.randrange(1, 400) / 64 for _ in range(NUM)]
        row = {"long_nll": long, f"short_nll_{SIZE}": [a + b / 64 for a, b in zip(long, gains)]}
        found.append(row | ({f"divergence_{SIZE}": draw.sample(range(NUM), NUM)} if divergence else {}))
    return found


def folder_of(path, rows, *, tokens=None, **columns):
    tokens = tokens or [[7 * row + place for place in range(NUM)] for row in range(len(rows))]
    data = {"input_ids": tokens} | {name: [row[name] for row in rows] for name in rows[0]} | columns
    floats = {name: datasets.List(datasets.Value("float32")) for name in rows[0]}
    dataset = datasets.Dataset.from_dict(data)
    dataset.cast(datasets.Features({**dataset.features, **floats})).save_to_disk(str(path))
    return path


def ranks(values):
    """From 1; equal values have the mean of theirs."""
    order = sorted(values)
    return [statistics.mean(place for place, one in enumerate(order, 1) if one == value) for value in values]


def slow(first, second, ranking, share):
    """(overlap, key tokens, benefit, own benefit) of rows without equal values, and the rank correlation."""
    totals = dict.fromkeys(itertools.product(("overlap", "keys", "benefit", "own"), (0, 1)), 0.0)
    correlations, all_keys, all_benefit, picks_made = [], [0, 0], [0.0, 0.0], 0
    for pair in zip(first, second):
        long = [row["long_nll"][SIZE:] for row in pair]
        gain = [[short - a for short, a in zip(row[f"short_nll_{SIZE}"][SIZE:], own)] for row, own in zip(pair, long)]
        score = gain
        if ranking == "likely_gain":
            score = [[math.exp(-a) * g for a, g in zip(*one)] for one in zip(long, gain)]
        if ranking == "divergence":
            score = [row[f"divergence_{SIZE}"][SIZE:] for row in pair]
        num = int(Fraction(share).limit_denominator(100) * (NUM - SIZE))
        picks = [set(sorted(range(NUM - SIZE), key=lambda t: -one[t])[:num]) for one in score]
        keys = [{t for t, (a, g) in enumerate(zip(*one)) if g > 2 and a < 2} for one in zip(long, gain)]
        picks_made += num
        for own, other in ((0, 1), (1, 0)):
            totals["overlap", own] += len(picks[own] & picks[other])
            totals["keys", own] += len(keys[own] & picks[other])
            totals["benefit", own] += sum(gain[own][t] for t in picks[other])
            totals["own", own] += sum(gain[own][t] for t in picks[own])
            all_keys[own] += len(keys[own])
            all_benefit[own] += sum(gain[own])
        correlations.append(statistics.correlation(*map(ranks, score)))
    shares = {
        name: [totals[name, n] / whole[n] for n in (0, 1)]
        for name, whole in (("keys", all_keys), ("benefit", all_benefit), ("own", all_benefit))
    }
    return totals["overlap", 0] / picks_made, *shares.values(), statistics.mean(correlations), all_keys


@pytest.mark.parametrize("share", SHARES)
@pytest.mark.parametrize("ranking", ["gain", "likely_gain", "divergence"])
def test_numbers_are_those_of_sets_and_sums_in_plain_python(ranking, share, tmp_path):
    rows, others = losses_of(1, divergence=True), losses_of(2, divergence=True)
    found = compare_scores(folder_of(tmp_path / "a", rows), folder_of(tmp_path / "b", others))
    overlap, keys, benefit, own, correlation, num_keys = slow(rows, others, ranking, share)
    (picks,) = (one for one in found.picks if (one.ranking, one.share) == (ranking, share))
    assert min(num_keys) > 3
    assert (found.key_tokens, found.tokens, found.sizes) == (tuple(num_keys), 3 * (NUM - SIZE), (SIZE, SIZE))
    assert picks.overlap == pytest.approx(overlap)
    assert picks.key_tokens == pytest.approx(tuple(keys))
    assert picks.benefit == pytest.approx(tuple(benefit))
    assert picks.own_benefit == pytest.approx(tuple(own))
    assert found.rank_correlation[ranking] == pytest.approx(correlation)


def test_of_equal_values_each_is_picked_as_often_as_in_a_random_order():
    values = [2.0, 0.0, 1.0, 1.0, 3.0, 1.0]
    for num in range(1, 7):
        often = np.zeros(6)
        for order in itertools.permutations(range(6)):
            often[sorted(order, key=lambda t: -values[t])[:num]] += 1  # sorting keeps the order of equal values
        assert picked(np.array(values), float(num)) == pytest.approx(often / 720)
    assert picked(np.array(values), 2.5).tolist() == pytest.approx([1, 0, 1 / 6, 1 / 6, 1, 1 / 6])
    assert picked(np.zeros(7), 0.35).sum() == pytest.approx(0.35)


def test_ranks_of_equal_values_are_shared():
    draw = random.Random(0)
    one, other = ([float(draw.randrange(4)) for _ in range(30)] for _ in range(2))
    comparison = Comparison()
    comparison.add(*(Losses(np.zeros(30), np.array(values)) for values in (one, other)))
    assert comparison.result().rank_correlation["gain"] == pytest.approx(
        statistics.correlation(ranks(one), ranks(other))
    )


def test_a_scorer_agrees_with_itself_and_knows_no_more_than_chance_where_it_says_nothing(tmp_path):
    rows = losses_of(3)
    flat = [{**row, "long_nll": row[f"short_nll_{SIZE}"]} for row in rows]
    same = compare_scores(folder_of(tmp_path / "a", rows), tmp_path / "a")
    assert set(same.rank_correlation) == {"gain", "likely_gain"}
    assert list(same.rank_correlation.values()) == pytest.approx([1, 1])
    assert [one.overlap for one in same.picks] == pytest.approx([1] * 4)
    assert all(one.benefit == one.own_benefit for one in same.picks)
    assert not same.more + same.less
    nothing = compare_scores(tmp_path / "a", folder_of(tmp_path / "flat", flat))
    assert nothing.rank_correlation["gain"] is None
    for one in nothing.picks:
        assert one.key_tokens == (pytest.approx(one.share), None)
        assert one.benefit == (pytest.approx(one.share), None)


def test_a_divergence_that_one_of_them_has_finds_tokens_of_the_other(tmp_path):
    rows, others = losses_of(4), losses_of(5, divergence=True)
    found = compare_scores(folder_of(tmp_path / "a", rows), folder_of(tmp_path / "b", others))
    (picks, _) = (one for one in found.picks if one.ranking == "divergence")
    assert found.rank_correlation["divergence"] is picks.overlap is None
    assert picks.key_tokens[1] is picks.benefit[1] is picks.own_benefit[0] is None
    expected = slow(losses_of(4, divergence=True), others, "divergence", SHARES[0])
    assert picks.key_tokens[0] == pytest.approx(expected[1][0])


def test_the_lists_hold_the_tokens_whose_probable_gains_differ_most(tmp_path):
    rows, others = losses_of(6), losses_of(7)
    found = compare_scores(folder_of(tmp_path / "a", rows), folder_of(tmp_path / "b", others), top=5)

    def likely(row, place):
        return math.exp(-row["long_nll"][place]) * (row[f"short_nll_{SIZE}"][place] - row["long_nll"][place])

    places = [(row, place) for row in range(3) for place in range(SIZE, NUM)]
    differ = {at: likely(rows[at[0]], at[1]) - likely(others[at[0]], at[1]) for at in places}
    ordered = sorted(places, key=differ.get)
    assert [(one.row, one.position) for one in found.more] == ordered[::-1][:5]
    assert [(one.row, one.position) for one in found.less] == ordered[:5]
    row, place = ordered[0]
    assert found.less[0].long_nll == (rows[row]["long_nll"][place], others[row]["long_nll"][place])
    assert found.less[0].token == str(7 * row + place)  # without a tokenizer, its id
    assert not found.names_tokens
    assert compare_scores(tmp_path / "a", tmp_path / "b", top=0).more == []


def test_tokens_count_that_are_predicted_and_beyond_both_windows_of_their_document(tmp_path):
    positions = [[*range(10), *range(NUM - 10)]] * 3
    labels = [[*([-100] * 12), *range(NUM - 12)]] * 3
    others = [row | {"short_nll_6": row[f"short_nll_{SIZE}"]} for row in losses_of(8)]
    first = folder_of(tmp_path / "a", losses_of(8), position_ids=positions, labels=labels)
    second = folder_of(tmp_path / "b", others, position_ids=positions, labels=labels)
    found = compare_scores(first, second, sizes=(None, 6))
    assert (found.sizes, found.tokens) == ((4, 6), 3 * (NUM - 10 - 6))


def test_the_command_prints_saves_and_shows_the_text_of_tokens(folders, capsys):
    trained_tokenizer().save_pretrained(folders / "model")
    for name, size in (("one", 8), ("other", 12)):
        context = ShortContext(size, 5)
        score_folder(folders / "rows", str(folders / "model"), [context], folders / name, with_long=True)
    words = [str(folders / "one"), str(folders / "other"), "--save", str(folders / "agreement.json")]
    assert cli.main(["compare-scores", *words]) == 0
    printed = capsys.readouterr().out
    assert "rank correlation" in printed
    assert "More by other" in printed
    found = compare_scores(folders / "one", folders / "other")
    assert json.loads((folders / "agreement.json").read_text()) == json.loads(json.dumps(found.as_json()))
    assert found.names_tokens
    assert any(one.token.strip().isalpha() for one in found.more + found.less)
    assert len(agreement_view(found)) == 4


def test_what_cannot_be_compared_is_refused_in_one_line(folders, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    folder_of(tmp_path / "a", losses_of(1))
    folder_of(tmp_path / "few", losses_of(1, rows=2))
    folder_of(tmp_path / "others", losses_of(1), tokens=[[7 * row + n for n in range(NUM)] for row in (0, 1, 3)])
    folder_of(tmp_path / "masked", losses_of(1), labels=[[-100] * NUM] * 2 + [[*range(NUM)]])
    folder_of(tmp_path / "nan", [{**row, "long_nll": [math.nan] * NUM} for row in losses_of(1)])
    folder_of(tmp_path / "short", [{"short_nll_4": row["short_nll_4"]} for row in losses_of(1)])
    folder_of(tmp_path / "two", [row | {"short_nll_30": row["short_nll_4"]} for row in losses_of(1)])
    capsys.readouterr()
    for words, message in (
        (["a", "few"], "a holds 3 sequences and few 2: "),
        (["a", "others"], "a and others differ in row 2: "),
        (["a", "masked"], "a and masked differ in row 0: "),
        (["nan", "a"], "row 0"),
        (["a", "short"], "short has no column long_nll: score it with `tokenweight score short --long`"),
        (["a", "two"], "two holds scores with short contexts of "),
        (["a", "two", "--size", "4,30"], "no token has more than 30 tokens before it"),
        (["a", "a", "--size", "4,4,4"], "--size 4,4,4: "),
        (["a", "a", "--top", "-1"], "--top -1: "),
        (["a", "a", "--save", "out.csv"], "--save out.csv: expected a name that ends in .json"),
        (["a", "none"], "none: no such folder of rows"),
    ):
        assert cli.main(["compare-scores", *words]) == 2
        errors = capsys.readouterr().err.splitlines()
        assert message in errors[-1]
        assert sum(line.startswith("tokenweight compare-scores: ") for line in errors) == 1
