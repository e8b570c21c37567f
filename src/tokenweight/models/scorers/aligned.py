"""Scoring by a language model with another tokenizer: both tokenizations of a text, aligned by its bytes."""

import codecs
import contextlib
import functools
import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from tokenweight.method import NonFinite, Pass, ShortContext, Window, sliding_windows
from tokenweight.models.checks import RowError, tokenizer_fingerprint
from tokenweight.models.rope import check_stale_rows, context_length, rope_depends_on_length
from tokenweight.models.scorers.contrast import Contrast
from tokenweight.models.scorers.scorer import Scorer
from tokenweight.models.scorers.token_bytes import TokenBytes, without_unicode_forms

_FILL = 0.75  # least length of a document in a pass, relative to the longest


class AlignedScorer:
    """Scores tokens by a language model that has another tokenizer.

    Each document of a row is text; the model reads that text in tokens of its own. Where tokens of both end at the same
    byte, a group ends. The model's losses are summed over each group, and the sum is given to our tokens of the group
    in proportion to their bytes, or whole. With one tokenizer for both, each group is a token, and the losses are
    those of `Scorer` to the bit.

    Tokens that are not text: those with which the model's tokenizer begins a text (BOS) precede each document, in
    place of ours or where we have none; a control token of ours maps to the model's of the same name or, for BOS and
    EOS, of the same use; any other is not read, and has losses of 0. So has a token none of whose bytes are read: those
    of a character that the border of a row cuts in two. The first token of a document has losses of 0, as none of ours
    predicts it.

    Windows are those of the short context in our tokens, and each reads the text of the same tokens: a group is scored
    by the window that scores its first token, which reads no byte from before its own first token, but for one token
    where there would be none before the first that it scores.

    Args:
        model: the scoring model.
        tokenizer: the model's.
        rows_tokenizer: that of the rows.
        tokenize: maps a tokenizer and texts to the tokens of each, without those around a text: `data.text_tokens`.
        prefix: the model's tokens before a text; they replace the first tokens of a window.
        whole: each token has the losses of its group, not its share of them.
        max_tokens: as for `Scorer`.

    Raises:
        ValueError: if a tokenizer does not say the bytes of its tokens, or the model is not supported.

    Source: groups as in GOLD of TRL, `_align_by_byte_offsets`.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        rows_tokenizer: PreTrainedTokenizerBase,
        *,
        tokenize: Callable[[PreTrainedTokenizerBase, Sequence[str]], Sequence[Sequence[int]]],
        prefix: Sequence[int] = (),
        whole: bool = False,
        max_tokens: int = 32768,
    ) -> None:
        self.model, self.prefix, self.whole = model, list(prefix), whole
        self._ours, self._theirs = TokenBytes(rows_tokenizer), TokenBytes(tokenizer)
        self._tokenize = functools.partial(tokenize, without_unicode_forms(tokenizer))
        self._tokenizer = tokenizer
        self._same = _same_control(self._ours, self._theirs, rows_tokenizer, tokenizer)
        # Its own context is never used: each call has one.
        self._scorer = Scorer(model, ShortContext(len(self.prefix) + 2), prefix=prefix, max_tokens=max_tokens)
        self._lengths: set[int] = set()
        self.groups = 0
        """Groups of all tokens that were scored."""
        self.shared_groups = 0
        """Those with several of our tokens."""

    @property
    def provenance(self) -> dict[str, Any]:
        """Provenance of the scores besides the model, for `scores.json`."""
        return {
            "scorer": "aligned",
            "scorer_tokenizer_fingerprint": tokenizer_fingerprint(self._tokenizer),
            "prefix": self.prefix,
            "contrast": "scorer",
        }

    @torch.no_grad()
    def __call__(
        self,
        tokens: Int[Tensor, "batch seq"],
        context: ShortContext,
        *,
        position_ids: Int[Tensor, "batch seq"] | None = None,
    ) -> Contrast:
        """The losses of every token with the whole row (or packed document) as context, and with the short one.

        Args:
            tokens: sequences of one length.
            context: the windows of the short context, in these tokens.
            position_ids: where they restart at 0, a document begins. By default each sequence is one document.

        Raises:
            ValueError: naming the row whose tokens are no text, whose text the model's tokenizer changes, which skips
                positions, or is too long for the model.
            NonFinite: for a loss that is not finite, with row and position.
        """
        documents = self._documents(tokens.cpu(), None if position_ids is None else position_ids.cpu())
        long_nll = self._long(documents)
        short_nll = self._short(documents, context, long_nll)
        columns = torch.zeros(2, *tokens.shape, dtype=long_nll[0].dtype)
        for one, *losses in zip(documents, long_nll, short_nll):
            for column, of_theirs in zip(columns, losses):
                ours = one.ours_of(of_theirs.cpu(), whole=self.whole)
                column[one.row, one.first : one.first + len(ours)] = ours
        long, short = columns.to(tokens.device)
        return Contrast(long, short)

    def _long(self, documents: Sequence["_Document"]) -> list[Tensor]:
        """The losses of the model's tokens of each document, given all of it before them."""
        lengths = [len(one.tokens) for one in documents]
        dtype = torch.promote_types(self._scorer.parts.head.weight.dtype, torch.float32)
        losses = [torch.zeros(length, dtype=dtype, device=self.model.device) for length in lengths]
        fill = 1.0 if rope_depends_on_length(self.model.config) else _FILL
        left = sorted((number for number, length in enumerate(lengths) if length > 1), key=lambda n: -lengths[n])
        while left:
            least = fill * lengths[left[0]]
            num = next((place for place, number in enumerate(left) if lengths[number] < least), len(left))
            batch, left = left[:num], left[num:]
            for number, row in zip(batch, self._read_whole([documents[number] for number in batch])):
                losses[number] = row[: lengths[number]]
        return losses

    def _read_whole(self, documents: Sequence["_Document"]) -> Tensor:
        """The long losses of documents, one per row, padding included."""
        longest = max(len(one.tokens) for one in documents)
        # Causal attention hides from a token what follows it.
        read = [one.tokens + one.tokens[-1:] * (longest - len(one.tokens)) for one in documents]
        with _numbered_as_ours(lambda row, position: (documents[row], position)):
            return self._scorer.long_nll(torch.tensor(read, device=self.model.device))

    def _short(
        self, documents: Sequence["_Document"], context: ShortContext, long_nll: Sequence[Tensor]
    ) -> Sequence[Tensor]:
        """The same with the short context; tokens before all windows have no shorter one: they keep long losses."""
        ends = np.cumsum([len(one.tokens) for one in documents])
        skip_first, before = not rope_depends_on_length(self.model.config), max(1, len(self.prefix))
        passes = [
            Pass(0, int(end) - len(one.tokens), window)
            for one, end in zip(documents, ends)
            for window in one.windows(context, skip_first=skip_first, before=before)
        ]

        def document(row: int, position: int) -> tuple[_Document, int]:
            number = int(np.searchsorted(ends, position, side="right"))
            return documents[number], position - int(ends[number]) + len(documents[number].tokens)

        flat = [token for one in documents for token in one.tokens]
        with _numbered_as_ours(document):
            short_nll, scored = self._scorer.of_windows(passes, torch.tensor([flat], device=self.model.device))
        return short_nll.where(scored, torch.cat(list(long_nll))[None])[0].split([len(one.tokens) for one in documents])

    def _documents(self, tokens: Tensor, positions: Tensor | None) -> list["_Document"]:
        """The documents of rows in the tokens of both tokenizers."""
        spelled = []
        for row, ids in enumerate(tokens.tolist()):
            begins = [] if positions is None else _restarts(row, positions[row])
            for first, stop in itertools.pairwise([0, *begins, len(ids)]):
                with _of_row(row):
                    spelled.append((row, first, *self._spelled(ids[first:stop], first)))
        texts = [part for *_, parts in spelled for part in parts if isinstance(part, str)]
        read = iter(self._tokenize(texts))
        documents = []
        for row, first, ends, parts in spelled:
            with _of_row(row):
                document = self._document(row, first, ends, parts, read)
            documents.append(document)
            self._lengths.add(len(document.tokens))
            self.groups += len(document.firsts)
            self.shared_groups += document.shared
        check_stale_rows(self.model.config, self._lengths)
        return documents

    def _spelled(self, ids: list[int], first: int) -> tuple[np.ndarray, list[str | int]]:
        """The end of each token of a document, in bytes; and the input of the model: texts, and control tokens of its
        own, which count as a byte."""
        lengths, parts = np.zeros(len(ids), dtype=np.int64), list[str | int]()
        for control, run in itertools.groupby(enumerate(self._ours.of(ids, first)), key=lambda item: item[1] is None):
            places, spelled = zip(*run)
            if control:
                same = [self._same.get(ids[place]) for place in places]
                lengths[[*places]] = [one is not None for one in same]
                parts += [one for one in same if one is not None]
            else:
                text, lengths[[*places]] = _decoded(spelled, first + places[0])
                parts += [text] if text else []
        return lengths.cumsum(), parts

    def _document(
        self, row: int, first: int, ends: np.ndarray, parts: list[str | int], read: Iterator[Sequence[int]]
    ) -> "_Document":
        tokens, lengths = list[int](), list[int]()
        for part in parts:
            if isinstance(part, str):
                ids, spelled = self._read(part, list(next(read)))
                tokens += ids
                lengths += spelled
            else:
                tokens.append(part)
                lengths.append(1)
        prefix = [] if tokens[: len(self.prefix)] == self.prefix else self.prefix
        tokens = prefix + tokens
        known, positions = len(self._scorer.parts.head.weight), context_length(self.model.config)
        if max(tokens, default=0) >= known:
            raise ValueError(
                f"token {max(tokens)} of the scoring model's tokenizer is not in its vocabulary of {known}"
            )
        if positions is not None and len(tokens) > positions:
            raise ValueError(f"a text of {len(tokens)} tokens of the scoring model, which has {positions} positions")
        return _Document.of(row, first, tokens, ends, np.cumsum(lengths, dtype=np.int64), len(prefix))

    def _read(self, text: str, ids: list[int]) -> tuple[list[int], list[int]]:
        """The model's tokens of a text, and the number of its bytes in each."""
        written, spelled = text.encode(), self._theirs.spelled
        pieces = [spelled.get(token, b"") for token in ids]
        whole = b"".join(pieces)
        if whole == b" " + written:  # some put a space before each text, which may be the one that is there
            if text.startswith(" "):
                ids = list(self._tokenize([text[1:]])[0])
                pieces = [spelled.get(token, b"") for token in ids]
            else:
                pieces[0] = pieces[0][1:]
            whole = b"".join(pieces)
        if whole != written:
            whole = whole if written.startswith(b" ") else whole.removeprefix(b" ")
            at = next((n for n, (a, b) in enumerate(zip(whole, written)) if a != b), min(len(whole), len(written)))
            found, expected = (part[at : at + 20].decode(errors="replace") for part in (whole, written))
            raise ValueError(
                f"the scoring model's tokenizer makes {found!r} of the text {expected!r}: expected one that gives each "
                "text back"
            )
        return ids, [len(piece) for piece in pieces]


