"""Scores on disk against the scorer itself, through interruptions, and what is refused."""

import json

import datasets
import numpy as np
import pytest
import torch
from scored import CONTEXT, OTHER_BATCH, Interrupted, arrow_bytes, tensor_of, tiny_scorer

import models
from models import LENGTH, NUM_ROWS, some_rows
from texts import trained_tokenizer
from tokenweight import Scorer, ShortContext, load_tokenizer, token_nll
from tokenweight.data import RowScorer, load_rows, load_scores, process_share, score_folder, score_rows
from tokenweight.data.score import write
from tokenweight.models import tokenizer_fingerprint


def short_losses(tokens, **settings):
    return Scorer(models.tiny(dtype=torch.float32), CONTEXT)(tokens, **settings)


@pytest.mark.parametrize("with_long", [False, True])
def test_stored_losses_are_those_of_the_scorer_bit_for_bit(with_long, tmp_path):
    rows, scorer = some_rows(), tiny_scorer(with_long=with_long)
    score_rows(rows, scorer, tmp_path / "scored", provenance={})
    scored = datasets.load_from_disk(str(tmp_path / "scored"))
    tokens = tensor_of(rows, "input_ids")
    long_nll = token_nll(models.tiny(dtype=torch.float32), tokens) if with_long else None
    expected = ({"long_nll": long_nll} if with_long else {}) | {"short_nll_8": short_losses(tokens, long_nll=long_nll)}
    assert scored.column_names == [*rows.column_names, *scorer.features]
    for name, losses in expected.items():
        assert torch.equal(torch.tensor(scored[name][:]), losses)
        assert scored.features[name].feature.dtype == "float32"


@pytest.mark.parametrize("max_tokens", [1, 50, 32768])
def test_shards_and_batches_do_not_change_the_scores(max_tokens, shards_of_two, tmp_path):
    rows = some_rows()
    score_rows(rows, tiny_scorer(max_tokens=max_tokens), tmp_path / "scored", provenance={})
    assert len(list((tmp_path / "scored").glob("*.arrow"))) == 4
    expected = short_losses(tensor_of(rows, "input_ids"))
    torch.testing.assert_close(tensor_of(load_rows(tmp_path / "scored"), "short_nll_8"), expected, **OTHER_BATCH)


COLUMNS = {
    "weight": [0.1 * number for number in range(NUM_ROWS)],
    "note": [None, "ü"] * 3 + [None],
    "labels": models.some_tokens(NUM_ROWS, LENGTH, seed=1).tolist(),
    "flag": [True, False] * 3 + [True],
    "count": [None, 2**60] * 3 + [7],
    "turns": [[[1, 2], []], [[3]]] * 3 + [[]],
    "source": [{"url": "a", "page": 3}] * NUM_ROWS,
}


@pytest.mark.parametrize("name", COLUMNS)
def test_all_other_columns_are_kept_as_they_are(name, shards_of_two, tmp_path):
    rows = some_rows(**{name: COLUMNS[name]})
    score_rows(rows, tiny_scorer(), tmp_path / "scored", provenance={})
    kept = datasets.load_from_disk(str(tmp_path / "scored")).remove_columns("short_nll_8")
    assert kept.to_dict() == rows.with_format(None).to_dict()
    assert kept.features == rows.features


@pytest.mark.parametrize("lengths", [[24, 24, 9, 30, 30, 2, 24], [1, 2]])
def test_rows_of_unequal_lengths_have_the_scores_they_have_alone(lengths, tmp_path):
    rows = [models.some_tokens(1, length, seed=seed) for seed, length in enumerate(lengths)]
    data = datasets.Dataset.from_dict({"input_ids": [row[0].tolist() for row in rows]}).with_format("numpy")
    score_rows(data, tiny_scorer(), tmp_path / "scored", provenance={})
    for row, losses in zip(rows, load_rows(tmp_path / "scored")["short_nll_8"], strict=True):
        torch.testing.assert_close(torch.tensor(losses)[None], short_losses(row), **OTHER_BATCH)


def test_packed_documents_are_scored_apart(tmp_path):
    positions = [[*range(10), *range(14)]] * 3 + [list(range(24))] * 4
    rows = some_rows(position_ids=positions)
    score_rows(rows, tiny_scorer(with_long=True), tmp_path / "scored", provenance={})
    scored, tokens = load_rows(tmp_path / "scored"), tensor_of(rows, "input_ids")
    positions = torch.tensor(positions)
    long_nll = token_nll(models.tiny(dtype=torch.float32), tokens, positions)
    assert torch.equal(tensor_of(scored, "long_nll"), long_nll)
    expected = short_losses(tokens, position_ids=positions, long_nll=long_nll)
    assert torch.equal(tensor_of(scored, "short_nll_8"), expected)
    assert (short_losses(tokens) - expected)[:3, 10:].abs().max() > 0.01


