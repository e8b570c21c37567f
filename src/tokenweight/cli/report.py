"""The commands `report` and `figures`, which visualize runs."""

import dataclasses
from pathlib import Path
from typing import Annotated, Literal

import tyro

from tokenweight import method, records, view
from tokenweight.cli.common import OptionalTokens, drawing


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
    smooth: bool = False
    """Average weight by position over the tokens that each window scores."""
    model: str | None = None
    """Model that computes the long losses anew; by default they are the stored ones, or those of the scoring model."""

    def run(self) -> None:
        """Write the page and print its size."""
        excerpt = view.Excerpt(rows=self.rows, num=self.num, size=self.size, model=self.model, smooth=self.smooth)
        num_bytes = view.write_report(self.runs, self.out, excerpt)
        print(f"{self.out}: {len(self.runs)} run{'s' * (len(self.runs) > 1)}, {num_bytes / 1e6:.2f} MB")


@dataclasses.dataclass(frozen=True)
class Figures:
    """Draw figures of scores, trainings and evaluations, as SVG and PNG."""

    runs: Annotated[
        tyro.conf.Positional[tuple[Path, ...]], tyro.conf.arg(metavar="FOLDERS …", help_behavior_hint="(required)")
    ]
    """Folders that `score`, `train` or `eval` has written."""
    out: Path
    """Folder for the figures; those of the same name are replaced."""
    style: Literal["paper", "screen"] = "paper"
    """Either as wide as a column of a paper and without titles, or larger and with titles."""
    weighting: str | None = None
    """Weightings of scored sequences, as in dense,sparse:keep=0.1,longce. By default dense,sparse,longce."""
    row: int | None = None
    """Number of the first scored sequence; by default 0."""
    num_rows: int | None = None
    """Largest number of scored sequences; by default 8."""
    size: OptionalTokens = None
    """Tokens of the short context, where scores of several are stored."""
    smooth: bool = False
    """Average weight by position over the tokens that each window scores."""

    def run(self) -> None:
        """Write the figures and print their names."""
        if not self.runs:
            raise ValueError("name at least one folder of scores, of a training, or of an evaluation")
        given = {name: getattr(self, name) for name in ("weighting", "row", "num_rows", "size", "smooth")}
        given = {name: value for name, value in given.items() if value is not None and value is not False}
        if given and "scored" not in map(records.run_kind, self.runs):
            name, value = next(iter(given.items()))
            raise ValueError(f"--{name} {value}: applies to scored sequences, and no folder of them is named")
        if self.num_rows is not None and self.num_rows < 1:
            raise ValueError(f"--num_rows {self.num_rows}: expected at least 1")
        weightings = _weightings("dense,sparse,longce" if self.weighting is None else self.weighting)
        with drawing():
            figures = view.draw(
                self.runs,
                weightings,
                first_row=self.row or 0,
                num_rows=self.num_rows or 8,
                size=self.size,
                smooth=self.smooth,
                style=self.style,
            )
            self.out.mkdir(parents=True, exist_ok=True)
            for name, figure in figures.items():
                view.write_figure(figure, self.out / name, style=self.style)
        print(f"{self.out}, each as .svg and .png: {', '.join(figures)}")
        for name, figure in figures.items():
            if note := str(figure.get_label()):
                print(f"{name}: {note}")


def _weightings(text: str) -> dict[str, "method.Weighting"]:
    """Split weightings at commas, which also separate settings: a word such as keep=0.1 is a setting, and so is
    anything in parentheses."""
    words: list[str] = []
    for word in text.split(","):
        if words and (words[-1].count("(") > words[-1].count(")") or ("=" in word and not {":", "("} & {*word})):
            words[-1] += f",{word}"
        else:
            words.append(word)
    return {word.strip(): method.parse_weighting(word) for word in words}
