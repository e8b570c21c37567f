"""Liger's kernels, by a stand-in that puts them in as Liger does: its losses are refused, the others verified."""

import sys
import types

import pytest
import torch
from distributed import some_rows
from transformers.integrations import liger

import models
from tokenweight import Dense, with_weighted_loss
from tokenweight.train import DataCollatorWithScores, WeightedTrainer, training_arguments

WITHOUT_LOSSES = {"cross_entropy": False, "fused_linear_cross_entropy": False}


@pytest.fixture
def kernels(monkeypatch):
    """What the stand-in has put in, and which of it ran. Its norm multiplies its results by `scale`."""
    seen = types.SimpleNamespace(put_in=[], ran=0, scale=1.0)

    def norm(self, hidden_states):
        seen.ran += 1
        return type(self).forward(self, hidden_states) * seen.scale

    def fused_loss(self, input_ids=None, labels=None, **ignored):
        return type(self).forward(self, input_ids=input_ids)

    def put_in(model, rope=True, cross_entropy=False, fused_linear_cross_entropy=True, rms_norm=True):
        seen.put_in.append((cross_entropy, fused_linear_cross_entropy))
        for module in model.modules():
            if type(module).__name__ == "LlamaRMSNorm" and rms_norm:
                module.forward = types.MethodType(norm, module)
        if fused_linear_cross_entropy:
            model.forward = types.MethodType(fused_loss, model)

    package = types.SimpleNamespace(transformers=types.SimpleNamespace(_apply_liger_kernel_to_instance=put_in))
    monkeypatch.setitem(sys.modules, "liger_kernel", package)
    monkeypatch.setitem(sys.modules, "liger_kernel.transformers", package.transformers)
    monkeypatch.setattr(liger, "is_liger_kernel_available", lambda: True)
    return seen


def trainer_of(out, **given):
    model = with_weighted_loss(models.tiny(dtype=torch.float32), Dense())
    arguments = training_arguments({"max_steps": 2, "save_strategy": "no", "report_to": [], **given}, out)
    return WeightedTrainer(model, arguments, train_dataset=some_rows(), data_collator=DataCollatorWithScores())


def test_kernels_without_losses_are_put_in_and_verified_before_training_and_used_in_it(kernels, tmp_path):
    trainer = trainer_of(tmp_path, use_liger_kernel=True, liger_kernel_config=WITHOUT_LOSSES)
    assert kernels.put_in == [(False, False)]
    assert kernels.ran > 0
    before = kernels.ran
    trainer.train()
    assert kernels.ran > before
    assert trainer.state.log_history[-1]["train_loss"] > 0


def test_kernels_with_which_tokens_read_ahead_or_losses_differ_are_refused(kernels, tmp_path, monkeypatch):
    kernels.scale = torch.nan
    with pytest.raises(ValueError, match="is not supported"):
        trainer_of(tmp_path, use_liger_kernel=True, liger_kernel_config=WITHOUT_LOSSES)


def test_a_loss_of_liger_is_refused_whoever_puts_it_in(kernels, tmp_path):
    trainer = trainer_of(tmp_path)
    trainer.args.use_liger_kernel = True  # after all checks
    with pytest.raises(ValueError, match="a model with a weighted loss returned an unweighted one"):
        trainer.train()


def test_without_liger_it_is_said_what_is_missing(tmp_path, monkeypatch):
    monkeypatch.setattr(liger, "is_liger_kernel_available", lambda: False)
    with pytest.raises(ValueError, match=r"trainer.use_liger_kernel: .* expected liger-kernel to be installed"):
        trainer_of(tmp_path, use_liger_kernel=True, liger_kernel_config=WITHOUT_LOSSES)
