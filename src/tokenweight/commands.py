"""The commands: each a dataclass of its options, and what it does. Nothing heavy is imported before it runs."""

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from tokenweight.evalplan import EvalSettings
from tokenweight.progress import progress


@dataclasses.dataclass(frozen=True)
class Prepare:
    """Cut texts into rows of tokens of one length. Interrupted and run again, it goes on."""

    texts: Annotated[
        tyro.conf.Positional[tuple[str, ...]], tyro.conf.arg(metavar="TEXTS …", help_behavior_hint="(required)")
    ]
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
            "hub": [source.name for source in sources if source.kind == "hub"],
            "text_column": self.text_column,
            "subset": self.subset,
            "split": self.split,
            "seed": self.seed,
            "environment": environment(),
        }
        documents = read_documents(sources, text_column=self.text_column, subset=self.subset, split=self.split)
        if self.seed is not None:
            documents = shuffled(documents, self.seed)
        with progress("characters") as advance:

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
        with progress("tokens") as advance:
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

    model: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="MODEL")]
    """Folder, hub id or .gguf file of the model."""

    def run(self) -> None:
        """Write the folder and print the table."""
        from rich.console import Console

        from tokenweight.card import add_evaluation
        from tokenweight.comparison import notes, terminal_tables
        from tokenweight.evaluate import evaluate, read_table

        with progress("tokens") as advance:
            record = evaluate(self, progress=advance)
        table = read_table(record)
        console = Console()
        tables = terminal_tables(table, width=console.width)
        console.print(*tables, *notes(table, unit=record["unit"]), sep="\n")
        print(f"{self.out}: eval.json, table.csv, and table.md with every measure")
        if self.baseline is not None and add_evaluation(self.model, record):
            print(f"{self.model}/README.md: the evaluation in the model card")
