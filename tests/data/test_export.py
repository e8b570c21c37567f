"""Exported rows, read back and given to the loss of each tool as docs/data.md describes it."""

import functools
import json
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
import transformers
from crossing import crossed

import models
from tokenweight import Dense, LongCE, ShortContext, Sparse, Uniform, with_weighted_loss
from tokenweight.data import export_rows, export_weights, load_rows, load_scores, score_folder
from tokenweight.data.export import weigh_rows
from tokenweight.method import Custom, parse_weighting

DOCS = Path(__file__).parents[2] / "docs/data.md"
LENGTHS = [24, 9, 2, 17]
DOCUMENTS = [[10, 1, 13], [9], [1, 1], [5, 12]]
"""Lengths of the documents of each row, if they are packed. Nothing is predicted in those of one token."""
WEIGHTINGS = [Dense(0.25), Sparse(0.5), LongCE()]
# Stored losses are float32, those of the reference float64: up to 16 nats they differ by 2^-21, and scores, of about
# one nat, by twice that. Stored weights are float32, too: 2^-24 of each.
STORED = {"rtol": 4 * 2**-20, "atol": 0}


def positions_of(documents):
    return [position for length in documents for position in range(length)]


def some_columns(*, packed, labeled):
    columns = {
        "input_ids": [models.some_tokens(1, length, seed=length)[0].tolist() for length in LENGTHS],
        "document": list("abcd"),
    }
    if packed:
        columns["position_ids"] = [positions_of(documents) for documents in DOCUMENTS]
    if labeled:  # the third row has nothing to predict, where the first document of the last row ends, and elsewhere
        ignored = [{0, 3, 4, 23}, {1}, {0, 1}, {4, 9}]
        columns["labels"] = [
            [-100 if place in places else token for place, token in enumerate(tokens)]
            for tokens, places in zip(columns["input_ids"], ignored)
        ]
    return columns


model = functools.cache(models.tiny)


def model_losses(tokens, positions=None):
    """The loss of each token, at its own place; 0 for the first one."""
    positions = None if positions is None else torch.tensor([positions])
    with torch.no_grad():
        logits = model()(torch.tensor([tokens]), position_ids=positions, use_cache=False).logits[0]
    losses = [-logits[place - 1].log_softmax(-1)[token].item() for place, token in enumerate(tokens) if place > 0]
    return np.array([0.0, *losses])


def references(columns, weighting):
    """What a model with our own loss says of each row: weights, losses, and which tokens are predicted."""
    weighted_model = with_weighted_loss(models.tiny(), weighting)
    for number, tokens in enumerate(columns["input_ids"]):
        batch = {
            name: torch.tensor([columns[name][number]]) for name in ("short_nll", "position_ids") if name in columns
        }
        labels = torch.tensor([columns.get("labels", columns["input_ids"])[number]])
        mask = (labels[0] != -100).numpy() & (np.array(positions_of(documents(columns, number))) > 0)
        labels = labels.where(torch.from_numpy(mask), -100)
        with torch.no_grad():
            output = weighted_model(torch.tensor([tokens]), labels=labels, num_items_in_batch=1, **batch)
        weighted = (output.weights * output.long_nll)[0].numpy()
        assert output.weighted_loss.item() == pytest.approx(weighted.sum(), rel=1e-12)
        yield output.weights[0].numpy(), weighted, mask


def documents(columns, number):
    return DOCUMENTS[number] if "position_ids" in columns else [LENGTHS[number]]


def write_scored(folder, columns):
    positions = columns.get("position_ids", [None] * len(LENGTHS))
    long = [model_losses(*row) for row in zip(columns["input_ids"], positions)]
    generator = torch.Generator().manual_seed(1)
    short = [row + torch.randn(len(row), generator=generator).numpy() for row in long]
    columns |= {
        name: [[np.nan, *row[1:].astype(np.float32)] for row in rows]  # nobody predicts the first token
        for name, rows in (("long_nll", long), ("short_nll", short))
    }
    kinds = {name: datasets.List(datasets.Value("float32")) for name in ("long_nll", "short_nll")}
    kinds |= {name: datasets.List(datasets.Value("int32")) for name in ("input_ids", "position_ids", "labels")}
    kinds["document"] = datasets.Value("string")
    features = datasets.Features({name: kinds[name] for name in columns})
    datasets.Dataset.from_dict(columns, features=features).save_to_disk(str(folder))
    return columns


@pytest.fixture(params=["plain", "labeled", "packed", "packed and labeled"])
def scored(request, tmp_path):
    columns = some_columns(packed="packed" in request.param, labeled="labeled" in request.param)
    return tmp_path / "scored", write_scored(tmp_path / "scored", columns)


