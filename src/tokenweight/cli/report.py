"""The command `report`."""

import dataclasses
from pathlib import Path
from typing import Annotated

import tyro

from tokenweight import view
from tokenweight.cli.common import OptionalTokens


@dataclasses.dataclass(frozen=True)
class Report:
    """Write one HTML page about runs, with texts tinted by weight, charts and tables. It opens from disk."""

    runs: Annotated[
        tyro.conf.Positional[tuple[Path, ...]], tyro.conf.arg(metavar="FOLDERS …", help_behavior_hint="(required)")
    ]
    """Folders that `score`, `train` or `eval` has written; several are shown side by side."""
    out: Path = Path("report.html")
    """File for the page; an existing one is replaced."""
    rows: int = 1
    """Number of sequences shown from each scored folder, from the first."""
    num: int = 2048
    """Number of tokens shown from each sequence; charts are of whole sequences."""
    size: OptionalTokens = None
    """Tokens of the short context, where scores of several are stored."""
    model: str | None = None
    """Model that computes the long losses anew; by default they are the stored ones, or those of the scoring model."""

    def run(self) -> None:
        """Write the page and print its size."""
        excerpt = view.Excerpt(rows=self.rows, num=self.num, size=self.size, model=self.model)
        num_bytes = view.write_report(self.runs, self.out, excerpt)
        print(f"{self.out}: {len(self.runs)} run{'s' * (len(self.runs) > 1)}, {num_bytes / 1e6:.2f} MB")