def test_an_interrupted_run_goes_on_where_it_stopped_and_ends_as_if_undisturbed(shards_of_two, tmp_path):
    rows, settings = some_rows(), {"provenance": {"size": 8}}
    undisturbed, resumed = tmp_path / "undisturbed", tmp_path / "resumed"
    score_rows(rows, tiny_scorer(with_long=True), undisturbed, **settings)
    with pytest.raises(KeyboardInterrupt):
        score_rows(rows, tiny_scorer(Interrupted, with_long=True), resumed, **settings)
    left = sorted(file.name for file in resumed.iterdir() if not file.name.endswith(".lock"))
    shards = [f"scores-0000{number}-of-00004.{kind}" for number in (0, 1) for kind in ("arrow", "json")]
    assert left == [*shards, "scores.json"]
    with pytest.raises(ValueError, match="is not a finished `datasets` folder"):
        load_scores(resumed)
    reported = []
    summary = score_rows(
        rows, tiny_scorer(with_long=True), resumed, **settings, progress=lambda *now: reported.append(now)
    )
    assert reported == [(num * LENGTH, NUM_ROWS * LENGTH) for num in (2, 2, 2, 1)]
    assert (summary.rows, summary.tokens, summary.new_tokens) == (NUM_ROWS, NUM_ROWS * LENGTH, 3 * LENGTH)
    assert arrow_bytes(resumed) == arrow_bytes(undisturbed)
    assert {file.name for file in resumed.iterdir()} == {file.name for file in undisturbed.iterdir()}
    assert load_rows(resumed).to_dict() == load_rows(undisturbed).to_dict()
    assert score_rows(rows, tiny_scorer(Interrupted, with_long=True), resumed, **settings).new_tokens == 0


@pytest.mark.parametrize(
    ("now", "with_long", "message"),
    [
        ({"size": 16, "model": "m"}, False, "size is 8 there, 16 now"),
        ({"size": 8, "model": "n"}, False, "model is 'm' there, 'n' now"),
        ({"size": 8, "model": "m", "dtype": "float64"}, False, "dtype is None there, 'float64' now"),
        ({"size": 8, "model": "m"}, True, "long is False there, True now"),
        ({"size": 8, "model": "m", "rows_fingerprint": "b"}, False, "of other sequences, books; name a new folder"),
    ],
)
def test_going_on_with_another_setting_is_refused_by_its_name(now, with_long, message, shards_of_two, tmp_path):
    before = {"size": 8, "model": "m", "rows": "books", "environment": {"date": "yesterday"}}
    with pytest.raises(KeyboardInterrupt):
        score_rows(some_rows(), tiny_scorer(Interrupted), tmp_path / "scored", provenance=before)
    kept = {file.name: file.read_bytes() for file in (tmp_path / "scored").iterdir()}
    with pytest.raises(ValueError, match=f"^out .*scored: already holds scores.*{message}") as refusal:
        score_rows(some_rows(), tiny_scorer(with_long=with_long), tmp_path / "scored", provenance=now)
    assert "environment" not in str(refusal.value)
    assert {file.name: file.read_bytes() for file in (tmp_path / "scored").iterdir()} == kept