@pytest.fixture
def packed(tmp_path):
    return tmp_path / "scored", write_scored(tmp_path / "scored", some_columns(packed=True, labeled=True))


def exported(folder, weighting, format):
    out = folder.with_name("weighted")
    summary = export_weights(folder, weighting, out, format=format)
    rows = datasets.load_from_disk(str(out))
    assert summary.rows == len(rows)
    return list(rows)


def hf_loss(rows):
    """`weighted_loss` of docs/data.md, over all rows as one step."""
    total, count = 0.0, 0
    for row in rows:
        losses = model_losses(row["input_ids"], row.get("position_ids"))
        labels, weights = np.array(row["labels"]), np.array(row["loss_weights"])
        total += (losses * weights)[1:][labels[1:] != -100].sum()
        count += (labels[1:] != -100).sum()
    return total / count


def trl_loss(rows):
    """The collator ignores labels where the positions, counted from `seq_lengths`, are 0."""
    rows = [{**row, "position_ids": positions_of(row["seq_lengths"])} for row in rows]
    for row in rows:
        starts = np.array(row["position_ids"]) == 0
        row["labels"] = np.where(starts, -100, row["labels"])
    return hf_loss(rows)


def llamafactory_loss(rows):
    """Micro-batches of one row: each divided by the sum of its weights, and counted by its labels."""
    counts = [sum(label != -100 for label in row["labels"]) for row in rows]
    loss = 0.0
    for row, count in zip(rows, counts):
        weights = np.array(row["loss_weights"][1:])
        losses = model_losses(row["input_ids"])[1:]
        loss += (losses * weights).sum() / (weights.sum() + 1e-6) * count / (sum(counts) + 1e-6)
    return loss


def ms_swift_loss(rows):
    """The template makes labels of tokens with a scale above 0, ignores the first, and the loss rolls both by -1."""
    total, count = 0.0, 0
    for row in rows:
        (message,) = row["messages"]
        assert message["role"] == "assistant"
        tokens, scale = (np.array(message["content"][name]) for name in ("token_ids", "loss_scale"))
        labels = np.where(scale > 0, tokens, -100)
        labels[0], scale[0] = -100, 0
        rolled = np.roll(scale, -1), np.roll(labels, -1)
        losses = np.roll(model_losses(tokens.tolist()), -1)
        total += np.where(rolled[1] != -100, losses * rolled[0], 0).sum()
        count += (labels[1:] != -100).sum()
        assert row["lengths"] == len(tokens)
    return total / count


def tinker_loss(rows):
    """A sum over positions, each of which predicts its target."""
    total = 0.0
    for row in rows:
        with torch.no_grad():
            logprobs = model()(torch.tensor([row["model_input"]]), use_cache=False).logits[0].log_softmax(-1)
        for position, (target, weight) in enumerate(zip(row["target_tokens"], row["weights"], strict=True)):
            total -= weight * logprobs[position, target].item()
    return total


@crossed("format, loss, weighting", [("hf", hf_loss), ("trl", trl_loss), ("ms-swift", ms_swift_loss)], WEIGHTINGS)
def test_tools_that_divide_by_predicted_tokens_have_our_loss(format, loss, weighting, scored):
    folder, columns = scored
    parts = list(references(columns, weighting))
    expected = sum(weighted.sum() for _, weighted, _ in parts) / sum(mask.sum() for *_, mask in parts)
    np.testing.assert_allclose(loss(exported(folder, weighting, format)), expected, **STORED)


@pytest.mark.parametrize("weighting", WEIGHTINGS, ids=str)
def test_tinker_has_the_numerator_of_our_loss(weighting, scored):
    folder, columns = scored
    expected = sum(weighted.sum() for _, weighted, _ in references(columns, weighting))
    np.testing.assert_allclose(tinker_loss(exported(folder, weighting, "tinker")), expected, **STORED)


@pytest.mark.parametrize("weighting", WEIGHTINGS, ids=str)
def test_llamafactory_has_our_loss_but_for_the_mean_weight_of_its_micro_batches(weighting, scored):
    folder, columns = scored
    expected, count = 0.0, 0
    for number, (weights, weighted, mask) in enumerate(references(columns, weighting)):
        ends = np.cumsum(documents(columns, number))
        for start, end in zip([0, *ends], ends):
            predicted = mask[start:end].sum()
            expected += predicted * weighted[start:end].sum() / (weights[start:end].sum() + 1e-6)
            count += predicted
    # The scale of 1e-6 that the tool adds to the number of labels is below the tolerance.
    loss = llamafactory_loss(exported(folder, weighting, "llamafactory"))
    np.testing.assert_allclose(loss, expected / count, **STORED)


