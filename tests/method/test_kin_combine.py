"""Weightings made of weightings, and the texts that they are written as."""

import pytest
import torch
from weighed import KIN, some

import models
from tokenweight.method import (
    ESLM,
    EXACT,
    Custom,
    Dense,
    Expected,
    FirstWindow,
    Floor,
    Gain,
    LongCE,
    Mix,
    Normalized,
    Rho1,
    Sparse,
    Uniform,
    Warmup,
    parse_weighting,
    weighting_names,
)


def test_combinations_are_what_their_parts_make():
    long, short, mask, used = some()
    dense, longce = Dense(0.2)(long, short, mask), LongCE()(long, short, mask)
    for weighting, expected in (
        (Mix(Dense(0.2), LongCE(), share=0.3), 0.3 * dense + 0.7 * longce),
        (Floor(Dense(0.2), 0.7), dense.clamp(min=0.7).where(mask, 0)),
        (Normalized(LongCE()), longce / longce.sum(dim=1, keepdim=True) * mask.sum(dim=1, keepdim=True)),
        (Mix(Uniform(), Custom(models.emphasize), 0.5), 0.5 * mask + 0.5 * Custom(models.emphasize)(long, short, mask)),
    ):
        torch.testing.assert_close(weighting(long, short, mask, **used), expected, rtol=1e-12, atol=0)


def test_a_warmup_goes_from_uniform_to_its_weighting_as_targets_are_trained_on():
    long, short, mask, _ = some()
    dense = Dense(0.0)(long, short, mask)
    num = int(mask.sum())
    weighting = Warmup(Dense(0.0), tokens=4.0 * num)
    assert weighting.observe(long, short, mask).tolist() == [num]
    for past, share in ((0, 0.25), (num, 0.5), (2 * num, 0.75), (3 * num, 1.0), (9 * num, 1.0)):
        weights = weighting(long, short, mask, history=torch.tensor([num + past], dtype=torch.float64))
        torch.testing.assert_close(weights, (1 + share * (dense - 1)).where(mask, 0), rtol=1e-12, atol=0)


def test_the_first_window_has_a_weight_of_its_own_and_the_rest_is_weighed_alone():
    long, short, mask, used = some()
    used["positions"][1, 20:] -= 20  # a second document
    first = used["positions"] < 6
    weights = FirstWindow(Dense(0.1), size=6, weight=0.5)(long, short, mask, **used)
    assert weights[mask & first].unique().tolist() == [0.5]
    torch.testing.assert_close(weights.where(~first, 0), Dense(0.1)(long, short, mask & ~first))


def test_each_part_has_its_own_stretch_of_the_history():
    long, short, mask, used = some()
    eslm, exact = ESLM(0.5), EXACT(threshold=8)
    weighting = Warmup(Mix(eslm, Mix(Uniform(), exact, 0.5), 0.5), tokens=50.0)
    assert weighting.history == 1 + eslm.history + exact.history
    past = torch.arange(weighting.history).double() + 1
    ours, exacts = past[1 : 1 + eslm.history], past[1 + eslm.history :]
    expected = 0.5 * eslm(long, short, mask, history=ours)
    expected += 0.25 * (mask + exact(long, short, mask, positions=used["positions"], history=exacts))
    expected = 1 + (expected - 1) / 50
    torch.testing.assert_close(weighting(long, short, mask, **used, history=past), expected.where(mask, 0))
    of_exact = exact.observe(long, short, mask, positions=used["positions"])
    observed = torch.cat([mask.sum()[None], eslm.observe(long, short, mask), of_exact])
    assert torch.equal(weighting.observe(long, short, mask, **used), observed)


def test_a_combination_uses_what_its_parts_use():
    mixed = Mix(EXACT(), Rho1(), 0.5)
    assert mixed.uses == {"positions", "ref_nll"}
    assert not mixed.uses_short
    assert mixed.of_losses
    assert not mixed.pointwise
    assert Mix(EXACT(), LongCE()).pointwise
    assert not Normalized(LongCE()).pointwise
    assert not Mix(EXACT(), Expected(Dense())).of_losses
    assert FirstWindow(Dense(), 8).uses == {"short_nll", "positions"}
    floored = Floor(Expected(Gain()), 0.5)
    assert (floored.divergence_of, floored.divergence) == (Gain(), "kl")


def test_parts_cannot_spoil_what_the_others_read():
    long, short, mask, _ = some()

    def destructive(long, short, mask):
        for values in (long, short, mask):
            values.zero_()
        return long

    weights = Mix(Custom(destructive), Dense(), 0.5)(long, short, mask)
    torch.testing.assert_close(weights, 0.5 * Dense()(long, short, mask))


def test_one_column_is_one_divergence():
    Mix(Expected(Dense()), Expected(Sparse()))
    with pytest.raises(ValueError, match=r"divergences of dense.* and gain"):
        Mix(Expected(Dense()), Expected(Gain()))


