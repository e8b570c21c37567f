"""The commands that show what weights do: each a dataclass of its options. Nothing heavy is imported before it runs."""

import dataclasses
from pathlib import Path

import tyro


@dataclasses.dataclass(frozen=True)
class Show:
    """Show a passage of scored rows, tinted by weight, and the tokens whose weight changes most."""

    scored: tyro.conf.Positional[Path]
    """Folder of scored rows."""
    row: int = 0
    """Which row, counted from 0."""
    weighting: str = "dense"
    """As in `train`."""
    start: int | None = None
    """First token of the passage; by default the passage with the most weight."""
    num: int = 300
    """Tokens of the passage."""
    top: int = 12
    """Tokens listed below it."""
    size: int | None = None
    """Of the short context, where scores of several are stored."""
    model: str | None = None
    """Gives the long losses, if they are not stored; by default the scoring model."""
    svg: Path | None = None
    """Also write the picture to this file."""

    def run(self) -> None:
        """Print the passage and the list."""
        from rich.console import Console

        from tokenweight.scored import read_row
        from tokenweight.show import view
        from tokenweight.svg import write_svg
        from tokenweight.weighting import parse_weighting

        weighting = parse_weighting(self.weighting)
        if self.num < 1 or self.top < 0:
            raise ValueError(f"--num {self.num} --top {self.top}: expected at least 1 token, and no negative number")
        if self.svg is not None and not self.svg.parent.is_dir():
            raise ValueError(f"--svg {self.svg}: no such folder")
        row = read_row(self.scored, self.row, self.model, size=self.size)
        picture = view(row, weighting, start=self.start, num=self.num, top=self.top)
        Console().print(*picture, sep="\n\n")
        if self.svg is not None:
            write_svg(picture, self.svg, title=f"{self.scored}, row {self.row}, {weighting}")
