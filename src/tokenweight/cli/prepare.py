"""The commands: each a dataclass of its options, and what it does. Nothing heavy is imported before it runs."""

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from tokenweight import data, models, records
from tokenweight.cli.progress import progress_bar


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

        if not self.texts:
            raise ValueError("name at least one text file, folder or data set")
        sources = data.find_sources(self.texts)
        tokenizer = models.load_tokenizer(self.tokenizer)
        provenance = {
            **data.tokenizer_note(tokenizer, self.tokenizer),
            "texts": list(self.texts),
            "hub": [source.name for source in sources if source.kind == "hub"],
            "text_column": self.text_column,
            "subset": self.subset,
            "split": self.split,
            "seed": self.seed,
            "environment": records.environment(),
        }
        documents = data.read_documents(sources, text_column=self.text_column, subset=self.subset, split=self.split)
        if self.seed is not None:
            documents = data.shuffled(documents, self.seed)
        with progress_bar("characters") as advance:

            def counted() -> Iterator[Any]:
                for document in documents:
                    yield document
                    advance(len(document.text))

            summary = data.prepare_rows(
                counted(),
                tokenizer,
                self.length,
                self.out,
                short=self.short,
                max_rows=self.max_rows,
                provenance=provenance,
            )
        print(f"{self.out}: {summary}")
