"""Scores by counts on disk: the same as of the scorer itself, in shards, resumed, and read by every command."""

import datasets
import numpy as np
import pytest
import torch
from runs import packed
from scored import Interrupted, arrow_bytes

import models
from texts import EXCERPT, trained_tokenizer
from tokenweight import BoundedGain, CountScorer, Gain, ShortContext, cli
from tokenweight.data import RowScorer, load_scores, read_row, score_folder, score_rows
from tokenweight.data.row_scorer import gains_of_rows
from tokenweight.method import document_positions, prediction_mask
from tokenweight.records import read_json

CONTEXTS = [ShortContext(8, 5), ShortContext(12, 9)]


@pytest.fixture
def rows():
    """Packed rows of repeated and of random tokens, with labels that leave some out."""
    random = np.random.default_rng(0)
    tokens = [random.integers(3, 12, length).tolist() for length in (24, 16, 30, 24, 16, 30)]
    labels = [[-100] * 4 + row[4:] for row in tokens]
    return packed(datasets.Dataset.from_dict({"input_ids": tokens, "labels": labels}), (0, 1), (2,), (3, 4), (5,))


@pytest.fixture
def folder(rows, tmp_path):
    rows.save_to_disk(str(tmp_path / "rows"))
    return tmp_path / "rows"


def test_every_column_is_what_the_scorer_says(rows, folder, tmp_path):
    score_folder(folder, "count:order=2", CONTEXTS, tmp_path / "scored")
    scored, scorer = datasets.load_from_disk(str(tmp_path / "scored")).with_format("numpy"), CountScorer(2)
    for row in scored:
        tokens, positions = (torch.as_tensor(row[name])[None] for name in ("input_ids", "position_ids"))
        mask = prediction_mask(torch.as_tensor(row["labels"])[None], positions)
        for context in CONTEXTS:
            found = scorer(tokens, context, position_ids=positions)
            for name, values in found._asdict().items():
                column = name if name == "long_nll" else f"{name}_{context.size}"
                assert np.array_equal(row[column], values[0])
                assert scored.features[column].feature.dtype == "float32"
            beyond = mask & (document_positions(tokens, positions) >= context.size)
            for name, gain in gains_of_rows(found.long_nll, found.short_nll, beyond)._asdict().items():
                assert np.array_equal(row[f"{name}_{context.size}"], np.float32(gain[0]), equal_nan=True)
    assert scored.column_names[: len(rows.column_names)] == rows.column_names


def test_the_folder_says_what_its_scores_are(folder, tmp_path):
    score_folder(folder, "count", CONTEXTS[:1], tmp_path / "scored", divergence=Gain())
    noted = read_json(tmp_path / "scored" / "scores.json")
    named = {name: noted[name] for name in ("model", "contrast", "divergence", "long", "contexts")}
    assert named == {
        "model": "count:order=4,vocab_size=262144",
        "contrast": "scorer",
        "divergence": "kl",
        "long": True,
        "contexts": [{"size": 8, "stride": 5}],
    }


def test_the_order_of_settings_does_not_matter_but_their_values_do(folder, tmp_path):
    first = score_folder(folder, "count:vocab_size=50,order=3", CONTEXTS, tmp_path / "scored")
    again = score_folder(folder, "count: order=3, vocab_size=50", CONTEXTS, tmp_path / "scored")
    assert (first.new_tokens, again.new_tokens) == (first.tokens, 0)
    with pytest.raises(ValueError, match=r"other settings \(model is"):
        score_folder(folder, "count:order=2,vocab_size=50", CONTEXTS, tmp_path / "scored")


def test_an_interrupted_run_goes_on_and_shares_of_processes_add_up_to_the_same_files(rows, shards_of_two, tmp_path):
    rows, scorer = rows.with_format("numpy"), CountScorer()
    whole, resumed, shared = (tmp_path / name for name in ("whole", "resumed", "shared"))
    score_rows(rows, RowScorer(scorer, CONTEXTS), whole, provenance={})
    with pytest.raises(KeyboardInterrupt):
        score_rows(rows, Interrupted(scorer, CONTEXTS, max_tokens=1), resumed, provenance={})
    assert 0 < len(arrow_bytes(resumed)) < len(arrow_bytes(whole))
    score_rows(rows, RowScorer(scorer, CONTEXTS), resumed, provenance={})
    for index in (1, 0):
        score_rows(rows, RowScorer(scorer, CONTEXTS), shared, provenance={}, share=(index, 2))
    assert (
        datasets.load_from_disk(str(whole))[:]
        == datasets.load_from_disk(str(resumed))[:]
        == datasets.load_from_disk(str(shared))[:]
    )


