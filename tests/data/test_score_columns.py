"""Divergences and reference losses on disk: from plain logits, with packed documents, beside scores that are there."""

import re

import datasets
import numpy as np
import pytest
import torch
from runs import packed

import models
from texts import trained_tokenizer
from tokenweight import CountScorer, ShortContext, cli, parse_weighting, token_nll
from tokenweight.data import RowScorer, export_weights, read_row, score_folder
from tokenweight.method import (
    BoundedGain,
    Dense,
    Expected,
    Gain,
    LongCE,
    Rho1,
    parse_divergence,
    sliding_windows,
    vanishes,
)
from tokenweight.records import read_json
from tokenweight.train import TrainSettings, train

CONTEXTS = [ShortContext(8, 5), ShortContext(12, 9)]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A model, another one of the same tokenizer, and packed rows."""
    root = tmp_path_factory.mktemp("columns")
    for name, seed in (("model", 0), ("reference", 1)):
        models.tiny(dtype=torch.float32, seed=seed).save_pretrained(root / name)
        trained_tokenizer().save_pretrained(root / name)
    random = np.random.default_rng(0)
    rows = datasets.Dataset.from_dict({"input_ids": [random.integers(3, 60, n).tolist() for n in (24, 16, 30, 40)]})
    packed(rows, (0, 1), (2,), (3,)).save_to_disk(str(root / "rows"))
    return root


def documents(row):
    """The documents of a row, each as a batch of one, and where they begin."""
    begins = [place for place, position in enumerate(row["position_ids"]) if position == 0]
    for begin, stop in zip(begins, [*begins[1:], len(row["input_ids"])]):
        yield begin, torch.as_tensor(row["input_ids"][begin:stop])[None]


def distributions(model, tokens, context):
    """-log p of all of the vocabulary, from plain logits of the document, and of windows beyond the first."""
    long = torch.zeros(tokens.shape[1], model.config.vocab_size, dtype=torch.float64)
    long[1:] = -model(tokens).logits.double().log_softmax(dim=-1)[0, :-1]
    short = long.clone()
    for start, first, stop in sliding_windows(tokens.shape[1], context.size, context.stride):
        nll = -model(tokens[:, start:stop]).logits.double().log_softmax(dim=-1)[0]
        short[first:stop] = nll[first - start - 1 : -1]
    return long, short


@pytest.mark.parametrize(
    ("kind", "weighting"),
    [("kl", Gain()), ("tv", BoundedGain()), ("absolute", Dense()), ("longce:cap=2.0", LongCE(2.0))],
)
@torch.no_grad()
def test_stored_divergences_are_sums_over_the_vocabulary(kind, weighting, place, tmp_path):
    score_folder(place / "rows", str(place / "model"), CONTEXTS, tmp_path / "scored", divergence=parse_divergence(kind))
    score_folder(place / "rows", str(place / "model"), CONTEXTS, tmp_path / "plain", with_long=True)
    model = models.tiny(dtype=torch.float32)
    scored, plain = (datasets.load_from_disk(str(tmp_path / name)).with_format("numpy") for name in ("scored", "plain"))
    for row, other in zip(scored, plain):
        for name in other:
            np.testing.assert_allclose(row[name], other[name], rtol=0, atol=1e-5)
        for context in CONTEXTS:
            for begin, tokens in documents(row):
                long, short = distributions(model, tokens, context)
                expected = ((-long).exp() * weighting.score(long, short)).sum(dim=-1)
                expected[: context.size if vanishes(weighting) else 1] = 0
                found = row[f"divergence_{context.size}"][begin : begin + tokens.shape[1]]
                np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5)
    noted = read_json(tmp_path / "scored" / "scores.json")
    assert (noted["divergence"], noted["long"]) == (kind, True)
    assert "divergence" not in read_json(tmp_path / "plain" / "scores.json")


def test_the_divergence_of_one_kind_is_not_taken_for_another(place, tmp_path):
    scored = tmp_path / "scored"
    score_folder(place / "rows", str(place / "model"), CONTEXTS[:1], scored, divergence=Gain())
    message = "holds the divergence 'kl', but weighting expected.boundedgain.* needs 'tv': .*--divergence tv"
    with pytest.raises(ValueError, match=message):
        read_row(scored, 0).weigh(Expected(BoundedGain()))
    with pytest.raises(ValueError, match=message):
        export_weights(scored, Expected(BoundedGain()), tmp_path / "out", format="hf")
    with pytest.raises(ValueError, match=message):
        train(TrainSettings(str(place / "model"), str(scored), str(tmp_path / "run"), "expected(boundedgain)"))
    settings = {"weighting": "expected(dense)", "scorer": "count", "size": 8}
    counted = TrainSettings(str(place / "model"), str(place / "rows"), str(tmp_path / "run"), **settings)
    with pytest.raises(ValueError, match="scorer count holds the divergence 'kl'"):
        train(counted)
    row = read_row(scored, 0)
    losses = (row.long_nll, row.short_nll, row.mask)
    assert torch.equal(row.weigh(Expected(Gain())), Expected(Gain())(*losses, divergence=row.divergence))
    export_weights(scored, Expected(Gain()), tmp_path / "out", format="hf")


def test_losses_of_a_reference_are_a_column_of_their_own_beside_scores_or_before_them(place, tmp_path):
    def score(rows, *options):
        out = tmp_path / f"after-{len(list(tmp_path.iterdir()))}"
        assert cli.main(["score", str(rows), *options, "--dtype", "float32", "--out", str(out)]) == 0
        return out

    scorer = ["--model", str(place / "model"), "--size", "8,12"]
    reference = ["--model", str(place / "reference"), "--as", "reference"]
    scores_first = score(score(place / "rows", *scorer), *reference)
    reference_first = score(score(place / "rows", *reference), *scorer)
    model = models.tiny(dtype=torch.float32, seed=1)
    both = [datasets.load_from_disk(str(folder)).with_format("numpy") for folder in (scores_first, reference_first)]
    for row, other in zip(*both):
        assert row.keys() == other.keys()
        assert all(np.array_equal(row[name], other[name], equal_nan=True) for name in row if name != "documents")
        for begin, tokens in documents(row):
            found = row["ref_nll"][begin : begin + tokens.shape[1]]
            np.testing.assert_allclose(found, token_nll(model, tokens)[0], rtol=0, atol=1e-5)
    for folder in (scores_first, reference_first):
        noted = read_json(folder / "scores.json")
        assert noted["model"] == str(place / "model")
        assert noted["reference"]["model"] == str(place / "reference")
        assert noted["contexts"] == [{"size": 8, "stride": 6}, {"size": 12, "stride": 9}]
        row = read_row(folder, 0, size=8)
        excess = row.weigh(Rho1(0.5))
        assert torch.equal(excess, Rho1(0.5)(row.long_nll, row.short_nll, row.mask, ref_nll=row.ref_nll))


@pytest.mark.parametrize(
    ("weighting", "option"),
    [("expected(gain)", "--divergence kl"), ("expected(dense)", "--divergence absolute"), ("rho1", "--as reference")],
)
def test_a_row_without_what_a_weighting_uses_says_how_to_score_it(weighting, option, place, tmp_path):
    score_folder(place / "rows", str(place / "model"), CONTEXTS[:1], tmp_path / "scored", with_long=True)
    with pytest.raises(ValueError, match=f"scored has no column .*: score it with `tokenweight score {option}`"):
        read_row(tmp_path / "scored", 0).weigh(parse_weighting(weighting))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--model", "model", "--as", "reference", "--size", "8"], "size 8: a reference reads whole sequences"),
        (["--model", "model", "--as", "reference", "--long"], "long True: a reference reads whole sequences"),
        (["--model", "count", "--as", "reference"], "as reference: count scores without a model"),
        (["--model", "count", "--divergence", "tv"], "divergence tv: count stores kl, and no other"),
        (["--model", "model", "--divergence", "kld"], "divergence 'kld': expected one of kl, tv, absolute"),
        (["--model", "model", "--divergence", "uniform"], "divergence 'uniform': expected one of kl, tv, absolute"),
    ],
)
def test_what_does_not_go_together_is_refused_in_one_line(options, message, place, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(place)
    assert cli.main(["score", "rows", *options, "--out", str(tmp_path / "out")]) == 2
    printed = capsys.readouterr().err
    assert printed.count("\n") == 1
    assert re.search(message, printed)
    assert not (tmp_path / "out").exists()


def test_scores_of_a_second_scorer_are_not_mixed_with_those_of_a_first(place, tmp_path):
    score_folder(place / "rows", str(place / "model"), CONTEXTS[:1], tmp_path / "scored")
    with pytest.raises(ValueError, match="the rows have a column short_nll_8 already"):
        score_folder(tmp_path / "scored", str(place / "reference"), CONTEXTS[1:], tmp_path / "again")


def test_a_reference_or_a_scorer_with_a_divergence_of_its_own_takes_no_other(place):
    with pytest.raises(ValueError, match="as_reference"):
        RowScorer(models.tiny(), CONTEXTS, as_reference=True)
    with pytest.raises(ValueError, match="divergence: expected none"):
        RowScorer(CountScorer(2), CONTEXTS, divergence=Gain())
