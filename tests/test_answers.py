"""Standard suites among the measures of an evaluation; probes are tested with the other measures."""

import datasets
import pytest

import models
from test_harness import LENGTHS, ruler_tokenizer, tiny
from tokenweight.answers import suite_measures
from tokenweight.evalplan import EvalSettings, make_plan
from tokenweight.evaluate import evaluate, read_table
from tokenweight.harness import run_suites

SUITES = ["niah_single_1", "niah_multikey_3"]


def plan(suites=SUITES, lengths="512", limit=2):
    settings = EvalSettings("m", "d", "o", suites=",".join(suites), suite_lengths=lengths, suite_limit=limit)
    return make_plan(settings, 1024)


@pytest.mark.slow
def test_measures_hold_the_value_of_every_sample_of_a_suite(unchecked):
    assert max(LENGTHS[suite] for suite in SUITES[1:]) == 512
    model, tokenizer = tiny(), ruler_tokenizer()
    measures = {measure.name: measure for measure in suite_measures(model, tokenizer, plan())}
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
