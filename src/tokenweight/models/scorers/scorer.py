"""The loss of every token when the model sees only a short context."""

import contextlib
import copy
import functools
import logging
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeVar, cast

import torch
from accelerate.utils.memory import clear_device_cache, should_reduce_batch_size
from jaxtyping import Bool, Float, Int, Shaped
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from transformers import PreTrainedModel

from tokenweight.method import (
    Pass,
    Reading,
    ScoreWeighting,
    ShortContext,
    ShortLosses,
    check_finite,
    linear_divergence,
    linear_nll,
    plan_passes,
    read_passes,
)
from tokenweight.models.causal import causal_parts, check_base_is_frozen, evaluating, without_adapters
from tokenweight.models.checks import UnknownToken
from tokenweight.models.context_parallel import dealt, merged
from tokenweight.models.inputs import documents_of
from tokenweight.models.processes import any_process, is_sharded
from tokenweight.models.rope import check_stale_windows, rope_depends_on_length

logger = logging.getLogger(__name__)
Item = TypeVar("Item")
Method = TypeVar("Method", bound=Callable[..., Any])


def _with_its_adapters(method: Method) -> Method:
    """A method of a `Scorer` in which adapters are switched off, if the scorer is without them."""

    @functools.wraps(method)
    def called(self: "Scorer", *args: Any, **kwargs: Any) -> Any:
        with contextlib.nullcontext() if self.adapters else without_adapters(self.model):
            return method(self, *args, **kwargs)

    return cast(Method, called)


class ShortStates(NamedTuple):
    """States that predict tokens with the short context."""

    states: Float[Tensor, "batch seq dim"]
    scored: Bool[Tensor, "batch seq"]
    """Where windows scored a token."""
    rows: Int[Tensor, " n"]
    """The numbers of these among all tokens, in any order."""
    skipped: bool
    """Whether the first windows of documents, in which both contexts are the same, were skipped."""


