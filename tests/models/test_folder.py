"""Folders whose files are broken, absent or of another model: refused in one line that names what is wrong."""

import json
import re
from pathlib import Path

import architectures
import pytest
import torch
from safetensors.torch import load_file, save_file

import models
from texts import trained_tokenizer
from tokenweight import load_model, load_tokenizer
from tokenweight.models import find_tokenizer, load_config

POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:0123\nsize 123456\n"
WEIGHTS = "model.safetensors"
QUERY = "model.layers.0.self_attn.q_proj"


@pytest.fixture
def folder(tmp_path):
    models.tiny(dtype=torch.float32).save_pretrained(tmp_path / "model")
    trained_tokenizer().save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def refused(load, folder, *names):
    with pytest.raises(ValueError, match=re.escape(str(folder))) as refusal:
        load(folder)
    message = str(refusal.value)
    assert "\n" not in message
    for name in names:
        assert name in message
    return message


def change_weights(folder, **changes):
    """Weights with others beside or in place of them; None removes one."""
    weights = load_file(folder / WEIGHTS) | {name.replace("__", "."): value for name, value in changes.items()}
    kept = {name: value for name, value in weights.items() if value is not None}
    save_file(kept, folder / WEIGHTS, {"format": "pt"})


@pytest.mark.parametrize("content", [POINTER, b"", b"\xff" * 100, None])
@pytest.mark.parametrize("name", [WEIGHTS, "pytorch_model.bin"])
def test_weights_that_are_a_pointer_or_cut_off_are_named(name, content, folder):
    if name != WEIGHTS:
        torch.save(load_file(folder / WEIGHTS), folder / name)
        (folder / WEIGHTS).unlink()
    whole = (folder / name).read_bytes()
    (folder / name).write_bytes(whole[:-100] if content is None else content)
    message = refused(load_model, folder, name)
    assert ("Git LFS" in message) == (content == POINTER)


@pytest.mark.parametrize("load", [load_model, load_config])
@pytest.mark.parametrize("content", [POINTER, b'{"model_type": "lla'])
def test_a_config_that_is_a_pointer_or_cut_off_is_named(content, load, folder):
    (folder / "config.json").write_bytes(content)
    refused(load, folder, "config.json")


@pytest.mark.parametrize("load", [load_tokenizer, find_tokenizer])
@pytest.mark.parametrize(
    "content", [POINTER, b'{"version": "1.0", "model":', b'{"version": "1.0", "model": {"type": "BPE"}}']
)
def test_a_tokenizer_that_is_a_pointer_or_broken_is_named(content, load, folder):
    (folder / "tokenizer.json").write_bytes(content)
    refused(load, folder, "tokenizer.json")


def test_weights_that_the_files_lack_are_refused_by_name(folder):
    change_weights(folder, lm_head__weight=None)
    refused(load_model, folder, "lm_head.weight")


def test_a_tied_head_that_the_files_lack_is_not_missing(tmp_path):
    models.tiny("llama-tied", dtype=torch.float32).save_pretrained(tmp_path)
    assert "lm_head.weight" not in load_file(tmp_path / WEIGHTS)
    load_model(tmp_path)


def test_weights_of_another_shape_are_refused_with_both_shapes(folder):
    change_weights(folder, lm_head__weight=torch.zeros(60, 16))
    refused(load_model, folder, "lm_head.weight", "[60, 16]", "[61, 16]")
    assert load_model(folder, ignore_mismatched_sizes=True).lm_head.weight.shape == (61, 16)  # as was asked for


@pytest.mark.parametrize(
    "name",
    [f"{QUERY}.bias", f"{QUERY}.lora_A.weight", "model.layers.1.self_attn.q_norm.weight", "lm_head.bias"],
)
def test_weights_that_a_layer_of_the_model_would_leave_out_are_refused_by_name(name, folder):
    change_weights(folder, **{name: torch.zeros(4)})
    refused(load_model, folder, name)


