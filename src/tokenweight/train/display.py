"""Terminal output of a run: a header before its first step, a row of numbers per logged line, and what to do next."""

import contextlib
import os
import shlex
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from transformers import (
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)

from tokenweight.method import weighting_names
from tokenweight.records import device_name
from tokenweight.train.checkpoints import last_whole
from tokenweight.train.lengths import Pieces
from tokenweight.train.records import FinishedRun
from tokenweight.train.sequences import Mixture

_HEADS = ("step", "loss", "unweighted", "lr", "effective", "tokens/s", "left")
_WIDTHS = (8, 10, 11, 10, 10, 10, 10)
_LOGGED = {
    "loss": ".4f",
    "unweighted_loss": ".4f",
    "learning_rate": ".2e",
    "effective_share": ".1%",
    "tokens_per_second": ",.0f",
}
"""Columns of a row of numbers, between the step and the remaining time."""
_HELD_OUT = {
    "loss": "held-out loss",
    "loss_beyond_half": "beyond half",
    "loss_short": "short range",
    "weighted_loss": "weighted",
}
_EVERY = {"logging": "a row", "eval": "an evaluation", "save": "a checkpoint"}


class Display(TrainerCallback):
    """Prints the header, a row for each logged line, and the end of a run, in its main process.

    Args:
        record: of the run, as in `run.json`.
        model: as it is trained: a PreTrainedModel, or a PeftModel around it.
        arguments: of the Trainer.
        batch: sequences of an optimizer step.
        dry: whether the run ends before its first step.
    """

    def __init__(
        self, record: dict[str, Any], model: Any, arguments: TrainingArguments, *, batch: int, dry: bool = False
    ) -> None:
        self.record, self.arguments, self.batch, self.dry = record, arguments, batch, dry
        self.lines = _header(record, model)
        self.main, self.rows = arguments.process_index == 0, arguments.disable_tqdm
        self.out = Path(record["settings"]["out"])
        self.state: TrainerState | None = None
        self.first = 0  # the step at which the run began
        self.last: dict[str, float] = {}  # what was logged last
        self._since = time.perf_counter()

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Print the header; end a dry run."""
        self.state, self.first, self._since = state, state.global_step, time.perf_counter()
        for label, text in (*self.lines, *self._planned(args, state, kwargs["train_dataloader"])):
            self._print(f"{label:<11}{text}")
        if self.dry:
            raise FinishedRun
        if self.rows:
            self._print("\n" + _row(_HEADS))

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        """Print a row of the table, or the losses of held-out sequences."""
        logs = logs or {}
        losses = {name.removeprefix("eval_"): value for name, value in logs.items() if name.startswith("eval_")}
        if "loss" in logs:
            self.last = logs
            done = state.global_step - self.first
            left = (time.perf_counter() - self._since) / max(done, 1) * (state.max_steps - state.global_step)
            cells = [f"{logs[name]:{form}}" if name in logs else "-" for name, form in _LOGGED.items()]
            if self.rows:
                self._print(_row((str(state.global_step), *cells, _duration(left))))
        elif "loss" in losses and self.rows:
            told = ", ".join(f"{label} {losses[name]:.4f}" for name, label in _HELD_OUT.items() if name in losses)
            self._print(f"{state.global_step:>{_WIDTHS[0]}}  {told}")

    @contextlib.contextmanager
    def ends(self) -> Iterator[None]:
        """Print the results and next steps at the end of a run, and after an error how to resume it."""
        try:
            yield
        except BaseException:
            if self.state is not None and self.state.global_step > 0:
                with contextlib.suppress(OSError):  # nobody reads it
                    self._print("\n" + "\n".join(self._stopped(self.state)))
            raise
        if not self.dry and self.state is not None:
            self._print("\n" + "\n".join(self._finished(self.state)))

    def _planned(self, args: TrainingArguments, state: TrainerState, loader: Any) -> Iterator[tuple[str, str]]:
        """Header lines that are known only after the Trainer has planned its steps."""
        held, rows, batch = self.record["rows"], loader.dataset, self.batch
        autocast = "bfloat16" if args.bf16 else "float16" if args.fp16 else "no"
        on = args.device.type
        on = device_name() if on == "cuda" or not torch.cuda.is_available() else on
        kernel, dtype = self.record["attn_implementation"], self.record["settings"]["dtype"]
        yield "device", f"{on}; weights in {dtype}, {autocast} autocast, {kernel} attention"
        about = "" if held["shortest"] == held["longest"] else "about "
        passes = f"{args.per_device_train_batch_size} a pass"
        split = {"passes": args.gradient_accumulation_steps, "processes": args.world_size}
        passes += "".join(f", {number} {name}" for name, number in split.items() if number > 1)
        if isinstance(rows, Pieces):
            longest, shortest = rows.sizes[-1], rows.sizes[0]
            lengths = f"{_some(batch, 'sequence')} of {longest:,} to {batch * longest // shortest:,} of {shortest:,}"
            yield "step", f"{_some(batch * longest, 'predicted token')}: {lengths} ({passes})"
        else:
            tokens = round(held["tokens"] / len(rows) * batch)
            yield "step", f"{_some(batch, 'sequence')}, {about}{_some(tokens, 'token')} ({passes})"
        epochs = state.max_steps * batch / len(rows)
        whole = round(epochs) if abs(epochs - round(epochs)) < batch / len(rows) else epochs
        began = f", {_some(state.max_steps - self.first, 'step')} left" * (self.first > 0)
        num = held["num"] if isinstance(rows, Pieces) else len(rows)
        yield "run", f"{_some(state.max_steps, 'step')} = {_some(whole, 'epoch')} of {_some(num, 'sequence')}{began}"
        if isinstance(rows, Pieces):
            parts = ", ".join(f"{name} {part:.1%}" for name, part in zip(rows.names, rows.parts))
            yield "lengths", f"curriculum {rows.curriculum}; of the tokens, in sequences of {parts}"
        if isinstance(rows, Mixture):
            read = zip(self.record["mixture"], rows.passes(epochs))
            yield "mixture", ", ".join(f"{name} read {times:.2f} times" for name, times in read)
        trackers = "".join(f", {name}" for name in args.report_to)
        every = {name: _every(getattr(args, f"{name}_strategy"), getattr(state, f"{name}_steps")) for name in _EVERY}
        told = ", ".join(f"{label} {every[name]}" for name, label in _EVERY.items() if every[name])
        yield "logs", f"{self.out / 'metrics.jsonl'}{trackers}; {told}"

    def _finished(self, state: TrainerState) -> Iterator[str]:
        settings, steps = self.record["settings"], state.global_step - self.first
        took = f"{_some(steps, 'step')} in {_duration(time.perf_counter() - self._since)}" if steps else "no step left"
        losses = {"loss": "last loss", "unweighted_loss": "unweighted"}
        told = [f"{label} {self.last[name]:.4f}" for name, label in losses.items() if name in self.last]
        yield ", ".join([took, *told])
        if self.arguments.load_best_model_at_end and state.best_model_checkpoint:
            name = self.arguments.metric_for_best_model.removeprefix("eval_")
            yield f"best: {Path(state.best_model_checkpoint).name}, eval_{name} {state.best_metric:.4f}"
        yield f"{self.out}: the trained {'adapter' if settings['lora'] else 'model'}, run.json and metrics.jsonl"
        data = settings["eval_data"] or "HELD_OUT"
        words = ["tokenweight", "eval", str(self.out), "--baseline", settings["model"], "--data", data]
        yield f"next: {shlex.join([*words, '--out', f'{self.out}-eval'])}"

    def _stopped(self, state: TrainerState) -> Iterator[str]:
        found = last_whole(self.out)
        yield f"stopped after {_some(state.global_step, 'step')} of {state.max_steps:,}"
        words = [*_launcher(self.arguments), "train", "--config", str(self.out / "run.json")]
        names = weighting_names(self.record["settings"]["weighting"])
        words += ["--allow_code"] * any("." in name for name in names)  # by the user
        if found is not None:
            command = shlex.join([*words, "--out", str(self.out), "--trainer.resume_from_checkpoint", found.name])
            yield f"to resume from {found.name}: {command}"
        else:
            command = shlex.join([*words, "--out", f"{self.out}-2"])
            yield f"no checkpoint is complete (trainer.save_steps); to start again: {command}"

    def _print(self, text: str) -> None:
        if self.main:
            print(text, flush=True)


def _header(record: dict[str, Any], model: Any) -> list[tuple[str, str]]:
    """Header lines that are known before the Trainer has planned its steps: labels and texts."""
    settings, mixture = record["settings"], record.get("mixture", {})
    numbers = [(parameter.numel(), parameter.requires_grad) for parameter in model.parameters()]
    total, trained = sum(number for number, _ in numbers), sum(number for number, trains in numbers if trains)
    share = "all trained" if trained == total else f"{trained:,} trained ({trained / total:.2%})"
    lines = [("model", f"{settings['model']}: {total:,} parameters, {share}")]
    lines += [
        ("data", f"{part['share']:.1%} of tokens from {part['path']}: {_held(part)}") for part in mixture.values()
    ]
    if not mixture:
        (folder,) = (
            [settings["data"]] if isinstance(settings["data"], str) else [one["path"] for one in settings["data"]]
        )
        lines.append(("data", f"{folder}: {_held(record)}"))
    if "held_out" in record:
        lines.append(("held out", f"{record['held_out']['path']}: {_held(record['held_out'])}"))
    lines.append(("weighting", settings["weighting"]))
    lines.append(("scorer", _scorer(settings, record["data"], record["scores"])))
    rope, longest = record["rope"], record["rows"]["longest"]
    context = rope["after"] or "not known"
    if rope["before"] != rope["after"]:
        needless = rope["positions"] is not None and longest <= rope["positions"]
        note = f"; no sequence is longer than the {rope['positions']:,} positions of before"
        context += f", before: {rope['before']}" + note * needless
    return [*lines, ("context", context)]


def _held(part: dict[str, Any]) -> str:
    rows = part["rows"]
    lengths = " to ".join(f"{length:,}" for length in dict.fromkeys([rows["shortest"], rows["longest"]]))
    return f"{_some(rows['num'], 'sequence')} of {lengths} tokens, {rows['tokens']:,} in all"


def _scorer(settings: dict[str, Any], data: dict[str, Any], scores: str | None) -> str:
    """Describe the source of the short losses, and its windows."""
    if scores is None:
        return "none: the weights need no short losses"
    own = {"self": "the model itself, as it is trained", "base": "the model itself, without the adapter"}
    name = own.get(scores, scores)
    windows = settings
    if scores == "stored":
        windows, by = data.get("context", {}), data.get("model")
        name = f"stored, by {by}" if by else name
    size, stride = windows.get("size"), windows.get("stride")
    told = [f"windows of {size:,} tokens"] if size else []
    return ", ".join([name, *told, *([f"stride {stride:,}"] if stride else [])])


def _launcher(arguments: TrainingArguments) -> list[str]:
    """The words of the command line that start the current processes, up to the name of a command."""
    if arguments.world_size == 1:
        return ["tokenweight"]
    local = int(os.environ.get("LOCAL_WORLD_SIZE", arguments.world_size))
    nodes = ["--nnodes", str(arguments.world_size // local)] if local < arguments.world_size else []
    return ["torchrun", *nodes, "--nproc-per-node", str(local), "-m", "tokenweight"]


def _every(strategy: Any, steps: int | float) -> str:
    """Describe how often something is done; empty if never."""
    name = getattr(strategy, "value", strategy)
    if name == "steps":
        return "every step" if steps == 1 else f"every {steps:,g} steps"
    return {"no": "", "epoch": "every epoch", "best": "of the best"}[name]


def _row(cells: tuple[str, ...]) -> str:
    return "".join(f"{cell:>{width}}" for cell, width in zip(cells, _WIDTHS))


def _some(number: int | float, noun: str) -> str:
    return f"{number:,d} {noun}{'s' * (number != 1)}" if isinstance(number, int) else f"{number:,.3g} {noun}s"


def _duration(seconds: int | float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02}:{seconds:02}"
