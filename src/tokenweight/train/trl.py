"""TRL's SFTTrainer with a token-weighted loss."""

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel, Trainer
from trl import SFTConfig, SFTTrainer

from tokenweight.data import TRANSLATED, noted_contrast
from tokenweight.method import SCORES, ShortContext, parse_weighting
from tokenweight.models import (
    TEACHER,
    CountScorer,
    Distillation,
    Scorer,
    Teacher,
    check_tokenizer,
    context_mesh,
    find_tokenizer,
    load_model,
    score_columns,
    text_prefix,
    tokenizer_fingerprint,
    with_weighted_loss,
)
from tokenweight.train.arguments import distillation_arguments
from tokenweight.train.checkpoints import WeightingState
from tokenweight.train.checks import check_processes
from tokenweight.train.sequences import DataCollatorWithScores
from tokenweight.train.settings import counts_of
from tokenweight.train.trainer import EndOfDistillation, compile_decoder, prepare_engine, use_liger

_EXPECTED = {"loss_type": "nll", "max_length": None, "packing": False, "eval_packing": None, "padding_free": False}
"""Settings of TRL that leave sequences, scores and loss unchanged; the defaults of `TokenWeightedSFTConfig`."""


@dataclass
class TokenWeightedSFTConfig(SFTConfig):
    """Arguments of `TokenWeightedSFTTrainer`: those of TRL's `SFTConfig`, and the source of the weights.

    Sequences are not truncated (`max_length=None`), since their scores would not be.

    Raises:
        ValueError: for settings of TRL that would change sequences, scores or loss, and for settings of the short
            context that do not fit the scorer.

    Example:
        >>> TokenWeightedSFTConfig("run", weighting="sparse:keep=0.2", max_steps=240)  # doctest: +SKIP
        >>> TokenWeightedSFTConfig("run", weighting="dense", scorer="self", size=1024)  # doctest: +SKIP
    """

    weighting: str = field(
        default="dense",
        metadata={
            "help": "uniform, dense, sparse, longce, ppmi or npmi, with settings as in sparse:keep=0.1; or "
            "package.module.function."
        },
    )
    scorer: str = field(
        default="stored",
        metadata={
            "help": 'Where short losses come from: "stored" (the column short_nll), "self" (the model being trained), '
            '"base" (the same without its adapter), "count" (no model), or the folder or hub '
            "id of a model."
        },
    )
    size: int | None = field(
        default=None, metadata={"help": 'Tokens of the short context. Needed unless the scorer is "stored".'}
    )
    stride: int | None = field(
        default=None, metadata={"help": "Tokens scored by each window; by default three quarters of size."}
    )
    contrast: str | None = field(
        default=None,
        metadata={
            "help": 'Whose long losses weights compare with the short ones: "trained", those of the model as it is '
            'trained, or "scorer", those of the scorer (the column long_nll); by default trained, unless the scorer is '
            "count or the rows of `load_scores` were scored by it."
        },
    )
    distill_weight: float | None = field(
        default=None, metadata={"help": "Weight of the divergence from a teacher in the loss; by default no teacher."}
    )
    distill_teacher: str = field(
        default="stored",
        metadata={"help": 'The teacher: "stored" (columns teacher_ids, teacher_logprobs), or the name of a model.'},
    )
    distill_top_k: int | None = field(
        default=None, metadata={"help": "Tokens of each prediction of a teacher that is a model; 16 by default."}
    )
    distill_steps: int | None = field(
        default=None, metadata={"help": "Steps after which the weighted loss is left alone; by default never."}
    )
    max_length: int | None = field(default=None, metadata={"help": "None: sequences and scores are not truncated."})

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, expected in _EXPECTED.items():
            found = getattr(self, name)
            if found != expected and (found or expected):  # eval_packing may be False
                raise ValueError(f"{name} {found!r}: expected {expected!r}, which keeps scores with their tokens")
        scored = score_columns(parse_weighting(self.weighting), self.contrast or "trained") - {"ref_nll"}
        counts = self.counts  # raises
        if self.contrast is None and counts is not None and parse_weighting(self.weighting).uses_short:
            self.contrast = "scorer"
        if self.scorer != "stored" and scored and self.size is None:
            raise ValueError(f"size: expected the tokens of the short context, for the scorer {self.scorer!r}")
        if self.scorer == "stored" and (self.size, self.stride) != (None, None):
            raise ValueError(f"size {self.size}, stride {self.stride}: expected neither, as the scores are stored")
        assert self.distillation is not None  # which raises

    @property
    def distillation(self) -> dict[str, Any]:
        """Settings of the distillation; empty without one."""
        given = {name: getattr(self, f"distill_{name}") for name in ("weight", "teacher", "top_k", "steps")}
        return distillation_arguments(given) if {*given.values()} - {None, "stored"} else {}

    @property
    def counts(self) -> CountScorer | None:
        """The scorer of sequences as they are read, if it is one without a model."""
        return counts_of(self.scorer, parse_weighting(self.weighting), self.contrast)