@pytest.mark.parametrize(
    "name",
    [
        "vision_tower.patch_embedding.weight",
        "model.layers.0.self_attn.rotary_emb.inv_freq",
        "model.layers.0.self_attn.masked_bias",
    ],
)
def test_whole_modules_besides_the_model_and_old_buffers_are_left_out(name, folder):
    change_weights(folder, **{name: torch.zeros(4)})
    expected = models.tiny(dtype=torch.float32).state_dict()
    assert all(torch.equal(value, expected[key]) for key, value in load_model(folder).state_dict().items())


@pytest.mark.parametrize(
    ("kind", "name"),
    [
        ("deepseek_v3", "model.layers.2.eh_proj.weight"),
        ("exaone_moe", "mtp.fc.weight"),
        ("ernie4_5_moe", "model.mtp_block.0.mlp.up_proj.weight"),
        ("glm4_moe_lite", "model.layers.47.enorm.weight"),
    ],
)
def test_heads_that_predict_several_tokens_ahead_are_left_out_and_named(kind, name, tmp_path, caplog):
    architectures.build(architectures.tiny_config(kind)).save_pretrained(tmp_path)
    load_model(tmp_path)
    assert not caplog.records
    change_weights(tmp_path, **{name: torch.zeros(4)})
    assert name not in load_model(tmp_path).state_dict()
    (said,) = (record.getMessage() for record in caplog.records if record.name.startswith("tokenweight"))
    assert str(tmp_path) in said
    assert name in said


@pytest.mark.parametrize("load", [load_model, load_config])
def test_a_model_with_code_of_its_own_is_refused_without_a_question_and_without_running_it(load, folder, capsys):
    config = json.loads((folder / "config.json").read_text())
    code = {"model_type": "mine", "auto_map": {"AutoConfig": "mine.Config", "AutoModelForCausalLM": "mine.Model"}}
    (folder / "config.json").write_text(json.dumps(config | code))
    (folder / "mine.py").write_text("raise KeyboardInterrupt")
    refused(load, folder, "trust_remote_code=True")
    assert capsys.readouterr().out == ""


def test_an_interrupt_is_no_broken_file(folder, monkeypatch):
    def stop(*arguments, **named):
        raise KeyboardInterrupt

    monkeypatch.setattr("transformers.AutoModelForCausalLM.from_pretrained", stop)
    with pytest.raises(KeyboardInterrupt):
        load_model(folder)


def of_gpt2(folder):
    """A folder with the two files of GPT-2's tokenizer, and none of a fast one."""
    models.tiny("gpt2").save_pretrained(folder)
    (folder / "vocab.json").write_text(json.dumps({"a": 0, "b": 1, "ab": 2, "<|endoftext|>": 3}))
    (folder / "merges.txt").write_text("#version: 0.2\na b\n")
    return folder


@pytest.mark.filterwarnings("ignore:Deprecated in 0.9.0")  # what transformers 5.13 calls
def test_a_tokenizer_in_any_of_its_files_is_found(tmp_path):
    assert find_tokenizer(of_gpt2(tmp_path))("abab")["input_ids"] == [2, 2]
    (tmp_path / "merges.txt").write_bytes(POINTER)  # which would be read as merges
    refused(find_tokenizer, tmp_path, "merges.txt")


@pytest.mark.parametrize("name", ["spiece.model", "sentencepiece.bpe.model", "tekken.json", "vocab.txt"])
def test_a_tokenizer_that_cannot_be_made_from_its_files_is_not_taken_for_none(name, tmp_path):
    models.tiny().save_pretrained(tmp_path)
    assert find_tokenizer(tmp_path) is None
    (tmp_path / name).write_bytes(b"{}")
    refused(find_tokenizer, tmp_path)


def test_a_tokenizer_of_nothing_but_special_tokens_is_none(tmp_path):
    models.tiny("gpt2").save_pretrained(tmp_path)  # of which transformers makes one without its files
    assert find_tokenizer(Path(tmp_path)) is None
    refused(load_tokenizer, tmp_path, "special tokens")
