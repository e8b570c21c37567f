"""The command `export`."""

import dataclasses
from pathlib import Path
from typing import Literal

import tyro

from tokenweight import data, method
from tokenweight.cli.common import OptionalTokens


@dataclasses.dataclass(frozen=True)
class Export:
    """Write sequences with their loss weights, in the columns and alignment that another trainer reads.

    With --format parquet or jsonl, it writes the stored losses and all other columns as they are.
    """

    scored: tyro.conf.Positional[Path]
    """Folder of sequences that were scored; for weights, with --long."""
    out: Path
    """New folder for the weights, or for the files."""
    format: Literal["hf", "trl", "llamafactory", "ms-swift", "tinker", "parquet", "jsonl"] = "hf"
    """Trainer to write weights for, or format of files; see docs/data.md."""
    weighting: str | None = None
    """Weighting, as in `train`; by default dense."""
    size: OptionalTokens = None
    """Tokens of the short context, where scores of several are stored."""

    def run(self) -> None:
        """Write the weights, or the files, and print a summary."""
        if self.format in data.COPIES:
            for option, value in (("weighting", self.weighting), ("size", self.size)):
                if value is not None:
                    raise ValueError(f"--{option} {value}: --format {self.format} holds the scores, not weights")
            contents = data.export_rows(self.scored, self.out, format=self.format)
            print(f"{self.out}: {contents.rows:,} rows, {contents.tokens:,} tokens")
            return
        weighting = method.parse_weighting(self.weighting or "dense")
        summary = data.export_weights(self.scored, weighting, self.out, format=self.format, size=self.size)
        print(f"{self.out}: {summary}")
