"""A training run, from its settings to a model folder."""

import contextlib
import dataclasses
import errno
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from transformers import (
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PrinterCallback,
    TrainerCallback,
    set_seed,
)
from transformers.integrations.deepspeed import unset_hf_deepspeed_config

from tokenweight.method import ShortContext
from tokenweight.models import (
    Distillation,
    Scorer,
    Teacher,
    adapter_base,
    check_fit,
    find_tokenizer,
    identity,
    is_config,
    load_config,
    load_model,
    predicts_one_more,
    text_prefix,
    tokenizer_note,
    with_adapter,
    with_weighted_loss,
)
from tokenweight.train.checkpoints import find_checkpoint
from tokenweight.train.display import Display
from tokenweight.train.lengths import Pieces
from tokenweight.train.records import Records, describe
from tokenweight.train.sequences import DataCollatorWithScores, HeldOut, Sequences, open_sequences
from tokenweight.train.settings import Run, TrainSettings, resolve
from tokenweight.train.trainer import EndOfDistillation, WeightedTrainer


def train(settings: TrainSettings, callbacks: Sequence[TrainerCallback] = (), *, dry_run: bool = False) -> Any:
    """Run a recipe: `settings.out` becomes a model folder with `run.json`, `metrics.jsonl` and a model card.

    Prints a summary of the run, a row for each logged line, and next steps (`Display`).

    Args:
        settings: what to train, on what, and how.
        callbacks: additional ones for the Trainer, such as `transformers.EarlyStoppingCallback(3)`.
        dry_run: whether to end before the first step: everything is checked, and nothing is left behind.

    Returns:
        The trained model; with `settings.lora`, a `peft.PeftModel` around it.

    Raises:
        ValueError: if settings, data and models do not fit, before any work; for a loss, gradient or weight that is not
            finite, before it is saved.
        OSError: if something cannot be written.
    """
    run = resolve(settings)
    checkpoint = find_checkpoint(run.out, run.arguments)
    if dry_run:  # no tracker starts a run, and no repository is created on the hub
        without = {**settings.trainer, "report_to": "none", "push_to_hub": False}
        run = resolve(dataclasses.replace(settings, trainer=without))
    with _folder(run.out, main=run.arguments.process_index == 0) as keep:
        return _trained(run, checkpoint, callbacks, keep, dry_run)


def _trained(
    run: Run, checkpoint: Path | None, callbacks: Sequence[TrainerCallback], keep: Callable[[], None], dry_run: bool
) -> Any:
    sequences, arguments = open_sequences(run), run.arguments
    context = run.short_context(sequences.contents.longest or 0)
    # Otherwise ZeRO-3 would load sharded models, which cannot be verified. The Trainer shards the model later.
    unset_hf_deepspeed_config()
    before, tokenizer, model, scoring, teaching = _opened(run, sequences, context)
    rows = sequences.dataset(run)
    identities: dict[str, Any] = {}
    if arguments.process_index == 0 and not dry_run:  # hashing takes a while, and one process writes the record
        named = {"model": (model, run.settings.model), "scorer": (scoring, run.settings.scorer)}
        named["teacher"] = teaching, run.distill.get("teacher", "")
        identities = {role: identity(one, name) for role, (one, name) in named.items() if one is not None}
    set_seed(arguments.seed)  # initializes the weights of an adapter
    trained = with_adapter(model, run.lora)
    scorer = distillation = None
    if context is not None and run.scored and run.counts is None:
        prefix = text_prefix(tokenizer, sequences.provenance)
        adapters = run.settings.scorer != "base"
        scorer = Scorer(model if scoring is None else scoring, context, prefix=prefix, adapters=adapters)
    if run.distill:
        teacher = None if teaching is None else Teacher(teaching, run.distill["top_k"])
        distillation = Distillation(run.distill["weight"], teacher)
    with_weighted_loss(model, run.weighting, scorer, contrast=sequences.contrast, distillation=distillation)
    record = describe(run, sequences, context, before, model.config)
    record.update(identities)
    if not isinstance(rows, Pieces):
        record["rows"]["epoch"] = len(rows)
    if run.distill.get("steps") is not None:
        callbacks = [*callbacks, EndOfDistillation(model, run.distill["steps"])]
    callbacks = [] if dry_run else [Records(record, checkpoint, keep), *callbacks]
    trainer = _trainer(run, sequences, rows, context, trained, tokenizer, callbacks)
    batch = trainer.get_total_train_batch_size(arguments)
    display = Display(record, trained, arguments, batch=batch, dry=dry_run)
    trainer.remove_callback(PrinterCallback)  # rows of the display replace its dicts
    trainer.add_callback(display)
    with display.ends():
        trainer.fit(checkpoint, saves=not dry_run)
    return trained