@pytest.mark.parametrize("number", [0, 1, 5])
def test_a_loss_that_is_not_finite_is_refused_by_row_and_not_stored(number, shards_of_two, tmp_path):
    model, last = models.tiny(dtype=torch.float32), models.VOCABULARY - 1
    scorer = RowScorer(model, [CONTEXT])
    model.get_input_embeddings().weight.data[last] = torch.nan
    tokens = models.some_tokens(NUM_ROWS, LENGTH).clamp(max=last - 1)
    tokens[number, 11] = last
    with pytest.raises(ValueError, match=rf"row {number}, position \d+ is nan"):
        score_rows(some_rows(input_ids=tokens.tolist()), scorer, tmp_path / "scored", provenance={})
    stored = arrow_bytes(tmp_path / "scored")
    assert sorted(stored) == [f"scores-{shard:05d}-of-00004.arrow" for shard in range(number // 2)]
    assert not (tmp_path / "scored" / "state.json").exists()


def test_a_token_outside_the_vocabulary_is_refused_by_row(shards_of_two, tmp_path):
    tokens = models.some_tokens(NUM_ROWS, LENGTH).tolist()
    tokens[4][9] = 1000
    with pytest.raises(ValueError, match="token 1000 of row 4, position 9 is not in the vocabulary"):
        score_rows(some_rows(input_ids=tokens), tiny_scorer(), tmp_path / "scored", provenance={})


@pytest.mark.parametrize(("column", "with_long"), [("short_nll_8", False), ("long_nll", True)])
def test_rows_that_have_scores_already_are_refused_before_anything_is_written(column, with_long, tmp_path):
    rows = some_rows(**{column: [[0.0] * LENGTH] * NUM_ROWS})
    with pytest.raises(ValueError, match=f"the rows have a column {column} already"):
        score_rows(rows, tiny_scorer(with_long=with_long), tmp_path / "scored", provenance={})
    assert list(tmp_path.iterdir()) == []


def test_a_folder_of_something_else_is_refused_and_kept(tmp_path):
    (tmp_path / "scored").mkdir()
    (tmp_path / "scored" / "notes").write_text("mine")
    with pytest.raises(ValueError, match=r"^out .*scored: exists and holds no scores"):
        score_rows(some_rows(), tiny_scorer(), tmp_path / "scored", provenance={})
    assert [file.name for file in (tmp_path / "scored").iterdir()] == ["notes"]


def test_a_folder_is_scored_with_the_model_of_that_name_and_its_provenance_is_kept(folders):
    rows, model, out = str(folders / "rows"), str(folders / "model"), folders / "scored"
    summary = score_folder(rows, model, [CONTEXT], out, dtype="float64", with_long=True)
    scored, provenance = load_scores(out)
    assert (len(scored), summary.new_tokens) == (NUM_ROWS, NUM_ROWS * LENGTH)
    assert provenance["environment"]["versions"]["torch"] == torch.__version__
    told = {"model": model, "dtype": "float64", "rows": rows, "long": True, "prefix": []}
    told["contexts"] = [{"size": 8, "stride": 5}]
    assert {name: provenance[name] for name in told} == told
    tokens, wide = tensor_of(some_rows(), "input_ids"), models.tiny(dtype=torch.float32).double()
    expected = Scorer(wide, CONTEXT)(tokens, long_nll=token_nll(wide, tokens))
    assert torch.equal(tensor_of(scored, "short_nll"), expected.float())


def test_the_attention_that_scored_is_recorded(folders):
    names = str(folders / "rows"), str(folders / "model")
    for kernel in ("eager", "sdpa"):
        score_folder(*names, [CONTEXT], folders / kernel, attn_implementation=kernel)
        assert load_scores(folders / kernel)[1]["attn_implementation"] == kernel
    with pytest.raises(ValueError, match="attn_implementation is 'eager' there, 'sdpa' now"):
        score_folder(*names, [CONTEXT], folders / "eager", attn_implementation="sdpa")


@pytest.mark.parametrize(
    ("context", "length", "with_long", "message"),
    [
        (ShortContext(24, 8), 24, False, "^size 24: sequences hold 24 tokens: no token would have a shorter context"),
        (ShortContext(25, 8), 24, False, "^size 25: sequences hold 24 tokens"),
        (ShortContext(130, 8), 150, False, "^size: windows of 130 tokens: the model has 128 positions"),
        (CONTEXT, 150, True, "^long: rows of 150 tokens: the model has 128 positions"),
    ],
)
def test_windows_rows_and_models_that_do_not_fit_are_refused(context, length, with_long, message, folders):
    longer = datasets.Dataset.from_dict({"input_ids": models.some_tokens(2, length).tolist()})
    longer.save_to_disk(str(folders / "longer"))
    with pytest.raises(ValueError, match=message):
        score_folder(folders / "longer", str(folders / "model"), [context], folders / "scored", with_long=with_long)
    assert not (folders / "scored").exists()


@pytest.mark.parametrize("num_short", [1, 64])
def test_all_rows_are_looked_at_before_work_starts(num_short, folders):
    rows = [models.some_tokens(1, length)[0].tolist() for length in [9] * num_short + [150]]
    datasets.Dataset.from_dict({"input_ids": rows}).save_to_disk(str(folders / "longer"))
    with pytest.raises(ValueError, match=r"^long: rows of 150 tokens: the model has 128 positions"):
        score_folder(folders / "longer", str(folders / "model"), [CONTEXT], folders / "scored", with_long=True)
    assert not (folders / "scored").exists()


def test_rows_of_another_tokenizer_are_refused_by_both_names(folders):
    trained_tokenizer().save_pretrained(folders / "model")
    note = {"tokenizer": "/no/theirs", "tokenizer_fingerprint": "0123456789abcdef"}
    (folders / "rows" / "rows.json").write_text(json.dumps(note))
    fingerprint = tokenizer_fingerprint(load_tokenizer(folders / "model"))
    message = rf"rows was made with the tokenizer of /no/theirs \(0123456789abcdef\), but .*another \({fingerprint}\)"
    with pytest.raises(ValueError, match=message):
        score_folder(folders / "rows", str(folders / "model"), [CONTEXT], folders / "scored")
    assert not (folders / "scored").exists()
    note["tokenizer_fingerprint"] = fingerprint
    (folders / "rows" / "rows.json").write_text(json.dumps(note))
    score_folder(folders / "rows", str(folders / "model"), [CONTEXT], folders / "scored")
    assert load_scores(folders / "scored")[1]["tokenizer_fingerprint"] == fingerprint


def test_an_empty_row_is_refused_by_its_number(folders):
    datasets.Dataset.from_dict({"input_ids": [[5] * LENGTH, []]}).save_to_disk(str(folders / "empty"))
    with pytest.raises(ValueError, match="empty: row 1 is empty"):
        score_folder(folders / "empty", str(folders / "model"), [CONTEXT], folders / "scored", with_long=True)


@pytest.mark.parametrize("prefix", [[9], [9, 10]])
def test_windows_begin_with_the_prefix_that_prepare_noted(prefix, folders):
    tokens = [[*prefix, *row[len(prefix) :].tolist()] for row in some_rows()["input_ids"]]
    datasets.Dataset.from_dict({"input_ids": tokens}).save_to_disk(str(folders / "begun"))
    (folders / "begun" / "rows.json").write_text(json.dumps({"prefix": prefix}))
    score_folder(folders / "begun", str(folders / "model"), [CONTEXT], folders / "scored")
    scored, provenance = load_scores(folders / "scored")
    assert provenance["prefix"] == prefix
    bare, begun = (tiny_scorer(prefix=one)({"input_ids": tokens}) for one in ([], prefix))
    assert not np.allclose(begun["short_nll_8"], bare["short_nll_8"], atol=0.01)
    np.testing.assert_allclose(np.stack(scored["short_nll"]), begun["short_nll_8"], atol=4e-5)


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


def test_a_process_says_which_shards_are_its_own_and_warns_if_some_have_none(tmp_path, caplog):
    said = []
    settings = {"provenance": {}, "shard_tokens": 2 * LENGTH + 1, "announce": said.append}
    score_rows(some_rows(), tiny_scorer(), tmp_path / "scored", share=(1, 3), **settings)
    assert said == ["share 1 of 3: 1 of 4 shards (1)"]
    assert caplog.text == ""
    score_rows(some_rows(), tiny_scorer(), tmp_path / "scored", share=(4, 5), **settings)
    assert said[1:] == ["share 4 of 5: 0 of 4 shards (none)"]
    assert "5 processes share 4 shards: some have nothing to do" in caplog.text
    score_rows(some_rows(), tiny_scorer(), tmp_path / "scored", share=(0, 1), **settings)
    assert len(said) == 2


def test_the_size_of_shards_can_be_chosen_and_is_recorded(tmp_path, monkeypatch):
    for number, shard_tokens in ((7, 1), (4, 2 * LENGTH), (1, 1 << 20), (1, None)):
        folder = tmp_path / str(shard_tokens)
        score_rows(some_rows(), tiny_scorer(), folder, provenance={}, shard_tokens=shard_tokens)
        assert len(list(folder.glob("*.arrow"))) == number
        assert json.loads((folder / "scores.json").read_text())["shard_tokens"] == (shard_tokens or 1 << 20)
    with pytest.raises(ValueError, match="shard_tokens is 1 there, 1048576 now"):
        score_rows(some_rows(), tiny_scorer(), tmp_path / "1", provenance={})


def test_without_a_size_the_context_is_a_quarter_of_the_longest_row(folders):
    said = []
    some_rows(input_ids=[*[[5] * LENGTH] * (NUM_ROWS - 1), [5] * 44]).save_to_disk(str(folders / "longer"))
    score_folder(folders / "longer", str(folders / "model"), None, folders / "scored", announce=said.append)
    assert json.loads((folders / "scored" / "scores.json").read_text())["contexts"] == [{"size": 11, "stride": 8}]
    assert said == ["size 11, a quarter of the longest sequence, and stride 8"]


@pytest.mark.parametrize("num_rows", [1, 999, 5000])
def test_there_are_few_shards_however_many_rows(num_rows, monkeypatch):
    monkeypatch.setattr(write, "SHARD_TOKENS", 24)
    shards = write._shards(np.full(num_rows, 24), write._shard_tokens(np.full(num_rows, 24)))
    assert np.concatenate(shards).tolist() == list(range(num_rows))
    assert len(shards) <= write.MAX_SHARDS + 1
