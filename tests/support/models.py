"""Tiny random causal models, one for each way to make logits from states, and weightings to import by a dotted path."""

from dataclasses import dataclass

import datasets
import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from tokenweight.method import Weighting

VOCABULARY = 61
COMMON = {
    "vocab_size": VOCABULARY,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 4,
    "max_position_embeddings": 128,
    "initializer_range": 0.4,  # about what makes a random model prefer some tokens to others by several nats
    "tie_word_embeddings": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": None,
}
GPT2_NAMES = {"n_embd": 16, "n_inner": 24, "n_layer": 2, "n_head": 4, "n_positions": 128, "tie_word_embeddings": True}
KINDS = {
    "llama": ("llama", {}),
    "llama-tied": ("llama", {"tie_word_embeddings": True}),
    "qwen2": ("qwen2", {}),
    "qwen3": ("qwen3", {}),
    "gpt2": ("gpt2", GPT2_NAMES),  # learned absolute positions
    "phi": ("phi", {"partial_rotary_factor": 0.5}),  # the head has a bias
    # Logits of several times the cap, so that it matters; a query scale as of any other model.
    "gemma2": ("gemma2", {"final_logit_softcapping": 30.0, "query_pre_attn_scalar": 4, "tie_word_embeddings": True}),
    "granite": ("granite", {"logits_scaling": 3.0}),
    "cohere": ("cohere", {"logit_scale": 0.5}),
    "gpt_neox": ("gpt_neox", {}),
    "mistral": ("mistral", {"sliding_window": 6}),
}
DROPOUT = ("attention_dropout", "hidden_dropout", "resid_pdrop", "embd_pdrop", "attn_pdrop")


def tiny(
    kind: str = "llama", *, seed: int = 0, dropout: float = 0.0, dtype: torch.dtype = torch.float64, **changes
) -> PreTrainedModel:
    """A random model of the kind, in evaluation mode, with every bias and norm weight away from its usual start."""
    model_type, settings = KINDS[kind]
    config = AutoConfig.for_model(model_type, **{**COMMON, **settings, **changes})
    for name in DROPOUT:
        if hasattr(config, name):
            setattr(config, name, dropout)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.dim() == 1:
                    parameter += 0.3 * torch.randn_like(parameter)
            if kind == "gemma2":
                model.get_output_embeddings().weight *= 10
    return model.eval()


def enable_checkpointing(model: PreTrainedModel, arguments: dict | None = None) -> None:
    """Compute activations anew in the backward pass; the method has the first name since transformers 5.23."""
    (getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable)(arguments)


def some_tokens(batch: int, length: int, *, seed: int = 0) -> Tensor:
    """Random token ids without the BOS of the models above."""
    return torch.randint(3, VOCABULARY, (batch, length), generator=torch.Generator().manual_seed(seed))


LENGTH, NUM_ROWS = 24, 7


def some_rows(**columns) -> datasets.Dataset:
    """Rows of random tokens, with more columns or others."""
    tokens = some_tokens(NUM_ROWS, LENGTH)
    columns = {"input_ids": tokens.tolist(), "document": list("abcdefg"), "offset": list(range(NUM_ROWS)), **columns}
    return datasets.Dataset.from_dict(columns).with_format("numpy")


def a_64th(long: Tensor, short: Tensor, mask: Tensor) -> Tensor:
    """Weights that scale all sums by a power of two, exactly."""
    return torch.full_like(long, 1 / 64)


def emphasize(long: Tensor, short: Tensor, mask: Tensor) -> Tensor:
    """A user's own weighting, as a function; it depends on the whole row."""
    return (short - long).sigmoid() * long / (1 + long.sum(dim=1, keepdim=True))


@dataclass(frozen=True)
class Threshold(Weighting):
    """A user's own weighting, as a class with a setting."""

    above: float = 1.0

    def weigh(self, long: Tensor, short: Tensor, mask: Tensor) -> Tensor:
        return (short - long > self.above).to(long.dtype)


@dataclass(frozen=True)
class ByColumns(Weighting):
    """Reads stored columns and positions; the first tokens of a document weigh by their divergence alone."""

    uses = frozenset({"ref_nll", "divergence", "positions"})

    def weigh(
        self, long: Tensor, short: Tensor, mask: Tensor, *, ref_nll: Tensor, divergence: Tensor, positions: Tensor
    ) -> Tensor:
        return (long - ref_nll).abs() * (positions > 2) + divergence


# Models with float64 weights compute norms in float32: states that differ by 1e-15 may round apart by 6e-8 of their
# size, and a weight that divides by a sum of differences magnifies that.
CLOSE = {"rtol": 1e-5, "atol": 1e-6}


def assert_close(actual, expected, **tolerance):
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(actual[name], value, **(tolerance or CLOSE), msg=lambda m, n=name: f"{n}: {m}")
