"""What a run is said to leave on disk is what its files hold."""

import datasets
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

import models
from tokenweight.data import score_folder
from tokenweight.method import ShortContext
from tokenweight.models import with_adapter
from tokenweight.plan.disk import Disk, disk_bytes
from tokenweight.train import training_arguments

CONFIG = AutoConfig.for_model(
    "llama", vocab_size=900, hidden_size=96, num_hidden_layers=2, num_attention_heads=4, intermediate_size=256
)
LORA = {"r": 8, "target_modules": "all-linear", "task_type": "CAUSAL_LM"}


def planned(out, *, lora=None, num_tokens=None, num_columns=0, num_steps=None, **trainer) -> Disk:
    given = {"num_tokens": num_tokens, "num_columns": num_columns, "num_steps": num_steps}
    return disk_bytes(CONFIG, training_arguments(trainer, out), torch.float32, lora, **given)


def held(*paths):
    return sum(file.stat().st_size for path in paths for file in ([path] if path.is_file() else path.rglob("*.*")))


@pytest.mark.parametrize("lora", [None, LORA])
def test_a_checkpoint_holds_what_is_trained_and_the_states_of_the_optimizer(lora, tmp_path):
    model = with_adapter(AutoModelForCausalLM.from_config(CONFIG, dtype=torch.float32), lora or {})
    model.save_pretrained(tmp_path / "model")
    trained = [one for one in model.parameters() if one.requires_grad]
    optimizer = torch.optim.AdamW(trained)
    for one in trained:
        one.grad = torch.ones_like(one)
    optimizer.step()
    torch.save(optimizer.state_dict(), tmp_path / "optimizer.pt")
    (weights,) = (tmp_path / "model").glob("*.safetensors")
    disk = planned(tmp_path / "out", lora=lora)
    assert disk.model == pytest.approx(held(weights), rel=0.1)  # beside names and shapes
    assert disk.checkpoint == pytest.approx(held(weights, tmp_path / "optimizer.pt"), rel=0.1)
    assert planned(tmp_path / "out", lora=lora, save_only_model=True).checkpoint == disk.model


def test_scored_sequences_hold_tokens_and_scores(tmp_path):
    rows = {"input_ids": models.some_tokens(300, 48).int().tolist()}
    features = datasets.Features({"input_ids": datasets.List(datasets.Value("int32"))})
    datasets.Dataset.from_dict(rows, features).save_to_disk(str(tmp_path / "data"))
    models.tiny(dtype=torch.float32).save_pretrained(tmp_path / "model")
    score_folder(tmp_path / "data", str(tmp_path / "model"), [ShortContext(24, 18)], tmp_path / "scored")
    disk = planned(tmp_path / "out", num_tokens=300 * 48, num_columns=1)
    for found, name in ((disk.sequences, "data"), (disk.scored, "scored")):
        assert found == pytest.approx(sum(file.stat().st_size for file in (tmp_path / name).rglob("*.arrow")), rel=0.1)


@pytest.mark.parametrize(
    ("num", "settings"),
    [
        (5, {"save_steps": 50}),
        (4, {"save_steps": 50, "save_total_limit": 3}),
        (5, {"save_steps": 50, "save_total_limit": 9}),
        (5, {"save_steps": 50, "save_total_limit": 0}),  # all are kept
        (3, {"save_steps": 50, "save_total_limit": 1, "metric_for_best_model": "loss"}),
        (4, {"save_steps": 0.25}),
        (3, {"save_strategy": "epoch", "num_train_epochs": 2.5}),
        (0, {"save_strategy": "no"}),
    ],
)
def test_checkpoints_are_counted_while_the_next_one_is_written(num, settings, tmp_path):
    disk = planned(tmp_path / "out", num_tokens=1000, num_steps=240, **settings)
    assert disk.num_checkpoints == num
    assert disk.total == 4000 + num * disk.checkpoint + disk.model
    if "save_steps" in settings and "save_total_limit" not in settings:
        assert planned(tmp_path / "out", num_tokens=1000, **settings).total is None
