"""Checkpoints that are whole or recognized as not whole, whatever ends the process that writes them."""

import contextlib
import logging
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import ExportableState

from tokenweight.models import load_weighting_state, weighting_state
from tokenweight.records import read_json, write_json

logger = logging.getLogger(__name__)
MARK = "whole.json"
"""Written into a checkpoint after everything else: the size of each of its files."""


def _sizes(folder: Path) -> dict[str, int]:
    files = (file for file in folder.rglob("*") if file.is_file() and file.name != MARK)
    return {str(file.relative_to(folder)): file.stat().st_size for file in files}


def mark_whole(folder: Path) -> None:
    """Mark a checkpoint as whole, once all of it is on the disk."""
    sizes = _sizes(folder)
    for name in sizes:
        descriptor = os.open(folder / name, os.O_RDONLY)
        try:
            os.fsync(descriptor)  # or the mark could outlive them when the machine stops
        finally:
            os.close(descriptor)
    write_json(folder / MARK, sizes)


def is_whole(folder: Path) -> bool:
    """Whether the checkpoint has its mark, and every file the size that it had then."""
    try:
        return read_json(folder / MARK) == _sizes(folder)
    except ValueError:
        return False


def _checkpoints(out: Path) -> list[Path]:
    """All checkpoints of a run, whole or not, the latest first."""
    folders = [folder for folder in out.glob("checkpoint-*") if re.fullmatch(r"checkpoint-\d+", folder.name)]
    return sorted(folders, key=step_of, reverse=True)


def step_of(checkpoint: Path) -> int:
    """The optimizer step that its name tells."""
    return int(checkpoint.name.rpartition("-")[2])


def last_whole(out: Path) -> Path | None:
    """The latest complete checkpoint of a run."""
    return next(filter(is_whole, _checkpoints(out)), None)


def last_whole_named(out: Path) -> str:
    """The end of a message about a run that stopped."""
    found = last_whole(out)
    return "no checkpoint yet" if found is None else f"the last complete checkpoint is {found}"


def find_checkpoint(out: Path, arguments: TrainingArguments) -> Path | None:
    """The checkpoint to resume from: the folder `trainer.resume_from_checkpoint`, or the latest whole one for "true".

    The folder may be named as it is within the run, `checkpoint-100`. Later checkpoints that are not whole are logged
    as warnings.

    Raises:
        ValueError: if there is no such checkpoint, it is not whole, or the run would write into the folder of another.
    """
    given = arguments.resume_from_checkpoint
    if out.exists() and not out.is_dir():
        raise ValueError(f"out {out}: is a file; name a new folder")
    if given is not None and given.lower() != "true" and not Path(given).is_dir() and len(Path(given).parts) == 1:
        given = str(out / given)
    if arguments.process_index == 0 and out.exists() and any(out.iterdir()):
        own = given is not None and (given.lower() == "true" or Path(given).resolve().parent == out.resolve())
        if not own:
            raise ValueError(f"out {out}: exists; name a new folder, or set trainer.resume_from_checkpoint to resume")
    if given is None:
        return None
    if given.lower() != "true":
        if not is_whole(Path(given)):
            raise ValueError(
                f"trainer.resume_from_checkpoint {given}: not a complete checkpoint; {last_whole_named(out)}"
            )
        return _with_state(Path(given))
    found = last_whole(out)
    broken = [folder for folder in _checkpoints(out) if found is None or step_of(folder) > step_of(found)]
    if found is None:
        named = f", {broken[0].name} was not saved to its end" if broken else ""
        raise ValueError(
            f"trainer.resume_from_checkpoint true: {out} holds no complete checkpoint{named}; "
            "train from the start, into a new folder"
        )
    for folder in broken:
        logger.warning("%s is not whole: resuming from %s", folder, found)
    return _with_state(found)


def _with_state(checkpoint: Path) -> Path:
    """Refuse a checkpoint that the Trainer would go on from with a new optimizer, and say nothing."""
    if not any(checkpoint.glob("rng_state*.pth")):
        raise ValueError(
            f"trainer.resume_from_checkpoint: {checkpoint} holds a model without the state of its training "
            "(save_only_model): train from it as --model, into a new folder"
        )
    return checkpoint


def unmark_after(out: Path, step: int) -> None:
    """Let nothing of an earlier attempt pass for a checkpoint of the run that goes on after `step`."""
    for folder in _checkpoints(out):
        if step_of(folder) > step:
            (folder / MARK).unlink(missing_ok=True)


def rotate(out: Path, limit: int | None, best: str | None = None) -> None:
    """Keep the `limit` latest complete checkpoints and the best, and remove the others before the first of them."""
    whole = [folder for folder in _checkpoints(out) if is_whole(folder)]
    if limit is not None and 0 < limit < len(whole):
        for folder in _checkpoints(out):
            if step_of(folder) < step_of(whole[limit - 1]) and (best is None or folder.name != Path(best).name):
                shutil.rmtree(folder, ignore_errors=True)


@contextlib.contextmanager
def writing(what: str, folder: Path, out: Path) -> Iterator[None]:
    """Say in one line what could not be written where, why, and what is left of the run.

    Safetensors, tokenizers and torch each raise an exception of their own when a disk is full, and torch's does not
    even say so: hence any of them, and the room that is left.

    Raises:
        OSError: in their place.
    """
    try:
        yield
    except Exception as error:
        reason = (
            os.strerror(error.errno) if isinstance(error, OSError) and error.errno else str(error).partition("\n")[0]
        )
        free = shutil.disk_usage(out).free / 2**20
        raise OSError(
            f"cannot write {what} to {folder}: {reason} ({free:,.1f} MiB free there); {last_whole_named(out)}"
        ) from error


class WeightingState(TrainerCallback, ExportableState):
    """Keeps the history of a weighting, as that of `EXACT` or `Warmup`, in the checkpoints of any Trainer.

    A run that is resumed goes on with it. `WeightedTrainer` and `TokenWeightedSFTTrainer` have it where it is needed.

    Example:
        >>> model = with_weighted_loss(model, EXACT())  # doctest: +SKIP
        >>> transformers.Trainer(model, args, train_dataset=rows, callbacks=[WeightingState()])  # doctest: +SKIP
    """

    model: Any = None

    def state(self) -> dict[str, Any]:
        """What a Trainer writes into the trainer_state.json of a checkpoint."""
        return {"args": {}, "attributes": {} if self.model is None else weighting_state(self.model)}

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: Any = None, **kwargs: Any
    ) -> None:
        """Take up the history of the checkpoint from which the run goes on.

        Raises:
            ValueError: if the checkpoint has none, or that of another weighting.
        """
        self.model = model
        if not state.global_step:
            return
        saved = (state.stateful_callbacks or {}).get(type(self).__name__) or {}
        try:
            load_weighting_state(model, saved.get("attributes") or {"weighting": "no weighting", "history": ()})
        except ValueError as error:
            raise ValueError(f"resume_from_checkpoint: step {state.global_step}: {error}") from None
