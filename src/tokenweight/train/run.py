"""A training run, from its settings to a model folder."""

import contextlib
import os
from collections.abc import Sequence
from typing import Any, NamedTuple

import datasets
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainerCallback
from transformers.integrations.deepspeed import unset_hf_deepspeed_config

from tokenweight.data import Contents, choose_scores, has_scores, load_rows, read_contents, tokenizer_note, verify
from tokenweight.method import ShortContext
from tokenweight.models import (
    Scorer,
    check_length,
    check_tokenizer,
    check_tokens,
    find_tokenizer,
    load_config,
    load_model,
    with_weighted_loss,
)
from tokenweight.records import read_provenance
from tokenweight.train.checkpoints import find_checkpoint
from tokenweight.train.collator import DataCollatorWithScores
from tokenweight.train.records import Records, describe
from tokenweight.train.settings import Run, TrainSettings, resolve
from tokenweight.train.trainer import WeightedTrainer


class Data(NamedTuple):
    """The sequences of a run, and what is known of all of them."""

    rows: datasets.Dataset
    provenance: dict[str, Any]
    contents: Contents
    size: int | None
    """Tokens of the short context, if its scores are stored and used."""

    @property
    def longest(self) -> int:
        """Tokens of the longest sequence."""
        return self.contents.longest or 0


class Opened(NamedTuple):
    """A model, and its tokenizer if it has one."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase | None


def train(settings: TrainSettings, callbacks: Sequence[TrainerCallback] = ()) -> PreTrainedModel:
    """Run a recipe: `settings.out` becomes a model folder with `run.json`, `metrics.jsonl` and a model card.

    Raises:
        ValueError: for settings, data and models that do not fit, before any work starts; for a loss, a gradient or a
            weight that is not finite, before it is saved.
        OSError: if something cannot be written.
    """
    run = resolve(settings)
    # Or ZeRO-3 would load models in parts, which cannot be verified. The Trainer shards the model later.
    unset_hf_deepspeed_config()
    checkpoint = find_checkpoint(run.out, run.arguments)
    data = _open_data(run)
    context = run.short_context(data.longest)
    model = load_model(settings.model, dtype=settings.dtype, extend=run.extension)
    opened = Opened(model, find_tokenizer(settings.model))
    scoring = opened if (name := run.scoring_model) is None else Opened(load_model(name), find_tokenizer(name))
    before = load_config(settings.model)
    check_fit(run, data, context, opened, scoring)
    record = describe(run, data.provenance, data.contents, context, before, model.config)
    scorer = None
    if context is not None and run.weighting.uses_short:
        if scoring is not opened:
            scoring.model.to(run.arguments.device)
        scorer = Scorer(scoring.model, context, bos=getattr(opened.tokenizer, "bos_token_id", None))
    try:
        trainer = WeightedTrainer(
            model=with_weighted_loss(model, run.weighting, scorer),
            args=run.arguments,
            train_dataset=data.rows,
            data_collator=DataCollatorWithScores(),
            processing_class=opened.tokenizer,
            callbacks=[Records(record, checkpoint), *callbacks],
            size=data.size if scorer is None else scorer.context.size,
        )
        trainer.fit(checkpoint)
    finally:
        with contextlib.suppress(OSError):  # the folder that the Trainer made, if nothing was written to it
            run.out.rmdir()
    return model


def _open_data(run: Run) -> Data:
    folder = run.settings.data
    rows, provenance, size = load_rows(folder), read_provenance(folder), None
    if run.reads_scores:
        rows, provenance = choose_scores(rows, folder, size=run.settings.size, stride=run.settings.stride)
        size = provenance.get("context", {}).get("size", run.settings.size)
    if os.environ.get("RANK", "0") == "0":  # the others would read and compare the same files
        verify(folder)
    return Data(rows, provenance, read_contents(folder), size)


def check_fit(run: Run, data: Data, context: ShortContext | None, model: Opened, scorer: Opened) -> None:
    """Raise a ValueError unless data, model and scorer fit one another: scores, lengths, token ids, tokenizers.

    Args:
        run: the resolved settings.
        data: the sequences.
        context: of the scorer, if there is one.
        model: to be trained.
        scorer: the model itself where no other model scores.
    """
    folder = run.settings.data
    if run.settings.scorer != "stored" and has_scores(data.rows):
        raise ValueError(
            f"scorer {run.settings.scorer!r}: {folder} holds stored scores (short_nll), which would be used: set "
            "scorer to stored, or data to the sequences before scoring"
        )
    check_length(model.model.config, data.longest, f"{folder}: rows")
    check_tokens(model.model.config, *data.contents.token_range, folder)
    check_tokenizer(model.tokenizer, run.settings.model, data.provenance, folder)
    if context is None or scorer is model:
        return
    if model.tokenizer is not None:
        made = tokenizer_note(model.tokenizer, run.settings.model)
        check_tokenizer(scorer.tokenizer, run.settings.scorer, made, folder)
    check_tokens(scorer.model.config, *data.contents.token_range, folder)
    check_length(scorer.model.config, context.size, "size: windows")
