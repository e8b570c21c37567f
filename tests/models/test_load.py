"""Losses of tokens against the model's own logits, for each way in which an architecture makes them."""

import contextlib
import json

import pytest
import torch
from tokenizers import Tokenizer, normalizers, pre_tokenizers
from tokenizers.models import BPE, Unigram, WordLevel
from tokenizers.processors import TemplateProcessing
from torch.nn.functional import cross_entropy, linear
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    T5Config,
    T5ForConditionalGeneration,
)

import models
from texts import trained_tokenizer
from tokenweight import load_model, load_tokenizer, token_nll
from tokenweight.method import prediction_mask
from tokenweight.models import (
    causal_parts,
    config_fingerprint,
    evaluating,
    find_tokenizer,
    load_config,
    tokenizer_fingerprint,
    weights_fingerprint,
)

LENGTHS = [5, 1, 8]
PACKED = torch.tensor([[t for length in LENGTHS for t in range(length)]] * 2)
SKIPPING = torch.tensor([[0, 1, 2, 3, 20, 21, 22, 60, 61, 62, 63, 64, 65, 66]] * 2)


def nll_of_logits(model, tokens, **kwargs):
    """The loss of each token but the first, from all logits of the model as it is."""
    with torch.no_grad():
        logits = model(tokens, **kwargs).logits
    return cross_entropy(logits[:, :-1].transpose(1, 2), tokens[:, 1:], reduction="none")


@pytest.mark.parametrize("kind", models.KINDS)
def test_losses_equal_the_cross_entropy_of_the_logits_shifted_by_one(kind):
    model, tokens = models.tiny(kind), models.some_tokens(2, 19)
    losses = token_nll(model, tokens)
    assert losses[:, 0].tolist() == [0, 0]
    # The same states, in float64; only the order of the sums over 16 dimensions and 61 tokens differs.
    torch.testing.assert_close(losses[:, 1:], nll_of_logits(model, tokens), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("kind", ["llama", "gemma2", "phi", "cohere"])
def test_losses_of_a_bfloat16_model_are_float32_and_no_worse_than_those_of_its_bfloat16_logits(kind):
    model, tokens = models.tiny(kind, dtype=torch.bfloat16), models.some_tokens(4, 30)
    parts = causal_parts(model)
    with torch.no_grad():
        states = parts.decoder(tokens).last_hidden_state.double()
        bias = parts.output.bias
        logits = linear(states, parts.output.weight.double(), None if bias is None else bias.double()) * parts.scale
    if parts.softcap is not None:
        logits = parts.softcap * torch.tanh(logits / parts.softcap)
    exact = cross_entropy(logits[:, :-1].transpose(1, 2), tokens[:, 1:], reduction="none")
    ours = token_nll(model, tokens)[:, 1:]
    assert ours.dtype == torch.float32
    naive = nll_of_logits(model, tokens)
    # Float32: a sum of 16 products and one of 61, of logits up to 60 in size: at worst 77 * 60 * 2**-24 = 3e-4.
    assert (ours - exact).abs().max() < 3e-4 < (naive.double() - exact).abs().max()


@pytest.mark.parametrize("kind", models.KINDS)
def test_dropout_is_off_and_every_submodule_gets_its_own_mode_back(kind):
    model, tokens = models.tiny(kind, dropout=0.5), models.some_tokens(2, 19)
    expected = nll_of_logits(model, tokens)
    model.train()
    frozen = model.get_input_embeddings()
    frozen.eval()
    modes = {name: module.training for name, module in model.named_modules()}
    assert sorted(set(modes.values())) == [False, True]
    torch.testing.assert_close(token_nll(model, tokens)[:, 1:], expected, rtol=1e-12, atol=1e-12)
    assert {name: module.training for name, module in model.named_modules()} == modes


def test_modes_come_back_also_after_an_error():
    model = models.tiny().train()
    with contextlib.suppress(KeyError), evaluating(model):
        assert not any(module.training for module in model.modules())
        raise KeyError
    assert all(module.training for module in model.modules())


class Scaled(LlamaForCausalLM):
    secret_scale = 3.0

    def forward(self, *args, **kwargs):
        output = super().forward(*args, **kwargs)
        output.logits = self.secret_scale * output.logits
        return output


class SlightlyScaled(Scaled):
    secret_scale = 1.05


class HardlyScaled(Scaled):
    secret_scale = 1.0001  # far above a rounding of float64, far below what a loss would show


def encoder_decoder():
    sizes = {"d_model": 16, "d_kv": 4, "d_ff": 24, "num_layers": 1, "num_heads": 4, "vocab_size": models.VOCABULARY}
    return T5ForConditionalGeneration(T5Config(**sizes, decoder_start_token_id=0))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (encoder_decoder, "T5ForConditionalGeneration is not supported: expected a causal language model"),
        (lambda: models.tiny().model, "LlamaModel is not supported"),
        (lambda: AutoModel.from_config(models.tiny("gpt2").config), "GPT2Model is not supported"),
        (lambda: Scaled(models.tiny().config), "Scaled is not supported: its logits are not its output head times"),
        (lambda: SlightlyScaled(models.tiny().config), "SlightlyScaled is not supported"),
        (lambda: HardlyScaled(models.tiny().config).double(), "HardlyScaled is not supported"),
        (lambda: HardlyScaled(models.tiny().config).float(), "HardlyScaled is not supported"),
    ],
)
def test_a_model_whose_logits_are_something_else_is_refused_by_name(make, message):
    with pytest.raises(ValueError, match=message):
        causal_parts(make())


