"""What a batch says is heard in all passes, or refused by name; what a model took before it takes as before."""

import inspect

import datasets
import pytest
import torch
import transformers
from torch.nn.functional import pad

import models
from models import CLOSE, assert_close
from tokenweight import Dense, LongCE, Scorer, ShortContext, Sparse, Uniform, token_nll
from tokenweight import with_weighted_loss as bind
from tokenweight.method import SCORES, as_weighting
from tokenweight.models import TEACHER

CONTEXT = ShortContext(8, 5)


def padded(side, *, real=13, extra=6):
    """A sequence, and the same with padding on one side, with what a collator gives beside it."""
    tokens = models.some_tokens(1, real)
    widths = (0, extra) if side == "right" else (extra, 0)
    labels = pad(tokens, widths, value=-100)
    if side == "left":
        labels[:, extra] = -100
    return tokens, {
        "input_ids": pad(tokens, widths, value=0),
        "labels": labels,
        "attention_mask": pad(torch.ones_like(tokens), widths, value=0),
    }


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("scoring", ["self", "another"])
def test_padding_is_not_read_as_context_by_a_scorer(side, scoring):
    model = models.tiny()
    scorer = Scorer(model if scoring == "self" else models.tiny("qwen3", seed=1), CONTEXT)
    bind(model, Dense(), scorer)
    tokens, inputs = padded(side)
    alone, output = model(input_ids=tokens, labels=tokens), model(**inputs)
    real = inputs["attention_mask"] == 1
    torch.testing.assert_close(output.short_nll[real][1:], alone.short_nll[0, 1:], **CLOSE)
    torch.testing.assert_close(output.weights[real][1:], alone.weights[0, 1:], **CLOSE)
    assert output.weights[~real].count_nonzero() == 0
    if scoring == "self":
        assert torch.equal(output.short_nll[real][:8], output.long_nll[real][:8])


def test_losses_of_padded_sequences_are_those_of_the_sequences():
    model, scorer = models.tiny(), Scorer(models.tiny(), CONTEXT)
    tokens, inputs = padded("left")
    batch, real = inputs["input_ids"], inputs["attention_mask"] == 1
    for losses in (scorer, scorer.long_nll):
        found = losses(batch, attention_mask=inputs["attention_mask"])[real]
        torch.testing.assert_close(found[1:], losses(tokens)[0, 1:], **CLOSE)
    torch.testing.assert_close(
        token_nll(model, batch, attention_mask=inputs["attention_mask"])[real][1:], token_nll(model, tokens)[0, 1:]
    )


@pytest.mark.parametrize("stored", [True, False])
def test_packed_documents_and_padding_do_not_see_each_other(stored):
    model, scorer = models.tiny(), Scorer(models.tiny("qwen3", seed=1), CONTEXT)
    tokens = models.some_tokens(1, 30)
    positions = torch.cat([torch.arange(11), torch.arange(12), torch.zeros(7, dtype=torch.long)])[None]
    labels = tokens.where(torch.arange(30) < 23, -100)
    expected = torch.cat([scorer(tokens[:, :11]), scorer(tokens[:, 11:23]), torch.zeros(1, 7)], dim=1)
    bind(model, LongCE(), None if stored else scorer)
    output = model(
        input_ids=tokens, labels=labels, position_ids=positions, **({"short_nll": expected} if stored else {})
    )
    torch.testing.assert_close(output.short_nll, expected * output.mask, **CLOSE)


