"""The special tokens around a text: with those before it, the windows of a scorer begin, too."""

import itertools
from collections.abc import Iterator, Mapping
from typing import Any

from transformers import PreTrainedTokenizerBase

# Processes that tokenize import this file, and nothing here that would make them load torch or `datasets`.


def special_tokens(tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], list[int]]:
    """The tokens that the tokenizer itself puts before and after a text: ([BOS] or [], [EOS] or []), or more."""
    for text in itertools.chain(["a"], _words(tokenizer)):
        plain, special = tokenizer(text, add_special_tokens=False)["input_ids"], tokenizer(text)["input_ids"]
        starts = [t for t in range(len(special) - len(plain) + 1) if special[t : t + len(plain)] == plain]
        if plain and len(starts) == 1:  # a text that has no token, or one like those around it, shows nothing
            return special[: starts[0]], special[starts[0] + len(plain) :]
    raise ValueError(f"{type(tokenizer).__name__}: cannot tell the special tokens around a text from its own tokens")


def text_prefix(tokenizer: PreTrainedTokenizerBase | None, provenance: Mapping[str, Any]) -> list[int]:
    """The tokens before a text, with which windows of it begin: what `prepare` noted; for rows of unknown origin, the
    tokenizer's own rule, else its BOS."""
    if "prefix" in provenance:
        return list(provenance["prefix"])
    if tokenizer is None:
        return []
    prefix, bos = special_tokens(tokenizer)[0], tokenizer.bos_token_id
    return prefix or ([] if bos is None else [bos])


def _words(tokenizer: PreTrainedTokenizerBase) -> Iterator[str]:
    """Texts of one token, a thousand at most: an alphabet may be without "a"."""
    special = {*tokenizer.all_special_ids}
    words = (token for token in sorted(tokenizer.get_vocab().values()) if token not in special)
    return map(tokenizer.decode, ([token] for token in itertools.islice(words, 1000)))
