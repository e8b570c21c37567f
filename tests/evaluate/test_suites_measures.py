"""Standard suites among the measures of an evaluation; probes are tested with the other measures."""

import datasets
import pytest
from suite_tasks import LENGTHS, ruler_tokenizer, tiny

import models
from tokenweight.evaluate import EvalSettings, evaluate, read_table, run_suites
from tokenweight.evaluate.run import _check_samples
from tokenweight.evaluate.settings import make_plan
from tokenweight.evaluate.suites import suite_measures

SUITES = ["niah_single_1", "niah_multikey_3"]


def plan(suites=SUITES, lengths="512", limit=2):
    settings = EvalSettings("m", "d", "o", suites=",".join(suites), suite_lengths=lengths, suite_limit=limit)
    return make_plan(settings, 1024)


@pytest.mark.slow
def test_measures_hold_the_value_of_every_sample_of_a_suite(unchecked):
    assert max(LENGTHS[suite] for suite in SUITES[1:]) == 512
    model, tokenizer = tiny(), ruler_tokenizer()
    measures = {measure.name: measure for measure in suite_measures(model, tokenizer, plan())[0]}
    assert list(measures) == ["niah_single_1", "niah_single_1_512", "niah_multikey_3", "niah_multikey_3_512"]
    for suite in SUITES:
        (result,) = run_suites(model, tokenizer, [suite], max_length=2048, lengths=[512], limit=2).tasks
        for measure in (measures[suite], measures[f"{suite}_512"]):
            assert (measure.group, measure.unit, measure.better) == ("long", "share", "higher")
            assert (tuple(measure.total), measure.num_tokens) == (result.values, [1.0, 1.0])
            assert measure.summary == (measure.name == suite)


def test_a_suite_that_would_be_cut_is_refused_before_any_row_is_read(unchecked, tmp_path):
    tiny(max_position_embeddings=600).save_pretrained(tmp_path / "model")
    ruler_tokenizer().save_pretrained(tmp_path / "model")
    rows = {"input_ids": models.some_tokens(2, 128).tolist()}
    datasets.Dataset.from_dict(rows).save_to_disk(str(tmp_path / "rows"))
    model, out = str(tmp_path / "model"), tmp_path / "out"
    settings = {"probes": "none", "sizes": "32", "suites": "niah_single_1", "suite_limit": 2}
    read = []
    too_long = EvalSettings(model, tmp_path / "rows", out, **settings, suite_lengths="1024")
    with pytest.raises(ValueError, match="niah_single_1 at length 1024: 2 of 2 requests would be cut"):
        evaluate(too_long, progress=lambda *done: read.append(done))
    assert (read, out.exists()) == ([], False)
    record = evaluate(EvalSettings(model, tmp_path / "rows", out, **settings, suite_lengths="256"))
    (row,) = read_table(record)
    (entry,) = [entry for entry in row if entry.measure == "niah_single_1"]
    assert (entry.summary, entry.num_documents) == (True, 2)
    assert record["settings"]["suites"] == ["niah_single_1"]


def test_models_that_saw_other_samples_are_not_compared():
    models = [{"model": "a", "suites": {"mmlu": "1 by lm_eval 0.4.13"}}, {"model": "b", "suites": {"mmlu": "2"}}]
    with pytest.raises(
        ValueError, match=r"--suites: a and b saw different samples .mmlu is '1 by lm_eval 0.4.13' there"
    ):
        _check_samples(models)
    _check_samples([models[0], {**models[0], "model": "b"}])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"suite_limit": 2}, "--suites None: expected suites, with --suite_lengths or --suite_limit"),
        ({"suite_lengths": "64"}, "--suites None: expected suites"),
        ({"suites": "mmlu", "suite_limit": 0}, "--suite_limit 0: expected at least 1"),
        ({"suites": "ruler", "suite_lengths": "4k"}, "--suite_lengths 4k: expected numbers"),
    ],
)
def test_options_of_suites_that_make_no_sense_are_refused(settings, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        make_plan(EvalSettings("m", tmp_path, tmp_path, **settings), 64)
