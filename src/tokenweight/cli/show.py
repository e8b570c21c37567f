"""The commands that show what weights do: each a dataclass of its options. Nothing heavy is imported before it runs."""

import dataclasses
import functools
from pathlib import Path

import tyro

from tokenweight import data, method, view


@dataclasses.dataclass(frozen=True)
class Show:
    """Show a passage, tinted by weight, and the tokens that weigh most: of scored rows, or of any text."""

    source: tyro.conf.Positional[Path]
    """Folder of scored rows; or a file that `prepare` reads, which `--model` then scores at once."""
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
    """Of the short context: which of several that are stored; of a text, by default a quarter of the row."""
    stride: int | None = None
    """Of a text: tokens that a window scores, by default three quarters of the size."""
    length: int | None = None
    """Of a text: tokens of a row, the long context; by default 4096, or what the model reads, if that is less."""
    model: str | None = None
    """Folder, hub id or .gguf file. Scores a text; gives long losses in place of stored ones, or where none are."""
    svg: Path | None = None
    """Also write the picture to this file."""

    def run(self) -> None:
        """Print the passage and the list."""
        from rich.console import Console

        weighting = method.parse_weighting(self.weighting)
        if self.num < 1 or self.top < 0:
            raise ValueError(f"--num {self.num} --top {self.top}: expected at least 1 token, and no negative number")
        if self.svg is not None and not self.svg.parent.is_dir():
            raise ValueError(f"--svg {self.svg}: no such folder")
        console, row = Console(), self._row()
        shown = functools.partial(view.view, row, weighting, start=self.start, num=self.num, top=self.top)
        console.print(*shown(tinted=console.color_system is not None and not console.no_color), sep="\n\n")
        if self.svg is not None:
            view.write_svg(shown(), self.svg, title=f"{self.source}, row {self.row}, {weighting}")

    def _row(self) -> "data.ScoredRow":

        if not self.source.is_file():
            if self.stride is not None or self.length is not None:
                raise ValueError(
                    f"--length and --stride are of a text: {self.source} is a folder of rows that has its own"
                )
            return data.read_row(self.source, self.row, self.model, size=self.size)
        if self.model is None:
            raise ValueError(f"--model: {self.source} is a text: name the model that scores it")
        return data.score_text(
            self.source, self.model, number=self.row, length=self.length, size=self.size, stride=self.stride
        )
