"""The bytes that each token of a tokenizer stands for, from the tokenizer itself."""

import copy
import json
import re
from collections.abc import Sequence
from typing import Any

from transformers import PreTrainedTokenizerBase

_UNICODE_FORMS = ("NFC", "NFD", "NFKC", "NFKD")


def _byte_letters() -> dict[str, int]:
    """The letter by which a byte-level BPE writes each byte: its own, if that can be printed, else one from 256 on."""
    printed = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printed]
    return {chr(byte): byte for byte in printed} | {chr(256 + place): byte for place, byte in enumerate(others)}


_LETTERS = _byte_letters()


class TokenBytes:
    """The bytes that each token spells: of a byte-level BPE, or of a sentencepiece with `▁` for a space, with or
    without tokens for single bytes. Control tokens spell nothing.

    Args:
        tokenizer: that of the tokens.

    Raises:
        ValueError: if the tokenizer is of another kind: its tokens do not say which bytes they are.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        added = getattr(tokenizer, "added_tokens_decoder", {})
        self.control = {token: str(one) for token, one in added.items() if one.special}
        self.control |= dict(zip(tokenizer.all_special_ids, tokenizer.all_special_tokens))
        names = {token: name for name, token in tokenizer.get_vocab().items()}
        kinds = _kinds(tokenizer)
        in_letters = "ByteLevel" in kinds
        if not in_letters and not kinds & {"Metaspace", "▁"}:
            raise ValueError(
                f"{type(tokenizer).__name__}: cannot tell the bytes of its tokens: expected a byte-level BPE, or a "
                "sentencepiece that writes ▁ for a space"
            )
        spell = _of_letters if in_letters else _of_pieces
        self.spelled = {token: spell(name) for token, name in names.items() if token not in self.control}
        self.unknown = None if in_letters or "<0x00>" in tokenizer.get_vocab() else tokenizer.unk_token_id
        """The token that stands for any text that has no other."""

    def of(self, tokens: Sequence[int], first: int = 0) -> list[bytes | None]:
        """The bytes of each token; None for a control token.

        Args:
            first: position of the first of them, in an error.

        Raises:
            ValueError: for a token that is not in the vocabulary, or stands for unknown text.
        """
        for place, token in enumerate(tokens):
            if token == self.unknown or (token not in self.spelled and token not in self.control):
                reason = "stands for unknown text" if token == self.unknown else "is not in the vocabulary"
                raise ValueError(f"position {first + place}: token {token} {reason} of the tokenizer of the rows")
        return [self.spelled.get(token) for token in tokens]


def without_unicode_forms(tokenizer: PreTrainedTokenizerBase) -> PreTrainedTokenizerBase:
    """The tokenizer, or a copy, that takes characters as they are in a text, neither composed nor decomposed."""
    backend: Any = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None or backend.normalizer is None:
        return tokenizer
    whole = json.loads(backend.to_str())
    steps = whole["normalizer"].get("normalizers", [whole["normalizer"]])
    kept = [step for step in steps if step["type"] not in _UNICODE_FORMS]
    if len(kept) == len(steps):
        return tokenizer
    whole["normalizer"] = {"type": "Sequence", "normalizers": kept}
    plain: Any = copy.deepcopy(tokenizer)
    plain.backend_tokenizer.normalizer = type(backend).from_str(json.dumps(whole)).normalizer
    return plain


def _kinds(tokenizer: PreTrainedTokenizerBase) -> set[str]:
    """The types of the tokenizer's decoding steps; `▁` for one that turns it into a space."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:  # a Python tokenizer: a sentencepiece names its bytes, or its spaces
        return {"▁"} & {name[:1] for name in tokenizer.get_vocab()}
    decoder = json.loads(backend.to_str())["decoder"] or {}
    steps = decoder.get("decoders", [decoder])
    return {"▁" if step.get("pattern") == {"String": "▁"} else step.get("type", "") for step in steps}


def _of_letters(name: str) -> bytes:
    try:
        return bytes(_LETTERS[letter] for letter in name)
    except KeyError:  # an added token, whose name is its text
        return name.encode()


def _of_pieces(name: str) -> bytes:
    byte = re.fullmatch("<0x([0-9A-F]{2})>", name)
    return bytes([int(byte[1], 16)]) if byte else name.replace("▁", " ").encode()