def _opened(
    run: Run, sequences: Sequences, context: ShortContext | None
) -> tuple[
    PreTrainedConfig, PreTrainedTokenizerBase | None, PreTrainedModel, PreTrainedModel | None, PreTrainedModel | None
]:
    """Load the models of a run, and check that they can read its sequences.

    Returns:
        The config of the trained model before its context is extended, its tokenizer, the model itself, and the scoring
        model and the teacher, if these are others.
    """
    name, revision, kernel = run.settings.model, run.settings.revision, run.settings.attn_implementation
    if revision is not None and Path(name).exists():
        raise ValueError(f"revision {revision}: {name} is no model of the hub, and has none: leave it out")
    if run.lora and adapter_base(name, revision) is not None:
        raise ValueError(
            f"lora: {name} is an adapter itself, and a second one would be loaded without it: expected a model, as "
            "load_model(…).save_pretrained(…) makes of it"
        )
    before, tokenizer = load_config(name, revision=revision), find_tokenizer(name, revision=revision)
    if tokenizer is None and is_config(name) and sequences.provenance.get("tokenizer") is not None:
        tokenizer = find_tokenizer(sequences.provenance["tokenizer"])  # a model from scratch has no other
    set_seed(run.arguments.seed)  # initializes the weights of a config, before the Trainer would set it
    dtype, extension = run.settings.dtype, run.extension
    model = load_model(name, dtype=dtype, revision=revision, extend=extension, attn_implementation=kernel)
    if run.extension and tokenizer is not None:  # or users of the saved tokenizer would truncate at the old length
        tokenizer.model_max_length = max(tokenizer.model_max_length, run.extension["length"])
    scoring = teaching = its = theirs = None
    if run.scoring_model is not None:
        scoring, its = load_model(run.scoring_model, attn_implementation=kernel), find_tokenizer(run.scoring_model)
    if run.teacher_model is not None:
        teaching, theirs = load_model(run.teacher_model, attn_implementation=kernel), find_tokenizer(run.teacher_model)
    note = {} if tokenizer is None else tokenizer_note(tokenizer, name)
    pieces = run.curriculum is not None  # of 2^k + 1 tokens: a model of 2^k positions predicts all but the first
    for source in (*sequences.sources, *filter(None, [sequences.held_out])):
        longest, tokens = source.contents.longest or 0, source.contents.token_range
        if run.counts is not None:
            run.counts.check_tokens(tokens[1], source.folder)
        fits: dict[str, Any] = {"folder": source.folder, "token_range": tokens}
        read = longest - (pieces and predicts_one_more(model.config))
        check_fit(model.config, tokenizer, name, **fits, longest=read, provenance=source.provenance)
        fits["provenance"] = {**source.provenance, **note}
        if scoring is not None and context is not None:
            check_fit(scoring.config, its, run.settings.scorer, **fits, longest=context.size, what="size: windows")
        if teaching is not None and source is not sequences.held_out:  # evaluation ignores teachers
            read = longest - (pieces and predicts_one_more(teaching.config))
            check_fit(teaching.config, theirs, run.distill["teacher"], **fits, longest=read)
    for other in filter(None, (scoring, teaching)):
        other.to(run.arguments.device)
    return before, tokenizer, model, scoring, teaching


def _trainer(
    run: Run,
    sequences: Sequences,
    rows: Any,
    context: ShortContext | None,
    model: Any,
    tokenizer: PreTrainedTokenizerBase | None,
    callbacks: Sequence[TrainerCallback],
) -> WeightedTrainer:
    """The Trainer of a bound model over the sequences of a run."""
    arguments, counts, held_out = run.arguments, run.counts, sequences.held_out
    at_once = arguments.world_size * arguments.eval_batch_size
    return WeightedTrainer(
        model=model,
        args=arguments,
        train_dataset=rows,
        eval_dataset=None if held_out is None else HeldOut(held_out.rows, held_out.contents.longest or 0, at_once),
        data_collator=DataCollatorWithScores() if counts is None else DataCollatorWithScores(counts, context),
        processing_class=tokenizer,
        callbacks=[*callbacks],
        size=context.size if counts is not None and context is not None else sequences.sources[0].context.get("size"),
        sources=rows.names if isinstance(rows, Pieces) else sequences.names if len(sequences.sources) > 1 else (),
    )


@contextlib.contextmanager
def _folder(out: Path, main: bool) -> Iterator[Callable[[], None]]:
    """The folder of a run, which is removed if the run ends before its first step, so that it can be started again.

    Yields:
        A function to call once there is something to keep.
    """
    keep: list[bool] = []
    if not main or (out.is_dir() and any(out.iterdir())):
        yield lambda: None  # another process handles it, or an earlier attempt made it
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