@pytest.mark.parametrize(
    ("kind", "setting", "value"),
    [("granite", "logits_scaling", 1.02), ("cohere", "logit_scale", 1.02), ("granite", "logits_scaling", 0.99)],
)
def test_a_scale_close_to_one_is_applied_the_right_way_around(kind, setting, value):
    model, tokens = models.tiny(kind, **{setting: value}), models.some_tokens(2, 19)
    torch.testing.assert_close(token_nll(model, tokens)[:, 1:], nll_of_logits(model, tokens), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("kind", models.KINDS)
def test_packed_documents_have_the_losses_they_have_alone(kind):
    model, tokens = models.tiny(kind), models.some_tokens(2, sum(LENGTHS))
    model.config.use_cache = True
    alone = torch.cat([token_nll(model, document) for document in tokens.split(LENGTHS, dim=1)], dim=1)
    packed = token_nll(model, tokens, PACKED)
    # Some of these models compute norms or softmax in float32 even if their weights are float64.
    torch.testing.assert_close(packed, alone, rtol=1e-5, atol=1e-5)
    assert (token_nll(model, tokens) - alone).abs()[:, LENGTHS[0] + 2 :].max() > 0.01


@pytest.mark.parametrize("model_type", ["falcon", "bloom", "mamba"])
def test_a_model_that_cannot_keep_packed_documents_apart_does_not_silently_mix_them(model_type):
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": models.VOCABULARY}
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **sizes)).eval()
    tokens = models.some_tokens(2, sum(LENGTHS))
    try:
        packed = token_nll(model, tokens, PACKED)
    except ValueError:
        return
    alone = torch.cat([token_nll(model, document) for document in tokens.split(LENGTHS, dim=1)], dim=1)
    torch.testing.assert_close(packed, alone, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", ["llama", "gpt2", "mistral", "gpt_neox"])
def test_skipped_positions_are_no_border_between_documents(kind):
    model, tokens = models.tiny(kind), models.some_tokens(2, SKIPPING.shape[1])
    expected = nll_of_logits(model, tokens, position_ids=SKIPPING, attention_mask=torch.ones_like(tokens))
    torch.testing.assert_close(token_nll(model, tokens, SKIPPING)[:, 1:], expected, rtol=1e-12, atol=1e-12)
    as_documents = nll_of_logits(model, tokens, position_ids=SKIPPING, use_cache=False)
    assert (as_documents - expected).abs().max() > 0.01  # what transformers does unless it is told otherwise


@pytest.mark.parametrize(
    ("positions", "padding", "message"),
    [
        (torch.cat([SKIPPING[:1], PACKED[:1]]), 0, "row 0 jump to 20 at token 4, in a batch with packed"),
        (PACKED + 7 * (torch.arange(14) > 10), 0, "row 0 jump to 12 at token 11"),
        (PACKED, 1, "attention_mask holds padding"),
    ],
)
def test_positions_that_would_mix_documents_are_refused(positions, padding, message):
    model, tokens = models.tiny(), models.some_tokens(2, sum(LENGTHS))
    attention_mask = torch.ones_like(tokens)
    attention_mask[1, tokens.shape[1] - padding :] = 0
    with pytest.raises(ValueError, match=message):
        causal_parts(model).states(tokens, positions, attention_mask)


def test_a_token_is_predicted_unless_it_is_unlabeled_or_begins_a_row_or_document():
    labels = torch.tensor([[5, 6, -100, 8, 9, 10]])
    assert prediction_mask(labels).tolist() == [[False, True, False, True, True, True]]
    positions = torch.tensor([[3, 4, 5, 0, 1, 0]])
    assert prediction_mask(labels, positions).tolist() == [[False, True, False, False, True, False]]


@pytest.mark.parametrize("load", [load_model, load_tokenizer])
@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("missing", "cannot be loaded from the hub, and there is no such folder: "),
        ("empty", "cannot be loaded from its folder: "),
        ("model.bin", "is a file: expected a folder, a hub id or a .gguf file"),
        ("missing.gguf", "no such file"),
    ],
)
def test_what_cannot_be_loaded_is_refused_in_one_line_that_names_it(load, name, message, tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "model.bin").write_bytes(b"GGUF")
    with pytest.raises(ValueError, match=message) as refusal:
        load(tmp_path / name)
    assert repr(str(tmp_path / name)) in str(refusal.value)
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_a_saved_model_is_loaded_with_the_dtype_of_its_file_unless_another_is_asked_for(dtype, tmp_path):
    model, tokens = models.tiny(dtype=torch.float32), models.some_tokens(2, 9)
    model.save_pretrained(tmp_path)
    loaded = load_model(tmp_path, **({"dtype": dtype} if dtype else {}))
    assert type(loaded) is type(model)
    assert loaded.dtype == (dtype or torch.float32)
    assert torch.equal(token_nll(loaded, tokens), token_nll(model.to(loaded.dtype), tokens))


