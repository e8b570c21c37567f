"""The command line: one dataclass per command. Torch is imported when a command runs, so that help comes at once."""

import contextlib
import dataclasses
import io
import os
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import tyro

from tokenweight.recipe import TrainSettings, read_recipe


@dataclasses.dataclass(frozen=True)
class Prepare:
    """Cut texts into rows of tokens of one length."""

    texts: tyro.conf.Positional[tuple[Path, ...]]
    """Text files (one document each), .jsonl files (one document a line), or folders of them."""
    tokenizer: str
    """Folder, hub id or .gguf file of the model whose tokenizer to use."""
    length: int
    """Tokens of a row: the long context."""
    out: Path
    """New folder for the rows."""
    text_column: str = "text"
    """Of .jsonl files."""
    max_rows: int | None = None
    """Stop after so many rows."""

    def run(self) -> None:
        """Write the rows and print what became of the documents."""
        from tokenweight.model import load_tokenizer, tokenizer_fingerprint
        from tokenweight.records import environment
        from tokenweight.rows import prepare_rows, read_documents

        if not self.texts:
            raise ValueError("name at least one text file or folder")
        tokenizer = load_tokenizer(self.tokenizer)
        provenance = {
            "tokenizer": self.tokenizer,
            "tokenizer_fingerprint": tokenizer_fingerprint(tokenizer),
            "texts": [str(text) for text in self.texts],
            "environment": environment(),
        }
        with _progress("characters") as advance:

            def counted() -> Iterator[Any]:
                for document in read_documents(self.texts, text_column=self.text_column):
                    yield document
                    advance(len(document.text))

            summary = prepare_rows(
                counted(), tokenizer, self.length, self.out, max_rows=self.max_rows, provenance=provenance
            )
        print(
            f"{self.out}: {summary.rows} rows of {self.length} tokens from {summary.documents} documents; "
            f"{summary.dropped_tokens} of their tokens are in no row, {summary.short_documents} documents shorter "
            f"than a row ({summary.empty_documents} of them empty)"
        )


@dataclasses.dataclass(frozen=True)
class Score:
    """Compute the loss of every token with a short context, once, with a frozen model. Run again, it goes on."""

    rows: tyro.conf.Positional[Path]
    """Folder of rows."""
    model: str
    """Folder, hub id or .gguf file of the scoring model."""
    size: int
    """Tokens that a window reads: the short context."""
    stride: int
    """Tokens that a window scores."""
    out: Path
    """Folder for the scored rows."""
    dtype: str = "auto"
    """Of the scoring model's weights."""
    long: bool = False
    """Also store the losses with the whole row as context: then `show` needs no model."""
    max_tokens: int = 32768
    """Tokens read in one forward pass; fewer need less memory."""

    def run(self) -> None:
        """Write the scores and print a summary."""
        from tokenweight.scoring import ShortContext
        from tokenweight.store import score_folder

        context = ShortContext(self.size, self.stride)
        with _progress("tokens") as advance:
            print(
                score_folder(
                    self.rows,
                    self.model,
                    context,
                    self.out,
                    dtype=self.dtype,
                    with_long=self.long,
                    max_tokens=self.max_tokens,
                    progress=advance,
                )
            )


@dataclasses.dataclass(frozen=True)
class Show:
    """Show a passage of scored rows, tinted by weight, and the tokens whose weight changes most."""

    scored: tyro.conf.Positional[Path]
    """Folder of scored rows."""
    row: int = 0
    """Which row, counted from 0."""
    weighting: str = "dense"
    """As in `train`."""
    start: int | None = None
    """First token of the passage; by default the passage with the most weight."""
    num: int = 300
    """Tokens of the passage."""
    top: int = 12
    """Tokens listed below it."""
    model: str | None = None
    """Gives the long losses, if they are not stored; by default the scoring model."""
    svg: Path | None = None
    """Also write the picture to this file."""

    def run(self) -> None:
        """Print the passage and the list."""
        from rich.console import Console

        from tokenweight.show import view
        from tokenweight.store import read_row
        from tokenweight.svg import write_svg
        from tokenweight.weighting import parse_weighting

        weighting = parse_weighting(self.weighting)
        if self.num < 1 or self.top < 0:
            raise ValueError(f"--num {self.num} --top {self.top}: expected at least 1 token, and no negative number")
        if self.svg is not None and not self.svg.parent.is_dir():
            raise ValueError(f"--svg {self.svg}: no such folder")
        row = read_row(self.scored, self.row, self.model)
        picture = view(row, weighting, start=self.start, num=self.num, top=self.top)
        Console().print(*picture, sep="\n\n")
        if self.svg is not None:
            write_svg(picture, self.svg, title=f"{self.scored}, row {self.row}, {weighting}")


