"""A tiny random configuration of each kind of causal language model that transformers trains, by model type."""

import copy

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

VOCABULARY = 128
COMMON = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 16,
    "max_position_embeddings": 64,
}
TOKENS = {"pad_token_id": None, "bos_token_id": 1, "eos_token_id": 2}
GPT = {"n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 64, "n_inner": 48}
SLIDING = {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 6}
EXPERTS = {
    "num_experts": 4,
    "num_local_experts": 4,
    "n_routed_experts": 4,
    "moe_num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_k": 2,
    "moe_intermediate_size": 16,
    "shared_expert_intermediate_size": 16,
    "n_shared_experts": 1,
    "n_group": 1,
    "topk_group": 1,
    "first_k_dense_replace": 1,
}
LATENT = {
    "num_key_value_heads": 2,
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 4,
    "qk_nope_head_dim": 4,
    "v_head_dim": 8,
}
YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 16}
MSCALE = {"rope_parameters": {**YARN, "mscale": 1.0, "mscale_all_dim": 0.5}}
LLAMA3 = {"rope_type": "llama3", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 16}
SMOOTHED = {"rope_parameters": {**LLAMA3, "low_freq_factor": 1.0, "high_freq_factor": 4.0}}
STATES = {
    "mamba_n_heads": 4,
    "mamba_d_head": 16,
    "mamba_n_groups": 1,
    "mamba_d_state": 8,
    "mamba_expand": 2,
    "mamba_chunk_size": 8,
    "state_size": 8,
    "use_mamba_kernels": False,
}
DELTA = {
    "layer_types": ["linear_attention", "full_attention"],
    "linear_num_value_heads": 4,
    "linear_num_key_heads": 2,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
}
MROPE = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 2], "partial_rotary_factor": 0.5}
EMBEDDED = {"hidden_size_per_layer_input": 8, "vocab_size_per_layer_input": VOCABULARY, "num_kv_shared_layers": 0}

