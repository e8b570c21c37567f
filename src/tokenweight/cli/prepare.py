"""The command `prepare`."""

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from tokenweight import data, models, records
from tokenweight.cli.common import progress_bar


@dataclasses.dataclass(frozen=True)
class Prepare:
    """Cut or pack texts into token sequences of one length. Resumes if run again after an interruption."""

    texts: Annotated[
        tyro.conf.Positional[tuple[str, ...]], tyro.conf.arg(metavar="TEXTS …", help_behavior_hint="(required)")
    ]
    """Text files (a document each), .jsonl and .parquet files (a document per row), folders of these, or data sets."""
    tokenizer: str
    """Folder, hub id or .gguf file of the model whose tokenizer to use."""
    length: int
    """Tokens per sequence: the long context."""
    out: Path
    """New folder for the sequences."""
    short: Literal["drop", "pack"] = "drop"
    """Whether documents, and rests of documents, that are shorter than a sequence are dropped or packed together."""
    text_column: str = "text"
    """Column that holds the text, in .jsonl and .parquet files and data sets."""
    subset: str | None = None
    """Subset of a data set of the hub."""
    split: str = "train"
    """Split of a data set of the hub."""
    seed: int | None = None
    """Seed to shuffle the documents with; by default they are read in their own order."""
    max_rows: int | None = None
    """Largest number of sequences to write."""
    skip_invalid: bool = False
    """Whether documents that are no text (null, lists, broken JSON, not UTF-8) are left out and counted."""

    def run(self) -> None:
        """Write the sequences and print what became of the documents."""
        if not self.texts:
            raise ValueError("name at least one text file, folder or data set")
        sources = data.find_sources(self.texts, text_column=self.text_column)
        tokenizer = models.load_tokenizer(self.tokenizer)
        provenance = {
            **data.tokenizer_note(tokenizer, self.tokenizer),
            "texts": list(self.texts),
            "hub": [source.name for source in sources if source.kind == "hub"],
            "text_column": self.text_column,
            "subset": self.subset,
            "split": self.split,
            "skip_invalid": self.skip_invalid,
            "seed": self.seed,
            "environment": records.environment(),
        }
        documents = data.read_documents(
            sources,
            text_column=self.text_column,
            subset=self.subset,
            split=self.split,
            skip_invalid=self.skip_invalid,
        )
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
