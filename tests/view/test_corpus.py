"""Statistics of a scored folder: against sums over the columns that scoring stored, written out."""

import csv
import json
import math
import statistics
from itertools import pairwise

import datasets
import pytest

from tokenweight import ShortContext, cli
from tokenweight.data import load_rows, score_folder
from tokenweight.view import corpus_gains, name_folders
from tokenweight.view.corpus import bin_labels, corpus_view

NAN = math.nan
GAINS = [0.1, 0.4, -0.2, NAN, 0.3, 0.0, 0.5, 0.1]
BETTER = [0.5, 0.6, 0.4, NAN, 0.7, 0.5, 0.8, 0.5]
KEY = [0.0, 0.1, 0.0, NAN, 0.2, 0.0, 0.3, 0.0]
NAMES = ["a", "b", "a", "c", "b", "d", "e", "f"]


def folder_of(path, **columns):
    rows = {"input_ids": [[1, 2, 3, 4]] * len(GAINS), **columns}
    for size, factor in ((2, 1), (3, 2)):
        own = {"gain_mean": GAINS, "gain_positive": BETTER, "key_token_ratio": KEY}
        rows |= {f"{name}_{size}": [factor * value for value in values] for name, values in own.items()}
    kinds = {name: datasets.Value("float32") for name in rows if "_2" in name or "_3" in name}
    data = datasets.Dataset.from_dict(rows)
    data.cast(datasets.Features({**data.features, **kinds})).save_to_disk(str(path))
    return path


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return folder_of(tmp_path_factory.mktemp("corpus") / "gains", document=NAMES)


def test_numbers_are_over_the_sequences_that_have_a_token_beyond_the_first_window(folder):
    largest, gain = corpus_gains(folder, name="gains")
    assert (largest.size, gain.size) == (3, 2)
    known = [value for value in GAINS if not math.isnan(value)]
    assert (gain.source, gain.sequences, gain.all_sequences, gain.tokens) == ("gains", 7, 8, 32)
    assert gain.mean_gain == pytest.approx(statistics.mean(known))
    assert gain.quantiles["p50"] == pytest.approx(statistics.median(known))
    assert gain.better == pytest.approx(sum(value for value in BETTER if value == value) / 7)
    assert gain.key_token_ratio == pytest.approx(0.6 / 7)
    assert gain.top_share == pytest.approx((0.5 + 0.4) / 1.2)  # a fifth of seven is two
    assert largest.mean_gain == pytest.approx(2 * gain.mean_gain)
    assert sum(gain.histogram.counts) == 7
    assert corpus_gains(folder, size=3, name="gains") == [largest]


def test_the_best_and_the_worst_documents_are_means_over_their_sequences(folder):
    (gain,) = corpus_gains(folder, size=2, top=2)
    expected = {"a": -0.05, "b": 0.35, "d": 0, "e": 0.5, "f": 0.1}
    order = sorted(expected, key=expected.get)
    assert [document.name for document in gain.worst] == order[:2]
    assert [document.name for document in gain.best] == order[::-1][:2]
    for document in gain.best + gain.worst:
        assert document.mean_gain == pytest.approx(expected[document.name], abs=1e-7)
        assert (document.row, document.sequences) == (NAMES.index(document.name), 1 + (document.name in "ab"))
    (all_of_them,) = corpus_gains(folder, size=2, top=9)  # no document is in both lists
    assert [len(all_of_them.best), len(all_of_them.worst)] == [2, 2]


def test_sequences_have_numbers_where_the_folder_does_not_name_documents_and_packed_ones_both(tmp_path):
    (gain,) = corpus_gains(folder_of(tmp_path / "plain"), size=2, top=1)
    assert [document.name for document in gain.best + gain.worst] == ["row 6", "row 2"]
    packed = [["x", "y", "z"], ["x"], ["x"], ["x"], ["x"], ["x"], ["x"], ["x"]]
    (gain,) = corpus_gains(folder_of(tmp_path / "packed", documents=packed[::-1]), size=2, top=1)
    assert [document.name for document in gain.best + gain.worst] == ["x (row 6)", "x (row 2)"]


