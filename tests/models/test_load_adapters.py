"""Folders with an adapter of PEFT: merged into the base, or refused in one line."""

import json
import re

import pytest
import torch
from safetensors.torch import load_file, save_file

import models
from texts import trained_tokenizer
from tokenweight import load_model
from tokenweight.models import find_tokenizer, load_config

peft = pytest.importorskip("peft")
# PEFT asks transformers by an older name whether activations are recomputed.
pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")


@pytest.fixture
def folder(tmp_path):
    models.tiny(dtype=torch.float32).save_pretrained(tmp_path / "model")
    trained_tokenizer().save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def refused(folder, *names):
    with pytest.raises(ValueError, match=re.escape(str(folder))) as refusal:
        load_model(folder)
    assert "\n" not in str(refusal.value)
    for name in names:
        assert name in str(refusal.value)


@pytest.fixture
def adapter(folder, tmp_path):
    """A folder with an adapter whose base is the other folder, and the logits of both together."""
    wrapped = peft.get_peft_model(load_model(folder), peft.LoraConfig(r=2, target_modules="all-linear"))
    with torch.no_grad():
        for name, parameter in wrapped.named_parameters():
            if "lora_B" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0)))
    wrapped.save_pretrained(tmp_path / "adapter")
    with torch.no_grad():
        return tmp_path / "adapter", wrapped.eval()(models.some_tokens(2, 9)).logits


def change_adapter(adapter, **changes):
    path = adapter / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_an_adapter_is_merged_into_its_base_and_all_weights_train(adapter, folder):
    adapter, expected = adapter
    model = load_model(adapter)
    with torch.no_grad():
        # Once the product of the two factors is added to the weights, once to what they give.
        torch.testing.assert_close(model(models.some_tokens(2, 9)).logits, expected, rtol=1e-4, atol=1e-4)
    assert {name for name, _ in model.named_parameters()} == {name for name, _ in load_model(folder).named_parameters()}
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert load_config(adapter).to_dict() == load_config(folder).to_dict()
    assert find_tokenizer(adapter).get_vocab() == find_tokenizer(folder).get_vocab()
    assert load_model(adapter, extend={"length": 256}).config.max_position_embeddings == 256


def test_an_adapter_without_its_base_is_refused(adapter):
    adapter, _ = adapter
    change_adapter(adapter, base_model_name_or_path=str(adapter / "elsewhere"))
    refused(adapter, str(adapter / "elsewhere"))
    change_adapter(adapter, base_model_name_or_path=None)
    refused(adapter, "base_model_name_or_path is None")


def test_an_adapter_whose_weights_are_lost_is_refused(adapter):
    adapter, _ = adapter
    weights = load_file(adapter / "adapter_model.safetensors")
    lost = sorted(weights)[0]
    save_file({name: value for name, value in weights.items() if name != lost}, adapter / "adapter_model.safetensors")
    refused(adapter, lost.removeprefix("base_model.model.").split(".lora")[0])
    (adapter / "adapter_model.safetensors").write_bytes(b"version https://git-lfs.github.com/spec/v1\n")
    refused(adapter, "adapter_model.safetensors", "Git LFS")


def test_an_adapter_that_cannot_be_merged_or_stands_beside_a_model_is_refused(folder, tmp_path):
    tuning = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)
    peft.get_peft_model(load_model(folder), tuning).save_pretrained(tmp_path / "prompt")
    refused(tmp_path / "prompt", "PROMPT_TUNING")
    peft.get_peft_model(load_model(folder), peft.LoraConfig(r=2, target_modules="all-linear")).save_pretrained(folder)
    refused(folder, "model.safetensors", "adapter_config.json")