@pytest.mark.parametrize(
    ("name", "given", "message"),
    [
        ("count:order=x", {}, r"scorer count:order=x: found 'order=x': expected"),
        ("count:size=3", {}, "found 'size=3'"),
        ("count:order=1,order=2", {}, "found 'order=2'"),
        ("count:vocab_size=7", {}, r"rows: token 11 .* count:vocab_size=12"),
        ("count", {"divergence": BoundedGain()}, "divergence tv: count stores kl, and no other"),
        ("count", {"revision": "main"}, "revision main: count scores without a model"),
        ("count", {"dtype": "bfloat16"}, "dtype bfloat16: count"),
        ("count", {"attn_implementation": "sdpa"}, "attn_implementation sdpa: count"),
    ],
)
def test_what_it_cannot_be_asked_for_is_refused_before_anything_is_written(name, given, message, folder, tmp_path):
    with pytest.raises(ValueError, match=message):
        score_folder(folder, name, CONTEXTS, tmp_path / "scored", **given)
    assert not (tmp_path / "scored").exists()


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A tokenizer without a model, rows that were made with it, and their scores by the command."""
    root = tmp_path_factory.mktemp("counted")
    trained_tokenizer(framed=True).save_pretrained(root / "tokenizer")
    (root / "book.txt").write_text(EXCERPT.read_text(encoding="utf-8")[:4000], encoding="utf-8")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(root)
        assert cli.main(["prepare", "book.txt", "--tokenizer", "tokenizer", "--length", "256", "--out", "rows"]) == 0
        assert cli.main(["score", "rows", "--model", "count", "--size", "64", "--out", "scored"]) == 0
    return root


@pytest.mark.parametrize(
    ("command", "printed"),
    [
        (["stats", "scored"], "scored"),
        (["show", "scored", "--weighting", "expected(gain)"], "expected"),
        (["report", "scored", "--out", "page.html"], "page.html"),
        (
            [
                "export",
                "scored",
                "--weighting",
                "mix(uniform, expected(gain), share=0.5)",
                "--format",
                "hf",
                "--out",
                "w",
            ],
            "w:",
        ),
    ],
)
def test_every_command_reads_the_folder_without_a_model(command, printed, place, monkeypatch, capsys):
    monkeypatch.chdir(place)
    assert cli.main(command) == 0, capsys.readouterr().err
    assert printed in capsys.readouterr().out


def test_a_row_has_the_pieces_of_the_tokenizer_of_the_rows(place, monkeypatch):
    monkeypatch.chdir(place)
    row = read_row("scored", 0)
    assert len(row.tokenizer) == 300
    assert row.tokenizer.decode(row.tokens[0]) == "".join(row.to_pandas()["text"])
    rows, _ = load_scores("scored")
    assert np.array_equal(row.long_nll[0], rows[0]["long_nll"])
    assert np.array_equal(row.divergence[0], rows[0]["divergence"])


@pytest.mark.parametrize("command", [["show", "referred"], ["export", "referred", "--format", "hf", "--out", "w2"]])
def test_a_reference_is_never_compared_with_its_losses(command, place, monkeypatch, capsys):
    monkeypatch.chdir(place)
    if not (place / "referred").exists():
        models.tiny(dtype=torch.float32, vocab_size=300, max_position_embeddings=256).save_pretrained("reference")
        (place / "reference" / "tokenizer.json").write_bytes((place / "tokenizer" / "tokenizer.json").read_bytes())
        score_folder("scored", "reference", None, "referred", as_reference=True)
    assert cli.main([*command, "--weighting", "rho1"]) == 2
    assert "in referred are comparable with each other only" in capsys.readouterr().err


@pytest.mark.parametrize("command", [["show", "scored"], ["report", "scored", "--out", "other.html"]])
def test_long_losses_of_a_model_are_never_compared_with_its_short_ones(command, place, monkeypatch, capsys):
    monkeypatch.chdir(place)
    models.tiny(dtype=torch.float32, vocab_size=300).save_pretrained("model")
    assert cli.main([*command, "--model", "model"]) == 2
    assert "--model model: scored was scored by count" in capsys.readouterr().err