def test_sources_are_told_apart_by_a_column(folder):
    found = {gain.source: gain for gain in corpus_gains(folder, size=2, by="document", name="g")}
    assert list(found) == [f"g, {name}" for name in "abcdef"]
    assert found["g, a"].mean_gain == pytest.approx(-0.05)
    assert (found["g, c"].sequences, found["g, c"].all_sequences) == (0, 1)
    assert math.isnan(found["g, c"].mean_gain)
    assert found["g, a"].top_share is None  # nothing is gained there
    assert corpus_view(list(found.values()))


@pytest.mark.parametrize("num", [1, 7, 60, 1000])
def test_every_sequence_is_in_a_bin_and_outer_bins_say_that_they_are_open(num, tmp_path):
    values = [math.tan(3.0 * (i / num - 0.5)) / 50 for i in range(num)]
    rows = {"input_ids": [[1, 2]] * num, "gain_mean_1": values, "gain_positive_1": values, "key_token_ratio_1": values}
    datasets.Dataset.from_dict(rows).save_to_disk(str(tmp_path / "rows"))
    (gain,) = corpus_gains(tmp_path / "rows")
    edges, counts = gain.histogram
    inner = [-math.inf, *edges[1:-1], math.inf]
    assert counts == [sum(low <= value < high for value in values) for low, high in pairwise(inner)]
    assert len(counts) <= 13
    labels = bin_labels(gain.histogram)
    assert len(labels) == len(counts)
    assert (labels[0].split()[0], labels[-1].split()[1:]) == ("below", ["or", "more"])


def test_the_numbers_of_a_folder_that_was_scored_are_those_of_its_columns(folders, capsys):
    contexts = [ShortContext(8, 5), ShortContext(4, 2)]
    score_folder(folders / "rows", str(folders / "model"), contexts, folders / "scored", with_long=True)
    found = corpus_gains(folders / "scored")
    rows = load_rows(folders / "scored")
    assert [gain.size for gain in found] == [8, 4]
    for gain in found:
        assert gain.mean_gain == pytest.approx(statistics.mean(map(float, rows[f"gain_mean_{gain.size}"])), rel=1e-5)
    for ending in ("json", "csv"):
        assert cli.main(["stats", str(folders / "scored"), "--save", str(folders / f"out.{ending}")]) == 0
        assert "mean gain" in capsys.readouterr().out
    (first, second) = json.loads((folders / "out.json").read_text())
    assert (first["source"], first["size"], first["mean_gain"]) == ("scored", 8, found[0].mean_gain)
    assert second["quantiles"] == found[1].quantiles
    lines = list(csv.DictReader((folders / "out.csv").open()))
    assert [float(line["p90"]) for line in lines] == [gain.quantiles["p90"] for gain in found]


def test_what_cannot_be_summed_up_is_refused_in_one_line(folder, folders, tmp_path, monkeypatch, capsys):
    score_folder(folders / "rows", str(folders / "model"), [ShortContext(8, 5)], folders / "short")
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path / "empty")
    capsys.readouterr()
    for words, message in (
        ([str(folders / "short")], "stores no gain per sequence: score it with `tokenweight score … --long`"),
        ([str(folder), "--size", "5"], "--size 5: "),
        ([str(folder), "--by", "input_ids"], "--by input_ids: "),
        ([str(folder), "--by", "sorce"], "expected one of document"),
        ([str(folder), "--top", "-1"], "--top -1: "),
        ([str(folder), "--save", "out.txt"], "--save out.txt: expected a name that ends in .json or .csv"),
        ([str(folder), "--save", "none/out.csv"], "--save none/out.csv: no such folder"),
    ):
        assert cli.main(["stats", *words]) == 2
        error = capsys.readouterr().err
        assert message in error
        assert error.count("\n") == 1
    assert not list((tmp_path / "empty").iterdir())


def test_folders_are_named_by_their_last_part_unless_two_have_the_same(tmp_path):
    assert name_folders(["a/x", "b/y/"]) == ["x", "y"]
    assert name_folders(["a/x", "b/x"]) == ["a/x", "b/x"]
