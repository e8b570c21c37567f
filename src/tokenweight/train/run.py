"""A stock `transformers.Trainer` around a model with a weighted loss."""

import contextlib
import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import datasets
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainerCallback
from transformers.integrations.deepspeed import unset_hf_deepspeed_config

from tokenweight.data import choose_scores, has_scores, load_rows, row_lengths, token_range
from tokenweight.method import ShortContext, Weighting, parse_weighting
from tokenweight.models import (
    Scorer,
    check_length,
    check_tokenizer,
    check_tokens,
    context_mesh,
    find_tokenizer,
    load_model,
    tokenizer_fingerprint,
    with_weighted_loss,
)
from tokenweight.records import environment, read_provenance
from tokenweight.train.card import run_facts
from tokenweight.train.checkpoints import find_checkpoint
from tokenweight.train.collator import collate
from tokenweight.train.engines import prepare_engine
from tokenweight.train.records import FinishedRun, Records, resumed
from tokenweight.train.settings import TrainSettings, extension_arguments, training_arguments
from tokenweight.train.trainer import WeightedTrainer

_NOT_RESUMED = ("resume_from_checkpoint", "false")


def train(settings: TrainSettings, callbacks: Sequence[TrainerCallback] = ()) -> PreTrainedModel:
    """Run a recipe. `settings.out` then is a folder of transformers, with `run.json`, `metrics.jsonl` and a card.

    Raises:
        ValueError: for settings, rows and models that do not fit, before any work starts; for a loss, a gradient or a
            weight that is not finite, before it is saved.
        OSError: if something cannot be written.
    """
    weighting, out = parse_weighting(settings.weighting), Path(settings.out)
    given = {name: value for name, value in settings.trainer.items() if (name, str(value).lower()) != _NOT_RESUMED}
    # Or the Trainer would wait for the device at each batch, to replace the losses that are to stop a run.
    arguments = training_arguments({"logging_nan_inf_filter": False, **given}, out)
    # Or ZeRO-3 would load models in parts, which cannot be proved. The Trainer divides the model later.
    unset_hf_deepspeed_config()
    checkpoint = find_checkpoint(out, arguments.resume_from_checkpoint)
    rows, provenance = _open_rows(settings, weighting)
    lengths = row_lengths(rows).tolist()
    context = _short_context(settings, max(lengths))
    model, tokenizer = _open_model(settings, rows, provenance, max(lengths))
    scorer = None
    if context is not None and weighting.uses_short:
        own = settings.scorer == "self"
        scoring = model if own else _open_scorer(settings, rows, tokenizer, context.size).to(arguments.device)
        scorer = Scorer(scoring, context, bos=None if tokenizer is None else tokenizer.bos_token_id)
    windows = {} if context is None else dataclasses.asdict(context)
    resolved = {**dataclasses.asdict(settings), "weighting": str(weighting), **windows}
    run = {"settings": resolved, "data": provenance, **environment()}
    run |= run_facts(model, arguments, settings, provenance, lengths)
    stored = provenance.get("size") if isinstance(provenance.get("size"), int) else settings.size
    trainer = WeightedTrainer(
        model=with_weighted_loss(model, weighting, scorer),
        args=arguments,
        train_dataset=rows,
        data_collator=collate,
        processing_class=tokenizer,
        callbacks=[Records(resumed(run, out, checkpoint)), *callbacks],
        size=None if not weighting.uses_short else stored if context is None else context.size,
    )
    try:
        prepare_engine(trainer)
        if (ranks := context_mesh(trainer.accelerator)) is not None:
            with_weighted_loss(model, weighting, scorer, ranks)
        with contextlib.suppress(FinishedRun):
            trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
        trainer.save_trained()
    finally:
        trainer.statistics.remove()
        with contextlib.suppress(OSError):  # the folder that the Trainer made, if nothing was written to it
            out.rmdir()
    return model


def _open_rows(settings: TrainSettings, weighting: Weighting) -> tuple[datasets.Dataset, dict[str, Any]]:
    rows, provenance = load_rows(settings.data), read_provenance(settings.data)
    _check_scores(settings, rows)
    if settings.scorer == "stored" and weighting.uses_short:
        rows, provenance = choose_scores(rows, settings.data, size=settings.size, stride=settings.stride)
    return rows, provenance


def _open_model(
    settings: TrainSettings, rows: datasets.Dataset, provenance: dict[str, Any], length: int
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase | None]:
    model = load_model(settings.model, dtype=settings.dtype, extend=extension_arguments(settings.extend))
    check_length(model.config, length, f"{settings.data}: rows")
    check_tokens(model.config, *token_range(rows), settings.data)
    tokenizer = find_tokenizer(settings.model)
    check_tokenizer(tokenizer, settings.model, provenance, settings.data)
    return model, tokenizer


def _open_scorer(
    settings: TrainSettings, rows: datasets.Dataset, tokenizer: PreTrainedTokenizerBase | None, size: int
) -> PreTrainedModel:
    scorer, theirs = load_model(settings.scorer), find_tokenizer(settings.scorer)
    if tokenizer is not None:
        made = {"tokenizer": settings.model, "tokenizer_fingerprint": tokenizer_fingerprint(tokenizer)}
        check_tokenizer(theirs, settings.scorer, made, settings.data)
    check_tokens(scorer.config, *token_range(rows), settings.data)
    check_length(scorer.config, size, "size: windows")
    return scorer


def _check_scores(settings: TrainSettings, rows: datasets.Dataset) -> None:
    stored = has_scores(rows)
    needed = parse_weighting(settings.weighting).uses_short
    if settings.scorer == "stored" and needed and not stored:
        raise ValueError(
            f"data: {settings.data} has no column short_nll: score it with `tokenweight score`, or set scorer to self"
        )
    if settings.scorer != "stored" and stored:
        raise ValueError(
            f"scorer: {settings.scorer!r}, but {settings.data} holds stored scores (short_nll), which would be used: "
            "set scorer to stored, or data to the rows before scoring"
        )


def _short_context(settings: TrainSettings, length: int) -> ShortContext | None:
    if settings.scorer == "stored":
        return None
    size = length // 4 if settings.size is None else settings.size
    stride = ShortContext(size).stride if settings.stride is None else settings.stride
    context = ShortContext(size=size, stride=stride)
    if context.size >= length:
        raise ValueError(f"size: {context.size} tokens, but rows hold {length}: no token would have a shorter context")
    return context
