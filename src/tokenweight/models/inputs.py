"""The inputs of a bound model beside the tokens: each is used in all passes, or rejected by name."""

import dataclasses
import functools
from collections.abc import Iterator, Set
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float, Int, Shaped
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from transformers.utils import TransformersKwargs

from tokenweight.method import SCORES, NonFinite, TopK, prediction_mask
from tokenweight.models.checks import UnknownToken
from tokenweight.models.context_parallel import SequenceShard, sequence_shard

TEACHER = ("teacher_ids", "teacher_logprobs")
"""Columns of a teacher's likeliest tokens: `[seq, k]`, aligned with tokens."""
OF_THE_LOSS = (*SCORES, *TEACHER, "num_items_in_batch")
"""Inputs of a bound model beside those of the model itself."""
SCORE_OPTIONS = {"short_nll": "", "long_nll": " --long", "ref_nll": " --as reference", "divergence": " --divergence kl"}
SCORE_OPTIONS |= dict.fromkeys(TEACHER, " --as teacher")
"""The options with which `tokenweight score` writes each column of scores."""
_REFUSED = ("inputs_embeds", "logits_to_keep", "return_dict", "cache", "past_key_values")
"""Inputs of causal models that ask for something other than the loss of the tokens."""
_PACKING = ("cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k", "seq_idx")
"""Inputs by which kernels know the documents that position_ids separate."""


def check_names(given: dict[str, Any], known: Set[str], *, scored: bool) -> None:
    """Raise a ValueError unless every input is known, and valid in a pass with a short context, too.

    Args:
        given: all inputs of the model by name.
        known: the names of the model's inputs, and of those beside them.
        scored: whether the weights are computed from scores of the tokens.
    """
    present = {name: value for name, value in given.items() if value is not None}
    if present.get("return_dict") is True:
        del present["return_dict"]
    refused = [name for name in _REFUSED if name in present]
    unknown = sorted(present.keys() - known - set(TransformersKwargs.__annotations__))
    if refused or unknown or "input_ids" not in present:
        found = ", ".join([*refused, *unknown]) or "no input_ids"
        expected = "masks as labels of -100, and documents as position_ids"
        if "fused_lm_head" in unknown:  # of TRL, which asks for a loss of its own
            expected = "tokenweight.train.trl.TokenWeightedSFTTrainer in place of SFTTrainer"
        raise ValueError(
            f"a model with a weighted loss takes input_ids, labels and {', '.join(SCORES)}: found {found}, which would "
            f"not be heard: expected {expected}"
        )
    if "position_ids" not in present and (told := [name for name in _PACKING if name in present]):
        raise ValueError(f"{told[0]}: found without position_ids: expected position_ids that restart at each document")
    ours = ("input_ids", "labels", "position_ids", "attention_mask", "shift_labels", *OF_THE_LOSS, *_PACKING)
    others = [name for name, value in present.items() if name not in ours and isinstance(value, Tensor)]
    if scored and others:
        raise ValueError(
            f"{others[0]}: the model reads it beside the tokens, but no pass with a short context does, so that both "
            "losses of a token would not differ by its context alone: expected tokens only, or a weighting without "
            "short losses"
        )