@dataclasses.dataclass(frozen=True)
class Demo:
    """Prepare, score, show, train and evaluate: a real model and real texts, a few minutes on two cores."""

    out: Path = Path("demo")
    """New folder for rows, scores and the trained model."""
    weighting: str = "dense"
    """As in `train`."""

    def run(self) -> None:
        """Run the whole loop."""
        from tokenweight.demo import run_demo

        run_demo(self.out, self.weighting)


COMMANDS: dict[str, Any] = {"prepare": Prepare, "score": Score, "train": TrainSettings, "show": Show, "demo": Demo}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command.

    Returns:
        The exit status: 0, or 2 after one line on standard error for a bad input, 130 after an interruption.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    if not words or words[0] in ("-h", "--help"):
        print(_overview())
        return 0
    try:
        if words[0] not in COMMANDS:
            raise ValueError(f"unknown command {words[0]!r}: expected one of {', '.join(COMMANDS)}")
        command = _parse_train(words[1:]) if words[0] == "train" else _parse(words[0], words[1:])
        if command is not None:
            _run(command)
    except (ValueError, OSError, ImportError) as error:
        print(f"tokenweight {words[0]}: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"tokenweight {words[0]}: interrupted", file=sys.stderr)
        return 130
    return 0


def _run(command: Any) -> None:
    import datasets
    import transformers

    datasets.disable_progress_bars()
    transformers.utils.logging.disable_progress_bar()
    if isinstance(command, TrainSettings):
        from tokenweight.training import train

        train(command)
        if os.environ.get("RANK", "0") == "0":
            print(f"{command.out}: the trained model, run.json and metrics.jsonl")
    else:
        command.run()


def _overview() -> str:
    lines = [
        "usage: tokenweight COMMAND …",
        "",
        "Train language models that use a long context, by weighting the loss of each token.",
        "",
    ]
    for name, command in COMMANDS.items():
        lines.append(f"  {name:<9}{(command.__doc__ or '').splitlines()[0]}")
    return "\n".join([*lines, "", "tokenweight COMMAND --help lists the options of a command."])


def _parse(name: str, argv: list[str], default: Any = tyro.MISSING) -> Any:
    """The command's dataclass, or None after its help was printed. What tyro prints of an error becomes one line."""
    printed = io.StringIO()
    try:
        with contextlib.redirect_stderr(printed):
            extra = {} if default is tyro.MISSING else {"default": default}
            return tyro.cli(COMMANDS[name], prog=f"tokenweight {name}", args=argv, use_underscores=True, **extra)
    except SystemExit as stop:
        if not stop.code:
            return None
        words = re.sub("[─│╭╮╰╯]+", " ", re.sub(r"\x1b\[[0-9;]*m", "", printed.getvalue())).split()
        raise ValueError(" ".join(words)) from None


def _parse_train(argv: list[str]) -> TrainSettings | None:
    """A recipe, overridden by options, of which `--trainer.NAME` are fields of TrainingArguments."""
    argv, recipes = _take(argv, "--config")
    argv, trainer = _take(argv, "--trainer.")
    settings = read_recipe(recipes["--config"]) if recipes else {}
    settings["trainer"] = {
        **settings.get("trainer", {}),
        **{name[len("--trainer.") :]: trainer[name] for name in trainer},
    }
    required = {
        field.name: tyro.MISSING
        for field in dataclasses.fields(TrainSettings)
        if field.name in ("model", "data", "out")
    }
    return _parse("train", argv, TrainSettings(**{**required, **settings}))


def _take(argv: list[str], prefix: str) -> tuple[list[str], dict[str, str]]:
    """Remove options that begin with `prefix`, `--name value` or `--name=value`, and return what is left, and them."""
    left, taken = [], {}
    words = iter(argv)
    for word in words:
        name, equals, value = word.partition("=")
        if not (name == prefix or (prefix.endswith(".") and name.startswith(prefix))):
            left.append(word)
            continue
        found = value if equals else next(words, None)
        if found is None:
            raise ValueError(f"{name}: expected a value")
        taken[name] = found
    return left, taken


@contextlib.contextmanager
def _progress(unit: str) -> Iterator[Callable[..., None]]:
    """A progress bar on standard error; yields a function that takes how many units were done, and of how many."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, Task, TimeRemainingColumn
    from rich.text import Text

    class Rate(ProgressColumn):
        def render(self, task: Task) -> Text:
            return Text(f"{unit}, {task.speed or 0:,.0f} a second")

    columns = (BarColumn(), MofNCompleteColumn(), Rate(), TimeRemainingColumn())
    console = Console(stderr=True)
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task(unit, total=None)

        def advance(done: int, total: int | None = None) -> None:
            progress.update(task, advance=done, total=total)

        yield advance
