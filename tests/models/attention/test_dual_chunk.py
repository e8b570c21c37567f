"""Dual Chunk Attention beside the model's own attention, asked for every distance one by one."""

import inspect

import architectures
import pytest
import torch
from transformers import DynamicCache

import models
from tokenweight.models import DualChunk, causal_parts, parse_attention, token_nll, with_dual_chunk

SETTINGS, LENGTH = DualChunk(chunk=8, local=3), 23
YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 16}
ONE_LAYER = {"num_hidden_layers": 1, "layer_types": ["full_attention"]}
EXACT = {
    "llama": {"rope_parameters": YARN},  # cosine and sine have a factor
    "qwen3": {},  # norms of queries and keys
    "phi": {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}},
    "glm": {},  # pairs of neighbouring dimensions
    "deepseek_v3": {},  # keys of parts, values of another size, a scale of its own
    "gemma2": ONE_LAYER,  # soft-capped scores
    "gpt_oss": ONE_LAYER,  # sinks
    "gemma3_text": ONE_LAYER,  # embeddings for each kind of layer
    "diffllama": {},  # attends twice
}


def one_layer(kind):
    model = architectures.build(architectures.tiny_config(kind, **{"num_hidden_layers": 1, **EXACT[kind]}))
    if kind == "gpt_oss":
        model.set_experts_implementation("eager")  # others have no products in float64
    return model.double()


def by_distance(model, tokens, settings):
    """The states of one layer: each query alone, with keys put where it is to see them, by the model's own code."""
    distances = settings.relative_positions(torch.arange(tokens.shape[1]))
    states = []
    for row, read in enumerate(distances):
        positions = settings.chunk - read[None, : row + 1]
        seen = {"position_ids": positions, "attention_mask": torch.ones_like(positions)}
        with torch.no_grad():
            found = causal_parts(model).decoder(input_ids=tokens[:, : row + 1], use_cache=False, **seen)
        states.append(found.last_hidden_state[:, -1])
    return torch.stack(states, dim=1)


@pytest.mark.parametrize("kind", EXACT)
def test_queries_see_keys_at_the_distances_of_the_table(kind):
    model, tokens = one_layer(kind), architectures.some_tokens(1, LENGTH)
    expected = by_distance(model, tokens, SETTINGS)
    plain = causal_parts(model).decoded(tokens)
    found = causal_parts(with_dual_chunk(model, SETTINGS)).decoded(tokens)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
    assert (found - plain).abs().max() > 1e-3


def test_distances_are_exact_in_a_chunk_and_nearby_and_never_beyond_the_chunk():
    distances = SETTINGS.relative_positions(torch.arange(64))
    plain = torch.arange(64)[:, None] - torch.arange(64)
    causal, chunks = plain >= 0, torch.arange(64) // SETTINGS.step
    near = (plain <= SETTINGS.local) | (chunks[:, None] == chunks)
    assert torch.equal(distances[causal & near], plain[causal & near])
    assert distances[causal].min() >= 0
    assert distances[causal].max() == SETTINGS.chunk


@pytest.mark.parametrize("kind", ["llama", "mistral", "gemma2"])
def test_losses_up_to_the_chunk_are_those_of_plain_attention(kind):
    model, tokens = models.tiny(kind), models.some_tokens(2, SETTINGS.step)
    if kind == "gemma2":  # for which transformers 5.13 takes sdpa, which has no softcap
        model.set_attn_implementation("eager")
    expected = token_nll(model, tokens)
    found = token_nll(with_dual_chunk(model, SETTINGS), tokens)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)  # eager attention rounds weights to float32


def test_layers_with_sliding_attention_stay_as_they_are():
    model, tokens = models.tiny("mistral", num_hidden_layers=3), models.some_tokens(2, LENGTH)
    expected = token_nll(model, tokens)
    torch.testing.assert_close(token_nll(with_dual_chunk(model, SETTINGS), tokens), expected)


def test_packed_documents_have_chunks_of_their_own():
    model, tokens = with_dual_chunk(models.tiny(), SETTINGS), models.some_tokens(2, LENGTH)
    positions = torch.stack([torch.arange(LENGTH), torch.arange(LENGTH)])
    positions[0, 13:] -= 13
    expected = torch.cat([token_nll(model, part) for part in (tokens[:1, :13], tokens[:1, 13:])], dim=1)
    found = token_nll(model, tokens, positions)
    torch.testing.assert_close(found[:1], expected)
    torch.testing.assert_close(found[1:], token_nll(model, tokens[1:]))