@dataclass(frozen=True)
class Batch:
    """The inputs of a bound model that is given labels, as parsed by `read_batch`."""

    tokens: Int[Tensor, "batch part"]
    labels: Int[Tensor, "batch seq"]
    """Labels of whole sequences, aligned with tokens."""
    scores: dict[str, Float[Tensor, "batch seq"]]
    """Those of `SCORES` that are used and were given, of whole sequences."""
    num_items: Tensor | int | None
    position_ids: Int[Tensor, "batch part"] | None
    attention_mask: Tensor | None
    rest: dict[str, Any]
    """The other inputs of the model's decoder."""
    share: SequenceShard | None
    """The part of the sequences that the tokens are, where ranks split them."""
    teacher: TopK | None = None
    """A teacher's columns, if they were given."""

    @functools.cached_property
    def real(self) -> Bool[Tensor, "batch seq"] | None:
        """False at padding, for whole sequences; None without any, and where a mask is not per token."""
        mask = self.attention_mask
        if mask is None or mask.shape != self.tokens.shape:
            return None
        return mask != 0 if self.share is None else self.share.in_order((mask != 0).to(torch.uint8)) != 0

    @functools.cached_property
    def read_by_scorer(self) -> tuple[Tensor, dict[str, Any]]:
        """The tokens of whole sequences, and their positions and attention mask by name."""
        if self.share is None:
            return self.tokens, {"position_ids": self.position_ids, "attention_mask": self.attention_mask}
        of_all = {"position_ids": self.share.positions, "attention_mask": self.real}
        return self.share.in_order(self.tokens), of_all

    @functools.cached_property
    def mask(self) -> Bool[Tensor, "batch seq"]:
        """True where a token is predicted and counts: a label other than -100, after another token of its document."""
        mask = prediction_mask(self.labels, self.position_ids if self.share is None else None)
        return mask if self.real is None else mask & self.real & self.real.roll(1, dims=1)

    def check(self, *, scored: bool, scorer: int | None, vocabulary: int) -> "tuple[Batch, Tensor | None]":
        """Reject tokens that would be weighted or counted wrongly, with one host-device synchronization.

        Args:
            scored: whether the weights are computed from scores of the tokens.
            scorer: the vocabulary size of a scorer, if one is to read the batch.
            vocabulary: that of the model.

        Returns:
            The batch, without a mask that marks no padding; and the numbers of the predicted tokens, where ranks do not
            split the sequences.

        Raises:
            ValueError: for such a token, with its row and position.
        """
        if scorer is not None and self.attention_mask is not None and self.real is None:
            shape = list(self.attention_mask.shape)
            raise ValueError(
                f"attention_mask has shape {shape}: expected that of input_ids, {list(self.tokens.shape)}: a scorer "
                "cuts windows out of it"
            )
        wrong = dict(self._wrong(scored, scorer, vocabulary))
        if not wrong:  # split, without scores
            return self, None
        places = torch.stack([*wrong.values()])
        padded = places.new_ones(()) if self.real is None else ~self.real.all()
        num_wrong, num_predicted, padding = torch.stack([places.sum(), self.mask.sum(), padded.long()]).tolist()
        if num_wrong:
            raise self._error(places, [*wrong], scorer)
        if self.share is not None:
            return self, None
        batch = self if padding else dataclasses.replace(self, attention_mask=None)
        return batch, self.mask.flatten().byte().argsort(descending=True, stable=True)[:num_predicted]

    def _error(self, places: Tensor, wrong: list[tuple[str, str]], scorer: int | None) -> ValueError:
        """The error for the first place where something is wrong."""
        number, row, column = places.nonzero()[0].tolist()
        name, expected = wrong[number]
        if name == "input_ids":
            return UnknownToken(int(self.read_by_scorer[0][row, column]), row, column, scorer or 0)
        values: dict[str, Any] = {**self.scores, "labels": self.labels, "attention_mask": self.real}
        value = values[name][row, column].item()
        if name in SCORES:
            return NonFinite(name, row, column, value)
        return ValueError(f"{name} of row {row}, position {column} is {int(value)}: expected {expected}")

    def _wrong(self, scored: bool, scorer: int | None, vocabulary: int) -> Iterator[tuple[tuple[str, str], Tensor]]:
        """For each input, and what is expected of it, the tokens that violate it."""
        named, counted = self.labels != -100, self.num_items is not None
        for name, values in self.scores.items():
            yield (name, "a finite number"), self.mask & ~values.isfinite()
        later = torch.ones_like(named)
        later[:, 0] = False
        if self.share is not None and self.real is not None:
            expected = "padding only after a sequence: where ranks split it, attention is causal and hears no mask"
            yield ("attention_mask", expected), self.real & later & ~self.real.roll(1, dims=1)
        if scorer is not None:
            read = self.read_by_scorer[0]
            yield ("input_ids", "tokens that the scorer knows"), (read < 0) | (read >= scorer)
        if scored and (self.share is None or scorer is not None):  # whole tokens are gathered for a scorer only
            other = self.labels != self.read_by_scorer[0]
            yield ("labels", "the token itself, of which its scores speak"), self.mask & other
        if self.share is not None:
            return
        # A target beyond the head would end a process that uses a GPU.
        beyond = (self.labels < 0) | (self.labels >= vocabulary)
        yield ("labels", f"-100 or a token id from 0 to {vocabulary - 1}"), self.mask & beyond
        if counted and self.position_ids is not None:
            expected = "-100 where a document begins, which nothing predicts (tokenweight.train.DataCollatorWithScores)"
            yield ("labels", expected), named & later & (self.position_ids == 0)
        if self.real is None:
            return
        yield ("labels", "-100 at padding, where attention_mask is 0"), named & ~self.real
        begins = self.real & ~(self.real.roll(1, dims=1) & later)
        if counted:
            yield ("labels", "-100 at the token after padding, which nothing predicts"), named & later & begins
        if scorer is not None:
            expected = "1 from the first token of a sequence to its last, and padding only before and after"
            yield ("attention_mask", expected), begins & (begins.cumsum(dim=1) > 1)