class _Document(NamedTuple):
    """A document in the tokens of both tokenizers."""

    row: int
    first: int
    """Column of its first token."""
    tokens: list[int]
    """The model's tokens."""
    begins: np.ndarray
    """The byte at which each of our tokens begins."""
    read: np.ndarray
    """The same for the model's tokens; 0 for those before the text."""
    edges: np.ndarray
    """The first of the model's tokens in each group; and, at the end, the one after the last group."""
    firsts: np.ndarray
    """The first of our tokens in each group."""
    group: np.ndarray
    """The group of each of our tokens."""
    share: np.ndarray
    """The share of each of our tokens in the bytes of its group."""

    @classmethod
    def of(
        cls, row: int, first: int, tokens: list[int], ends: np.ndarray, read_ends: np.ndarray, before: int
    ) -> "_Document":
        """Group the tokens of both by the bytes at which they end; `before` of the model's precede the text."""
        begins, read = (np.concatenate([[0], of[:-1]]) if len(of) else of for of in (ends, read_ends))
        borders = np.intersect1d(np.concatenate([[0], ends]), np.concatenate([[0], read_ends]))
        group = (np.searchsorted(borders, begins, side="right") - 1).clip(max=max(0, len(borders) - 2))
        sizes = np.diff(borders) if len(borders) > 1 else np.ones(1)
        return cls(
            row=row,
            first=first,
            tokens=tokens,
            begins=begins,
            read=np.concatenate([np.zeros(before, dtype=np.int64), read]),
            edges=before + np.searchsorted(read, borders),
            firsts=np.searchsorted(ends, borders[:-1], side="right"),
            group=group,
            share=(ends - begins) / sizes[group],
        )

    @property
    def shared(self) -> int:
        """Number of groups with several of our tokens."""
        return int((np.bincount(self.group[self.share > 0]) > 1).sum())

    def windows(self, context: ShortContext, *, skip_first: bool, before: int) -> Iterator[Window]:
        """The windows of the context in the model's tokens, each with `before` tokens before the first scored one."""
        num = len(self.share)
        found = [] if skip_first else [Window(0, 0, min(context.size, num))]
        for window in found + sliding_windows(num, context.size, context.stride):
            first, stop = self.edges[np.searchsorted(self.firsts, [window.first, window.stop])].tolist()
            first = max(1, first)  # the first of all is predicted by nothing
            if first < stop:
                start = 0
                if window.start:
                    start = int(np.searchsorted(self.read, self.begins[window.start]))
                yield Window(max(0, min(start, first - before)), first, stop)

    def ours_of(self, losses: Tensor, *, whole: bool) -> Tensor:
        """The losses of our tokens, from those of the model's."""
        start, stop = self.edges[[0, -1]].tolist()
        number = torch.from_numpy(np.repeat(np.arange(len(self.firsts)), np.diff(self.edges)))
        sums = torch.zeros(max(1, len(self.firsts)), dtype=torch.float64)
        sums.index_add_(0, number, losses[start:stop].double())
        share = torch.from_numpy((self.share > 0) if whole else self.share)
        ours = sums[torch.from_numpy(self.group)] * share
        ours[0] = 0
        return ours.to(losses.dtype)

    def our_position(self, position: int) -> int:
        """The column of the first of our tokens in the group of one of the model's."""
        group = int(np.searchsorted(self.edges, position, side="right")) - 1
        return self.first + int(self.firsts[min(max(0, group), len(self.firsts) - 1)])