class Scorer:
    """Scores tokens with a short context, without gradient, in evaluation mode and without KV cache.

    Args:
        model: the model being trained (it then scores itself, "unfrozen"), a frozen copy, or a smaller model with the
            same vocabulary.
        context: size and stride of the windows, in tokens; or, in place of it,
        size: tokens that a window reads, and
        stride: tokens that a window scores; three quarters of `size` by default, as in the paper.
        prefix: ids of the special tokens with which a text begins: they replace the first tokens of a window, in
            documents that begin with them. By default nothing is replaced.
        adapters: False switches adapters of PEFT off while the model scores: its base, as it was, is a frozen scorer
            without a second copy.
        max_tokens: most tokens per forward pass; at least one window is read. When memory does not suffice, the scorer
            halves it and continues, with a warning.

    Raises:
        ValueError: if the model is not supported, or would read windows with frequencies of longer sequences; without
            adapters, if parameters of the base are trained.

    Example:
        >>> scorer = Scorer(model, size=1024)
        >>> short_nll = scorer(tokens)  # [batch, seq], nats
        >>> model = with_weighted_loss(model, Dense(), scorer)  # or let the model score itself while it trains

    Source: Helm et al. 2025, `calculate_base_loss` of the reference code; its defects are left out (docs/papers.md).
    """

    def __init__(
        self,
        model: PreTrainedModel,
        context: ShortContext | None = None,
        *,
        size: int | None = None,
        stride: int | None = None,
        prefix: Sequence[int] = (),
        adapters: bool = True,
        max_tokens: int = 32768,
    ) -> None:
        if context is None:
            if size is None:
                raise ValueError("size is missing: expected the tokens of the short context, or context")
            context = ShortContext(size, stride)
        elif size is not None or stride is not None:
            raise ValueError(f"size {size}, stride {stride}: expected neither beside context, which has its own")
        if max_tokens < 1:
            raise ValueError(f"max_tokens={max_tokens}: expected at least 1")
        if len(prefix) >= context.size:
            raise ValueError(f"prefix {list(prefix)}: expected fewer tokens than size, {context.size}")
        check_stale_windows(model.config, context.size)
        self.context, self.max_tokens, self._checked = context, max_tokens, False
        if not adapters:
            check_base_is_frozen(model)
        self.model, self.prefix, self.adapters = model, tuple(prefix), adapters
        self.parts = causal_parts(model)
        self.ranks: DeviceMesh | None = None

    def __repr__(self) -> str:
        name = "the bound model"
        if self.model is not None:  # else of `of`
            name = self.model.config.name_or_path or type(self.model).__name__
        without = "" if self.adapters else ", adapters=False"
        return f"Scorer({name!r}, size={self.context.size}, stride={self.context.stride}{without})"

    def with_context(self, context: ShortContext) -> "Scorer":
        """A scorer of the same model with another short context."""
        check_stale_windows(self.model.config, context.size)
        scorer = copy.copy(self)
        scorer.context = context
        return scorer

    def of(self, model: Any, *, checked: bool = False) -> "Scorer":
        """The same scorer with its model removed (None) or put back, as it was found when this one was made.

        Args:
            checked: whether the token ids were checked already, which makes the host wait.
        """
        scorer = copy.copy(self)
        scorer.model, scorer._checked = model, checked
        return scorer

    def among(self, ranks: DeviceMesh | None) -> "Scorer":
        """The same scorer for losses by processes that share the work: all call it alike, with the same whole
        sequences, and have the losses of all tokens. Each reads some windows; for `long_nll`, some sequences."""
        scorer = copy.copy(self)
        scorer.ranks = ranks
        return scorer

    def __call__(
        self,
        tokens: Int[Tensor, "batch seq"],
        *,
        position_ids: Int[Tensor, "batch seq"] | None = None,
        attention_mask: Shaped[Tensor, "batch seq"] | None = None,
        long_nll: Float[Tensor, "batch seq"] | None = None,
    ) -> Float[Tensor, "batch seq"]:
        """The short loss of every token, windows never crossing from one packed document into another.

        Args:
            tokens: sequences of one length.
            position_ids: where they restart at 0, a document begins; larger jumps (PoSE) stay in the window. By default
                each sequence is one document.
            attention_mask: 0 at padding before and after each sequence, which no window reads.
            long_nll: the losses of the same model with the whole context. Given these, the first `size` tokens of a
                document are not read again: their short and long context are the same, and so are the losses. (With
                rotary frequencies that depend on the length of the input they are not, and are read.)

        Returns:
            Nats, float32. Column t belongs to token t; 0 for the first token of a sequence or document.

        Raises:
            NonFinite: for a loss that is not finite, with row and position.
            ValueError: if a token is not in the model's vocabulary.
        """
        given = {"position_ids": position_ids, "attention_mask": attention_mask}
        short = self.short_losses(tokens, **given, self_scored=long_nll is not None)
        return short.nll if long_nll is None else short.filled(long_nll)

    @torch.no_grad()
    def short_losses(
        self,
        tokens: Int[Tensor, "batch seq"],
        *,
        position_ids: Int[Tensor, "batch seq"] | None = None,
        attention_mask: Shaped[Tensor, "batch seq"] | None = None,
        self_scored: bool = False,
    ) -> ShortLosses:
        """The short losses of a model whose long losses are yet to come, or are those of another model.

        Args:
            self_scored: whether the long losses come from this model: then the first window of a document is not read,
                and its tokens are marked as `same_as_long`.

        The other arguments and errors are those of a call.
        """
        position_ids, passes, skipped = self._plan(tokens, position_ids, attention_mask, skip_first=self_scored)
        short_nll, scored = self.of_windows(passes, tokens, position_ids)
        return ShortLosses(short_nll, ~scored if skipped else None)

    @_with_its_adapters
    @torch.no_grad()
    def of_windows(
        self,
        passes: Sequence[Pass],
        tokens: Int[Tensor, "batch seq"],
        position_ids: Int[Tensor, "batch seq"] | None = None,
    ) -> tuple[Float[Tensor, "batch seq"], Bool[Tensor, "batch seq"]]:
        """The losses of the tokens that windows score, 0 for others; and which they are.

        Args:
            passes: the windows, in documents of `tokens`.

        The other arguments and errors are those of a call.
        """
        short_nll = self._no_losses(tokens)

        def write(hidden: Float[Tensor, "n dim"], target: Int[Tensor, " n"]) -> None:
            head, rows = self.parts.head, torch.arange(len(hidden), device=hidden.device)
            losses = linear_nll(hidden, head.weight, tokens.flatten()[target], active=rows, **head.after)
            short_nll.view(-1)[target] = losses.to(short_nll.dtype)

        scored, _ = self._read_windows(passes, tokens, position_ids, write)
        if self.ranks is not None:
            short_nll, scored = merged(short_nll, self.ranks), merged(scored, self.ranks)
        check_finite({"the short loss": short_nll}, scored)
        return short_nll, scored

    @_with_its_adapters
    @torch.no_grad()
    def short_states(
        self,
        tokens: Int[Tensor, "batch seq"],
        *,
        position_ids: Int[Tensor, "batch seq"] | None = None,
        attention_mask: Shaped[Tensor, "batch seq"] | None = None,
        self_scored: bool = True,
    ) -> ShortStates:
        """The states that predict each token with the short context, for `divergence`.

        Args, Raises: as for short losses.
        """
        head = self.parts.head.weight
        states = torch.zeros(*tokens.shape, head.shape[1], dtype=head.dtype, device=tokens.device)

        def write(hidden: Float[Tensor, "n dim"], target: Int[Tensor, " n"]) -> None:
            states.flatten(0, 1)[target] = hidden.to(head.dtype)

        position_ids, passes, skipped = self._plan(tokens, position_ids, attention_mask, skip_first=self_scored)
        return ShortStates(states, *self._read_windows(passes, tokens, position_ids, write), skipped)

    @_with_its_adapters
    @torch.no_grad()
    def long_states(
        self,
        tokens: Int[Tensor, "batch seq"],
        *,
        position_ids: Int[Tensor, "batch seq"] | None = None,
        attention_mask: Shaped[Tensor, "batch seq"] | None = None,
    ) -> Float[Tensor, "batch seq dim"]:
        """The states that predict each token with the whole sequence (or packed document) as context.

        Args, Raises: as for a call.
        """
        with evaluating(self.model):
            return self._of_rows(self.parts.states, tokens, position_ids, attention_mask)

    @_with_its_adapters
    def divergence(
        self,
        tokens: Int[Tensor, "batch seq"],
        weighting: ScoreWeighting,
        long: Float[Tensor, "batch seq dim"],
        short: ShortStates,
    ) -> tuple[Float[Tensor, "batch seq"], ShortLosses]:
        """The divergence of each token's two distributions, as `Expected(weighting)` weighs by; and its short loss.

        Args:
            weighting: the divergence is its expected score over the distribution with the long context.
            long: from `long_states`, or from the trained pass.
            short: from `short_states`.

        Returns:
            Float32; a divergence where windows scored the token, else 0.

        Raises:
            NonFinite: for a value that is not finite, with row and position.
        """
        head, targets = self.parts.head, tokens.where(short.scored, -100).flatten()
        states = (long.detach().flatten(0, 1), short.states.flatten(0, 1))
        _, short_nll, divergence = linear_divergence(
            *states, head.weight, targets, weighting, active=short.rows, **head.after
        )
        short_nll, divergence = short_nll.view_as(tokens), divergence.view_as(tokens)
        check_finite({"the short loss": short_nll, "the divergence": divergence}, short.scored)
        return divergence, ShortLosses(short_nll, ~short.scored if short.skipped else None)

    def _plan(
        self, tokens: Tensor, position_ids: Tensor | None, attention_mask: Tensor | None, *, skip_first: bool
    ) -> tuple[Tensor | None, list[Pass], bool]:
        """The positions of documents and all windows; and whether first windows are left out, as `skip_first` asks for:
        not if their losses depend on the length of what is read."""
        position_ids = documents_of(position_ids, attention_mask)
        skip_first = skip_first and not rope_depends_on_length(self.model.config)
        on_host = None if position_ids is None else position_ids.cpu()
        return position_ids, plan_passes(tokens, on_host, self.context, skip_first=skip_first), skip_first

    def _read_windows(
        self,
        passes: Sequence[Pass],
        tokens: Int[Tensor, "batch seq"],
        position_ids: Int[Tensor, "batch seq"] | None,
        write: Callable[[Tensor, Tensor], None],
    ) -> tuple[Bool[Tensor, "batch seq"], Int[Tensor, " n"]]:
        """Call `write` with the states that predict the tokens which windows score, and the places of these.

        Returns:
            Which tokens were scored, and their numbers.
        """
        self._check(tokens)
        scored, places = torch.zeros_like(tokens, dtype=torch.bool), [tokens.new_empty(0)]
        skips = position_ids is not None and bool(((position_ids.diff(dim=1) != 1) & (position_ids[:, 1:] != 0)).any())

        def read(batch: list[Pass]) -> None:
            hidden, target = self._read(batch, tokens, position_ids if skips else None)
            write(hidden, target)
            scored.view(-1)[target] = True
            places.append(target)

        with evaluating(self.model):
            self._in_batches(passes, lambda item: item.num_tokens, read, tokens.device)
        return scored, torch.cat(places)

    @_with_its_adapters
    def long_nll(
        self,
        tokens: Int[Tensor, "batch seq"],
        *,
        position_ids: Int[Tensor, "batch seq"] | None = None,
        attention_mask: Shaped[Tensor, "batch seq"] | None = None,
        states: Float[Tensor, "batch seq dim"] | None = None,
    ) -> Float[Tensor, "batch seq"]:
        """The loss of every token with the whole sequence (or packed document) as context, by the same model.

        Args, Returns, Raises: as for the short loss.
            states: from `long_states`, if they are known.
        """
        if states is None:
            long_nll = self._of_rows(self.parts.nll, tokens, position_ids, attention_mask)
            long_nll = long_nll if self.ranks is None else merged(long_nll, self.ranks)
        else:
            long_nll = self.parts.nll_of(states, tokens, position_ids)
        check_finite({"the long loss": long_nll}, torch.ones_like(tokens, dtype=torch.bool))
        return long_nll

    def _of_rows(
        self,
        of_batch: Callable[[Tensor, Tensor | None, Tensor | None], Tensor],
        tokens: Int[Tensor, "batch seq"],
        position_ids: Int[Tensor, "batch seq"] | None,
        attention_mask: Shaped[Tensor, "batch seq"] | None,
    ) -> Shaped[Tensor, "batch seq *values"]:
        """The results of `of_batch` for whole rows, as many at once as `max_tokens` allows."""
        self._check(tokens)
        found: dict[int, Tensor] = {} if self.ranks is None else dict(enumerate(self._no_losses(tokens)))

        def read(rows: list[int]) -> None:
            positions, mask = (None if of is None else of[rows] for of in (position_ids, attention_mask))
            found.update(zip(rows, of_batch(tokens[rows], positions, mask)))

        self._in_batches(list(range(len(tokens))), lambda row: tokens.shape[1], read, tokens.device)
        return torch.stack([found[row] for row in range(len(tokens))])

    def _in_batches(
        self,
        items: Sequence[Item],
        num_tokens: Callable[[Item], int],
        run: Callable[[list[Item]], None],
        device: torch.device,
    ) -> None:
        """Run over all items, `max_tokens` at a time; half as many once memory does not suffice.

        Longest first, so that items of one batch have nearly one length and the largest batch comes first. Where
        the model is sharded over processes, all run as many passes as the one with most items, since each pass
        all-gathers the weights; and none can halve its batches alone.
        """
        items = sorted(items, key=num_tokens, reverse=True)
        items = items if self.ranks is None else [*dealt(items, self.ranks)]
        together = is_sharded(self.model)
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

    def _read(
        self, passes: list[Pass], tokens: Tensor, position_ids: Tensor | None
    ) -> tuple[Float[Tensor, "n dim"], Int[Tensor, " n"]]:
        """Read windows in one forward pass: the states that predict the tokens they score, and the places of these."""
        reading = read_passes(passes, tokens, position_ids, self.prefix)
        lengths = [one.num_tokens for one in passes]
        if min(lengths) < max(lengths) and reading.position_ids is None and self.parts.packs_without_mask:
            reading = _packed(reading, lengths)
        hidden = self.parts.states(reading.tokens, reading.position_ids).flatten(0, 1)
        return hidden[reading.inside.to(tokens.device, non_blocking=True)], reading.target

    def _no_losses(self, tokens: Int[Tensor, "batch seq"]) -> Float[Tensor, "batch seq"]:
        dtype = torch.promote_types(self.parts.head.weight.dtype, torch.float32)
        return torch.zeros(tokens.shape, dtype=dtype, device=tokens.device)

    def _check(self, tokens: Tensor) -> None:
        """Raise if the model's head was replaced, or for tokens outside its vocabulary."""
        self.parts.check_head(self.model)
        if self._checked:
            return
        known = len(self.parts.head.weight)
        unknown = (tokens < 0) | (tokens >= known)
        if unknown.any():
            row, position = unknown.nonzero()[0].tolist()
            raise UnknownToken(int(tokens[row, position]), row, position, known)


def _packed(reading: Reading, lengths: Sequence[int]) -> Reading:
    """The same windows in one row, without the padding of shorter ones; their positions restart at 0.

    Args:
        lengths: tokens of each window.
    """
    read = reading.tokens
    columns = torch.arange(read.shape[1]).expand_as(read)  # on the host, like `inside`
    kept = columns < torch.tensor(lengths)[:, None]
    tokens = read.flatten()[kept.flatten().nonzero()[:, 0].to(read.device, non_blocking=True)]
    inside = kept.flatten().cumsum(0)[reading.inside] - 1
    positions = columns[kept][None].to(read.device, non_blocking=True)
    return Reading(tokens[None], positions, inside, reading.target)
