"""Texts -> tokens: what stands in a text is text, and what the tokenizer puts around one is known."""

import itertools
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from transformers import PreTrainedTokenizerBase

from tokenweight.models import tokenizer_fingerprint


def tokenizer_note(tokenizer: PreTrainedTokenizerBase, name: str) -> dict[str, Any]:
    """Which tokenizer made rows, for their provenance: the name it was loaded by, and its fingerprint."""
    return {"tokenizer": name, "tokenizer_fingerprint": tokenizer_fingerprint(tokenizer)}


def text_tokens(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> list[list[int]]:
    """The tokens of each text, without those that the tokenizer puts around it.

    The name of a control token in a text, such as the `<s>` of a web page or `<|im_start|>`, is spelled out in tokens
    of text: no text can end a document or begin a turn of a chat.

    Raises:
        ValueError: if the tokenizer makes a control token of text in a way that cannot be taken apart.
    """
    control = _control_tokens(tokenizer)
    # Tokenizers of mistral-common know no control tokens in texts, nor the option.
    spelled = {} if "MistralCommon" in type(tokenizer).__name__ else {"split_special_tokens": True}

    def plain(parts: Sequence[str]) -> list[list[int]]:
        options = {"add_special_tokens": False, "return_attention_mask": False, "return_token_type_ids": False}
        return tokenizer(list(parts), verbose=False, **options, **spelled)["input_ids"] if parts else []

    return [
        ids if control.keys().isdisjoint(ids) else _taken_apart(text, ids, tokenizer, control, plain)
        for text, ids in zip(texts, plain(texts))
    ]


def special_tokens(tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], list[int]]:
    """What the tokenizer, by its own rule, puts before and after a text: ([BOS] or [], [EOS] or []), or more."""
    for text in itertools.chain(["a"], _words(tokenizer)):
        plain, special = tokenizer(text, add_special_tokens=False)["input_ids"], tokenizer(text)["input_ids"]
        starts = [t for t in range(len(special) - len(plain) + 1) if special[t : t + len(plain)] == plain]
        if plain and len(starts) == 1:  # a text that has no token, or one like those around it, tells nothing
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


def _control_tokens(tokenizer: PreTrainedTokenizerBase) -> dict[int, str]:
    """Special tokens, and others with which the chat template marks turns."""
    template = str(getattr(tokenizer, "chat_template", None) or "")
    added = getattr(tokenizer, "added_tokens_decoder", {})
    named = {
        token: one.content
        for token, one in added.items()
        if one.special or (one.content in template and not one.content.isspace())
    }
    named.pop(tokenizer.unk_token_id, None)  # which stands for any unknown word
    return {token: name for token, name in named.items() if len(name) > 1}  # a character has no other spelling


def _taken_apart(
    text: str,
    ids: list[int],
    tokenizer: PreTrainedTokenizerBase,
    control: dict[int, str],
    plain: Callable[[Sequence[str]], list[list[int]]],
) -> list[int]:
    """The tokens of a text in which names of control tokens are read in two parts: the tokenizer finds them in its
    vocabulary, even where it does not look for them."""
    names = [control[token] for token in control.keys() & {*ids}]
    parts = _cut(text, names)
    if len(parts) == 1 and (normalizer := getattr(getattr(tokenizer, "backend_tokenizer", None), "normalizer", None)):
        parts = _cut(normalizer.normalize_str(text), names)  # which may have made the name of other characters
    if len(parts) == 1:
        raise ValueError(f"{type(tokenizer).__name__} makes the control token {names[0]} of {text[:40]!r}")
    found = []
    for part, inner in zip(parts, plain(parts)):
        disjoint = control.keys().isdisjoint(inner)
        found += inner if disjoint else _taken_apart(part, inner, tokenizer, control, plain)
    return found


def _cut(text: str, names: Sequence[str]) -> list[str]:
    """The text, cut after the first character of each name in it."""
    places = [match.start() + 1 for match in re.finditer(f"(?={'|'.join(map(re.escape, names))})", text)]
    return [text[start:stop] for start, stop in itertools.pairwise([0, *places, len(text)])]


def _words(tokenizer: PreTrainedTokenizerBase) -> Iterator[str]:
    """Texts of one token, a thousand at most: an alphabet may be without "a"."""
    special = {*tokenizer.all_special_ids}
    words = (token for token in sorted(tokenizer.get_vocab().values()) if token not in special)
    return map(tokenizer.decode, ([token] for token in itertools.islice(words, 1000)))
