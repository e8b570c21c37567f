"""Single rows with their losses, as a figure or a table of them reads them: of a scored folder, or of texts."""

import os
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import pyarrow as pa
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from tokenweight.data.columns import COLUMNS
from tokenweight.data.dataset import check_scores, load_rows, load_scores
from tokenweight.data.documents import find_sources, read_documents
from tokenweight.data.shards import verify
from tokenweight.data.stores import row_lengths
from tokenweight.data.tokenize import text_tokens, token_pieces
from tokenweight.method import SCORES, ShortContext, Weighting, document_positions, prediction_mask
from tokenweight.models import (
    SCORE_OPTIONS,
    Scorer,
    check_length,
    check_tokenizer,
    check_tokens,
    context_length,
    find_tokenizer,
    load_model,
    load_tokenizer,
    numbered_from,
    own_device,
    special_tokens,
    token_nll,
)

if TYPE_CHECKING:
    import pandas

TEXT_LENGTH = 4096
"""Tokens of a row of a text that is scored at once, unless the model has fewer positions."""
_NUMBERS = (*COLUMNS, *SCORES)


class ScoredRow(NamedTuple):
    """One scored row, as a batch of one, with its tokenizer."""

    tokens: Int[Tensor, "1 seq"]
    long_nll: Float[Tensor, "1 seq"]
    short_nll: Float[Tensor, "1 seq"]
    mask: Bool[Tensor, "1 seq"]
    tokenizer: PreTrainedTokenizerBase | None
    position_ids: Int[Tensor, "1 seq"] | None = None
    """Where they restart at 0, a packed document begins; without them the row is one document."""
    size: int | None = None
    """Tokens of the short context, if they are known."""
    stride: int | None = None
    """Tokens that each of its windows scores, if they are known."""
    number: int | None = None
    """Number of the row in its folder or text, from 0."""
    num_rows: int | None = None
    """Rows of the folder or text."""
    ref_nll: Float[Tensor, "1 seq"] | None = None
    """Its losses by a reference model, if they are stored."""
    divergence: Float[Tensor, "1 seq"] | None = None
    """Divergence of its predictions with the short context from those with the long one, if it is stored."""
    provenance: Mapping[str, Any] = MappingProxyType({})
    """Provenance of its scores, if it is from a folder."""

    def weigh(self, weighting: Weighting) -> Float[Tensor, "1 seq"]:
        """The weights of its tokens.

        Raises:
            ValueError: for a score that is not finite, or that the weighting uses and the row does not have.
        """
        folder = self.provenance.get("folder", "the row")
        check_scores(weighting, self.provenance, folder)
        stored = {"ref_nll": self.ref_nll, "divergence": self.divergence}
        if missing := [name for name, values in stored.items() if values is None and name in weighting.uses]:
            option = SCORE_OPTIONS[missing[0]]
            if missing[0] == "divergence" and weighting.divergence is not None:
                option = f" --divergence {weighting.divergence}"
            raise ValueError(
                f"weighting {weighting}: {folder} has no column {missing[0]}: score it with `tokenweight score{option}`"
            )
        positions = document_positions(self.tokens, self.position_ids)
        used: dict[str, Any] = {**stored, "positions": positions}
        return weighting(self.long_nll, self.short_nll, self.mask, **used)

    def to_pandas(self) -> "pandas.DataFrame":
        """A line for each token: its `position` in the row, from 0, `token` id, `text` (all together are the decoded
        text), `long_nll` and `short_nll` in nats, and `mask`: whether it is predicted and counts."""
        import pandas

        tokens = self.tokens[0].tolist()
        columns = {"long_nll": self.long_nll, "short_nll": self.short_nll, "mask": self.mask}
        return pandas.DataFrame(
            {
                "position": range(len(tokens)),
                "token": tokens,
                "text": token_pieces(tokens, self.tokenizer),
                **{name: values[0].numpy() for name, values in columns.items()},
            }
        )


def corpus_frame(folder: str | os.PathLike[str]) -> "pandas.DataFrame":
    """A line for each row of a folder, with `num_tokens` and all columns that have one value for each row: where it is
    from, and, if it was scored with the long losses, its context gain with each short context (`ContextGain`).

    No token is read for it.

    Raises:
        ValueError: as `load_rows` does.
    """
    import pandas

    rows = load_rows(folder)
    schema = rows.features.arrow_schema
    names = [field.name for field in schema if not pa.types.is_nested(field.type)]
    frame = pandas.DataFrame({"num_tokens": row_lengths(rows)})
    return frame.join(rows.with_format(None).select_columns(names).to_pandas()) if names else frame