def tokenizer(vocabulary, **special):
    inner = Tokenizer(WordLevel(vocabulary, unk_token="<unk>"))
    return PreTrainedTokenizerFast(tokenizer_object=inner, unk_token="<unk>", **special)


def framed(*arguments, **special):
    made = tokenizer(*arguments, **special)
    made.backend_tokenizer.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 3)])
    return made


def test_tokenizers_have_one_fingerprint_if_and_only_if_they_give_a_text_the_same_ids():
    words = {"<unk>": 0, "a": 1, "b": 2, "<s>": 3}
    fingerprint = tokenizer_fingerprint(tokenizer(words))
    assert len(fingerprint) == 16
    assert set(fingerprint) <= set("0123456789abcdef")
    assert tokenizer_fingerprint(tokenizer(dict(reversed(words.items())))) == fingerprint
    assert tokenizer_fingerprint(tokenizer(words, pad_token="<reserved>")) == fingerprint
    assert tokenizer_fingerprint(tokenizer(words, pad_token="<pad>")) == fingerprint
    others = [
        tokenizer({"<unk>": 0, "a": 2, "b": 1, "<s>": 3}),
        tokenizer({"<unk>": 0, "a": 1, "b": 2}),
        tokenizer({"<unk>": 0, "a": 1, "c": 2, "<s>": 3}),
    ]
    assert len({fingerprint, *map(tokenizer_fingerprint, others)}) == 4
    first = tokenizer_fingerprint(framed(words, bos_token="<s>"))
    assert first == tokenizer_fingerprint(framed(words, bos_token="<s>", eos_token="</s>"))
    assert first != tokenizer_fingerprint(tokenizer(words, bos_token="<s>"))  # puts nothing before a text


def of_bytes(pairs, *, digits=False, normalizer=None, special=("<s>", "<reserved_1>"), lower=("l", "o", "w", "1", "2")):
    """A tokenizer of pairs of characters, all of whose variants have one vocabulary."""
    names = [*lower, "lo", "ow", "low", "12"]
    inner = Tokenizer(BPE({name: token for token, name in enumerate(names)}, pairs))
    inner.pre_tokenizer = pre_tokenizers.Digits(individual_digits=True) if digits else None
    inner.normalizer = normalizer
    made = PreTrainedTokenizerFast(tokenizer_object=inner)
    made.add_special_tokens({"additional_special_tokens": list(special)})
    return made


LOW = [("l", "o"), ("lo", "w"), ("o", "w"), ("1", "2")]


@pytest.mark.parametrize(
    "other",
    [
        {"pairs": [("o", "w"), ("l", "ow"), ("l", "o"), ("1", "2")]},  # merges in another order
        {"pairs": LOW[:3]},
        {"pairs": LOW, "digits": True},
        {"pairs": LOW, "normalizer": normalizers.Lowercase()},
        {"pairs": LOW, "normalizer": normalizers.NFKC()},
    ],
)
def test_tokenizers_of_one_vocabulary_but_other_rules_have_other_fingerprints(other, tmp_path):
    first, second = of_bytes(LOW), of_bytes(**other)
    assert first.get_vocab() == second.get_vocab()
    assert tokenizer_fingerprint(first) != tokenizer_fingerprint(second)
    second.save_pretrained(tmp_path)
    assert tokenizer_fingerprint(load_tokenizer(tmp_path)) == tokenizer_fingerprint(second)


def test_tokenizers_with_other_names_of_reserved_tokens_have_one_fingerprint():
    fingerprint = tokenizer_fingerprint(of_bytes(LOW))
    assert tokenizer_fingerprint(of_bytes(LOW, special=("<s>", "<eom>"))) == fingerprint
    longer = of_bytes(LOW)
    longer.backend_tokenizer.enable_truncation(4)
    longer.padding_side = "left"
    assert tokenizer_fingerprint(longer) == fingerprint


