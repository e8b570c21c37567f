"""The commands: each a dataclass of its options, and what it does. Nothing heavy is imported before it runs."""

import contextlib
import dataclasses
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal

import tyro

from tokenweight.evalplan import EvalSettings


@dataclasses.dataclass(frozen=True)
class Prepare:
    """Cut texts into rows of tokens of one length. Interrupted and run again, it goes on."""

    texts: tyro.conf.Positional[tuple[str, ...]]
    """Text files (one document each); .jsonl and .parquet files (one document a row); folders of them; data sets."""
    tokenizer: str
    """Folder, hub id or .gguf file of the model whose tokenizer to use."""
    length: int
    """Tokens of a row: the long context."""
    out: Path
    """New folder for the rows."""
    short: Literal["drop", "pack"] = "drop"
    """What becomes of documents, and ends of documents, that fill no row: dropped, or packed several to a row."""
    text_column: str = "text"
    """Of .jsonl and .parquet files and data sets."""
    subset: str | None = None
    """Of a data set of the hub."""
    split: str = "train"
    """Of a data set of the hub."""
    seed: int | None = None
    """Read the documents in an order drawn with this seed; by default in their own."""
    max_rows: int | None = None
    """Stop after so many rows."""

    def run(self) -> None:
        """Write the rows and print what became of the documents."""
        from tokenweight.documents import find_sources, read_documents, shuffled
        from tokenweight.model import load_tokenizer, tokenizer_fingerprint
        from tokenweight.records import environment
        from tokenweight.rows import prepare_rows

        if not self.texts:
            raise ValueError("name at least one text file, folder or data set")
        sources = find_sources(self.texts)
        tokenizer = load_tokenizer(self.tokenizer)
        provenance = {
            "tokenizer": self.tokenizer,
            "tokenizer_fingerprint": tokenizer_fingerprint(tokenizer),
            "texts": list(self.texts),
            "text_column": self.text_column,
            "subset": self.subset,
            "split": self.split,
            "seed": self.seed,
            "environment": environment(),
        }
        documents = read_documents(sources, text_column=self.text_column, subset=self.subset, split=self.split)
        if self.seed is not None:
            documents = shuffled(documents, self.seed)
        with _progress("characters") as advance:

            def counted() -> Iterator[Any]:
                for document in documents:
                    yield document
                    advance(len(document.text))

            summary = prepare_rows(
                counted(),
                tokenizer,
                self.length,
                self.out,
                short=self.short,
                max_rows=self.max_rows,
                provenance=provenance,
            )
        print(f"{self.out}: {summary}")


@dataclasses.dataclass(frozen=True)
class Score:
    """Compute the loss of every token with a short context, once, with a frozen model. Run again, it goes on.

    Under torchrun each process scores its share of the shards, on its own GPU.
    """

    rows: tyro.conf.Positional[Path]
    """Folder of rows."""
    model: str
    """Folder, hub id or .gguf file of the scoring model."""
    size: str
    """Tokens that a window reads: the short context. Several, as in 512,1024,4096, are scored in one run."""
    out: Path
    """Folder for the scored rows."""
    stride: str | None = None
    """Tokens that a window scores, one number for each size; by default three quarters of the size."""
    long: bool = False
    """Also store the losses with the whole row as context, and what it gives to each row; implied by several sizes."""
    revision: str | None = None
    """Of a hub model."""
    dtype: str = "auto"
    """Of the scoring model's weights."""
    max_tokens: int = 32768
    """Tokens read in one forward pass; halved when memory does not suffice."""
    shard: str | None = None
    """i/n, from 0/n to n-1/n: score this share of the shards only, as one of n jobs."""

    def run(self) -> None:
        """Write the scores and print a summary."""
        from tokenweight.store import process_share, score_folder

        contexts = _contexts(self.size, self.stride)
        share = process_share(self.shard)
        with _progress("tokens") as advance:
            summary = score_folder(
                self.rows,
                self.model,
                contexts,
                self.out,
                revision=self.revision,
                dtype=self.dtype,
                with_long=self.long or len(contexts) > 1,
                max_tokens=self.max_tokens,
                share=share,
                progress=advance,
            )
        print(f"{self.out}: {summary}")


def _contexts(size: str, stride: str | None) -> list[Any]:
    from tokenweight.scoring import ShortContext
    from tokenweight.windows import default_stride

    sizes = _numbers("--size", size)
    strides = [default_stride(number) for number in sizes] if stride is None else _numbers("--stride", stride)
    if len(strides) != len(sizes):
        raise ValueError(f"--stride {stride}: expected one number for each of the sizes {size}")
    return [ShortContext(*pair) for pair in zip(sizes, strides)]


def _numbers(option: str, text: str) -> list[int]:
    words = text.split(",")
    if not all(word.isdecimal() for word in words):
        raise ValueError(f"{option} {text}: expected a number of tokens, or several as in 512,1024,4096")
    return list(map(int, words))


@dataclasses.dataclass(frozen=True)
class Export:
    """Write rows with their loss weights, in the columns and alignment of another trainer."""

    scored: tyro.conf.Positional[Path]
    """Folder of rows scored with --long."""
    out: Path
    """New folder."""
    format: Literal["hf", "trl", "llamafactory", "ms-swift", "tinker"] = "hf"
    """Whose; docs/export.md says what each one reads."""
    weighting: str = "dense"
    """As in `train`."""
    size: int | None = None
    """Of the short context, where scores of several are stored."""

    def run(self) -> None:
        """Write the weights and print a summary."""
        from tokenweight.export import export_weights
        from tokenweight.weighting import parse_weighting

        weighting = parse_weighting(self.weighting)
        print(f"{self.out}: {export_weights(self.scored, weighting, self.out, format=self.format, size=self.size)}")


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
    size: int | None = None
    """Of the short context, where scores of several are stored."""
    model: str | None = None
    """Gives the long losses, if they are not stored; by default the scoring model."""
    svg: Path | None = None
    """Also write the picture to this file."""

    def run(self) -> None:
        """Print the passage and the list."""
        from rich.console import Console

        from tokenweight.scored import read_row
        from tokenweight.show import view
        from tokenweight.svg import write_svg
        from tokenweight.weighting import parse_weighting

        weighting = parse_weighting(self.weighting)
        if self.num < 1 or self.top < 0:
            raise ValueError(f"--num {self.num} --top {self.top}: expected at least 1 token, and no negative number")
        if self.svg is not None and not self.svg.parent.is_dir():
            raise ValueError(f"--svg {self.svg}: no such folder")
        row = read_row(self.scored, self.row, self.model, size=self.size)
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


@dataclasses.dataclass(frozen=True)
class Eval(EvalSettings):
    """Measure a model at long and at short range, and compare it with its baseline in one table."""

    model: tyro.conf.Positional[str]
    """Folder, hub id or .gguf file of the model."""

    def run(self) -> None:
        """Write the folder and print the table."""
        from rich.console import Console

        from tokenweight.comparison import notes, terminal_tables
        from tokenweight.evaluate import evaluate, read_table

        with _progress("tokens") as advance:
            record = evaluate(self, progress=advance)
        table = read_table(record)
        console = Console()
        tables = terminal_tables(table, width=console.width)
        console.print(*tables, *notes(table, unit=record["unit"]), sep="\n")
        print(f"{self.out}: eval.json, table.csv, and table.md with every measure")


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
