"""Checks that a model fits its sequences: fingerprints of tokenizer, weights and config; length; vocabulary."""

import contextlib
import hashlib
import json
import os
from collections.abc import Iterator
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from tokenweight.method import NonFinite
from tokenweight.models.rope import context_length

_PROBES = (
    "The quick brown fox's 3.14159, 1234567890 -- and  two   spaces\tand a tab.\n\n\n  Indented\r\n",
    "def f(x_1: int) -> str:\n    return f'{x_1!r}' if x_1 != 0x1F else \"\\n\"  # TODO\n\n\n}});",
    " leading and trailing ",
    "Stra\u00dfe na\u00efve \u0130\u0131 \ufb01 \u00e9t\u00e9 e\u0301 \u2460 \uff21 \u00bd \u201cquoted\u201d\u2026",
    "\u6f22\u5b57\u304b\u306a\u4ea4\u3058\u308a\u6587 \ud55c\uad6d\uc5b4 \u0420\u0443\u0441\u0441\u043a\u0438\u0439 "
    "\u03b5\u03bb\u03bb \u05e2\u05d1\u05e8 \u0639\u0631\u0628\u064a \u0939\u093f\u0928\u094d\u0926\u0940 "
    "\u0e44\u0e17\u0e22",
    "\U0001f600\U0001f469\u200d\U0001f52c\U0001f1e9\U0001f1ea \u2211\u222b\u2260 \x00\x07\xa0\u200b\ufeff",
    "",
)
"""Texts on which tokenizers with one vocabulary differ: digits, spaces, code, letters to normalize, other scripts."""
_WITHOUT_EFFECT = ("version", "truncation", "padding", "added_tokens", "post_processor", "decoder")
"""Parts of a serialized tokenizer that change no id of a text, or that the probes show better."""


def tokenizer_fingerprint(tokenizer: PreTrainedTokenizerBase) -> str:
    """16 hex digits that two tokenizers share if they give every token of a text the same id.

    They hash the vocabulary, the rules (normalizer, splits, merges or scores) and the tokens of some texts. Of the
    special tokens, only those count that the tokenizer adds around a text by its own rule. The names of others differ
    within a family (Llama 3 reserves what Llama 3.2 uses) whose models can nevertheless score each other's texts.
    """
    added = tokenizer.added_tokens_decoder
    special = {token for token, one in added.items() if one.special} - set(tokenizer("")["input_ids"])
    tokens = ((token, name) for name, token in tokenizer.get_vocab().items() if token not in special)
    vocabulary = [(name, token) for token, name in sorted(tokens)]
    told = [(token, repr(one)) for token, one in sorted(added.items()) if not one.special]
    ids = [tokenizer(text)["input_ids"] for text in _PROBES]
    found = json.dumps([vocabulary, _rules(tokenizer, special), told, ids], sort_keys=True)
    return hashlib.sha256(found.encode()).hexdigest()[:16]


def tokenizer_note(tokenizer: PreTrainedTokenizerBase, name: str) -> dict[str, Any]:
    """The tokenizer of rows, for their provenance: the name it was loaded by, and its fingerprint."""
    return {"tokenizer": name, "tokenizer_fingerprint": tokenizer_fingerprint(tokenizer)}