@pytest.mark.parametrize("change", [0.5, None])
def test_scores_of_pieces_are_part_of_the_fingerprint(change):
    def made(score):
        inner = Tokenizer(Unigram([("<unk>", 0.0), ("a", -1.0), ("b", -2.0), ("ab", score)], 0, False))
        return PreTrainedTokenizerFast(tokenizer_object=inner, unk_token="<unk>")

    same = tokenizer_fingerprint(made(-1.5)) == tokenizer_fingerprint(made(-1.5 - (change or 0)))
    assert same == (change is None)


def test_fingerprints_of_weights_and_configs_tell_what_changes_losses():
    model = models.tiny()
    weights, config = weights_fingerprint(model), config_fingerprint(model.config)
    assert (weights, config) == (weights_fingerprint(models.tiny()), config_fingerprint(models.tiny().config))
    model.config.transformers_version = "6"
    model.config._name_or_path = "elsewhere"
    assert config_fingerprint(model.config) == config
    model.config.rms_norm_eps = 0.5
    assert config_fingerprint(model.config) != config
    with torch.no_grad():
        model.lm_head.weight[3, 4] += 1e-7
    assert weights_fingerprint(model) != weights
    assert weights_fingerprint(models.tiny(seed=1)) != weights
    tied = models.tiny("llama-tied")
    assert weights_fingerprint(tied) == weights_fingerprint(models.tiny("llama-tied"))


def test_a_fingerprint_of_weights_tells_names_shapes_and_types_apart():
    def holder(**tensors):
        module = torch.nn.Module()
        for name, tensor in tensors.items():
            module.register_buffer(name, tensor)
        return module

    one, other = torch.arange(6.0), torch.arange(6.0) + 1
    same_bytes = one.view(torch.int32)
    found = [
        weights_fingerprint(module)
        for module in (
            holder(a=one, b=other),
            holder(a=other, b=one),  # exchanged
            holder(a=one, c=other),  # another name
            holder(a=one.view(2, 3), b=other),
            holder(a=same_bytes, b=other),
        )
    ]
    assert len(set(found)) == len(found)
    assert found[0] == weights_fingerprint(holder(a=one.clone(), b=other.clone()))


def test_the_config_of_an_adapter_is_that_of_its_base(tmp_path):
    models.tiny().save_pretrained(tmp_path / "base")
    (tmp_path / "adapter").mkdir()
    note = json.dumps({"base_model_name_or_path": str(tmp_path / "base")})
    (tmp_path / "adapter" / "adapter_config.json").write_text(note)
    assert load_config(tmp_path / "adapter").to_dict() == load_config(tmp_path / "base").to_dict()


def test_a_config_alone_is_a_model_whose_weights_are_drawn_by_the_seed(tmp_path, caplog):
    path = tmp_path / "small.json"
    models.tiny().config.to_json_file(path)
    drawn = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        drawn.append(load_model(path).lm_head.weight)
    assert torch.equal(drawn[0], drawn[1])
    assert not torch.equal(drawn[0], drawn[2])
    assert "small.json: a config without weights, which are drawn at random" in caplog.text
    assert load_config(path).vocab_size == models.VOCABULARY
    model = load_model(path, dtype="bfloat16", attn_implementation="eager", extend={"length": 256, "method": "yarn"})
    assert (model.dtype, model.config._attn_implementation) == (torch.bfloat16, "eager")
    assert model.config.max_position_embeddings == 256


def test_the_tokenizer_of_a_config_is_that_in_its_folder(tmp_path):
    models.tiny().config.to_json_file(tmp_path / "small.json")
    assert find_tokenizer(tmp_path / "small.json") is None
    trained_tokenizer().save_pretrained(tmp_path)
    assert find_tokenizer(tmp_path / "small.json").get_vocab() == trained_tokenizer().get_vocab()


def test_a_config_that_is_not_there_is_no_name_of_the_hub(tmp_path):
    with pytest.raises(ValueError, match=r"missing.json': no such file"):
        load_model(tmp_path / "missing.json")


@pytest.mark.parametrize(
    ("dtype", "supported", "slow"), [("bfloat16", False, True), ("bfloat16", True, False), ("float32", False, False)]
)
def test_a_dtype_that_this_cpu_only_emulates_is_said_to_be_slow(dtype, supported, slow, tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: supported)
    models.tiny(dtype=torch.float32).save_pretrained(tmp_path)
    assert load_model(tmp_path, dtype=dtype).dtype == getattr(torch, dtype)
    assert ("set dtype to float32" in caplog.text) == slow