def test_a_cache_continues_what_it_holds():
    model, tokens = with_dual_chunk(models.tiny(), SETTINGS), models.some_tokens(2, LENGTH)
    cache = DynamicCache(config=model.config)
    name = "cache" if "cache" in inspect.signature(model.forward).parameters else "past_key_values"
    parts = [model(part, **{name: cache}).logits for part in (tokens[:, :7], tokens[:, 7:12], tokens[:, 12:13])]
    torch.testing.assert_close(torch.cat(parts, dim=1), model(tokens[:, :13]).logits)


def test_generated_tokens_are_those_of_whole_reads():
    model, tokens = with_dual_chunk(models.tiny(), SETTINGS), models.some_tokens(1, 13)
    asked = {"attention_mask": torch.ones_like(tokens), "max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    written = model.generate(tokens, **asked)
    best = model(written).logits.argmax(dim=-1)
    assert torch.equal(written[:, 13:], best[:, 12:-1])


def test_few_queries_at_a_time_are_all_of_them(monkeypatch):
    model, tokens = with_dual_chunk(models.tiny(), SETTINGS), models.some_tokens(2, LENGTH)
    expected = token_nll(model, tokens)
    monkeypatch.setattr("tokenweight.models.attention.pieces._SCORES_CPU", 1)
    torch.testing.assert_close(token_nll(model, tokens), expected)


def test_mscale_is_that_of_the_whole_length():
    model, tokens = models.tiny(max_position_embeddings=16), models.some_tokens(1, LENGTH)
    plain = DualChunk(chunk=8, local=3)
    grown = 1 + 0.05 * torch.tensor(LENGTH / 16).log().item()
    scaled = with_dual_chunk(models.tiny(max_position_embeddings=16), DualChunk(8, 3, mscale=0.05))
    for layer in with_dual_chunk(model, plain).model.layers:
        layer.self_attn.scaling *= grown**2
    torch.testing.assert_close(token_nll(scaled, tokens), token_nll(model, tokens))


def test_defaults_are_those_of_the_authors():
    settings = DualChunk().of(models.tiny(max_position_embeddings=8192).config)
    assert (settings.chunk, settings.local, str(settings)) == (6144, 1024, "dual-chunk:chunk=6144,local=1024")
    assert parse_attention(str(settings)) == settings


@pytest.mark.parametrize(
    ("kind", "changes", "named"),
    [
        ("gpt2", {}, "gpt2"),
        ("falcon", {}, "Falcon"),  # attention of its own
        ("doge", {}, "Doge"),  # masks of its own
        ("recurrent_gemma", {}, "recurrent_gemma"),
        ("llama", {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}}, "dynamic"),
        (
            "llama",
            {"rope_parameters": {**YARN, "rope_type": "longrope", "short_factor": [1] * 8, "long_factor": [1] * 8}},
            "longrope",
        ),
    ],
)
def test_models_that_cannot_are_refused_by_name_and_stay_as_they_are(kind, changes, named):
    model = architectures.build(architectures.tiny_config(kind, **changes))
    tokens = architectures.some_tokens(1, 12)
    expected = model(tokens).logits
    with pytest.raises(ValueError, match=named):
        with_dual_chunk(model, SETTINGS)
    assert torch.equal(model(tokens).logits, expected)


def test_padding_is_refused():
    model, tokens = with_dual_chunk(models.tiny(), SETTINGS), models.some_tokens(1, LENGTH)
    with pytest.raises(ValueError, match="attention_mask"):
        model(tokens, attention_mask=(torch.arange(LENGTH) > 2)[None].long())


@pytest.mark.parametrize(
    ("text", "named"),
    [("flash", "flash"), ("dual-chunk:chunk=x", "chunk"), ("dual-chunk:window=3", "window"),
     ("dual-chunk:mscale=nan", "mscale"), ("dual-chunk:chunk=8,chunk=9", "chunk")],
)  # fmt: skip
def test_senseless_texts_are_refused(text, named):
    with pytest.raises(ValueError, match=named):
        parse_attention(text)


@pytest.mark.parametrize(("settings", "named"), [((128, 3), "chunk"), ((8, 8), "local"), ((1, 1), "chunk")])
def test_senseless_settings_are_refused(settings, named):
    with pytest.raises(ValueError, match=named):
        with_dual_chunk(models.tiny(), DualChunk(*settings))
