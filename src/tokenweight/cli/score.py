"""The command `score`."""

import dataclasses
from pathlib import Path
from typing import Annotated, Literal

import tyro

from tokenweight import data, method
from tokenweight.cli.common import OptionalTokens, Tokens, progress_bar, token_counts


@dataclasses.dataclass(frozen=True)
class Score:
    """Store the loss of every token with a short context, computed once with a frozen model. Resumes if run again.

    Under torchrun, each process scores its own slice of the shards on its own GPU.
    """

    rows: tyro.conf.Positional[Path]
    """Folder of sequences: of `prepare`, of `datasets`, or of Parquet files with a column input_ids."""
    model: str
    """Folder, hub id or .gguf file of the scoring model, whose tokenizer may differ from that of the sequences; or
    count, as in count:order=4, which scores by repetition within a document, without a model (docs/data.md)."""
    out: Path
    """Folder for the scored sequences."""
    size: str | None = None
    """Tokens of the short context, by default a quarter of the longest sequence. Several sizes, as in 512,4096,32k, are
    scored in one run."""
    stride: str | None = None
    """Tokens that each window scores, one number per size; by default three quarters of the size."""
    long: bool = False
    """Also store the losses with the full context, and the mean gain from it per sequence. Implied by several sizes,
    by count, and by a model with another tokenizer."""
    divergence: str | None = None
    """Also store the divergence of the two predictions of each token, for weightings such as expected(gain): kl, tv,
    absolute, or the weighting within expected(…). Implies --long; count stores kl anyway."""
    as_: Annotated[Literal["reference", "teacher"] | None, tyro.conf.arg(name="as")] = None
    """Role of the model, if not the scorer: reference, whose full-context losses are read by weightings such as rho1;
    or teacher, whose likeliest tokens are read by --distill of train. The sequences may be scored already."""
    top_k: int | None = None
    """Tokens of each prediction of a teacher that are stored, by default 16: 8 bytes each."""
    revision: str | None = None
    """Revision of a hub model."""
    dtype: str = "auto"
    """Dtype the scoring model is loaded in."""
    attn_implementation: str | None = None
    """Attention kernel: sdpa, flash_attention_2, eager, … (docs/models.md); by default the choice of transformers."""
    max_tokens: Tokens = 32768
    """Most tokens in one forward pass; halved whenever memory runs out."""
    shard: str | None = None
    """Score only slice i of n of the shards, as one of n jobs: i/n, from 0/n to n-1/n."""
    shard_tokens: OptionalTokens = None
    """Tokens of a shard; n jobs need at least n shards. By default 1M, or a thousandth of all, if that is more."""
    format: Literal["arrow", "parquet"] = "arrow"
    """Format of the shards. Commands read both; Parquet is for other tools."""

    def run(self) -> None:
        """Write the scores and print a summary."""
        contexts = _contexts(self.size, self.stride)
        if self.top_k is not None and self.as_ != "teacher":
            raise ValueError(f"--top_k {self.top_k}: is that of --as teacher: leave it out")
        top_k = None if self.as_ != "teacher" else method.TOP_K if self.top_k is None else self.top_k
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
                with_long=self.long or len(contexts or ()) > 1,
                divergence=None if self.divergence is None else method.parse_divergence(self.divergence),
                as_reference=self.as_ == "reference",
                top_k=top_k,
                max_tokens=self.max_tokens,
                shard_tokens=self.shard_tokens,
                format=self.format,
                share=share,
                progress=advance,
                announce=lambda line: print(f"{self.out}: {line}", flush=True),
            )
        print(f"{self.out}: {summary}")


def _contexts(size: str | None, stride: str | None) -> list["method.ShortContext"] | None:
    if size is None:
        if stride is not None:
            raise ValueError(f"--stride {stride}: belongs to --size, which is not given")
        return None
    sizes = token_counts("size", size)
    strides: list[int | None] = [None] * len(sizes) if stride is None else [*token_counts("stride", stride)]
    if len(strides) != len(sizes):
        raise ValueError(f"--stride {stride}: expected one number for each of the sizes {size}")
    return list(map(method.ShortContext, sizes, strides))
