"""The commands that show what weights do: each a dataclass of its options. Nothing heavy is imported before it runs."""

import dataclasses
from pathlib import Path
from typing import Annotated

import tyro

from tokenweight import view


@dataclasses.dataclass(frozen=True)
class Report:
    """Write one HTML page about runs: texts tinted by weight, charts, tables. It opens from disk."""

    runs: Annotated[
        tyro.conf.Positional[tuple[Path, ...]], tyro.conf.arg(metavar="FOLDERS …", help_behavior_hint="(required)")
    ]
    """Folders that `score`, `train` or `eval` has written; several are shown side by side."""
    out: Path = Path("report.html")
    """The page; an existing one is replaced."""
    rows: int = 1
    """Rows of each scored folder, from the first."""
    num: int = 2048
    """Tokens of each row whose text is shown; weights and charts are of the whole rows."""
    size: int | None = None
    """Of the short context, where scores of several are stored."""
    model: str | None = None
    """Gives the long losses in place of stored ones, or where none are; by default the scoring model."""

    def run(self) -> None:
        """Write the page and print its size."""

        excerpt = view.Excerpt(rows=self.rows, num=self.num, size=self.size, model=self.model)
        num_bytes = view.write_report(self.runs, self.out, excerpt)
        print(f"{self.out}: {len(self.runs)} run{'s' * (len(self.runs) > 1)}, {num_bytes / 1e6:.2f} MB")
