"""A scorer without a language model: counts of the tokens that followed the same few tokens before in the document."""

import dataclasses
import itertools
import os
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor

from tokenweight.method import ShortContext, Window, sliding_windows
from tokenweight.models.checks import UnknownToken
from tokenweight.models.scorers.contrast import Contrast
from tokenweight.models.scorers.count_divergence import Divergences, Windows
from tokenweight.models.scorers.ngrams import Order, count_orders

Item = TypeVar("Item")
_TOKENS = 1 << 17  # counted at once; more, if a document or window is longer


@dataclasses.dataclass(frozen=True)
class CountScorer:
    """Scores tokens by counts within their own document: no model, any tokenizer, no look into other documents.

    After the n tokens h before it, token x has the probability

        p_n(x) = (c(h x) + u(h) p_{n-1}(x)) / (c(h) + u(h)),    p_{-1}(x) = 1 / vocab_size,

    where c(h x) is how often x came after h before, c(h) how often any token did, and u(h) how many different ones
    (Witten-Bell; method C of PPM, without exclusion). Where h did not come before, p_n is p_{n-1}. The probability is
    p_order. Counts are those of all tokens before in the document, for the long loss, and those of the tokens that the
    window reads, for the short one. It sees what is repeated, not what it means.

    Args:
        order: the longest context, in tokens.
        vocab_size: that of the tokenizer; the last probability is uniform over it.
        divergence: whether to compute the Kullback-Leibler divergence of the two distributions as well, which takes
            nearly all of the time.

    Raises:
        ValueError: if `order` is below 0, or `vocab_size` below 1.

    Example:
        >>> contrast = CountScorer(vocab_size=8)(torch.tensor([[1, 2, 3, 4, 5, 3, 4, 2, 1, 2]]), ShortContext(4, 1))
        >>> (contrast.short_nll - contrast.long_nll)[0, -1].item() > 1  # the 2 after the 1, from beyond the window
        True

    Source: Witten & Bell 1991; the contrast of counts is ours (docs/scorers.md).
    """

    order: int = 4
    vocab_size: int = 1 << 18
    divergence: bool = True

    def __post_init__(self) -> None:
        for name, least in (("order", 0), ("vocab_size", 1)):
            if getattr(self, name) < least:
                raise ValueError(f"{name}={getattr(self, name)}: expected at least {least}")

    def __str__(self) -> str:
        """Its name on a command line and in recipes, without settings that only decide which columns there are."""
        return f"count:order={self.order},vocab_size={self.vocab_size}"

    @property
    def provenance(self) -> dict[str, Any]:
        """Provenance of the scores, for `scores.json`."""
        return {"model": str(self), "contrast": "scorer", **({"divergence": "kl"} if self.divergence else {})}

    def check_tokens(self, largest: int, folder: str | os.PathLike[str]) -> None:
        """Raise a ValueError if a folder holds tokens, up to `largest`, that the vocabulary does not have."""
        if largest >= self.vocab_size:
            raise ValueError(
                f"{folder}: token {largest} is not in the vocabulary of {self}: expected a larger one, as in "
                f"count:vocab_size={largest + 1}"
            )

    def __call__(
        self,
        tokens: Int[Tensor, "batch seq"],
        context: ShortContext,
        *,
        position_ids: Int[Tensor, "batch seq"] | None = None,
    ) -> Contrast:
        """Both losses of every token, and the divergence of the long distribution from the short one.

        Args:
            tokens: sequences of one length.
            context: size and stride of the windows. The first `size` tokens of a document have the same losses.
            position_ids: where they restart at 0, a document begins. By default each sequence is one document.

        Returns:
            Nats, float32, on the device of `tokens`. Column t belongs to token t.

        Raises:
            ValueError: for a token that is not below `vocab_size`, with row and position.
        """
        ids = tokens.cpu().numpy().astype(np.int64)
        if ((ids < 0) | (ids >= self.vocab_size)).any():
            row, position = np.argwhere((ids < 0) | (ids >= self.vocab_size))[0].tolist()
            raise UnknownToken(int(ids[row, position]), row, position, self.vocab_size)
        begins = np.zeros(ids.shape, dtype=bool)
        begins[:, :1] = True
        if position_ids is not None:
            begins |= position_ids.cpu().numpy() == 0
        ids, edges = ids.ravel(), [*np.flatnonzero(begins).tolist(), ids.size]
        scored = np.zeros((3, ids.size))
        for part in _parts(list(itertools.pairwise(edges)), lambda document: document[1] - document[0]):
            first, stop = part[0][0], part[-1][1]
            scored[:, first:stop] = self._score(ids[first:stop], [begin - first for begin, _ in part], context)
        found = torch.from_numpy(scored.astype(np.float32)).view(3, *tokens.shape).to(tokens.device)
        return Contrast(found[0], found[1], found[2] if self.divergence else None)

    def _score(self, ids: np.ndarray, begins: Sequence[int], context: ShortContext) -> np.ndarray:
        """Long and short losses and divergences of concatenated documents, which begin where `begins` says."""
        lengths = np.diff([*begins, len(ids)])
        first = np.repeat(begins, lengths)
        orders = count_orders(ids, first, self.order)
        long_nll = self._losses(orders, len(ids))
        short_nll, divergence = long_nll.copy(), np.zeros(len(ids))
        divergences = Divergences(orders, first, self.vocab_size) if self.divergence else None
        windows = [
            Window(*(begin + place for place in window))
            for begin, length in zip(begins, lengths.tolist())
            for window in sliding_windows(length, context.size, context.stride)
        ]
        for part in map(Windows.of, _parts(windows, lambda window: window.stop - window.start)):
            short = count_orders(ids[part.read], part.begins, self.order)
            scored = part.read[part.scored]
            short_nll[scored] = self._losses(short, len(part.read))[part.scored]
            if divergences is not None:
                divergence[scored] = divergences.of(part, short)
        long_nll[begins] = short_nll[begins] = 0
        return np.stack([long_nll, short_nll, divergence])

    def _losses(self, orders: Sequence[Order], num: int) -> np.ndarray:
        """The loss of each of `num` tokens, in nats."""
        probability = np.full(num, 1 / self.vocab_size)
        for one in orders:
            lower, contexts = probability[one.tokens], np.maximum(one.contexts, 1)  # no context: hits and kinds are 0
            higher = (one.hits + one.kinds * lower) / (contexts + one.kinds)
            probability[one.tokens] = np.where(one.contexts > 0, higher, lower)
        return -np.log(probability)


def _parts(items: Sequence[Item], num_tokens: Callable[[Item], int]) -> Iterator[Sequence[Item]]:
    """Consecutive items, about `_TOKENS` tokens together."""
    first = total = 0
    for number, item in enumerate(items):
        if number > first and total + num_tokens(item) > _TOKENS:
            yield items[first:number]
            first, total = number, 0
        total += num_tokens(item)
    if items:
        yield items[first:]


def count_scorer(name: str) -> CountScorer | None:
    """The scorer named `count`, `count:order=4` or `count:order=4,vocab_size=50000`; None for other names.

    Raises:
        ValueError: for an unknown setting or an invalid value.
    """
    kind, _, text = name.partition(":")
    if kind != "count":
        return None
    settings: dict[str, Any] = {}
    for item in filter(None, text.split(",")):
        key, _, value = item.partition("=")
        if key.strip() not in ("order", "vocab_size") or not value.strip().isdecimal() or key.strip() in settings:
            raise ValueError(f"scorer {name}: found {item!r}: expected numbers, as in count:order=4,vocab_size=50000")
        settings[key.strip()] = int(value)
    return CountScorer(**settings)
