"""The commands: each a dataclass of its options, and what it does. Nothing heavy is imported before it runs."""

import dataclasses
from pathlib import Path
from typing import Literal

import tyro

from tokenweight import data, method


@dataclasses.dataclass(frozen=True)
class Export:
    """Write rows with their loss weights, in the columns and alignment of another trainer."""

    scored: tyro.conf.Positional[Path]
    """Folder of rows scored with --long."""
    out: Path
    """New folder."""
    format: Literal["hf", "trl", "llamafactory", "ms-swift", "tinker"] = "hf"
    """Whose; docs/data.md says what each one reads."""
    weighting: str = "dense"
    """As in `train`."""
    size: int | None = None
    """Of the short context, where scores of several are stored."""

    def run(self) -> None:
        """Write the weights and print a summary."""

        weighting = method.parse_weighting(self.weighting)
        print(
            f"{self.out}: {data.export_weights(self.scored, weighting, self.out, format=self.format, size=self.size)}"
        )