def test_the_lines_for_transformers_take_the_weights_through_its_trainer(packed, tmp_path, monkeypatch):
    folder, columns = packed
    exported(folder, LongCE(), "hf")
    losses = []

    def train(trainer):
        batches = list(trainer.get_train_dataloader())
        count = trainer._get_num_items_in_batch(batches, trainer.args.device)
        losses.extend(trainer.compute_loss(trainer.model, batch, num_items_in_batch=count).item() for batch in batches)

    monkeypatch.setattr(transformers.Trainer, "train", train)
    monkeypatch.chdir(tmp_path)
    (lines,) = [block for block in DOCS.read_text().split("```python\n")[1:] if "transformers.Trainer(" in block]
    exec(lines.split("```")[0], {"model": models.tiny().float()})
    parts = list(references(columns, LongCE()))
    expected = sum(weighted.sum() for _, weighted, _ in parts) / sum(mask.sum() for *_, mask in parts)
    assert len(losses) == len(LENGTHS)
    np.testing.assert_allclose(sum(losses), expected, rtol=1e-5)  # two layers in float32: some dozen roundings of 2^-24


__all__ = ["packed"]  # a fixture


def test_weights_and_labels_stand_at_their_tokens(packed):
    folder, columns = packed
    rows = exported(folder, Dense(0.25), "hf")
    for number, (weights, _, mask) in enumerate(references(columns, Dense(0.25))):
        assert rows[number]["input_ids"] == columns["input_ids"][number]
        assert rows[number]["position_ids"] == columns["position_ids"][number]
        assert rows[number]["labels"] == np.where(mask, columns["input_ids"][number], -100).tolist()
        assert rows[number]["loss_weights"][0] == 0
        np.testing.assert_allclose(rows[number]["loss_weights"], weights, **STORED)
        assert len(np.unique(weights[mask])) == mask.sum()  # a shift would show


@pytest.mark.parametrize("format", ["llamafactory", "ms-swift", "tinker"])
def test_documents_get_rows_of_their_own_where_positions_are_not_read(format, packed):
    folder, columns = packed
    rows = exported(folder, Uniform(), format)
    found = [
        row["model_input"] + row["target_tokens"][-1:]
        if format == "tinker"
        else row["messages"][0]["content"]["token_ids"]
        if format == "ms-swift"
        else row["input_ids"]
        for row in rows
    ]
    first, second, _, last = columns["input_ids"]
    assert found == [first[:10], first[11:], second, last[:5], last[5:]]
    note = json.loads((folder.with_name("weighted") / "weights.json").read_text())
    assert note["left_out"] == 3  # of one token each


def test_ms_swift_counts_a_predicted_token_of_weight_zero_and_no_other(packed):
    folder, columns = packed
    rows = exported(folder, Sparse(0.5), "ms-swift")
    scale = np.concatenate([row["messages"][0]["content"]["loss_scale"] for row in rows])
    masks = [mask for *_, mask in references(columns, Sparse(0.5))]
    assert (scale > 0).sum() == np.concatenate(masks).sum()
    assert 0 < ((scale > 0) & (scale < 1e-20)).sum() < (scale > 0).sum()


def test_the_note_says_which_scores_and_weighting_made_the_weights(packed):
    folder, _ = packed
    summary = export_weights(folder, LongCE(3.0), folder.with_name("weighted"), format="trl")
    note = json.loads((folder.with_name("weighted") / "weights.json").read_text())
    assert (note["format"], note["weighting"], note["scores"]) == ("trl", "longce:cap=3.0", {})
    assert "torch" in note["environment"]["versions"]
    assert (note["rows"], note["tokens"], note["predicted"]) == (4, sum(LENGTHS), 38)
    assert str(summary).startswith("4 rows, 52 tokens, 38 of them predicted, with a mean weight of ")
    assert f"{summary.sum_weights / 38:.4g}" in str(summary)


def test_of_several_contexts_the_one_that_is_named_makes_the_weights(folders):
    contexts = [ShortContext(4, 2), ShortContext(8, 5)]
    score_folder(folders / "rows", str(folders / "model"), contexts, folders / "scored", with_long=True)
    export_weights(folders / "scored", LongCE(), folders / "out", format="hf", size=8)
    found = datasets.load_from_disk(str(folders / "out"))["loss_weights"]
    rows, _ = load_scores(folders / "scored", size=8)
    for weights, row in zip(found, weigh_rows(rows, LongCE()), strict=True):
        assert weights == row.weights.tolist()
    note = json.loads((folders / "out" / "weights.json").read_text())
    assert (note["context"], len(note["scores"]["contexts"])) == ({"size": 8, "stride": 5}, 2)
    with pytest.raises(ValueError, match=r"size: .*scored holds scores with short contexts of 4, 8 tokens"):
        export_weights(folders / "scored", LongCE(), folders / "again", format="hf")