def _same_control(
    ours: TokenBytes, theirs: TokenBytes, our_tokenizer: PreTrainedTokenizerBase, tokenizer: PreTrainedTokenizerBase
) -> dict[int, int]:
    """Map our control tokens to those of the model of the same name, or with the same use."""
    names = {name: token for token, name in theirs.control.items()}
    same = {
        getattr(our_tokenizer, use): getattr(tokenizer, use)
        for use in ("eos_token_id", "bos_token_id")
        if None not in (getattr(our_tokenizer, use), getattr(tokenizer, use))
    }
    return same | {token: names[name] for token, name in ours.control.items() if name in names}


def _decoded(spelled: Sequence[bytes | None], first: int) -> tuple[str, np.ndarray]:
    """The text of tokens, and the number of its bytes in each; without the bytes of a character that is cut.

    Args:
        spelled: the bytes of each token.
        first: position of the first of them, in an error.
    """
    pieces = [piece or b"" for piece in spelled]
    ends = np.cumsum([len(piece) for piece in pieces])
    whole = b"".join(pieces)
    head = min(3, len(whole) - len(whole.lstrip(bytes(range(0x80, 0xC0)))))
    try:
        text = codecs.getincrementaldecoder("utf-8")().decode(whole[head:])
    except UnicodeDecodeError as error:
        place = first + int(np.searchsorted(ends, head + error.start, side="right"))
        raise ValueError(f"position {place}: the bytes of the tokens are not UTF-8, so that they are no text") from None
    kept = ends.clip(head, head + len(text.encode())) - head
    return text, np.diff(kept, prepend=0)


def _restarts(row: int, positions: Tensor) -> list[int]:
    """Starts of the documents of a row after the first."""
    steps = positions.diff()
    jumps = (steps != 1) & (positions[1:] != 0)
    if jumps.any():
        place = int(jumps.nonzero()[0]) + 1
        raise RowError(row, f"position_ids skip to {int(positions[place])} at token {place}: expected a whole text")
    return ((positions[1:] == 0).nonzero()[:, 0] + 1).tolist()


@contextlib.contextmanager
def _of_row(row: int) -> Iterator[None]:
    """Name the row in errors."""
    try:
        yield
    except ValueError as error:
        raise RowError(row, str(error)) from None


@contextlib.contextmanager
def _numbered_as_ours(document: Callable[[int, int], tuple[_Document, int]]) -> Iterator[None]:
    """Name our row and token in errors; `document` returns the document and the model's token in it."""
    try:
        yield
    except NonFinite as error:
        one, position = document(error.row, error.position)
        raise NonFinite(error.name, one.row, one.our_position(position), error.value) from None
