"""A training run, from its settings to a model folder."""

import contextlib
import errno
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase, TrainerCallback
from transformers.integrations.deepspeed import unset_hf_deepspeed_config

from tokenweight.data import choose_scores, has_scores, open_rows, text_prefix, tokenizer_note, verify
from tokenweight.models import Scorer, check_fit, find_tokenizer, identity, load_config, load_model, with_weighted_loss
from tokenweight.records import read_provenance
from tokenweight.train.checkpoints import find_checkpoint
from tokenweight.train.collator import DataCollatorWithScores
from tokenweight.train.records import Records, describe
from tokenweight.train.settings import Run, TrainSettings, resolve
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
    with _folder(run.out, main=run.arguments.process_index == 0) as keep:
        return _trained(run, checkpoint, callbacks, keep)


def _trained(
    run: Run, checkpoint: Path | None, callbacks: Sequence[TrainerCallback], keep: Callable[[], None]
) -> PreTrainedModel:
    settings = run.settings
    rows, contents = open_rows(settings.data)
    run.check_scores(has_scores(rows))
    scores: dict[str, Any] = {}
    if run.reads_scores:
        rows, scores = choose_scores(rows, settings.data, size=settings.size, stride=settings.stride)
    if run.arguments.process_index == 0:  # the others would read and compare the same files
        verify(settings.data)
    provenance = {**read_provenance(settings.data), **scores}
    context = run.short_context(contents.longest or 0)
    # Or ZeRO-3 would load models in parts, which cannot be verified. The Trainer shards the model later.
    unset_hf_deepspeed_config()
    before, tokenizer, model = _opened(run)
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
    if run.arguments.process_index == 0:  # hashing takes a while, and one process writes the record
        record["model"] = identity(model, settings.model)
        record |= {} if run.scoring_model is None else {"scorer": identity(scoring, run.scoring_model)}
    scored = context is not None and run.weighting.uses_short
    scorer = Scorer(scoring, context, prefix=text_prefix(tokenizer, provenance)) if scored else None
    trainer = WeightedTrainer(
        model=with_weighted_loss(model, run.weighting, scorer),
        args=run.arguments,
        train_dataset=rows,
        data_collator=DataCollatorWithScores(),
        processing_class=tokenizer,
        callbacks=[Records(record, checkpoint, keep), *callbacks],
        size=scores.get("context", {}).get("size"),
    )
    trainer.fit(checkpoint)
    return model


def _opened(run: Run) -> tuple[PreTrainedConfig, PreTrainedTokenizerBase | None, PreTrainedModel]:
    """The config of the model that is trained, before its context is extended; its tokenizer, and itself."""
    name, revision = run.settings.model, run.settings.revision
    if revision is not None and Path(name).exists():
        raise ValueError(f"revision {revision}: {name} is no model of the hub, and has none: leave it out")
    config, tokenizer = load_config(name, revision=revision), find_tokenizer(name, revision=revision)
    model = load_model(name, dtype=run.settings.dtype, revision=revision, extend=run.extension)
    if run.extension and tokenizer is not None:  # or whoever truncates by the saved tokenizer cuts at the old length
        tokenizer.model_max_length = max(tokenizer.model_max_length, run.extension["length"])
    return config, tokenizer, model


@contextlib.contextmanager
def _folder(out: Path, main: bool) -> Iterator[Callable[[], None]]:
    """The folder of a run. What ends the run before its first step leaves nothing of it, so that it can be begun again.

    Yields:
        A function to call once there is something to keep.
    """
    keep: list[bool] = []
    if not main or (out.is_dir() and any(out.iterdir())):
        yield lambda: None  # another process minds it, or an earlier attempt made it
        return
    made = [folder for folder in (out, *out.parents) if not folder.exists()]
    try:
        out.mkdir(parents=True, exist_ok=True)  # before any work that would be lost
        if not os.access(out, os.W_OK | os.X_OK):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
    except OSError as error:
        raise ValueError(f"out {out}: cannot be written to: {error.strerror}") from error
    try:
        yield lambda: keep.append(True)
    finally:
        if not keep:
            for inner in out.iterdir():
                shutil.rmtree(inner) if inner.is_dir() and not inner.is_symlink() else inner.unlink()
            for folder in made:
                with contextlib.suppress(OSError):
                    folder.rmdir()
