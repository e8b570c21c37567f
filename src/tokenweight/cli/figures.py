"""The commands that show what weights do: each a dataclass of its options. Nothing heavy is imported before it runs."""

import contextlib
import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from tokenweight import method, records, view


@dataclasses.dataclass(frozen=True)
class Figures:
    """Draw figures of scores, trainings and evaluations, as SVG and PNG."""

    runs: Annotated[
        tyro.conf.Positional[tuple[Path, ...]], tyro.conf.arg(metavar="FOLDERS …", help_behavior_hint="(required)")
    ]
    """Folders of `score`, `train` and `eval`; they are told apart by the files in them."""
    out: Path
    """Folder for the figures; those of the same name are replaced."""
    style: Literal["paper", "screen"] = "paper"
    """As wide as a column of a paper, without titles; or larger, with titles."""
    weighting: str | None = None
    """Of scored rows, as in `train`; several, as in dense,sparse:keep=0.1,longce. By default dense,sparse,longce."""
    row: int | None = None
    """Of scored rows, the first; by default 0."""
    num_rows: int | None = None
    """Of scored rows, how many at most; by default 8."""
    size: int | None = None
    """Of the short context, where scores of several are stored."""

    def run(self) -> None:
        """Write the figures and print their names."""
        if not self.runs:
            raise ValueError("name at least one folder of scores, of a training, or of an evaluation")
        given = {name: getattr(self, name) for name in ("weighting", "row", "num_rows", "size")}
        given = {name: value for name, value in given.items() if value is not None}
        if given and "scored" not in map(records.run_kind, self.runs):
            name, value = next(iter(given.items()))
            raise ValueError(f"--{name} {value}: is of scored rows, and no folder of them is named")
        if self.num_rows is not None and self.num_rows < 1:
            raise ValueError(f"--num_rows {self.num_rows}: expected at least 1")
        weightings = _weightings("dense,sparse,longce" if self.weighting is None else self.weighting)
        with drawing():
            draw, write = view.draw, view.write_figure
        figures = draw(
            self.runs,
            weightings,
            first_row=self.row or 0,
            num_rows=self.num_rows or 8,
            size=self.size,
            style=self.style,
        )
        self.out.mkdir(parents=True, exist_ok=True)
        for name, figure in figures.items():
            write(figure, self.out / name, style=self.style)
        print(f"{self.out}, each as .svg and .png: {', '.join(figures)}")


@contextlib.contextmanager
def drawing() -> Iterator[None]:
    """Say which extra has the package that is missing, if it is."""
    try:
        yield
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] != "matplotlib":
            raise
        raise ValueError(
            f"figures need a package that is missing: pip install 'tokenweight[plots]' ({error})"
        ) from error


def _weightings(text: str) -> dict[str, Any]:
    """Several weightings, separated by commas, as their settings are: a word such as keep=0.1 is one of these."""

    words: list[str] = []
    for word in text.split(","):
        if words and "=" in word and ":" not in word:
            words[-1] += f",{word}"
        else:
            words.append(word)
    return {word.strip(): method.parse_weighting(word) for word in words}
