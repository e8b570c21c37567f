"""The recipe that trains from scratch runs on a tiny model, with weights from its first step."""

import json
import re
import shlex
from pathlib import Path

import pytest
import torch
import yaml
from transformers import AutoConfig, AutoModelForCausalLM

import models
from texts import EXCERPT, trained_tokenizer
from tokenweight import cli, load_model, load_tokenizer
from tokenweight.plan import Hardware, plan
from tokenweight.train import TrainSettings, read_recipe

FOLDER = Path(__file__).parents[2] / "recipes"
RECIPE = FOLDER / "scratch" / "llama-33m-4k.yaml"
FACTOR = 64
"""By which all lengths are divided."""


def commands():
    """Of the section, the words after `tokenweight`."""
    section = (FOLDER / "README.md").read_text().split("\n## From scratch, by counts")[1].split("\n## ")[0]
    return [shlex.split(line)[1:] for line in re.findall(r"^\$ (.*)$", section, re.MULTILINE)]


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A folder in which the commands run: a tokenizer and a text by their names on the hub, and a tiny config."""
    trained_tokenizer().save_pretrained(tmp_path / "HuggingFaceTB" / "SmolLM2-135M")
    (tmp_path / "emozilla" / "pg19").mkdir(parents=True)
    (tmp_path / "emozilla" / "pg19" / "book.txt").write_text(EXCERPT.read_text(encoding="utf-8")[:4000], "utf-8")
    settings = read_recipe(RECIPE)
    (tmp_path / "recipes" / "scratch").mkdir(parents=True)
    config = {**models.COMMON, "vocab_size": 300, "max_position_embeddings": 64}
    AutoConfig.for_model("llama", **config).to_json_file(tmp_path / settings["model"])
    trainer = {name: value for name, value in settings["trainer"].items() if name not in ("bf16", "save_steps")}
    trainer |= {"max_steps": 2, "warmup_steps": 0, "dataloader_num_workers": 0, "save_strategy": "no"}
    settings |= {"size": settings["size"] // FACTOR, "stride": settings["stride"] // FACTOR, "trainer": trainer}
    (tmp_path / "recipes" / "scratch" / RECIPE.name).write_text(yaml.safe_dump(settings))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_its_commands_train_from_scratch_with_weights_from_the_first_step(place, capsys):
    prepare, counted, uniform = commands()
    prepare = [str(int(word) // FACTOR) if word.isdigit() else word for word in prepare]
    losses = {}
    for command in (prepare, counted, uniform):
        assert cli.main(command) == 0, capsys.readouterr().err
    for name in ("count", "uniform"):
        out = Path(f"runs/llama-33m-4k-{name}")
        lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
        losses[name] = [line for line in lines if "loss" in line]
        assert load_tokenizer(out).get_vocab() == trained_tokenizer().get_vocab()
        load_model(out)
    # Both begin with the same weights, which are those of the seed.
    assert losses["count"][0]["unweighted_loss"] == losses["uniform"][0]["unweighted_loss"]
    assert losses["count"][0]["effective_share"] < 0.95 < losses["uniform"][0]["effective_share"]
    assert losses["count"][1]["unweighted_loss"] != losses["uniform"][1]["unweighted_loss"]
    record = json.loads((Path("runs/llama-33m-4k-count") / "run.json").read_text())
    assert record["scores"] == "count:order=4,vocab_size=262144"


@pytest.mark.slow
def test_it_is_planned_and_has_the_size_that_its_name_says(monkeypatch):
    monkeypatch.chdir(FOLDER.parent)
    settings = TrainSettings(**read_recipe(RECIPE))
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(settings.model))
    assert round(sum(one.numel() for one in model.parameters()) / 1e6) == 33
    tokens = 4096 * settings.trainer["per_device_train_batch_size"] * settings.trainer["gradient_accumulation_steps"]
    assert tokens == 131072
    assert plan(settings, hardware=Hardware(gpu="4090"), length=4096).run[0].fits