def read_row(
    folder: str | os.PathLike[str],
    number: int,
    model_name: str | None = None,
    *,
    size: int | None = None,
    attn_implementation: str | None = None,
) -> ScoredRow:
    """The row of that number; see `read_rows`."""
    return read_rows(folder, number, 1, model_name, size=size, attn_implementation=attn_implementation)[0]


def read_rows(
    folder: str | os.PathLike[str],
    first: int,
    num: int,
    model_name: str | None = None,
    *,
    size: int | None = None,
    attn_implementation: str | None = None,
) -> list[ScoredRow]:
    """Read rows of a scored folder, with their long losses: stored ones, else those of a model.

    Args:
        first: number of the first row, from 0.
        num: number of rows; fewer, where the folder ends.
        model_name: source of the tokenizer, and of long losses in place of stored ones; by default the scoring model
            supplies those not stored. A ValueError for scores comparable with each other only (docs/data.md).
        size: size of the short context; by default the only one that is stored.
        attn_implementation: attention kernel of the model; by default the choice of transformers.

    Raises:
        ValueError: if there is no such row, one of their shards is damaged, or no model is named where one is needed.
    """
    rows, provenance = load_scores(folder, size=size)
    if not 0 <= first < len(rows):
        raise ValueError(f"row {first}: {folder} has rows 0 to {len(rows) - 1}")
    verify(folder, range(first, first + num))
    scored = model_name is None and "long_nll" in rows.column_names
    tokenizer, model = _readers(folder, provenance, model_name, attn_implementation, scored=scored)
    made = {**provenance, "folder": str(folder)}
    context, last = provenance.get("context", {}), min(first + num, len(rows))
    found: list[ScoredRow] = []
    for number, row in enumerate(rows.select(range(first, last)), first):
        columns = {key: torch.as_tensor(np.array(value))[None] for key, value in row.items() if key in _NUMBERS}
        tokens, positions = columns["input_ids"].long(), columns.get("position_ids")
        long_nll = columns["long_nll"] if model is None else _long_nll(model, tokens, positions, f"{folder}: rows")
        mask = prediction_mask(columns.get("labels", tokens), positions)
        losses = long_nll.float().cpu(), columns["short_nll"].float()
        place = context.get("size"), context.get("stride"), number, len(rows)
        others: dict[str, Any] = {name: columns[name].float() for name in ("ref_nll", "divergence") if name in columns}
        found.append(ScoredRow(tokens, *losses, mask, tokenizer, positions, *place, provenance=made, **others))
    return found


def _readers(
    folder: str | os.PathLike[str],
    provenance: dict[str, Any],
    model_name: str | None,
    attn_implementation: str | None,
    *,
    scored: bool,
) -> tuple[PreTrainedTokenizerBase | None, PreTrainedModel | None]:
    """The tokenizer of a scored folder, as far as it is known; and the model of its long losses, unless it is `scored`
    with them."""
    name = model_name or provenance.get("model")
    if provenance.get("contrast") == "scorer":  # its losses are comparable with each other only
        if model_name is not None:
            raise ValueError(
                f"model {model_name}: {folder} was scored by {provenance.get('model')}, whose short losses cannot be "
                "compared with the long ones of a model: expected no model"
            )
        name = provenance.get("tokenizer")
    revision = provenance.get("revision") if name == provenance.get("model") else None
    tokenizer = None if name is None else find_tokenizer(name, revision=revision)
    check_tokenizer(tokenizer, str(name), provenance, folder)
    if scored:
        return tokenizer, None
    if name is None:
        raise ValueError(f"model: {folder} stores no long losses and does not say which model scored it")
    dtype = provenance.get("dtype", "auto")
    model = load_model(name, dtype=dtype, revision=revision, attn_implementation=attn_implementation)
    return tokenizer, model.to(own_device())


def _long_nll(
    model: PreTrainedModel, tokens: Int[Tensor, "1 seq"], positions: Int[Tensor, "1 seq"] | None, what: str
) -> Float[Tensor, "1 seq"]:
    check_length(model.config, tokens.shape[1], what)
    return token_nll(model, tokens.to(model.device), None if positions is None else positions.to(model.device))