DENSE = {
    "apertus": SMOOTHED,
    "arcee": {},
    "biogpt": {},
    "bitnet": {},
    "bloom": {"n_layer": 2, "n_head": 2},
    "codegen": {**GPT, "rotary_dim": 4},
    "cohere": {"logit_scale": 0.5},
    "cohere2": SLIDING,
    "ctrl": {**GPT, "dff": 48},
    "cwm": {**SMOOTHED, **SLIDING},
    "diffllama": {"num_key_value_heads": 2},
    "doge": {},
    "ernie4_5": {},
    "exaone4": SLIDING,
    "falcon": {},
    "falcon alibi": {"alibi": True},
    "gemma": {},
    "gemma2": {**SLIDING, "query_pre_attn_scalar": 8},
    "gemma3 of text and pictures": {},
    "gemma3_text": {**SLIDING, "query_pre_attn_scalar": 8},
    "gemma3n_text": {**SLIDING, **EMBEDDED, "laurel_rank": 4},
    "gemma4_text": {**SLIDING, **EMBEDDED, "global_head_dim": 16},
    "glm": {},
    "glm4": {},
    "gpt2": GPT,
    "gpt_bigcode": GPT,
    "gpt_neo": {"num_layers": 2, "attention_types": [[["global", "local"], 1]], "window_size": 8, "num_heads": 2},
    "gpt_neox": {},
    "gptj": {**GPT, "rotary_dim": 4},
    "granite": {"logits_scaling": 3.0},
    "helium": {},
    "hunyuan_v1_dense": {},
    "internlm3": {},
    "jais2": {},
    "llama": {},
    "minicpm3": LATENT,
    "ministral": SLIDING,
    "ministral3": {"rope_parameters": {**YARN, "llama_4_scaling_beta": 0.1}},
    "mistral": {"sliding_window": 6},
    "mpt": {"d_model": 32, "n_heads": 2, "n_layers": 2, "max_seq_len": 64},
    "nanochat": {},
    "nemotron": {},
    "olmo": {},
    "olmo2": {},
    "olmo3": SLIDING,
    "openai-gpt": GPT,
    "opt": {"ffn_dim": 48, "word_embed_proj_dim": 32},
    "persimmon": {},
    "phi": {},
    "phi3": {"original_max_position_embeddings": 64},
    "qwen2": {},
    "qwen3": {},
    "seed_oss": {},
    "smollm3": {},
    "stablelm": {},
    "starcoder2": {},
    "vaultgemma": {**SLIDING, "query_pre_attn_scalar": 8},
    "xglm": {"d_model": 32, "ffn_dim": 48, "num_layers": 2, "attention_heads": 2},
    "youtu": LATENT,
}
OF_EXPERTS = {
    "afmoe": EXPERTS,
    "cohere2_moe": EXPERTS,
    "deepseek_v2": {**EXPERTS, **LATENT},
    "deepseek_v3": {**EXPERTS, **LATENT, **MSCALE},
    "dots1": EXPERTS,
    "ernie4_5_moe": EXPERTS,
    "exaone_moe": EXPERTS,
    "flex_olmo": EXPERTS,
    "glm4_moe": EXPERTS,
    "glm4_moe_lite": {**EXPERTS, **LATENT},
    "gpt_oss": {**EXPERTS, "rope_parameters": {**YARN, "truncate": False}},
    "granitemoe": EXPERTS,
    "granitemoeshared": EXPERTS,
    "hunyuan_v1_moe": EXPERTS,
    "jetmoe": {**EXPERTS, "kv_channels": 16},
    "llama4_text": {**EXPERTS, "intermediate_size_mlp": 48},
    "minimax_m2": EXPERTS,
    "mixtral": EXPERTS,
    "olmoe": EXPERTS,
    "phimoe": EXPERTS,
    "qwen2_moe": EXPERTS,
    "qwen3_moe": EXPERTS,
    "solar_open": EXPERTS,
}
RECURRENT = {
    "bamba": {**STATES, "attn_layer_indices": [1]},
    "falcon_h1": {**STATES, "mamba_d_ssm": 64},
    "falcon_mamba": STATES,
    "granitemoehybrid": {
        **EXPERTS, **STATES, "layer_types": ["mamba", "attention"], "shared_intermediate_size": 48,
        "position_embedding_type": "rope",
    },
    "granitemoehybrid nope": {
        **EXPERTS, **STATES, "layer_types": ["mamba", "attention"], "shared_intermediate_size": 48,
        "position_embedding_type": "nope",
    },
    "jamba": {
        **EXPERTS, **STATES, "attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_period": 2,
        "expert_layer_offset": 1,
    },
    "lfm2": {"layer_types": ["conv", "full_attention"], "block_ff_dim": 48},
    "lfm2_moe": {**EXPERTS, "layer_types": ["conv", "full_attention"]},
    "mamba": STATES,
    "mamba2": {**STATES, "num_heads": 4, "head_dim": 16, "n_groups": 1, "chunk_size": 8},
    "minimax": EXPERTS,
    "nemotron_h": {
        **STATES, "mamba_num_heads": 4, "mamba_head_dim": 16, "n_groups": 1, "ssm_state_size": 8, "chunk_size": 8,
        "layers_block_type": ["mamba", "attention"],
    },
    "olmo_hybrid": DELTA,
    "qwen3_5_text": {**DELTA, "rope_parameters": {**MROPE, "mrope_interleaved": True}},
    "qwen3_next": {**EXPERTS, **DELTA},
    "recurrent_gemma": {"lru_width": 32, "block_types": ["recurrent", "attention"], "attention_window_size": 8},
    "rwkv": {"attention_hidden_size": 32, "context_length": 64},
    "zamba2": {
        **STATES, "mamba_ngroups": 1, "n_mamba_heads": 4, "mamba_headdim": 16, "chunk_size": 8, "num_mem_blocks": 1,
        "layers_block_type": ["mamba", "hybrid"], "attention_hidden_size": 64, "attention_head_dim": 32,
    },
}  # fmt: skip
KINDS = {**DENSE, **OF_EXPERTS, **RECURRENT}


def tiny_config(kind: str, **changes) -> PreTrainedConfig:
    """The config of a kind, which is a model type and, after a space, what is special about it."""
    if kind == "gemma3 of text and pictures":
        return picture_config()
    model_type = kind.split()[0]
    config_class = type(AutoConfig.for_model(model_type))
    fields = {name for base in config_class.__mro__ for name in getattr(base, "__annotations__", {})}
    fields |= {*config_class.attribute_map, "global_head_dim"}
    given = {**COMMON, **KINDS[kind]}
    if "qk_rope_head_dim" in given:
        del given["head_dim"]
    given = {name: value for name, value in given.items() if name in fields}
    return AutoConfig.for_model(model_type, **copy.deepcopy({**given, **TOKENS, **changes}))


def picture_config() -> PreTrainedConfig:
    """The config of a model of text and pictures, with what matters to text in its `text_config` alone."""
    vision = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    vision |= {"image_size": 14, "patch_size": 14}
    text = {**COMMON, **SLIDING, "query_pre_attn_scalar": 8}
    return AutoConfig.for_model("gemma3", text_config=text, vision_config=vision, mm_tokens_per_image=1)


def build(config: PreTrainedConfig, *, seed: int = 0, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """A random model of a config, in evaluation mode, whose weights are large enough for tokens to differ."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    return model.eval()


def some_tokens(batch: int, length: int, *, seed: int = 0) -> torch.Tensor:
    """Random token ids without special ones."""
    return torch.randint(3, VOCABULARY, (batch, length), generator=torch.Generator().manual_seed(seed))
