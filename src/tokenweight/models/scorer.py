"""The loss of every token when the model sees only a short context."""

import copy
import itertools
import logging
from collections.abc import Callable
from typing import NamedTuple, TypeVar

import torch
from accelerate.utils.memory import clear_device_cache, should_reduce_batch_size
from jaxtyping import Float, Int
from torch import Tensor
from transformers import PreTrainedModel

from tokenweight.method import ShortContext, Window, check_finite, linear_nll, sliding_windows
from tokenweight.models.causal import causal_parts, evaluating
from tokenweight.models.processes import any_process, is_divided
from tokenweight.models.rope import check_stale_windows, turns_by_length

logger = logging.getLogger(__name__)
Item = TypeVar("Item")


class _Pass(NamedTuple):
    """A window of one row; `document` is where its document begins."""

    row: int
    document: int
    window: Window


class Scorer:
    """Scores tokens with a short context, without gradient, in evaluation mode and without KV cache.

    Args:
        model: the model being trained (it then scores itself, "unfrozen"), a frozen copy, or a smaller model with the
            same vocabulary.
        context: size and stride of the windows, in tokens.
        bos: id of the token that replaces the first token of a window, in documents that begin with it; None replaces
            nothing.
        max_tokens: that one forward pass reads at most; at least one window is read. When memory does not suffice, the
            scorer halves it and goes on, with a warning.

    Raises:
        ValueError: if the model is not supported, or would read windows with the rotary angles of longer rows.

    Source: Helm et al. 2025, `calculate_base_loss` of the reference code; its defects are left out (docs/papers.md).
    """

    def __init__(
        self, model: PreTrainedModel, context: ShortContext, *, bos: int | None = None, max_tokens: int = 32768
    ) -> None:
        if max_tokens < 1:
            raise ValueError(f"max_tokens={max_tokens}: expected at least 1")
        check_stale_windows(model.config, context.size)
        self.model, self.context, self.bos, self.max_tokens = model, context, bos, max_tokens
        self.parts = causal_parts(model)

    def with_context(self, context: ShortContext) -> "Scorer":
        """A scorer of the same model with another short context; the model is not proved again."""
        check_stale_windows(self.model.config, context.size)
        scorer = copy.copy(self)
        scorer.context = context
        return scorer

    @torch.no_grad()
    def __call__(
        self,
        tokens: Int[Tensor, "batch seq"],
        *,
        position_ids: Int[Tensor, "batch seq"] | None = None,
        long_nll: Float[Tensor, "batch seq"] | None = None,
        first_row: int = 0,
    ) -> Float[Tensor, "batch seq"]:
        """The short loss of every token, windows never crossing from one packed document into another.

        Args:
            tokens: rows of one length.
            position_ids: where they restart at 0, a document begins; larger jumps (PoSE) stay in the window. By default
                each row is one document.
            long_nll: the losses of the same model with the whole context. Given these, the first `size` tokens of a
                document are not read again: their short and long context are the same, and so are the losses. (With
                rotary angles that depend on the length of the input they are not, and are read.)
            first_row: number of the first row, for error messages.

        Returns:
            Nats, float32. Column t speaks of token t; 0 for the first token of a row or document.

        Raises:
            ValueError: if a loss is not finite, naming row and position, or a token is not in the model's vocabulary.
        """
        self._check(tokens, first_row)
        dtype = torch.promote_types(self.parts.head["head"].dtype, torch.float32)
        short_nll = (
            torch.zeros(tokens.shape, dtype=dtype, device=tokens.device) if long_nll is None else long_nll.clone()
        )
        scored = torch.zeros_like(tokens, dtype=torch.bool)
        skip_first = long_nll is not None and not turns_by_length(self.model.config)
        passes = self._passes(tokens, position_ids, skip_first=skip_first)
        skips = position_ids is not None and bool(((position_ids.diff(dim=1) != 1) & (position_ids[:, 1:] != 0)).any())
        with evaluating(self.model):
            self._in_batches(
                passes,
                lambda item: item.window.stop - item.window.start,
                lambda batch: self._score(batch, tokens, position_ids if skips else None, short_nll, scored),
                tokens.device,
            )
        check_finite({"the short loss": short_nll}, scored, first_row)
        return short_nll

    def long_nll(
        self,
        tokens: Int[Tensor, "batch seq"],
        *,
        position_ids: Int[Tensor, "batch seq"] | None = None,
        first_row: int = 0,
    ) -> Float[Tensor, "batch seq"]:
        """The loss of every token with the whole row (or packed document) as context, by the same model.

        Args, Returns, Raises: as for the short loss.
        """
        self._check(tokens, first_row)
        losses: dict[int, Tensor] = {}

        def read(rows: list[int]) -> None:
            positions = None if position_ids is None else position_ids[rows]
            losses.update(zip(rows, self.parts.nll(tokens[rows], positions)))

        self._in_batches(list(range(len(tokens))), lambda row: tokens.shape[1], read, tokens.device)
        long_nll = torch.stack([losses[row] for row in range(len(tokens))])
        check_finite({"the long loss": long_nll}, torch.ones_like(tokens, dtype=torch.bool), first_row)
        return long_nll

    def _in_batches(
        self,
        items: list[Item],
        num_tokens: Callable[[Item], int],
        run: Callable[[list[Item]], None],
        device: torch.device,
    ) -> None:
        """Run over all items, `max_tokens` at a time; half as many from when memory does not suffice.

        Longest first, so that items of one batch have nearly one length and the largest batch comes first. Where the
        processes of a run hold parts of the model, all run as many passes as the one with most items, since each pass
        collects the parts; and none can halve its batches alone.
        """
        items = sorted(items, key=num_tokens, reverse=True)
        together = is_divided(self.model)
        while any_process(bool(items), device) if together else items:
            if not items:
                self.parts.states(torch.zeros(1, 1, dtype=torch.long, device=device))
                continue
            longest = num_tokens(items[0])
            batch = items[: max(1, self.max_tokens // longest)]
            try:
                run(batch)
                items = items[len(batch) :]
                continue
            except RuntimeError as error:
                if not should_reduce_batch_size(error):
                    raise
                if len(batch) == 1 or together:
                    tokens = longest * len(batch)
                    raise ValueError(f"{tokens} tokens in one pass do not fit in memory: {error}") from error
            # Only here does nothing hold the tensors of the failed pass any more.
            clear_device_cache(garbage_collection=True)
            self.max_tokens = len(batch) // 2 * longest
            logger.warning("out of memory: from now on %d tokens in one pass", self.max_tokens)

    def _passes(self, tokens: Tensor, position_ids: Tensor | None, *, skip_first: bool) -> list[_Pass]:
        num_rows, length = tokens.shape
        begins = (
            [[]] * num_rows
            if position_ids is None
            else [row.nonzero()[:, 0].tolist() for row in position_ids[:, 1:] == 0]
        )
        passes = []
        for row in range(num_rows):
            documents = [0, *(t + 1 for t in begins[row]), length]
            for start, stop in itertools.pairwise(documents):
                passes += [_Pass(row, start, window) for window in self._windows(stop - start, skip_first)]
        return passes

    def _windows(self, length: int, skip_first: bool) -> list[Window]:
        first = [] if skip_first or length < 2 else [Window(0, 1, min(self.context.size, length))]
        return first + sliding_windows(length, self.context.size, self.context.stride)

    def _score(
        self, batch: list[_Pass], tokens: Tensor, position_ids: Tensor | None, short_nll: Tensor, scored: Tensor
    ) -> None:
        """Read the windows of `batch` in one forward pass and write the losses of their scored parts."""
        device, length = tokens.device, tokens.shape[1]
        lengths = [window.stop - window.start for _, _, window in batch]
        width = max(lengths)
        # Made on the host, so that no device is asked anything. A shorter window repeats its last token: causal
        # attention lets no earlier token see that.
        columns = torch.stack(
            [torch.arange(w.start, w.start + width).clamp(max=w.stop - 1) + document for _, document, w in batch]
        ).to(device)
        rows = torch.tensor([[row] for row, _, _ in batch], device=device)
        read = tokens[rows, columns]
        if self.bos is not None:
            begins = tokens[rows, torch.tensor([[document] for _, document, _ in batch], device=device)]
            read[:, :1] = torch.where(begins == self.bos, self.bos, read[:, :1])
        positions = None
        if position_ids is not None:
            positions = position_ids[rows, columns] - position_ids[rows, columns[:, :1]]
            positions[:, 1:].clamp_(min=1)  # padding may stay at one position: 0 would begin a document
        parts = [i * width + torch.arange(w.first - w.start, w.stop - w.start) for i, (_, _, w) in enumerate(batch)]
        whither = [row * length + document + torch.arange(w.first, w.stop) for row, document, w in batch]
        inside, target = torch.cat(parts), torch.cat(whither).to(device)
        if min(lengths) < width and positions is None and self.parts.packs_without_mask:
            read, positions, inside = _packed(read, lengths, inside)
        states = self.parts.states(read, positions).flatten(0, 1)[inside.to(device)]
        losses = linear_nll(states, targets=tokens.flatten()[target], **self.parts.head)
        short_nll.view(-1)[target] = losses.to(short_nll.dtype)
        scored.view(-1)[target] = True

    def _check(self, tokens: Tensor, first_row: int) -> None:
        """Refuse a model whose head was replaced, and tokens that it does not know."""
        self.parts.check_head(self.model)
        known = self.parts.head["head"].shape[0]
        unknown = (tokens < 0) | (tokens >= known)
        if unknown.any():
            row, position = unknown.nonzero()[0].tolist()
            raise ValueError(
                f"token {tokens[row, position].item()} of row {first_row + row}, position {position} is not in the "
                f"vocabulary of the scoring model ({known} tokens): expected a scorer with the tokenizer of the rows"
            )


def _packed(
    read: Int[Tensor, "windows width"], lengths: list[int], inside: Int[Tensor, " n"]
) -> tuple[Int[Tensor, "1 seq"], Int[Tensor, "1 seq"], Int[Tensor, " n"]]:
    """All windows in one row, without what pads the shorter ones; their positions; and where `inside` lies there."""
    columns = torch.arange(read.shape[1]).expand_as(read)  # on the host, like `inside`
    kept = columns < torch.tensor(lengths)[:, None]
    tokens = read.flatten()[kept.flatten().nonzero()[:, 0].to(read.device)]
    return tokens[None], columns[kept][None].to(read.device), kept.flatten().cumsum(0)[inside] - 1