def read_batch(given: dict[str, Any], context: DeviceMesh | None, used: Set[str] = frozenset(SCORES)) -> Batch:
    """Parse the inputs of a bound model, after `check_names`.

    Args:
        context: the ranks over which sequences are split.
        used: those of `SCORES` that weights are computed from; others are left out.

    Raises:
        ValueError: if labels or scores do not have the shape of the tokens, or scores are not exact.
    """
    rest, share = dict(given), None
    names = ("input_ids", "labels", "num_items_in_batch", "position_ids", "attention_mask", "shift_labels")
    tokens, labels, num_items, position_ids, mask, shift_labels = (rest.pop(name, None) for name in names)
    rest.pop("return_dict", None)
    rest.pop("use_cache", None)  # never used: with labels there is nothing to continue
    columns = {name: rest.pop(name, None) for name in SCORES}
    teacher = _teacher(rest.pop("teacher_ids", None), rest.pop("teacher_logprobs", None), tokens)
    scores = {name: unpack_bits(columns[name]) for name in SCORES if name in used and columns[name] is not None}
    if context is not None:
        share = sequence_shard(position_ids, context)
        labels = share.labels(shift_labels)
        scores = {name: share.rows(name, values) for name, values in scores.items()}
    elif shift_labels is not None:
        raise ValueError(
            "a model with a weighted loss found shift_labels, as of sequences that are split over ranks: expected "
            "with_weighted_loss(..., context=tokenweight.models.context_mesh(accelerator))"
        )
    elif position_ids is not None:
        position_ids = position_ids.expand(tokens.shape)
    if share is None and labels.shape != tokens.shape:
        raise ValueError(f"labels have shape {list(labels.shape)}: expected that of input_ids, {list(tokens.shape)}")
    for name, values in scores.items():
        _check_scores(name, values, labels)
    return Batch(tokens, labels, scores, num_items, position_ids, mask, rest, share, teacher)


def _teacher(ids: Tensor | None, logprobs: Tensor | None, tokens: Tensor) -> TopK | None:
    if ids is None or logprobs is None:
        return None
    if ids.shape != logprobs.shape or ids.shape[:-1] != tokens.shape:
        shapes = f"{list(ids.shape)} and {list(logprobs.shape)}"
        expected = f"[{', '.join(map(str, tokens.shape))}, k]"
        raise ValueError(f"teacher_ids and teacher_logprobs have shapes {shapes}: expected {expected}")
    return TopK(ids, unpack_bits(logprobs))


def _check_scores(name: str, values: Tensor, labels: Tensor) -> None:
    if values.shape != labels.shape:
        raise ValueError(f"{name} has shape {list(values.shape)}: expected that of labels, {list(labels.shape)}")
    if values.dtype not in (torch.float32, torch.float64):
        raise ValueError(
            f"{name} came as {values.dtype}, in which a loss of 8 nats is off by 0.03 or worse: expected "
            "float32. DeepSpeed, and FSDP2 in 16 bits, cast what a batch holds: use "
            "tokenweight.train.DataCollatorWithScores"
        )


def documents_of(
    position_ids: Int[Tensor, "batch seq"] | None, attention_mask: Shaped[Tensor, "batch seq"] | None
) -> Int[Tensor, "batch seq"] | None:
    """Positions that restart at 0 where padding begins and ends, too: no window then reads both padding and text."""
    if attention_mask is None or attention_mask.all():  # one wait for the device, where each document costs one
        return position_ids
    real = attention_mask != 0
    columns = torch.arange(real.shape[1], device=real.device).expand(real.shape)
    edges = torch.cat([torch.zeros_like(real[:, :1]), real[:, 1:] != real[:, :-1]], dim=1)
    starts = columns.where(edges, 0).cummax(dim=1).values
    positions = columns if position_ids is None else position_ids
    return positions - positions.gather(1, starts)


def pack_bits(values: Float[Tensor, "..."]) -> Int[Tensor, "..."]:
    """The bits of float32 values as int32: DeepSpeed and FSDP2 cast float columns of a batch to 16 bits."""
    return values.to(torch.float32).view(torch.int32)


def unpack_bits(values: Shaped[Tensor, "..."]) -> Shaped[Tensor, "..."]:
    """The inverse of `pack_bits`; values that are not integers of 32 bits are returned as they are."""
    return values.view(torch.float32) if values.dtype == torch.int32 else values
