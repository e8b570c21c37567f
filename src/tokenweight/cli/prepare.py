"""The command `prepare`."""

import contextlib
import dataclasses
import itertools
from collections.abc import Generator, Iterator
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from tokenweight import data, models, records
from tokenweight.cli.common import OptionalTokens, Tokens, progress_bar


@dataclasses.dataclass(frozen=True)
class Prepare:
    """Cut or pack texts into token sequences. Resumes if run again after an interruption."""

    texts: Annotated[
        tyro.conf.Positional[tuple[str, ...]], tyro.conf.arg(metavar="TEXTS …", help_behavior_hint="(required)")
    ]
    """Text files (one document each), .jsonl, .csv and .parquet files (one per row), folders of these, or data sets."""
    tokenizer: str
    """Folder, hub id or .gguf file of the model whose tokenizer to use."""
    length: Tokens
    """Tokens per sequence: the long context."""
    out: Path
    """New folder for the sequences."""
    short: Literal["drop", "pack", "decompose", "keep"] | None = None
    """Whether documents, and remainders of them, that are shorter than a sequence are dropped (the default) or packed
    together; or each document is decomposed into sequences of 2^k + 1 tokens, for `train --curriculum`. Chats are kept,
    each a sequence of its own length (the default), or packed."""
    chat: tyro.conf.FlagCreatePairsOff[bool] = False
    """Read chats (columns messages, or prompt and completion): the tokenizer's chat template renders them, and only
    answers are predicted."""
    shortest: OptionalTokens = None
    """With --short decompose: length of the shortest sequences, as --length is of the longest; by default 256."""
    order: Literal["read", "similar"] = "read"
    """Whether packed sequences hold documents in reading order, or similar documents together."""
    size: OptionalTokens = None
    """Tokens of the short context, for the printed share of tokens that have more; by default a quarter of --length."""
    text_column: str = "text"
    """Column that holds the text, in .jsonl, .csv and .parquet files and data sets."""
    glob: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    """Files to read in folders, as in '**/*.py', whatever their suffix; several times for several patterns."""
    subset: str | None = None
    """Subset of a data set of the hub."""
    split: str = "train"
    """Split of a data set of the hub."""
    seed: int | None = None
    """Seed to shuffle the documents with; by default they keep their order. With --order similar: seed for the
    documents that the path begins with, by default 0."""
    max_rows: int | None = None
    """Largest number of sequences to write."""
    skip_invalid: bool = False
    """Whether to skip and count documents that are not text (null, lists, broken JSON, not UTF-8)."""
    num_proc: int = 1
    """Processes that tokenize; the sequences are the same, whatever their number."""
    format: Literal["arrow", "parquet"] = "arrow"
    """Format of the shards. Commands read both; Parquet is for other tools."""

    def run(self) -> None:
        """Write the sequences; print what became of the documents, and the fraction of tokens with long context."""
        if not self.texts:
            raise ValueError("name at least one text file, folder or data set")
        if self.order == "similar" and (self.short != "pack" or self.chat):
            found = "chats are packed as they fit" if self.chat else "such sequences hold one document each"
            raise ValueError(f"order similar: {found}: expected texts and --short pack")
        if self.chat and self.text_column != "text":
            raise ValueError(
                f"text_column {self.text_column}: chats are read of messages, or prompt and completion: leave it out"
            )
        if self.size is not None and self.size >= self.length:
            raise ValueError(f"size {self.size}: expected less than length, {self.length}")
        text_column = None if self.chat else self.text_column
        sources = data.find_sources(self.texts, text_column=text_column, glob=self.glob)
        for name, value in {"subset": self.subset, "split": None if self.split == "train" else self.split}.items():
            if value is not None and not any(source.kind == "hub" for source in sources):
                raise ValueError(f"{name} {value}: found no data set of the Hub among the texts: leave it out")
        complete = self.out.exists()
        tokenizer = models.load_tokenizer(self.tokenizer)
        provenance = {**models.tokenizer_note(tokenizer, self.tokenizer), **self._provenance(sources, text_column)}
        with contextlib.closing(_counted(self._documents(sources, text_column))) as documents:
            summary = data.prepare_rows(
                documents,
                tokenizer,
                self.length,
                self.out,
                short=self.short,
                chat=self.chat,
                skip_invalid=self.skip_invalid,
                shortest=self.shortest,
                in_order=self.order == "similar",
                max_rows=self.max_rows,
                num_proc=self.num_proc,
                format=self.format,
                provenance=provenance,
            )
        print(f"{self.out}: {'complete already, ' if complete else ''}{summary}")
        size = self.size or max(1, self.length // 4)
        print(f"predicted tokens with more context than {size:,}{'' if self.size else ', a quarter of the length'}:")
        for part in data.context_shares(self.out, size):
            print(f"{part.share:>7.1%} of {part.tokens:,} in {part.source}")

    def _provenance(self, sources: list[Any], text_column: str | None) -> dict[str, Any]:
        return {
            "texts": list(self.texts),
            "hub": [source.name for source in sources if source.kind == "hub"],
            "glob": list(self.glob),
            "sources": data.sources_note(sources),
            "text_column": text_column,
            "subset": self.subset,
            "split": self.split,
            "skip_invalid": self.skip_invalid,
            "seed": self.seed,
            "order": self.order,
            "environment": records.environment(),
        }

    def _documents(self, sources: list[Any], text_column: str | None) -> Iterator[Any]:
        """The documents of all sources, in the requested order."""
        documents = data.read_documents(
            sources,
            text_column=text_column,
            subset=self.subset,
            split=self.split,
            skip_invalid=self.skip_invalid,
        )
        if self.order == "similar":
            return self._by_similarity(documents)
        return documents if self.seed is None else data.shuffled(documents, self.seed)

    def _by_similarity(self, documents: Iterator[Any]) -> Iterator[Any]:
        with progress_bar("documents read and compared") as advance:
            ordered = data.by_similarity(documents, seed=self.seed or 0, folder=self.out.parent, progress=advance)
            first = list(itertools.islice(ordered, 1))
        yield from itertools.chain(first, ordered)


def _counted(documents: Iterator[Any]) -> Generator[Any]:
    """The documents, with a progress bar of characters from the first one on; ordering shows its own bar."""
    first = list(itertools.islice(documents, 1))
    with progress_bar("characters") as advance:
        for document in itertools.chain(first, documents):
            yield document
            advance(len(document.text))
