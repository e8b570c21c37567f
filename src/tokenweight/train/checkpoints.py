"""Checkpoints that are complete, or recognized as partial, even if the process that writes them is killed."""

import contextlib
import hashlib
import logging
import os
import re
import shutil
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from accelerate.utils import gather_object
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import ExportableState

from tokenweight.models import load_weighting_state, weighting_state
from tokenweight.records import read_json, sync, sync_tree, write_json

logger = logging.getLogger(__name__)
MARK = "whole.json"
"""File written into a checkpoint last, with size and checksum of all other files."""
_PART = 1 << 24


def _sizes(folder: Path) -> dict[str, int]:
    files = (file for file in folder.rglob("*") if file.is_file() and file.name != MARK)
    return {str(file.relative_to(folder)): file.stat().st_size for file in files}


def _checksums(folder: Path, sizes: dict[str, int]) -> dict[str, str]:
    """Hash each file as the sha256 of the sha256s of its 16 MiB parts, so that several cores work on one file."""
    parts = [(name, start) for name, size in sizes.items() for start in range(0, max(size, 1), _PART)]

    def digest(part: tuple[str, int]) -> bytes:
        with (folder / part[0]).open("rb") as file:
            file.seek(part[1])
            return hashlib.sha256(file.read(_PART)).digest()

    joined = {name: hashlib.sha256() for name in sizes}
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as threads:
        for (name, _), found in zip(parts, threads.map(digest, parts)):
            joined[name].update(found)
    return {name: digests.hexdigest() for name, digests in joined.items()}


def mark_whole(folder: Path) -> None:
    """Mark a checkpoint as complete, once all of it is on disk; on return, its own name is, too."""
    sync_tree(folder)  # or the mark could outlive some of it in a crash of the machine
    sizes = _sizes(folder)
    checksums = _checksums(folder, sizes)
    write_json(folder / MARK, {name: {"bytes": sizes[name], "sha256": checksums[name]} for name in sizes})
    sync(folder.parent)


def is_whole(folder: Path) -> bool:
    """Whether the checkpoint has its mark, and every file its recorded size."""
    try:
        mark = read_json(folder / MARK)
        return {name: noted["bytes"] for name, noted in mark.items()} == _sizes(folder)
    except (ValueError, TypeError, KeyError):
        return False


def check_contents(checkpoint: Path, part: tuple[int, int] = (0, 1)) -> None:
    """Raise a ValueError that names a file of a checkpoint that differs from what was written.

    Args:
        checkpoint: one that `is_whole`.
        part: (i, n): every n-th file from the i-th, as n processes share the reading.
    """
    mark = read_json(checkpoint / MARK)
    by_size = sorted(mark, key=lambda name: (-mark[name]["bytes"], name))
    sizes = {name: mark[name]["bytes"] for name in by_size[part[0] :: part[1]]}
    for name, found in _checksums(checkpoint, sizes).items():
        if found != (written := mark[name]["sha256"]):
            raise ValueError(
                f"{checkpoint / name} is damaged: its checksum is {found[:16]}…, {written[:16]}… was written"
            )


def _damage(checkpoint: Path, arguments: TrainingArguments) -> str:
    """Describe the damage of a checkpoint; empty if there is none. Collective: all processes get the same answer."""
    found = ""
    try:
        check_contents(checkpoint, (arguments.process_index, arguments.world_size))
    except (ValueError, OSError) as error:
        found = str(error)
    return found if arguments.world_size == 1 else next(filter(None, gather_object([found])), "")


def _checkpoints(out: Path) -> list[Path]:
    """All checkpoints of a run, complete or not, latest first."""
    folders = [folder for folder in out.glob("checkpoint-*") if re.fullmatch(r"checkpoint-\d+", folder.name)]
    return sorted(folders, key=step_of, reverse=True)


def step_of(checkpoint: Path) -> int:
    """The optimizer step in its name."""
    return int(checkpoint.name.rpartition("-")[2])


def last_whole(out: Path) -> Path | None:
    """The latest complete checkpoint of a run."""
    return next(filter(is_whole, _checkpoints(out)), None)


def last_whole_named(out: Path) -> str:
    """The end of a message about a stopped run, naming the last complete checkpoint."""
    found = last_whole(out)
    return "no checkpoint yet" if found is None else f"the last complete checkpoint is {found}"


def find_checkpoint(out: Path, arguments: TrainingArguments) -> Path | None:
    """Find the checkpoint to resume from: the folder `trainer.resume_from_checkpoint`, or the last complete for "true".

    The folder may be given by its name within the run, `checkpoint-100`. Its files are compared with their checksums,
    and the processes of a run share the reading. Later checkpoints that are partial or damaged are logged as warnings.

    Raises:
        ValueError: if there is no such checkpoint, it is partial or damaged, or the run would write into the folder
            of another.
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
    folders, broken = _checkpoints(out), list[str]()
    if given.lower() != "true":
        folders = [Path(given)]
        if not is_whole(folders[0]):
            raise ValueError(
                f"trainer.resume_from_checkpoint {given}: not a complete checkpoint; {last_whole_named(out)}"
            )
    for folder in folders:
        damage = _damage(folder, arguments) if is_whole(folder) else f"{folder} is incomplete"
        if not damage:
            for found in broken:
                logger.warning("%s: resuming from %s", found, folder)
            return _with_state(folder)
        broken.append(damage)
    if given.lower() != "true":
        raise ValueError(f"trainer.resume_from_checkpoint {given}: {broken[0]}; expected another one, or true")
    raise ValueError(
        f"trainer.resume_from_checkpoint true: {out} holds no complete checkpoint"
        f"{''.join(f', {found}' for found in broken[:1])}; train from the start, into a new folder"
    )


def _with_state(checkpoint: Path) -> Path:
    """Reject a checkpoint that the Trainer would silently resume from with a new optimizer."""
    if not any(checkpoint.glob("rng_state*.pth")):
        raise ValueError(
            f"trainer.resume_from_checkpoint: {checkpoint} holds a model without the state of its training "
            "(save_only_model): train from it as --model, into a new folder"
        )
    return checkpoint


def unmark_after(out: Path, step: int) -> None:
    """Unmark checkpoints of an earlier attempt that are later than `step`, from which the run resumes."""
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
    """Turn errors of writing into one line: what could not be written where, why, and what is left of the run.

    Safetensors, tokenizers and torch each raise a different exception when a disk is full, and torch's does not even
    say so: hence all are caught, and the free space is added.

    Raises:
        OSError: in place of any of these.
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
    """Saves the state of a stateful weighting, such as `EXACT` or `Warmup`, in the checkpoints of any Trainer.

    A resumed run continues with it. `WeightedTrainer` and `TokenWeightedSFTTrainer` add it where needed.

    Example:
        >>> model = with_weighted_loss(model, EXACT())  # doctest: +SKIP
        >>> transformers.Trainer(model, args, train_dataset=rows, callbacks=[WeightingState()])  # doctest: +SKIP
    """

    model: Any = None

    def state(self) -> dict[str, Any]:
        """The state that a Trainer writes into the trainer_state.json of a checkpoint."""
        return {"args": {}, "attributes": {} if self.model is None else weighting_state(self.model)}

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: Any = None, **kwargs: Any
    ) -> None:
        """Load the state from the checkpoint that the run resumes from.

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
