"""The command `score`."""

import dataclasses
from pathlib import Path

import tyro

from tokenweight import data, method
from tokenweight.cli.common import progress_bar, token_counts


@dataclasses.dataclass(frozen=True)
class Score:
    """Store the loss of every token with a short context, computed once with a frozen model. Resumes if run again.

    Under torchrun, each process scores its own slice of the shards on its own GPU.
    """

    rows: tyro.conf.Positional[Path]
    """Folder of sequences that `prepare` has written."""
    model: str
    """Folder, hub id or .gguf file of the scoring model."""
    size: str
    """Tokens of the short context. Several sizes, as in 512,4096,32k, are scored in one run."""
    out: Path
    """Folder for the scored sequences."""
    stride: str | None = None
    """Tokens that each window scores, one number per size; by default three quarters of the size."""
    long: bool = False
    """Also store the losses with the full context, and the mean gain from it per sequence. Implied by several sizes."""
    revision: str | None = None
    """Revision of a hub model."""
    dtype: str = "auto"
    """Dtype the scoring model is loaded in."""
    attn_implementation: str | None = None
    """Attention kernel: sdpa, flash_attention_2, eager, … (docs/models.md); by default the choice of transformers."""
    max_tokens: int = 32768
    """Most tokens in one forward pass; halved whenever memory runs out."""
    shard: str | None = None
    """Score only slice i of n of the shards, as one of n jobs: i/n, from 0/n to n-1/n."""

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
                attn_implementation=self.attn_implementation,
                with_long=self.long or len(contexts) > 1,
                max_tokens=self.max_tokens,
                share=share,
                progress=advance,
            )
        print(f"{self.out}: {summary}")


def _contexts(size: str, stride: str | None) -> list["method.ShortContext"]:
    sizes = token_counts("size", size)
    strides: list[int | None] = [None] * len(sizes) if stride is None else [*token_counts("stride", stride)]
    if len(strides) != len(sizes):
        raise ValueError(f"--stride {stride}: expected one number for each of the sizes {size}")
    return list(map(method.ShortContext, sizes, strides))
