"""The commands: each a dataclass of its options, and what it does. Nothing heavy is imported before it runs."""

import dataclasses
from pathlib import Path
from typing import Any

import tyro

from tokenweight import data, method
from tokenweight.cli.progress import progress_bar


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

        contexts = _contexts(self.size, self.stride)
        share = data.process_share(self.shard)
        with progress_bar("tokens") as advance:
            summary = data.score_folder(
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

    sizes = _numbers("--size", size)
    strides = (
        [method.ShortContext(number).stride for number in sizes] if stride is None else _numbers("--stride", stride)
    )
    if len(strides) != len(sizes):
        raise ValueError(f"--stride {stride}: expected one number for each of the sizes {size}")
    return [method.ShortContext(*pair) for pair in zip(sizes, strides)]


def _numbers(option: str, text: str) -> list[int]:
    words = text.split(",")
    if not all(word.isdecimal() for word in words):
        raise ValueError(f"{option} {text}: expected a number of tokens, or several as in 512,1024,4096")
    return list(map(int, words))