def _rules(tokenizer: PreTrainedTokenizerBase, special: set[int]) -> dict[str, Any]:
    """The rules of a tokenizer, as far as it exposes them, without the names of special tokens."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:  # a Python tokenizer: the probes show what it does
        return {}
    rules = {name: part for name, part in json.loads(backend.to_str()).items() if name not in _WITHOUT_EFFECT}
    known = rules["model"].pop("vocab")
    if isinstance(known, list):  # with scores
        rules["model"]["vocab"] = [piece for token, piece in enumerate(known) if token not in special]
    return rules


def weights_fingerprint(model: torch.nn.Module) -> str:
    """16 hex digits of all weights, with their names, shapes and types."""
    digest = hashlib.sha256()
    seen: set[int] = set()
    for name, value in sorted(model.state_dict().items()):
        if value.data_ptr() not in seen:  # of tied weights, one
            seen.add(value.data_ptr())
            digest.update(f"{name} {tuple(value.shape)} {value.dtype}".encode())
            digest.update(value.detach().contiguous().cpu().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()[:16]


def identity(model: PreTrainedModel, name: str) -> dict[str, Any]:
    """The provenance of a loaded model: name, revision, fingerprint of its weights, dtype, attention, rotary base."""
    return {
        "model": name,
        "revision": getattr(model.config, "_commit_hash", None),
        "weights_fingerprint": weights_fingerprint(model),
        "dtype": str(model.dtype).removeprefix("torch."),
        "attn_implementation": getattr(model.config, "_attn_implementation", None),
        "rope_parameters": getattr(model.config.get_text_config(), "rope_parameters", None),
    }


def config_fingerprint(config: Any) -> str:
    """16 hex digits of all settings of a config that are not defaults of its type, except names and versions."""
    said = config.to_diff_dict()
    for name in ("_name_or_path", "architectures", "dtype", "transformers_version", "use_cache"):
        said.pop(name, None)
    return hashlib.sha256(json.dumps(said, sort_keys=True, default=str).encode()).hexdigest()[:16]


def check_fit(
    config: Any,
    tokenizer: PreTrainedTokenizerBase | None,
    name: str,
    folder: str | os.PathLike[str],
    *,
    longest: int | None,
    token_range: tuple[int, int],
    provenance: dict[str, Any],
    what: str | None = None,
) -> None:
    """Raise a ValueError unless a model can read the sequences of a folder: their lengths, token ids and tokenizer.

    Args:
        config: the model's.
        tokenizer: the model's, if it has one.
        name: the model's.
        folder: the folder of the sequences.
        longest: tokens that the model reads at once; None without a sequence.
        token_range: the smallest and the largest token id.
        provenance: that of the sequences.
        what: the name of what is `longest`; by default the rows of the folder.
    """
    check_tokenizer(tokenizer, name, provenance, folder)  # first, as the most informative
    check_tokens(config, *token_range, folder)
    check_length(config, longest or 0, what or f"{folder}: rows")


def check_tokenizer(
    tokenizer: PreTrainedTokenizerBase | None, name: str, provenance: dict[str, Any], folder: str | os.PathLike[str]
) -> None:
    """Raise a ValueError if rows, by their provenance, were made with another tokenizer than the model's."""
    theirs = provenance.get("tokenizer_fingerprint")
    if tokenizer is None or theirs is None or tokenizer_fingerprint(tokenizer) == theirs:
        return
    since = ", or an earlier version of tokenweight wrote them" if provenance.get("tokenizer") == name else ""
    raise ValueError(
        f"{folder} was made with the tokenizer of {provenance.get('tokenizer')} ({theirs}), but {name} has another "
        f"({tokenizer_fingerprint(tokenizer)}){since}: prepare the rows with the tokenizer of {name}"
    )


def check_length(config: Any, length: int, what: str) -> None:
    """Raise a ValueError if a model has fewer positions than `length` tokens need."""
    positions = context_length(config)
    if positions is not None and length > positions:
        raise ValueError(
            f"{what} of {length} tokens: the model has {positions} positions. Extend its context first (docs/models.md)"
        )


def check_tokens(config: Any, smallest: int, largest: int, folder: str | os.PathLike[str]) -> None:
    """Raise a ValueError if rows hold a token id that a model's vocabulary does not have."""
    known = config.get_text_config().vocab_size
    if smallest < 0 or largest >= known:
        token = smallest if smallest < 0 else largest
        raise ValueError(
            f"{folder}: token {token} is not in the vocabulary of the model, which has {known} tokens: "
            "expected rows made with its tokenizer"
        )


class UnknownToken(ValueError):
    """A token id that a model's vocabulary does not have, by its place in the batch."""

    def __init__(self, token: int, row: int, position: int, known: int) -> None:
        super().__init__(token, row, position, known)
        self.token, self.row, self.position, self.known = token, row, position, known

    def __str__(self) -> str:
        return (
            f"token {self.token} of row {self.row}, position {self.position} is not in the vocabulary of the scoring "
            f"model ({self.known} tokens): expected a scorer with the tokenizer of the sequences"
        )


class RowError(ValueError):
    """An error in a row, by its place in the batch."""

    def __init__(self, row: int, reason: str) -> None:
        super().__init__(row, reason)
        self.row, self.reason = row, reason

    def __str__(self) -> str:
        return f"row {self.row}: {self.reason}"


@contextlib.contextmanager
def numbered_from(first: int) -> Iterator[None]:
    """Number rows in errors about a row, a loss or a token from `first` on, the number of the first of the batch."""
    try:
        yield
    except NonFinite as error:
        raise NonFinite(error.name, first + error.row, error.position, error.value) from None
    except UnknownToken as error:
        raise UnknownToken(error.token, first + error.row, error.position, error.known) from None
    except RowError as error:
        raise RowError(first + error.row, error.reason) from None