def test_a_size_that_was_not_scored_is_refused(folders):
    score_folder(folders / "rows", str(folders / "model"), [ShortContext(8, 5)], folders / "scored", with_long=True)
    with pytest.raises(ValueError, match=r"size 4: .*scored holds scores with short contexts of 8 tokens"):
        export_weights(folders / "scored", LongCE(), folders / "out", format="hf", size=4)


def without(column):
    return lambda rows: rows.remove_columns(column)


def changed(column, row, place, value):
    def change(found, number):
        if number == row:
            found[column][place] = value
        return found

    return lambda rows: rows.map(change, with_indices=True)


def shorter(row):
    return {"short_nll": row["short_nll"][:-1]}


REFUSALS = [
    (without("long_nll"), "hf", r"scored has no column long_nll: score it with `tokenweight score .* --long`"),
    (without("short_nll"), "hf", r"scored has no column short_nll"),
    (changed("long_nll", 1, 5, float("inf")), "hf", "^long_nll of row 1, position 5 is inf: expected a finite number"),
    (changed("short_nll", 3, 7, float("nan")), "trl", "^short_nll of row 3, position 7 is nan"),
    (changed("labels", 3, 7, 5), "hf", "^row 3: label and token 7 differ: expected the token, or -100"),
    (changed("position_ids", 0, 9, 40), "trl", "^row 0: position_ids skip positions, which only --format hf can"),
    (changed("position_ids", 3, 0, 1), "tinker", "^row 3: position_ids skip positions"),
    (lambda rows: rows.map(shorter), "hf", "row 0 has 23 values in short_nll: expected one for each of 24 tokens"),
    (lambda rows: rows.select([2]), "ms-swift", "^no token is predicted in any row: expected labels other than -100"),
]


@pytest.mark.parametrize(("change", "format", "message"), REFUSALS)
def test_rows_that_cannot_be_weighed_or_written_are_refused(change, format, message, packed, tmp_path):
    change(datasets.load_from_disk(str(packed[0]))).save_to_disk(str(tmp_path / "changed" / "scored"))
    with pytest.raises(ValueError, match=message):
        export_weights(tmp_path / "changed" / "scored", Dense(), tmp_path / "out", format=format)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["changed", "scored"]


def test_skipped_positions_are_kept_for_transformers(packed, tmp_path):
    rows = changed("position_ids", 0, 9, 40)(datasets.load_from_disk(str(packed[0])))
    rows.save_to_disk(str(tmp_path / "skipping"))
    assert exported(tmp_path / "skipping", Dense(), "hf")[0]["position_ids"][9] == 40


def negative(long, short, mask):
    return short - long


def infinite(long, short, mask):
    return torch.full_like(long, torch.inf)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"format": "axolotl"}, "^format axolotl: expected one of hf, trl, llamafactory, ms-swift, tinker$"),
        *(
            ({"weighting": parse_weighting(text)}, "^weighting .*: keeps a history of training: expected one without$")
            for text in ("exact", "eslm", "warmup(dense, tokens=1000)")
        ),
        ({"out": "scored"}, "^out .*scored: exists already; name a new folder$"),
        (
            {"weighting": Custom(infinite)},
            "^row 0, weighed alone: the weight by .*infinite of row 0, position 1 is inf",
        ),
        ({"weighting": Custom(negative), "format": "ms-swift"}, "^row 0 has a negative weight, which ms-swift takes"),
    ],
)
def test_settings_that_make_no_sense_are_refused(settings, message, packed, tmp_path):
    settings = {"weighting": Dense(), "out": "out", "format": "hf", **settings}
    weighting, out = settings.pop("weighting"), tmp_path / settings.pop("out")
    with pytest.raises(ValueError, match=message):
        export_weights(packed[0], weighting, out, **settings)
    assert [path.name for path in tmp_path.iterdir()] == ["scored"]


@pytest.mark.parametrize("format", ["hf", "trl"])
def test_weights_for_other_trainers_are_not_ignored_as_rows(format, packed, tmp_path):
    export_weights(packed[0], Dense(), tmp_path / "out", format=format)
    with pytest.raises(ValueError, match="out has a column loss_weights, which is not read"):
        load_rows(tmp_path / "out")


@pytest.mark.parametrize("format", ["jsonl", "parquet"])
def test_a_name_of_a_file_is_not_made_a_folder(format, tmp_path):
    models.some_rows().save_to_disk(str(tmp_path / "rows"))
    with pytest.raises(ValueError, match=r"rows\..*: a folder is written.*: expected a name without it"):
        export_rows(tmp_path / "rows", tmp_path / f"rows.{format}", format=format)
    assert not (tmp_path / f"rows.{format}").exists()
