"""The records of a run, `run.json` and `metrics.jsonl`, which are continued when it resumes."""

import contextlib
import dataclasses
import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

from transformers import (
    PreTrainedConfig,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)

from tokenweight.method import ShortContext
from tokenweight.models import context_length, describe_rope
from tokenweight.records import append_line, differences, environment, read_json, replaced, write_json
from tokenweight.train.card import TRAINER_FIELDS
from tokenweight.train.checkpoints import unmark_after, writing
from tokenweight.train.sequences import Sequences
from tokenweight.train.settings import Run, as_settings

logger = logging.getLogger(__name__)


class FinishedRun(Exception):
    """Raised when no steps are left."""


class Records(TrainerCallback):
    """Writes `run.json` once all checks have passed, and everything that the Trainer logs, line by line."""

    def __init__(
        self, run: dict[str, Any], checkpoint: Path | None = None, keep: Callable[[], None] = lambda: None
    ) -> None:
        """`keep` is called after each step, when there is something to keep."""
        self.run, self.checkpoint, self.keep = run, checkpoint, keep

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Write `run.json`; in a resumed run, discard what came after its checkpoint."""
        out = Path(args.output_dir)
        if state.is_world_process_zero:
            out.mkdir(parents=True, exist_ok=True)
            with writing("run.json and metrics.jsonl", out, out):
                write_json(out / "run.json", _resumed(self.run, out, self.checkpoint))
                if state.global_step:
                    unmark_after(out, state.global_step)
                    _take_back(out / "metrics.jsonl", state)
        if 0 < state.max_steps <= state.global_step:
            raise FinishedRun  # the Trainer would make one more step
        _warn_of_schedule(args, state)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Signal that the folder is now worth keeping."""
        self.keep()

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict | None = None,
        **kwargs: Any,
    ) -> None:
        """Append a line to `metrics.jsonl`."""
        out = Path(args.output_dir)
        if state.is_world_process_zero:
            with writing("metrics.jsonl", out, out):
                append_line(out / "metrics.jsonl", {"step": state.global_step, **(logs or {})})


def _warn_of_schedule(args: TrainingArguments, state: TrainerState) -> None:
    schedule = getattr(args.lr_scheduler_type, "value", args.lr_scheduler_type)
    warmup = args.get_warmup_steps(state.max_steps)
    if not state.is_world_process_zero:
        return
    if schedule != "constant" and warmup >= state.max_steps:
        given, steps, rate = f"{args.warmup_steps:g}", state.max_steps, args.learning_rate
        text = "trainer.warmup_steps %s, but the run has %d steps (max_steps): the learning rate never reaches %s"
        logger.warning(text, given, steps, rate)
    if schedule in ("constant", "constant_with_warmup") and args.lr_scheduler_kwargs:
        text = "trainer.lr_scheduler_kwargs %s: not used, as lr_scheduler_type is %s"
        logger.warning(text, args.lr_scheduler_kwargs, schedule)


def _take_back(path: Path, state: TrainerState) -> None:
    """Rewrite the lines: keep those up to the checkpoint, and the summaries of attempts that ended before it."""
    lines = [{"step": line["step"], **line} for line in state.log_history]
    for text in path.read_text().splitlines() if path.is_file() else ():
        with contextlib.suppress(ValueError):  # the process was killed while it wrote the last one
            line = json.loads(text)
            if "train_runtime" in line and line["step"] <= state.global_step and line not in lines:
                lines.append(line)
    with replaced(path) as part:
        part.write_text("".join(json.dumps(line) + "\n" for line in sorted(lines, key=lambda line: line["step"])))


def describe(
    run: Run,
    sequences: Sequences,
    context: ShortContext | None,
    before: PreTrainedConfig,
    config: PreTrainedConfig,
) -> dict[str, Any]:
    """The content of `run.json` at the start of a run.

    Args:
        run: the resolved settings.
        sequences: the data that it reads.
        context: the windows of the scorer, if there is one.
        before, config: of the model, before and after the extension of its context.
    """
    windows = {} if context is None else dataclasses.asdict(context)
    fields = {name: getattr(run.arguments, name) for name in TRAINER_FIELDS}
    named = before.name_or_path == run.settings.model  # the base of an adapter has other commits
    revision = (getattr(before, "_commit_hash", None) if named else None) or run.settings.revision
    resolved = {"weighting": str(run.weighting), "contrast": sequences.contrast, "revision": revision, **windows}
    sources, held_out = sequences.sources, sequences.held_out
    mixture = {
        name: {"share": share, **source.record}
        for name, share, source in zip(sequences.names, sequences.shares, sources)
    }
    return {
        "settings": {**as_settings(run.settings), **resolved},
        "data": sequences.provenance,
        **environment(),
        "rows": sequences.contents.numbers,
        "texts": sources[0].texts if len(sources) == 1 else {},
        **({"mixture": mixture} if len(sources) > 1 else {}),
        **({} if held_out is None else {"held_out": held_out.record}),
        "scores": (str(run.counts) if run.counts else run.settings.scorer) if run.scored else None,
        **({"reference": sequences.provenance.get("reference", {})} if "ref_nll" in run.weighting.uses else {}),
        "rope": {"before": _rope(before), "after": _rope(config), "positions": context_length(before)},
        "rope_parameters": getattr(config.get_text_config(), "rope_parameters", None),
        "attn_implementation": config._attn_implementation,
        "arguments": {name: getattr(value, "value", value) for name, value in fields.items() if value is not None},
    }


def _rope(config: PreTrainedConfig) -> str | None:
    try:
        return describe_rope(config)
    except (ValueError, KeyError):  # an unknown type, which trains nevertheless
        return None


def _resumed(run: dict[str, Any], out: Path, checkpoint: Path | None) -> dict[str, Any]:
    """The record of a resumed run: its start, its final settings, and under `resumed` each resumption.

    So `--config run.json` repeats the run in one piece.
    """
    if checkpoint is None or not (out / "run.json").is_file():
        return run
    earlier = read_json(out / "run.json")
    there, now = (
        {**_lasting(one.get("settings", {})), "processes": one.get("arguments", {}).get("world_size")}
        for one in (earlier, run)
    )
    changed = differences(there, now)
    if changed:
        logger.warning("%s resumes with different settings: %s", out, changed)
    part = {"checkpoint": str(checkpoint), "changed": changed, **run}
    trainer = {k: v for k, v in run["settings"]["trainer"].items() if k != "resume_from_checkpoint"}
    latest = {"settings": {**run["settings"], "trainer": trainer}, "arguments": run["arguments"]}
    return {**earlier, **latest, "resumed": [*earlier.get("resumed", []), part]}


def _lasting(settings: dict[str, Any]) -> dict[str, Any]:
    """Settings that stay the same across resumptions, unless changed by the user."""
    trainer = {f"trainer.{name}": value for name, value in settings.get("trainer", {}).items()}
    return {
        name: value
        for name, value in {**settings, **trainer}.items()
        if name not in ("trainer", "trainer.resume_from_checkpoint")
    }
