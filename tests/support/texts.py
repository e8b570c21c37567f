"""Rows against the tokens of their documents, for tokenizers that frame a text with BOS and EOS and that do not."""

import copy
from functools import cache
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from tokenweight.data import Document

EXCERPT = Path(__file__).parents[1] / "texts" / "moby_dick.txt"
TEXT = EXCERPT.read_text(encoding="utf-8")
BOS, EOS = 0, 1


@cache
def trained_tokenizer(*, framed: bool = False, vocab_size: int = 300) -> PreTrainedTokenizerFast:
    """Byte-level BPE of the excerpt; a framed one puts BOS before a text and EOS after it, as a rule of its own."""
    inner = Tokenizer(models.BPE())
    inner.pre_tokenizer, inner.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=["<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    inner.train_from_iterator(TEXT.splitlines(), trainer)
    if framed:
        special = [("<s>", BOS), ("</s>", EOS)]
        inner.post_processor = processors.TemplateProcessing(single="<s> $A </s>", special_tokens=special)
    return PreTrainedTokenizerFast(tokenizer_object=inner, bos_token="<s>", eos_token="</s>")


def plain_ids(text: str) -> list[int]:
    return trained_tokenizer()(text)["input_ids"]


def of_tokens(num: int) -> str:
    """A text of exactly so many tokens: spaces apart, one letter each."""
    text = "\x01" * num  # a byte that nothing is merged with
    assert len(plain_ids(text)) == num
    return text


def some_documents():
    pieces = [TEXT[:2000], "", "short", TEXT[2000:2300], of_tokens(15), of_tokens(16), of_tokens(14), TEXT[3000:9000]]
    return [Document(f"file:{number}", text) for number, text in enumerate(pieces)]


CHATML = (
    "{{ bos_token }}{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}"
    "{% for c in m.tool_calls or [] %}[{{ c.function.name }}]{% endfor %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
"""A chat template that only appends."""
MARKED = (
    "{{ bos_token }}{% if tools %}{{ tools | tojson }}{% endif %}{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{% if m.role == 'assistant' %}{% generation %}{{ m.content }}<|im_end|>{% endgeneration %}"
    "{% else %}{{ m.content }}<|im_end|>{% endif %}\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
"""The same conversations, with answers marked."""


def chat_tokenizer(template: str = CHATML) -> PreTrainedTokenizerFast:
    """The trained tokenizer with marks of turns, and a chat template."""
    tokenizer = copy.deepcopy(trained_tokenizer())
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    tokenizer.chat_template = template
    return tokenizer


def conversation(*contents: str, system: str | None = None) -> dict[str, list[dict[str, str]]]:
    """A record of turns of a user and the assistant."""
    turns = [{"role": ("user", "assistant")[n % 2], "content": content} for n, content in enumerate(contents)]
    return {"messages": [*([{"role": "system", "content": system}] if system else []), *turns]}
