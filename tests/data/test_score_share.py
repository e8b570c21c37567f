"""Processes that share the shards of a folder."""

import numpy as np
import pytest
from scored import arrow_bytes, tensor_of, tiny_scorer

from models import some_rows
from tokenweight.data import load_rows, process_share, score, score_rows


def test_processes_share_the_shards_and_the_last_one_finishes(shards_of_two, tmp_path, monkeypatch):
    rows = some_rows()
    score_rows(rows, tiny_scorer(with_long=True), tmp_path / "alone", provenance={})
    for index, num_left in ((2, 3), (0, 1), (1, 0)):
        assert not (tmp_path / "shared" / "state.json").exists()
        summary = score_rows(rows, tiny_scorer(with_long=True), tmp_path / "shared", provenance={}, share=(index, 3))
        assert summary.missing_shards == num_left
        assert (f"{num_left} of 4 shards are not there yet" in str(summary)) == (num_left > 0)
    assert arrow_bytes(tmp_path / "shared") == arrow_bytes(tmp_path / "alone")
    assert (tmp_path / "shared" / "state.json").read_bytes() == (tmp_path / "alone" / "state.json").read_bytes()


def test_the_summary_of_all_shards_does_not_depend_on_who_made_them(shards_of_two, tmp_path):
    rows, settings = some_rows(), {"provenance": {}}
    alone = score_rows(rows, tiny_scorer(with_long=True), tmp_path / "alone", **settings)
    score_rows(rows, tiny_scorer(with_long=True), tmp_path / "shared", **settings, share=(0, 2))
    shared = score_rows(rows, tiny_scorer(with_long=True), tmp_path / "shared", **settings, share=(1, 2))
    assert (shared.rows, shared.tokens, shared.differences) == (alone.rows, alone.tokens, alone.differences)
    scored = load_rows(tmp_path / "alone")
    difference = (tensor_of(scored, "long_nll") - tensor_of(scored, "short_nll_8"))[:, 8:].abs().double()
    expected = f"mean |difference| {difference.mean():.3f} nats, {(difference > 2).double().mean():.2%} above 2"
    assert expected in str(shared)


@pytest.mark.parametrize(
    ("shard", "environment", "expected"),
    [
        (None, {}, (0, 1)),
        ("2/5", {}, (2, 5)),
        (None, {"RANK": "3", "WORLD_SIZE": "4"}, (3, 4)),
        ("1/2", {"RANK": "3", "WORLD_SIZE": "4"}, (7, 8)),
    ],
)
def test_a_process_has_the_share_of_its_job_and_rank(shard, environment, expected, monkeypatch):
    for name in ("RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert process_share(shard) == expected


@pytest.mark.parametrize("shard", ["2/2", "0", "-1/2", "a/b", "0/0", "1.0/2", "/"])
def test_a_share_that_is_none_is_refused(shard):
    with pytest.raises(ValueError, match=f"^shard {shard}: expected i/n"):
        process_share(shard)


@pytest.mark.parametrize("num_rows", [1, 999, 5000])
def test_there_are_few_shards_however_many_rows(num_rows, monkeypatch):
    monkeypatch.setattr(score, "SHARD_TOKENS", 24)
    shards = score._shards(np.full(num_rows, 24))
    assert np.concatenate(shards).tolist() == list(range(num_rows))
    assert len(shards) <= score.MAX_SHARDS + 1
