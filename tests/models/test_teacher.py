"""Distillation of a bound model, from a live and from a stored teacher, against full logits of both."""

import numpy as np
import pytest
import torch
from distributed import some_rows
from runs import packed

import models
from tokenweight import Sparse, with_weighted_loss
from tokenweight.data import load_rows, score_folder
from tokenweight.models import Distillation, Teacher, without_distillation
from tokenweight.train import DataCollatorWithScores

SHARE, K = 0.6, 5


def expected_loss(student, teacher, batch, weights):
    """(1 - w) nll + w KL of each token by full logits, its weight, and the mean over predicted tokens."""
    given = {"input_ids": batch["input_ids"], "position_ids": batch.get("position_ids"), "use_cache": False}
    log_p, log_q = (model(**given).logits[:, :-1].log_softmax(-1) for model in (student, teacher))
    labels = batch["labels"][:, 1:]
    kept = log_q.topk(K, dim=-1).indices
    p, q = log_p.gather(-1, kept), log_q.gather(-1, kept)
    rest_p, rest_q = 1 - p.exp().sum(-1), 1 - q.exp().sum(-1)
    divergence = (q.exp() * (q - p)).sum(-1) + rest_q * (rest_q / rest_p).log()
    nll = -log_p.gather(-1, labels.clamp(min=0)[..., None])[..., 0]
    mixed = (1 - SHARE) * nll + SHARE * divergence
    return (mixed * weights[:, 1:] * (labels != -100)).sum() / (labels != -100).sum()


@pytest.mark.parametrize("weighting", ["uniform", "sparse", "longce", "models.ByColumns", "eslm:keep=0.5"])
@pytest.mark.parametrize("stored", [False, True])
def test_the_loss_is_mixed_on_the_tokens_that_the_weighting_chooses(stored, weighting, tmp_path):
    rows = packed(some_rows((17, 9, 21, 12)), [1, 0], [2], [1, 3])
    for number, name in enumerate(("long_nll", "ref_nll", "divergence")):
        values = [np.random.default_rng(number).random(len(row)).tolist() for row in rows["input_ids"]]
        rows = rows.add_column(name, values)
    labels = [[-100 if t < 6 else token for t, token in enumerate(row)] for row in rows["input_ids"]]
    rows = rows.add_column("labels", labels)
    other = models.tiny(seed=3)
    if stored:
        bare = rows.remove_columns(["short_nll", "long_nll", "ref_nll", "divergence"])
        bare.save_to_disk(str(tmp_path / "rows"))
        other.save_pretrained(tmp_path / "teacher")
        teacher = {"top_k": K, "dtype": "float64"}
        score_folder(tmp_path / "rows", str(tmp_path / "teacher"), None, tmp_path / "taught", **teacher)
        taught = load_rows(tmp_path / "taught")
        for name in ("teacher_ids", "teacher_logprobs"):
            rows = rows.add_column(name, [np.asarray(row).tolist() for row in taught[name]])
    batch = DataCollatorWithScores()(rows.to_list())
    model = with_weighted_loss(
        models.tiny(), weighting, distillation=Distillation(SHARE, None if stored else Teacher(other, K))
    )
    found = model(**batch)
    plain = models.tiny()
    expected = expected_loss(plain, other, batch, found.weights)
    torch.testing.assert_close(found.loss.item(), expected.item(), **({"rtol": 1e-5, "atol": 1e-6} if stored else {}))
    found.loss.backward()
    expected.backward()
    for (name, parameter), other_parameter in zip(model.named_parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(parameter.grad, other_parameter.grad, rtol=2e-5, atol=1e-6, msg=name)


def test_an_evaluation_and_an_ended_distillation_are_without_the_teacher():
    batch = DataCollatorWithScores()(some_rows().to_list())
    model = with_weighted_loss(
        models.tiny(), Sparse(), distillation=Distillation(SHARE, Teacher(models.tiny(seed=3), K))
    )
    alone = with_weighted_loss(models.tiny(), Sparse())
    assert model(**batch).loss.item() != alone(**batch).loss.item()
    with torch.no_grad():
        assert model(**batch).loss.item() == alone(**batch).loss.item()
    assert without_distillation(model)(**batch).loss.item() == alone(**batch).loss.item()


def test_a_teacher_is_in_evaluation_mode_and_reads_no_padding():
    rows = some_rows((12, 30), scored=False)
    teacher = Teacher(models.tiny("gpt2", dropout=0.5, seed=3).train(), K)
    batch = DataCollatorWithScores()(rows.to_list())
    top, nll = teacher(batch["input_ids"], attention_mask=batch["attention_mask"])
    alone, of_alone = teacher(torch.tensor(rows[0]["input_ids"])[None])
    assert top.ids.shape == (2, 30, K)
    torch.testing.assert_close(top.logprobs[:1, :12], alone.logprobs)
    torch.testing.assert_close(nll[:1, :12], of_alone)
    assert torch.equal(top.ids[:1, :12], alone.ids)
    assert teacher.model.training


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"teacher_ids": None}, "no teacher_ids and teacher_logprobs reached the model"),
        ({"teacher_ids": torch.full((8, 40, 2), 99)}, "teacher_ids: found from 99 to 99"),
        ({"teacher_ids": torch.zeros(8, 39, 2)}, r"have shapes \[8, 39, 2\] and \[8, 40, 2\]: expected \[8, 40, k\]"),
        ({"teacher_logprobs": torch.full((8, 40, 2), torch.nan)}, "teacher_logprobs: found a value above 0, or not a"),
    ],
)
def test_columns_of_no_teacher_are_refused(change, message):
    batch = DataCollatorWithScores()(some_rows().to_list())
    columns = {
        "teacher_ids": torch.zeros(8, 40, 2, dtype=torch.int32),
        "teacher_logprobs": torch.full((8, 40, 2), -1.0),
    }
    model = with_weighted_loss(models.tiny(), Sparse(), distillation=Distillation(SHARE))
    with pytest.raises(ValueError, match=message):
        model(**batch, **{**columns, **change})


def test_settings_of_a_distillation_that_make_no_sense_are_refused(unchecked):
    model = models.tiny()
    for weight in (0.0, 1.5):
        with pytest.raises(ValueError, match=f"weight {weight}: expected above 0 and at most 1"):
            Distillation(weight)
    with pytest.raises(ValueError, match="top_k 99: expected 1 to 61"):
        Teacher(model, 99)
    with pytest.raises(ValueError, match="the teacher is the model that is trained"):
        with_weighted_loss(model, Sparse(), distillation=Distillation(SHARE, Teacher(model, K)))
    with pytest.raises(ValueError, match="context parallelism splits them"):
        with_weighted_loss(model, Sparse(), context=object(), distillation=Distillation(SHARE))
