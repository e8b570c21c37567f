"""Adapters: trained by the weighted loss, saved as PEFT saves them, resumed, and refused where they cannot be made."""

import dataclasses
import json
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tokenweight import load_model
from tokenweight.models import load_config
from tokenweight.records import read_json
from tokenweight.train import resolve, train

peft = pytest.importorskip("peft")
# PEFT asks transformers by an older name whether activations are recomputed.
pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")
LORA = {"r": 2, "alpha": "4", "target_modules": ["q_proj", "down_proj"], "dropout": 0.1}


@pytest.fixture
def adapted(short_run):
    return dataclasses.replace(short_run, lora=LORA)


def losses(out):
    lines = [json.loads(line) for line in (Path(out) / "metrics.jsonl").read_text().splitlines()]
    return [line["loss"] for line in lines if "loss" in line]


def test_an_adapter_is_trained_and_saved_in_place_of_the_model(adapted, short_run, capsys):
    base = {name: weight.clone() for name, weight in load_model(adapted.model).state_dict().items()}
    trained = train(adapted)
    printed = capsys.readouterr().out
    trains = sum(parameter.numel() for parameter in trained.parameters() if parameter.requires_grad)
    assert f"{trains:,} trained (" in printed
    assert "the trained adapter" in printed
    files = {path.name for path in Path(adapted.out).iterdir()}
    assert {"adapter_config.json", "adapter_model.safetensors", "run.json", "README.md"} <= files
    assert "model.safetensors" not in files
    assert all("lora_" in name for name in load_file(Path(adapted.out) / "adapter_model.safetensors"))
    config = peft.PeftConfig.from_pretrained(adapted.out)
    assert (config.r, config.lora_alpha, config.lora_dropout, config.task_type) == (2, 4, 0.1, "CAUSAL_LM")
    assert read_json(Path(adapted.out) / "run.json")["settings"]["lora"] == LORA
    assert "lora" in (Path(adapted.out) / "README.md").read_text()
    found = load_model(adapted.out)
    tokens = torch.arange(3, 23)[None]
    with torch.no_grad():
        # The adapter is added to the weights when it is loaded: some roundings of logits up to 8.
        torch.testing.assert_close(found(tokens).logits, trained.eval()(tokens).logits, rtol=0, atol=1e-5)
        assert (found(tokens).logits - load_model(adapted.model)(tokens).logits).abs().max() > 1e-2
    after = trained.unload().state_dict()
    assert all(torch.equal(weight, after[name]) for name, weight in base.items())
    assert load_config(adapted.out).to_dict() == load_config(adapted.model).to_dict()


def test_a_resumed_adapter_ends_as_if_undisturbed(adapted):
    train(adapted)
    first, whole = losses(adapted.out), load_file(Path(adapted.out) / "adapter_model.safetensors")
    again = {**adapted.trainer, "resume_from_checkpoint": "checkpoint-2"}
    train(dataclasses.replace(adapted, trainer=again))
    assert losses(adapted.out) == first
    for name, weight in load_file(Path(adapted.out) / "adapter_model.safetensors").items():
        assert torch.equal(weight, whole[name]), name