def score_text(
    path: str | os.PathLike[str],
    model_name: str,
    *,
    text: str | None = None,
    number: int = 0,
    length: int | None = None,
    size: int | None = None,
    stride: int | None = None,
    attn_implementation: str | None = None,
) -> ScoredRow:
    """Score one row of a text: tokens `number * length` to `(number + 1) * length` of its first document.

    Args:
        path: a file that `prepare` reads; with `text`, only the name of that in errors.
        model_name: source of tokenizer and losses.
        text: the text itself, in place of a file.
        number: number of the row, from 0.
        length: tokens of a row: the long context; by default `TEXT_LENGTH`, or what the model reads, if that is less.
        size: size of the short context; by default a quarter of the row.
        stride: stride of the short context; by default three quarters of its size.
        attn_implementation: attention kernel of the model; by default the choice of transformers.

    Raises:
        ValueError: if there is no such row, or no token of it would have a shorter context.
    """
    if text is None:
        text = next((document.text for document in read_documents(find_sources([path]))), "")
    if not text.strip():
        raise ValueError(f"{path} holds no text")
    tokenizer = load_tokenizer(model_name)
    model = load_model(model_name, attn_implementation=attn_implementation).to(own_device())
    if length is None:
        length = min(TEXT_LENGTH, context_length(model.config) or TEXT_LENGTH)
    check_length(model.config, length, f"{path}: rows")
    prefix = special_tokens(tokenizer)[0]
    ids = prefix + text_tokens(tokenizer, [text])[0]
    row = ids[number * length : (number + 1) * length] if number >= 0 else []
    if not row:
        raise ValueError(f"row {number}: {path} has rows 0 to {(len(ids) - 1) // length} of {length} tokens")
    scored = _scored(model, tokenizer, row, number, size, stride, prefix=prefix, what=f"{path}: row {number}")
    return scored._replace(number=number, num_rows=-(-len(ids) // length))


def score_texts(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    texts: Sequence[str],
    *,
    size: int | None = None,
    stride: int | None = None,
) -> list[ScoredRow]:
    """Score texts with a model that is loaded, each text as one row, on the device of the model.

    Args:
        model: a causal language model of transformers; bound to a weighted loss or not.
        tokenizer: the model's. A text begins with what it puts before one (BOS, if that is its rule).
        texts: texts of any length that the model reads.
        size: tokens of the short context; by default a quarter of each text.
        stride: tokens that each window scores; by default three quarters of the size.

    Raises:
        ValueError: naming a text that is too long for the model, or so short that no token would have a shorter
            context; if the tokenizer is of another model.

    Example:
        >>> from tokenweight import load_model, load_tokenizer
        >>> from tokenweight.data import score_texts
        >>> model, tokenizer = load_model("MODEL"), load_tokenizer("MODEL")  # doctest: +SKIP
        >>> (row,) = score_texts(model, tokenizer, [open("book.txt").read()], size=1024)  # doctest: +SKIP
        >>> row.to_pandas().nlargest(5, "short_nll")  # doctest: +SKIP
    """
    if isinstance(texts, str):
        raise ValueError("texts is a text: expected a list of texts")
    prefix = special_tokens(tokenizer)[0]
    rows = []
    for number, ids in enumerate(text_tokens(tokenizer, texts)):
        row = prefix + ids
        check_length(model.config, len(row), f"text {number}: rows")
        check_tokens(model.config, min(row, default=0), max(row, default=0), f"text {number}")
        scored = _scored(model, tokenizer, row, number, size, stride, prefix=prefix, what=f"text {number}")
        rows.append(scored._replace(number=number, num_rows=len(texts)))
    return rows


def _scored(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    row: list[int],
    number: int,
    size: int | None,
    stride: int | None,
    *,
    prefix: list[int],
    what: str,
) -> ScoredRow:
    """The row of that number of a text, scored."""
    if size is None and len(row) < 8:
        raise ValueError(f"{what} has {len(row)} tokens: expected at least 8, as its short context is a quarter")
    context = ShortContext.of(len(row), size, stride)
    scorer = Scorer(model, context, prefix=prefix)
    tokens = torch.tensor([row], device=model.device)
    with numbered_from(number):
        long_nll = scorer.long_nll(tokens)
        short_nll = scorer(tokens, long_nll=long_nll)
    mask = prediction_mask(tokens).cpu()
    losses = long_nll.float().cpu(), short_nll.float().cpu()
    return ScoredRow(tokens.cpu(), *losses, mask, tokenizer, None, context.size, context.stride)