@pytest.mark.parametrize("weighting", KIN, ids=str)
def test_the_text_of_a_weighting_reads_back_as_the_weighting(weighting):
    assert parse_weighting(str(weighting)) == weighting


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("mix(dense(interpolation=0.5), uniform, share=0.25)", Mix(Dense(0.5), Uniform(), 0.25)),
        (" Mix( Sparse() , second=models.emphasize ) ", Mix(Sparse(), Custom(models.emphasize))),
        ("sparse(keep=0.1, seed=-7)", Sparse(0.1, -7)),
        ("expected(gain)", Expected(Gain())),
        ("expected:weighting=gain", Expected(Gain())),
        ("rho1:over=batch", Rho1(over="batch")),
        ("normalized(rho1(over=batch))", Normalized(Rho1(over="batch"))),
        ("rho1(over='batch', keep=1e-1)", Rho1(0.1, "batch")),
        ("floor(models.Threshold(above=2), minimum=.5)", Floor(models.Threshold(2.0), 0.5)),
        ("warmup(firstwindow(dense, size=4096, weight=0), tokens=1_000)", Warmup(FirstWindow(Dense(), 4096, 0.0), 1e3)),
    ],
)
def test_a_weighting_is_read_from_nested_text(text, expected):
    assert parse_weighting(text) == expected


@pytest.mark.parametrize(
    ("text", "names"),
    [
        ("dense:interpolation=0.5", ["dense"]),
        ("mix(dense(interpolation=0.5), my . weights, share=0.25)", ["mix", "dense", "my.weights"]),
        ("floor:weighting=my.weights,minimum=0.5", ["floor", "my.weights"]),
        ("floor('my.weights:of=a.b', minimum='0.5')", ["floor", "my.weights", "a.b"]),
    ],
)
def test_the_names_in_a_text_are_those_of_its_weightings(text, names):
    assert {*weighting_names(text)} - {"my"} == {*names}


def test_what_is_no_name_is_not_imported(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "0.py").write_text("raise SystemExit")
    for text in ("0.5", "floor:weighting=0.5,minimum=1", "floor('0.5', minimum=1)"):
        with pytest.raises(ValueError, match=r"unknown weighting '0\.5'"):
            parse_weighting(text)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("mxi(dense, uniform)", r"unknown weighting 'mxi' \(did you mean 'mix'\?\): expected one of uniform, dense"),
        ("mix(dnse, uniform)", r"unknown weighting 'dnse' \(did you mean 'dense'\?\)"),
        ("mix(dense)", r"'mix' needs second: expected mix\(first, second, share=...\)"),
        ("floor(dense)", r"'floor' needs minimum: expected floor\(weighting, minimum=...\)"),
        ("expected", r"'expected' needs weighting"),
        ("mix(dense, uniform, 0.5)", r"'mix': found 3 values: expected 2 weightings, and its settings by name"),
        ("sparse(0.2)", r"'sparse': found 1 values: expected 0 weightings, and its settings by name"),
        ("mix(dense, uniform, shre=0.5)", r"unknown setting 'shre' of weighting 'mix' \(did you mean 'share'\?\)"),
        ("mix(dense, uniform, share=much)", "'mix': share='much' is not a number"),
        ("mix(dense, uniform, share=1.5)", "Mix: share=1.5 is not a number from 0 to 1"),
        ("mix(dense(interpolation=2), uniform)", "Dense: interpolation=2.0 is not a number from 0 to 1"),
        ("mix(dense, first=uniform, second=uniform)", "'mix': first is set twice"),
        ("mix(dense, uniform", r"'mix\(dense, uniform': .* expected a call such as"),
        ("mix(dense, 1 + 1)", r"found '1 \+ 1': expected a weighting"),
        ("mix(dense, [uniform])", r"found '\[uniform\]': expected a weighting"),
        ("dense(**x)", r"unknown setting '\*\*' of weighting 'dense'"),
        ("expected(uniform)", "Expected: weighting=uniform is not one whose weights follow from a score"),
        ("expected(expected(dense))", "is not one whose weights follow from a score"),
        ("rho1(over=column)", "Rho1: over=column is not row or batch"),
        ("models.emphasize(above=2)", "a function takes no settings"),
        ("exact:threshold=1.5", "threshold='1.5' is not a number"),
        ("eslm:keep=0", "ESLM: keep=0.0 is not a share above 0"),
        ("warmup(dense, tokens=0)", "Warmup: tokens=0.0 is not a finite number above 0"),
        ("floor(" * 300 + "dense" + ")" * 300, "weighting"),
    ],
)
@pytest.mark.usefixtures("unchecked")
def test_nested_text_that_is_no_weighting_is_refused_in_one_line_that_says_why(text, message):
    with pytest.raises(ValueError, match=message) as refusal:
        parse_weighting(text)
    assert "\n" not in str(refusal.value)
