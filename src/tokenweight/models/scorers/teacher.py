"""Distillation: a teacher's likeliest tokens, which a student learns beside the text, and their share of the loss."""

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float, Int, Shaped
from torch import Tensor
from transformers import PreTrainedModel

from tokenweight.method import DistillingHead, Head, ShortContext, TopK, check_finite, linear_top_k
from tokenweight.models.scorers.scorer import Scorer


class Teacher:
    """A model that predicts with the whole sequence (or packed document) as context, in evaluation mode.

    Args:
        model: one with the student's tokenizer; usually not the student.
        top_k: tokens kept of each of its predictions.
        max_tokens: as for `Scorer`.

    Raises:
        ValueError: if the model is not supported, or knows fewer tokens than `top_k`.
    """

    def __init__(self, model: PreTrainedModel, top_k: int, *, max_tokens: int = 32768) -> None:
        self._scorer = Scorer(model, ShortContext(2), max_tokens=max_tokens)  # no window of it is read
        known = len(self._scorer.parts.head.weight)
        if not 1 <= top_k <= known:
            raise ValueError(f"top_k {top_k}: expected 1 to {known}, the tokens that the teacher knows")
        self.top_k = top_k

    @property
    def model(self) -> PreTrainedModel:
        """The model."""
        return self._scorer.model

    @torch.no_grad()
    def __call__(
        self,
        tokens: Int[Tensor, "batch seq"],
        *,
        position_ids: Int[Tensor, "batch seq"] | None = None,
        attention_mask: Shaped[Tensor, "batch seq"] | None = None,
        chosen: Bool[Tensor, "batch seq"] | None = None,
    ) -> tuple[TopK, Float[Tensor, "batch seq"]]:
        """The top k of the prediction of each token, `[batch, seq, k]`, and its loss in nats, aligned with tokens.

        The first token of a sequence or document, which nothing predicts, has ids of 0 with a probability of 0; so have
        those that are not `chosen`, if some are.

        Args, Raises: as for a call of `Scorer`.
        """
        given: dict[str, Any] = {"position_ids": position_ids, "attention_mask": attention_mask}
        states = self._scorer.long_states(tokens, **given).flatten(0, 1)
        predicted = torch.ones_like(tokens, dtype=torch.bool) if position_ids is None else position_ids != 0
        predicted[:, 0] = False
        predicted = predicted if chosen is None else predicted & chosen
        top, nll = linear_top_k(states, self._scorer.parts.head, tokens.where(predicted, -100).flatten(), self.top_k)
        nll = nll.view_as(tokens)
        check_finite({"the teacher's loss": nll}, predicted)
        return TopK(*(values.view(*tokens.shape, self.top_k) for values in top)), nll


@dataclass(frozen=True)
class Distillation:
    """Distillation from a teacher: loss = (1 - weight) * nll + weight * KL(teacher || student), each weighted.

    The token weights multiply both terms, so that a student learns from it on the tokens that a weighting chooses.

    Args:
        weight: w, above 0 and at most 1.
        teacher: predicts each batch; None, where batches have its columns `teacher_ids` and
            `teacher_logprobs` (`tokenweight score --as teacher`).

    Source: SALT (arXiv 2410.18779), its loss; that token weights multiply it, and the top k, are ours.
    """

    weight: float
    teacher: Teacher | None = None

    def __post_init__(self) -> None:
        if not 0 < self.weight <= 1:
            raise ValueError(f"distillation: weight {self.weight}: expected above 0 and at most 1")

    def top_k(self, stored: TopK | None, tokens: Tensor, mask: Tensor, **given: Tensor | None) -> TopK:
        """The teacher's top k for a batch.

        Args:
            stored: the columns of the batch, if it has them.
            mask: True where a token is predicted and counts.
            given: `position_ids` and `attention_mask` of the batch.

        Raises:
            ValueError: if there is neither teacher nor columns.
        """
        if self.teacher is None and stored is None:
            raise ValueError(
                "distillation: no teacher_ids and teacher_logprobs reached the model: expected sequences of "
                "`tokenweight score --as teacher`, and tokenweight.train.DataCollatorWithScores; or a Teacher"
            )
        top = stored if self.teacher is None else self.teacher(tokens, chosen=mask, **given)[0]
        assert top is not None
        return top

    def head(self, head: Head, top: TopK, mask: Tensor) -> DistillingHead:
        """The head of the student for a batch, of which `top` is the `top_k`.

        Raises:
            ValueError: if `top` is not a valid top k for this model.
        """
        top = top.checked(mask, len(head.weight))
        return DistillingHead(head, TopK(*(values.flatten(0, 1) for values in top)), self.weight)
