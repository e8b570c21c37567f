"""A training run, from its settings to a model folder."""

import contextlib
import os
from collections.abc import Sequence
from typing import Any

from transformers import PreTrainedModel, TrainerCallback
from transformers.integrations.deepspeed import unset_hf_deepspeed_config

from tokenweight.data import choose_scores, has_scores, load_rows, read_contents, tokenizer_note, verify
from tokenweight.models import Scorer, check_fit, find_tokenizer, load_config, load_model, with_weighted_loss
from tokenweight.records import read_provenance
from tokenweight.train.checkpoints import find_checkpoint
from tokenweight.train.collator import DataCollatorWithScores
from tokenweight.train.records import Records, describe
from tokenweight.train.settings import TrainSettings, resolve
from tokenweight.train.trainer import WeightedTrainer


def train(settings: TrainSettings, callbacks: Sequence[TrainerCallback] = ()) -> PreTrainedModel:
    """Run a recipe: `settings.out` becomes a model folder with `run.json`, `metrics.jsonl` and a model card.

    Raises:
        ValueError: if settings, data and models do not fit, before any work; for a loss, gradient or weight that is not
            finite, before it is saved.
        OSError: if something cannot be written.
    """
    run = resolve(settings)
    checkpoint = find_checkpoint(run.out, run.arguments)
    rows, contents = load_rows(settings.data), read_contents(settings.data)
    run.check_scores(has_scores(rows))
    scores: dict[str, Any] = {}
    if run.reads_scores:
        rows, scores = choose_scores(rows, settings.data, size=settings.size, stride=settings.stride)
    if os.environ.get("RANK", "0") == "0":  # the others would read and compare the same files
        verify(settings.data)
    provenance = {**read_provenance(settings.data), **scores}
    context = run.short_context(contents.longest or 0)
    # Or ZeRO-3 would load models in parts, which cannot be verified. The Trainer shards the model later.
    unset_hf_deepspeed_config()
    before, tokenizer = load_config(settings.model), find_tokenizer(settings.model)
    model = load_model(settings.model, dtype=settings.dtype, extend=run.extension)
    scoring = model
    if run.scoring_model is not None:
        scoring, theirs = load_model(run.scoring_model), find_tokenizer(run.scoring_model)
    sequences: dict[str, Any] = {"folder": settings.data, "token_range": contents.token_range}
    check_fit(model.config, tokenizer, settings.model, **sequences, longest=contents.longest, provenance=provenance)
    if run.scoring_model is not None and context is not None:
        sequences["provenance"] = {} if tokenizer is None else tokenizer_note(tokenizer, model.name_or_path)
        check_fit(scoring.config, theirs, run.scoring_model, **sequences, longest=context.size, what="size: windows")
        scoring.to(run.arguments.device)
    record = describe(run, provenance, contents, context, before, model.config)
    scored = context is not None and run.weighting.uses_short
    bos = getattr(tokenizer, "bos_token_id", None)
    scorer = Scorer(scoring, context, prefix=() if bos is None else (bos,)) if scored else None
    try:
        trainer = WeightedTrainer(
            model=with_weighted_loss(model, run.weighting, scorer),
            args=run.arguments,
            train_dataset=rows,
            data_collator=DataCollatorWithScores(),
            processing_class=tokenizer,
            callbacks=[Records(record, checkpoint), *callbacks],
            size=scores.get("context", {}).get("size"),
        )
        trainer.fit(checkpoint)
    finally:
        with contextlib.suppress(OSError):  # the folder that the Trainer made, if nothing was written to it
            run.out.rmdir()
    return model
