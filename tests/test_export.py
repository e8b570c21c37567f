"""Exported rows, read back and given to the loss of each tool as docs/export.md describes it."""

import functools
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
import transformers

import models
from tokenweight import Dense, LongCE, Sparse, with_weighted_loss
from tokenweight.export import export_weights

DOCS = Path(__file__).parents[1] / "docs/export.md"
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
        with torch.no_grad():
            output = weighted_model(torch.tensor([tokens]), labels=labels, num_items_in_batch=1, **batch)
        mask = (labels[0] != -100).numpy() & (np.array(positions_of(documents(columns, number))) > 0)
        weighted = (output.weights * output.long_nll)[0].numpy()
        assert output.loss.item() == pytest.approx(weighted.sum(), rel=1e-12)
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
    """`weighted_loss` of docs/export.md, over all rows as one step."""
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


@pytest.mark.parametrize("weighting", WEIGHTINGS, ids=str)
@pytest.mark.parametrize(("format", "loss"), [("hf", hf_loss), ("trl", trl_loss), ("ms-swift", ms_swift_loss)])
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