class TokenWeightedSFTTrainer(SFTTrainer):
    """An `SFTTrainer` whose loss weights the tokens.

    SFTTrainer computes its own loss, bypassing the model's forward, and drops all columns except tokens and labels.
    Here loss and evaluation are those of `transformers.Trainer` with a bound model, and batches those of
    `DataCollatorWithScores`; data, PEFT, checkpoints and callbacks are TRL's. TRL's metrics `entropy`,
    `mean_token_accuracy` and `num_tokens` are not logged, as they need a pass that is not made.

    Example:
        >>> rows, _ = tokenweight.data.load_scores("scored")  # doctest: +SKIP
        >>> trainer = TokenWeightedSFTTrainer(
        ...     model="HuggingFaceTB/SmolLM2-135M",
        ...     args=TokenWeightedSFTConfig("run", weighting="sparse:keep=0.2"),
        ...     train_dataset=rows,
        ... )  # doctest: +SKIP
        >>> trainer.train()  # doctest: +SKIP

    Source: `SFTTrainer.compute_loss`, `_set_signature_columns_if_needed` and `add_fused_lm_head` of trl 1.16.0. Breaks
    when a newer TRL computes its loss elsewhere.
    """

    compute_loss = Trainer.compute_loss
    prediction_step = Trainer.prediction_step

    def __init__(
        self, model: str | Any, args: TokenWeightedSFTConfig | None = None, train_dataset: Any = None, **given: Any
    ) -> None:
        """Make the trainer, and bind the model.

        Args:
            model: a name, a causal language model, or a PEFT model around one.
            args: weighting, scorer, and settings of TRL.
            train_dataset: as for SFTTrainer; with the columns that the weighting uses, as `short_nll`, if the scorer is
                "stored".
            given: as for SFTTrainer, except `data_collator`.

        Raises:
            ValueError: if a setting or a column would change the sequences, the scores or the loss, or the model is not
                supported.
        """
        args = TokenWeightedSFTConfig() if args is None else args
        if not isinstance(args, TokenWeightedSFTConfig):
            raise ValueError(f"args: found a {type(args).__name__}: expected a TokenWeightedSFTConfig")
        if given.get("data_collator") is not None:
            raise ValueError("data_collator: expected none: batches are made by DataCollatorWithScores")
        if getattr(_base(model), "_token_weighting", None) is not None:
            raise ValueError(
                "model: has a weighted loss already: expected a model without one (without_weighted_loss), and "
                "weighting and scorer in args"
            )
        check_processes(args)
        _set_contrast(args, train_dataset, given.get("eval_dataset"))
        _check_columns(args, train_dataset, given.get("eval_dataset"))
        collator = DataCollatorWithScores()
        if args.counts is not None and args.size is not None:
            collator = DataCollatorWithScores(args.counts, ShortContext(args.size, args.stride))
        collate = functools.partial(_collate, collator)
        super().__init__(model, args, train_dataset=train_dataset, **{**given, "data_collator": collate})
        self._check_engine()
        base = _base(self.model)  # only now, as TRL may have replaced its head, for a chat template or by PEFT
        weighting = parse_weighting(args.weighting)
        teaching: dict[str, Any] = {"contrast": args.contrast or "trained", "distillation": self._distillation(args)}
        with_weighted_loss(base, weighting, self._scorer(base, args), **teaching)
        use_liger(self)
        compile_decoder(self)
        if weighting.history:
            self.add_callback(WeightingState())
        if (steps := args.distillation.get("steps")) is not None:
            self.add_callback(EndOfDistillation(base, steps))
        self.model_accepts_loss_kwargs = True  # the loss divides by all tokens of a step, which the Trainer counts

    def _check_engine(self) -> None:
        """Prepare sharded backends, or raise a ValueError if they would change the loss."""
        if self.aux_loss_enabled:
            raise ValueError(
                f"router_aux_loss_coef {self.router_aux_loss_coef}: the loss of the router is not added to the "
                "weighted one: expected 0.0"
            )
        prepare_engine(self)
        if context_mesh(self.accelerator) is not None:
            raise ValueError(
                "parallelism_config: has a cp_size above 1, and TRL's collators would not split scores as sequences: "
                "expected 1, or tokenweight.train.WeightedTrainer"
            )

    def _scorer(self, base: PreTrainedModel, args: TokenWeightedSFTConfig) -> Scorer | None:
        if args.counts is not None or args.scorer == "stored":
            return None
        if not score_columns(parse_weighting(args.weighting), args.contrast or "trained") - {"ref_nll"}:
            return None
        scoring = base if args.scorer in ("self", "base") else self._other(args.scorer)
        given: dict[str, Any] = {"prefix": text_prefix(self._tokenizer, {}), "adapters": args.scorer != "base"}
        return Scorer(scoring, size=args.size, stride=args.stride, **given)

    def _distillation(self, args: TokenWeightedSFTConfig) -> Distillation | None:
        settings = args.distillation
        if not settings:
            return None
        name = settings["teacher"]
        return Distillation(
            settings["weight"], None if name == "stored" else Teacher(self._other(name), settings["top_k"])
        )

    def _other(self, name: str) -> PreTrainedModel:
        """Load a model that scores or teaches, with the same tokenizer."""
        made = {"tokenizer": "args", "tokenizer_fingerprint": tokenizer_fingerprint(self._tokenizer)}
        check_tokenizer(find_tokenizer(name), name, made, "train_dataset")
        return load_model(name).to(self.args.device)

    def _set_signature_columns_if_needed(self) -> None:
        # SFTTrainer would drop all columns except tokens and labels; only those named here stay.
        columns = score_columns(parse_weighting(self.args.weighting), self.args.contrast or "trained")
        # TRL keeps this mask beside the labels where all tokens are trained, and our collator would apply it.
        masks = [name for name in TRANSLATED if name != "completion_mask" or self.completion_only_loss]
        taught = TEACHER if self.args.distillation.get("teacher") == "stored" else ()
        self._signature_columns = ["input_ids", "labels", "position_ids", *sorted(columns), *taught, *masks]