@pytest.mark.parametrize("changes", [{}, pytest.param({"scorer": "self", "data": "long"}, marks=pytest.mark.slow)])
def test_the_best_adapter_is_loaded_at_the_end(changes, adapted, corpus):
    changes = {name: str(corpus / value) if name == "data" else value for name, value in changes.items()}
    given = {"learning_rate": 0.5, "lr_scheduler_type": "constant", "load_best_model_at_end": True, "max_steps": 5}
    train(dataclasses.replace(adapted, eval_data=str(corpus / "mixed"), trainer={**given, "eval_steps": 1}, **changes))
    lines = [json.loads(line) for line in (Path(adapted.out) / "metrics.jsonl").read_text().splitlines()]
    found = {line["step"]: line["eval_loss"] for line in lines if "eval_loss" in line}
    best = load_file(Path(adapted.out) / f"checkpoint-{min(found, key=found.get)}" / "adapter_model.safetensors")
    for name, weight in load_file(Path(adapted.out) / "adapter_model.safetensors").items():
        assert torch.equal(weight, best[name]), name


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"lora": {"alhpa": 3}}, r"lora: unknown setting 'alhpa': did you mean 'alpha'"),
        ({"lora": {"r": "many"}}, r"lora\.r 'many': expected int"),
        ({"lora": {"bias": "some"}}, r"lora\.bias 'some': expected "),
        ({"lora": {"r": 2}, "extend": {"length": 512}}, r"extend: an adapter is saved without the config of its base"),
    ],
    ids=str,
)
def test_settings_of_an_adapter_that_cannot_be_meant_are_refused(changes, told, short_run):
    with pytest.raises(ValueError, match=f"^{told}"):
        resolve(dataclasses.replace(short_run, **changes))


def test_modules_that_a_model_does_not_have_are_refused(short_run):
    with pytest.raises(ValueError, match=r"^lora: Target modules"):
        train(dataclasses.replace(short_run, lora={"target_modules": ["nowhere"]}))
    assert not Path(short_run.out).exists()


def test_an_adapter_of_an_adapter_is_refused(adapted, tmp_path):
    train(adapted)
    with pytest.raises(ValueError, match=r"^lora: .*out is an adapter itself"):
        train(dataclasses.replace(adapted, model=adapted.out, out=str(tmp_path / "second")))


def test_without_peft_the_command_that_installs_it_is_named(short_run, monkeypatch):
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(ValueError, match=r"^lora: PEFT is missing .*: pip install 'tokenweight\[lora\]'$"):
        resolve(dataclasses.replace(short_run, lora=LORA))


@pytest.mark.slow
def test_the_base_of_the_adapter_scores_as_a_frozen_copy_of_it_does(adapted, corpus, tmp_path):
    lora = {**LORA, "dropout": 0.0}
    given = dataclasses.replace(adapted, data=str(corpus / "long"), size=10, stride=7, lora=lora)
    for name, scorer in (("base", "base"), ("copy", adapted.model)):
        train(dataclasses.replace(given, scorer=scorer, out=str(tmp_path / name)))
    assert losses(tmp_path / "base") == losses(tmp_path / "copy")
    assert "without the adapter" in (tmp_path / "base" / "README.md").read_text()
    train(dataclasses.replace(given, scorer="self", out=str(tmp_path / "self")))
    assert losses(tmp_path / "base")[1:] != losses(tmp_path / "self")[1:]


@pytest.mark.parametrize(
    ("lora", "found"), [({}, "there is no adapter"), ({**LORA, "bias": "all"}, "lora.bias all trains biases")]
)
def test_a_base_that_is_trained_is_no_frozen_scorer(lora, found, adapted, corpus):
    with pytest.raises(ValueError, match=f"scorer base: {found}"):
        resolve(dataclasses.replace(adapted, data=str(corpus / "long"), scorer="base", lora=lora))


@pytest.mark.slow
def test_the_seed_of_the_run_draws_the_adapter(adapted, tmp_path):
    found = []
    for number, seed in enumerate((3, 3, 4)):
        torch.manual_seed(number)
        trainer = {**adapted.trainer, "seed": seed, "data_seed": 0}
        lora = {**LORA, "dropout": 0.0}
        train(dataclasses.replace(adapted, trainer=trainer, lora=lora, out=str(tmp_path / str(number))))
        found.append(losses(tmp_path / str(number)))
    assert found[0] == found[1] != found[2]


def test_bias_is_the_field_of_that_name(adapted):
    assert resolve(dataclasses.replace(adapted, lora={**LORA, "bias": "lora_only"})).lora["bias"] == "lora_only"
