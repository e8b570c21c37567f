"""TRL's SFTTrainer around a model with a weighted loss."""

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn
from transformers import Trainer
from trl import SFTConfig, SFTTrainer

from tokenweight.train.collator import DataCollatorWithScores

_EXPECTED = {"loss_type": "nll", "max_length": None, "packing": False, "eval_packing": None, "padding_free": False}
"""Settings of TRL with which rows, scores and loss stay as they are."""


class TokenWeightedSFTTrainer(SFTTrainer):
    """An `SFTTrainer` whose loss is that of the model, which `with_weighted_loss` has bound.

    SFTTrainer computes its own loss, past the model's forward, and knows no columns but tokens and labels. Here loss
    and evaluation are those of `transformers.Trainer`, and batches those of `DataCollatorWithScores`; data, PEFT,
    checkpoints and callbacks are TRL's. TRL's metrics `entropy`, `mean_token_accuracy` and `num_tokens` are not
    logged: they come from the pass that is not made.

    Source: `SFTTrainer.compute_loss`, `_set_signature_columns_if_needed` and `add_fused_lm_head` of trl 1.16.0.
    """

    compute_loss = Trainer.compute_loss
    prediction_step = Trainer.prediction_step

    def __init__(self, model: nn.Module, args: SFTConfig, **given: Any) -> None:
        """Make the trainer.

        Args:
            model: bound by `with_weighted_loss`; of a PEFT model, the base model is.
            args: with `max_length=None` and without packing.
            given: as of SFTTrainer, but for `data_collator`.

        Raises:
            ValueError: if the model is not bound, or a setting would change the rows, the scores or the loss.
        """
        if "data_collator" in given:
            raise ValueError("data_collator: expected none: batches are made by DataCollatorWithScores")
        for name, expected in _EXPECTED.items():
            found = getattr(args, name, "nothing")
            if found != expected and (found or expected):  # eval_packing may be False
                raise ValueError(f"SFTConfig: {name} is {found!r}: expected {expected!r} (docs/train.md)")
        if getattr(_base(model), "_token_weighting", None) is None:
            raise ValueError(
                f"model: a {type(model).__name__} without a weighted loss: expected what with_weighted_loss returns"
            )
        _check_masks(args, given)
        super().__init__(model, args, data_collator=_collate, **given)
        base = _base(self.model)
        base._token_weighting.parts.check_head(base)
        if self.aux_loss_enabled:
            raise ValueError(
                f"SFTConfig: router_aux_loss_coef is {self.router_aux_loss_coef}, a loss that is not added to the "
                "weighted one: expected 0.0"
            )

    def _set_signature_columns_if_needed(self) -> None:
        # SFTTrainer would leave out all but tokens and labels; what is named here stays, what is not goes.
        self._signature_columns = ["input_ids", "labels", "position_ids", "short_nll", "seq_lengths"]


def _check_masks(args: SFTConfig, given: dict[str, Any]) -> None:
    """Masks of TRL become labels when it prepares a data set; where it does not, all tokens would be trained."""
    if not (args.dataset_kwargs or {}).get("skip_prepare_dataset"):
        return
    evaluated = given.get("eval_dataset")
    for rows in [given.get("train_dataset"), *(evaluated.values() if isinstance(evaluated, dict) else [evaluated])]:
        columns = set(getattr(rows, "column_names", None) or ())
        masks = sorted(columns & {"completion_mask", "assistant_masks"})
        if masks and "labels" not in columns:
            raise ValueError(
                f"the rows have {', '.join(masks)} but no labels, and skip_prepare_dataset makes none: expected "
                "labels, -100 where nothing is to be trained"
            )


def _collate(rows: Sequence[dict[str, Any]]) -> dict[str, Tensor]:
    if "seq_lengths" in rows[0]:
        raise ValueError(
            "the rows were packed by TRL (seq_lengths), which drops scores: expected rows of `tokenweight prepare "
            "--short pack`, whose position_ids keep documents apart"
        )
    return DataCollatorWithScores()(rows)


def _base(model: Any) -> Any:
    """The model itself, of a PEFT model the one that it wraps."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model