def _data_sets(train_dataset: Any, eval_dataset: Any) -> list[Any]:
    evaluated = list(eval_dataset.values()) if isinstance(eval_dataset, dict) else [eval_dataset]
    return [rows for rows in (train_dataset, *evaluated) if rows is not None]


def _set_contrast(args: TokenWeightedSFTConfig, train_dataset: Any, eval_dataset: Any) -> None:
    """Set an open contrast to that of the scores, else to trained. ValueError if they cannot be compared so."""
    own = args.scorer == "stored" and parse_weighting(args.weighting).uses_short
    noted = [noted_contrast(rows) for rows in _data_sets(train_dataset, eval_dataset)] if own else []
    if args.contrast is None:
        args.contrast = "scorer" if "scorer" in noted[:1] else "trained"
    if args.contrast == "trained" and "scorer" in noted:
        raise ValueError(
            "contrast trained: the data set was scored by a scorer whose losses cannot be compared with those of the "
            "model that is trained: expected scorer"
        )


def _check_columns(args: TokenWeightedSFTConfig, train_dataset: Any, eval_dataset: Any) -> None:
    """Check that the columns are those that the scorer needs; make TRL keep tokens unchanged where they are given.

    TRL turns masks into labels when it prepares a data set. Where it does not, all tokens would be trained.
    """
    columns = [set(getattr(rows, "column_names", None) or ()) for rows in _data_sets(train_dataset, eval_dataset)]
    masked = [names & {"completion_mask", "assistant_masks"} for names in columns if "labels" not in names]
    skip = (args.dataset_kwargs or {}).get("skip_prepare_dataset")
    if skip and any(masked):
        raise ValueError(
            f"dataset_kwargs: the rows have {', '.join(sorted(set().union(*masked)))} but no labels, and "
            "skip_prepare_dataset makes none: expected labels, -100 where nothing is to be trained"
        )
    if skip is None and not any(masked) and all("input_ids" in names for names in columns):
        args.dataset_kwargs = {**(args.dataset_kwargs or {}), "skip_prepare_dataset": True}
    needed = score_columns(parse_weighting(args.weighting), args.contrast or "trained")
    for names in filter(None, columns[:1] if args.distillation.get("teacher") == "stored" else []):
        if missing := [name for name in TEACHER if name not in names]:
            raise ValueError(
                f"train_dataset: found no column {missing[0]}: expected a data set of `tokenweight score --as teacher`"
                ", or the name of a model as distill_teacher"
            )
    for names in filter(None, columns):
        stored = any(name.startswith("short_nll") for name in names)
        read = needed if args.scorer == "stored" else needed & {"ref_nll"}
        if missing := [name for name in SCORES if name in read - names]:
            raise ValueError(
                f"train_dataset: found no column {missing[0]}: expected a data set of `tokenweight.data.load_scores`"
                + (', or scorer="self" in args' if args.scorer == "stored" and "ref_nll" not in missing else "")
            )
        if args.scorer != "stored" and stored:
            raise ValueError(
                f"scorer {args.scorer!r}: the data set has a column short_nll, which would be used: expected "
                'scorer="stored", or a data set without scores'
            )


def _collate(collator: DataCollatorWithScores, features: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
    if "seq_lengths" in features[0]:
        raise ValueError(
            "train_dataset: the sequences were packed by TRL (seq_lengths), which drops scores: expected sequences of "
            "`tokenweight prepare --short pack`, whose position_ids keep documents apart"
        )
    return collator(features)


def _base(model: Any) -> Any:
    """The model itself; for a PEFT model, the one that it wraps."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model
