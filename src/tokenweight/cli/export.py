"""The command `export`."""

import dataclasses
from pathlib import Path
from typing import Literal

import tyro

from tokenweight import data, method


@dataclasses.dataclass(frozen=True)
class Export:
    """Write sequences with their loss weights, in the columns and alignment that another trainer reads."""

    scored: tyro.conf.Positional[Path]
    """Folder of sequences that were scored with --long."""
    out: Path
    """New folder for the weights."""
    format: Literal["hf", "trl", "llamafactory", "ms-swift", "tinker"] = "hf"
    """Trainer to write for; see docs/data.md."""
    weighting: str = "dense"
    """Weighting, as in `train`."""
    size: int | None = None
    """Tokens of the short context, where scores of several are stored."""

    def run(self) -> None:
        """Write the weights and print a summary."""
        weighting = method.parse_weighting(self.weighting)
        summary = data.export_weights(self.scored, weighting, self.out, format=self.format, size=self.size)
        print(f"{self.out}: {summary}")
