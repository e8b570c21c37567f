"""Folders of a run are opened with the scores that its weights need, and refused where these do not belong together."""

import json

import datasets
import pytest

from tokenweight.data import open_held_out, open_sources
from tokenweight.method import Dense, Uniform

NEEDED = frozenset({"short_nll"})


def folder(path, note=None, **scores):
    """A folder of one row with these scores."""
    row = {"input_ids": [5, 6, 7, 8], "number": 3, **{name: [value] * 4 for name, value in scores.items()}}
    datasets.Dataset.from_list([row]).save_to_disk(str(path))
    if note is not None:
        (path / "rows.json").write_text(json.dumps(note))
    return str(path)


def test_a_source_has_the_scores_that_are_needed_and_no_others(tmp_path):
    data = folder(tmp_path / "data", {"length": 4}, short_nll_8=1.5, short_nll_16=2.5, ref_nll=3.5)
    (source,) = open_sources([data], Dense(), NEEDED, "trained", {"size": 16, "stride": None}, "stored")
    assert source.rows.column_names == ["input_ids", "number", "short_nll_8", "short_nll"]
    assert source.rows[0]["short_nll"].tolist() == [2.5] * 4


def test_held_out_scores_of_unknown_origin_are_used_as_those_of_the_data_are(tmp_path):
    data = folder(tmp_path / "data", short_nll=1.5)
    (source,) = open_sources([data], Dense(), NEEDED, "trained", {}, "stored")
    held_out = open_held_out(data, Dense(), NEEDED, "trained", source.context)
    assert held_out.rows.column_names == ["input_ids", "short_nll"]


@pytest.mark.parametrize("windows", [{"size": 8}, {}, {"size": 9}])
def test_held_out_scores_for_other_windows_are_left_out_with_a_warning(windows, tmp_path, caplog):
    data = folder(tmp_path / "data", {"length": 4}, short_nll_8=1.5, short_nll_16=2.5)
    held_out = open_held_out(data, Dense(), NEEDED, "trained", windows)
    refused = [told for told in caplog.messages if told.endswith("its weighted loss is not measured")]
    assert ("short_nll" in held_out.rows.column_names, len(refused)) == (windows == {"size": 8}, windows != {"size": 8})
    assert held_out.provenance == ({"length": 4} if refused else {"length": 4, "context": {"size": 8}})


def test_scores_that_would_not_be_used_are_refused(tmp_path):
    data = folder(tmp_path / "data", short_nll_8=1.5)
    with pytest.raises(ValueError, match=r"^scorer 'self': .*data holds stored scores \(short_nll\)"):
        open_sources([data], Uniform(), frozenset(), "trained", {}, "self")