ONES = torch.ones(2, 19, dtype=torch.long)
HOLE = ONES.index_fill(1, torch.tensor([5]), 0)
LABELS = models.some_tokens(2, 19)
DOCUMENTS = torch.cat([torch.arange(7), torch.arange(12)]).expand(2, -1)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"attention_mask": HOLE, "labels": LABELS.where(HOLE == 1, -100)}, "attention_mask of row 0, position 6 is 1"),
        ({"attention_mask": HOLE}, "labels of row 0, position 5 .*-100 at padding"),
        ({"labels": LABELS.index_fill(1, torch.tensor([4]), 7)}, "labels of row 0, position 4 is 7.*the token itself"),
        ({"position_ids": DOCUMENTS, "num_items_in_batch": 36}, "labels of row 0, position 7 .*a document begins"),
        ({"attention_mask": torch.zeros(2, 1, 19, 19)}, "attention_mask has shape .*2, 1, 19, 19"),
        ({"token_type_ids": ONES}, "found token_type_ids"),
        ({"pixel_values": torch.zeros(2, 3, 4, 4)}, "found pixel_values"),
        ({"completion_mask": ONES}, "found completion_mask"),
        ({"assistant_masks": ONES}, "found assistant_masks"),
        ({"seq_lengths": [[7, 12], [19]]}, "found seq_lengths"),
        ({"cu_seq_lens_q": torch.tensor([0, 7, 19])}, "cu_seq_lens_q.*position_ids"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_what_no_pass_could_hear_rightly_is_refused_by_name(change, message):
    model = models.tiny()
    bind(model, Dense(), Scorer(model, CONTEXT))
    with pytest.raises(ValueError, match=message):
        model(**{"input_ids": LABELS, "labels": LABELS, **change})


def test_an_input_that_the_model_reads_is_refused_where_losses_are_compared_and_used_where_not():
    model, inputs = models.tiny("gpt2"), {"input_ids": LABELS, "labels": LABELS, "token_type_ids": ONES}
    expected = model(**inputs).loss
    torch.testing.assert_close(bind(model, Uniform())(**inputs).loss, expected, rtol=1e-6, atol=0, check_dtype=False)
    for given in ({"short_nll": torch.zeros(2, 19)}, {}):
        bind(model, Sparse(), None if given else Scorer(model, CONTEXT))
        with pytest.raises(ValueError, match=r"token_type_ids.*short context"):
            model(**inputs, **given)


def test_positions_of_one_row_are_those_of_all():
    model = models.tiny()
    bind(model, Dense(), Scorer(model, CONTEXT))
    labels = LABELS.where(DOCUMENTS != 0, -100)
    expected = model(input_ids=LABELS, labels=labels, position_ids=DOCUMENTS).loss
    assert torch.equal(model(input_ids=LABELS, labels=labels, position_ids=DOCUMENTS[:1]).loss, expected)


@pytest.mark.parametrize("num_items", [None, 0, torch.tensor(0)])
def test_a_step_without_a_predicted_token_has_loss_0_and_no_gradient(num_items):
    model = bind(models.tiny(), Uniform())
    loss = model(input_ids=LABELS, labels=torch.full_like(LABELS, -100), num_items_in_batch=num_items).loss
    loss.backward()
    assert loss == 0
    assert all(parameter.grad is None or not parameter.grad.any() for parameter in model.parameters())


def test_a_weighting_that_writes_into_the_mask_changes_no_denominator():
    def late(long, short, mask):
        mask[:, :9] = False
        return mask.to(long.dtype)

    def copied(long, short, mask):
        return late(long, short, mask.clone())

    losses = [
        bind(models.tiny(), as_weighting(one))(input_ids=LABELS, labels=LABELS, short_nll=torch.zeros(2, 19)).loss
        for one in (late, copied)
    ]
    assert torch.equal(*losses)


# What the model took and gave before.


@pytest.mark.parametrize("kind", ["llama", "gpt2", "gemma2"])
def test_positional_arguments_and_columns_are_those_of_the_model(kind, tmp_path):
    model, plain = bind(models.tiny(kind), LongCE()), models.tiny(kind)
    mask = ONES.clone()
    mask[:, 14:] = 0
    names = [*inspect.signature(plain.forward).parameters]
    order = {"attention_mask": mask, "input_ids": LABELS}
    given = [order.get(name) for name in names[: 1 + max(map(names.index, order))]]
    assert torch.equal(model(*given).logits, plain(*given).logits)
    assert {*names, *SCORES, *TEACHER, "num_items_in_batch"} == {*inspect.signature(model.forward).parameters}
    with pytest.raises(TypeError):
        model(*[None] * 30, labels=LABELS)
    arguments = transformers.TrainingArguments(str(tmp_path), use_cpu=True, report_to="none")
    trainers = [transformers.Trainer(one, arguments) for one in (plain, model)]
    for trainer in trainers:
        trainer._set_signature_columns_if_needed()
    assert {*trainers[0]._signature_columns, *SCORES} <= {*trainers[1]._signature_columns}
    assert trainers[0].label_names == trainers[1].label_names


def test_generation_computes_the_logits_of_one_token():
    model, seen = models.tiny(), []
    model.lm_head.register_forward_hook(lambda head, given, result: seen.append(result.shape[1]))
    bind(model, LongCE())
    seen.clear()
    model.generate(LABELS, max_new_tokens=3, do_sample=False, pad_token_id=0)
    assert seen == [1, 1, 1]


def rows():
    tokens = models.some_tokens(6, 19).tolist()
    return datasets.Dataset.from_dict({"input_ids": tokens, "labels": tokens, "short_nll": [[1.0] * 19] * 6})


def trainer_of(model, folder, **given):
    arguments = transformers.TrainingArguments(
        str(folder), use_cpu=True, report_to="none", per_device_eval_batch_size=2, dataloader_pin_memory=False
    )
    return transformers.Trainer(model, arguments, eval_dataset=rows().with_format("torch"), **given)


@pytest.mark.parametrize("weighting", [Uniform(), Sparse(), LongCE()], ids=str)
def test_an_evaluation_reports_the_unweighted_loss(weighting, tmp_path):
    expected = trainer_of(models.tiny(dtype=torch.float32), tmp_path).evaluate()["eval_loss"]
    found = trainer_of(bind(models.tiny(dtype=torch.float32), weighting), tmp_path).evaluate()["eval_loss"]
    assert found == pytest.approx(expected, rel=1e-6)


def test_without_gradients_the_weighted_loss_stands_beside_the_unweighted_one():
    model, inputs = bind(models.tiny(), LongCE()), {"input_ids": LABELS, "labels": LABELS}
    short = {"short_nll": torch.ones(2, 19)}
    with torch.no_grad():
        output = model(**inputs, **short)
        unscored = model(**inputs)
    trained = model(**inputs, **short)
    torch.testing.assert_close(output.loss, trained.long_nll.sum() / 36, rtol=1e-12, atol=0)
    torch.testing.assert_close(output.weighted_loss, trained.loss.detach(), rtol=1e-12, atol=0)
    assert (output.loss - output.weighted_loss).abs() > 0.1
    assert_close({"loss": unscored.loss}, {"loss": output.loss}, rtol=1e-12, atol=0)
    assert (unscored.weighted_loss, unscored.weights, unscored.short_nll) == (None, None, None)


def test_who_asks_for_logits_is_told_that_there_are_none(tmp_path):
    model = bind(models.tiny(), LongCE())
    with pytest.raises(TypeError, match=r"no logits: .*compute_metrics"):
        trainer_of(model, tmp_path, compute_metrics=lambda prediction: {}).evaluate()
    output = model(input_ids=LABELS, labels=LABELS, short_nll=torch.ones(2, 19))
    with pytest.raises(AttributeError, match=r"logits\.shape: .*call without labels"):
        _ = output.logits.shape


def test_dropout_that_enters_the_weights_is_told_of(caplog):
    for dropout, weighting, told in ((0.0, Dense(), False), (0.1, Uniform(), False), (0.1, Dense(), True)):
        caplog.clear()
        bind(models.tiny(dropout=dropout), weighting)
        assert ("attention_dropout" in caplog.text) == told
