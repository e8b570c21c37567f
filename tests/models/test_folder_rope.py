"""Saved rotary settings in the names of transformers 4: complete, harmless to transformers 5, and read by 4."""

import json
import os
import subprocess

import pytest
import torch
from architectures import build, picture_config, tiny_config
from transformers import AutoConfig, AutoModelForCausalLM

from tokenweight.models import SETTINGS, add_older_rope, extend_context
from tokenweight.records import read_json
from tokenweight.train import TrainSettings, train

METHODS = [method for method in SETTINGS if method != "none"]
KINDS = ["llama", "phi", "gpt_neox", "gemma3_text", "deepseek_v2", "qwen3"]
FACTORS = {"short_factor": [1.0] * 8, "long_factor": [1.0 + i for i in range(8)]}


def extended(method, kind="llama", **changes):
    count = {"phi": 4, "gpt_neox": 2, "deepseek_v2": 2}.get(kind, 8)
    settings = {name: values[:count] for name, values in FACTORS.items()} if method == "longrope" else {}
    return extend_context(tiny_config(kind, **changes), 256, method, **settings)


def saved(config, folder):
    model = build(config)
    model.save_pretrained(folder)
    add_older_rope(folder, model.config)
    return read_json(folder / "config.json")


@pytest.mark.parametrize("method", METHODS)
def test_a_saved_config_has_the_names_of_transformers_4_beside_its_own(method, tmp_path):
    config = extended(method)
    found = saved(config, tmp_path)
    parameters = dict(config.rope_parameters)
    assert found["rope_parameters"] == parameters
    assert found["rope_theta"] == parameters.pop("rope_theta")
    assert found["rope_scaling"] == (None if method == "base" else parameters)
    assert found.get("original_max_position_embeddings") == (64 if method == "longrope" else None)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("kind", KINDS)
def test_transformers_5_reads_the_same_settings_as_before(kind, method, tmp_path):
    config = extended(method, kind)
    saved(config, tmp_path)
    assert AutoConfig.from_pretrained(tmp_path).rope_parameters == config.rope_parameters


def test_names_that_differ_among_models_are_theirs(tmp_path):
    found = saved(extended("base", "gpt_neox"), tmp_path / "gpt_neox")
    parameters = found["rope_parameters"]
    assert (found["rotary_emb_base"], found["rotary_pct"]) == (parameters["rope_theta"], 0.25)
    found = saved(extended("yarn", "phi"), tmp_path / "phi")
    assert (found["partial_rotary_factor"], found["rope_scaling"]["rope_type"]) == (0.5, "yarn")
    found = saved(extended("base", "gemma3_text"), tmp_path / "gemma3")
    assert (found["rope_theta"], found["rope_local_base_freq"]) == (1e6 * 4 ** (16 / 14), 1e4)
    found = saved(extend_context(picture_config(), 256, "yarn"), tmp_path / "part")["text_config"]
    assert (found["rope_theta"], found["rope_scaling"]["factor"], found["rope_local_base_freq"]) == (1e6, 4.0, 1e4)


@pytest.mark.parametrize(("kind", "method"), [("olmo3", "base"), ("nemotron", "yarn"), ("gemma4_text", "base")])
def test_settings_that_transformers_4_has_no_words_for_are_left_with_a_warning(kind, method, tmp_path, caplog):
    model = build(extended(method, kind))
    model.save_pretrained(tmp_path)
    before = (tmp_path / "config.json").read_bytes()
    add_older_rope(tmp_path, model.config)
    assert (tmp_path / "config.json").read_bytes() == before
    assert "transformers 5" in caplog.text


def test_a_model_without_rotary_settings_is_left_as_it_is(tmp_path):
    model = build(tiny_config("gpt2"))
    model.save_pretrained(tmp_path)
    before = (tmp_path / "config.json").read_bytes()
    add_older_rope(tmp_path, model.config)
    assert (tmp_path / "config.json").read_bytes() == before


def test_a_trained_folder_has_both_names_and_its_run_is_resumed(folders):
    model, rows, out = (str(folders / name) for name in ("model", "rows", "out"))

    extend = {"length": 256, "method": "yarn"}
    for steps in (1, 2):
        trainer = {"max_steps": steps, "save_steps": 1, "save_strategy": "steps", "disable_tqdm": True}
        resumed = {"resume_from_checkpoint": True} if steps > 1 else {}
        train(TrainSettings(model, rows, out, "uniform", extend=extend, trainer={**trainer, **resumed}))
        found = read_json(folders / "out" / "config.json")
        assert found["rope_theta"] == 1e4
        assert found["rope_scaling"] == {k: v for k, v in found["rope_parameters"].items() if k != "rope_theta"}


READ = """
import json, sys, torch
from transformers import AutoModelForCausalLM
tokens = torch.arange(3, 103)[None]
for folder in sys.argv[1:]:
    model = AutoModelForCausalLM.from_pretrained(folder, torch_dtype=torch.float32)
    found = [b.tolist() for n, b in model.named_buffers() if n.endswith("inv_freq") and "original" not in n]
    print("READ", json.dumps([model(input_ids=tokens, labels=tokens).loss.item(), sorted(sum(found, []))]))
"""


@pytest.mark.slow
def test_transformers_4_turns_by_the_same_frequencies_and_has_the_same_loss(tmp_path):
    python = os.environ.get("TRANSFORMERS_4_PYTHON")
    if not python:
        pytest.skip("TRANSFORMERS_4_PYTHON names no Python with transformers 4.57")
    folders, expected = [], []
    tokens = torch.arange(3, 103)[None]
    for kind in KINDS:
        for method in METHODS:
            folders.append(tmp_path / f"{kind}-{method}")
            saved(extended(method, kind), folders[-1])
            model = AutoModelForCausalLM.from_pretrained(folders[-1])
            buffers = {n: b for n, b in model.named_buffers() if n.endswith("inv_freq") and "original" not in n}
            frequencies = sorted(value for buffer in buffers.values() for value in buffer.tolist())
            expected.append([model(input_ids=tokens, labels=tokens).loss.item(), frequencies])
    others = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run([python, "-c", READ, *folders], capture_output=True, text=True, env=others, check=True)
    found = [json.loads(line.removeprefix("READ ")) for line in done.stdout.splitlines() if line.startswith("READ ")]
    assert len(found) == len(expected)
    for folder, (loss, frequencies), (its_loss, its_frequencies) in zip(folders, expected, found):
        # Two releases, in float32, of one model of two layers.
        assert its_loss == pytest.approx(loss, abs=1e-5), folder
        assert its_frequencies == pytest.approx(frequencies, rel=1e-5), folder
