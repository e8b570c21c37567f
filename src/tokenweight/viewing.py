"""The commands that show what weights do: each a dataclass of its options. Nothing heavy is imported before it runs."""

import contextlib
import dataclasses
import functools
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro

from tokenweight.progress import progress
from tokenweight.recipe import TrainSettings

if TYPE_CHECKING:
    from tokenweight.scored import ScoredRow


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

        from tokenweight.show import view
        from tokenweight.svg import write_svg
        from tokenweight.weighting import parse_weighting

        weighting = parse_weighting(self.weighting)
        if self.num < 1 or self.top < 0:
            raise ValueError(f"--num {self.num} --top {self.top}: expected at least 1 token, and no negative number")
        if self.svg is not None and not self.svg.parent.is_dir():
            raise ValueError(f"--svg {self.svg}: no such folder")
        console, row = Console(), self._row()
        shown = functools.partial(view, row, weighting, start=self.start, num=self.num, top=self.top)
        console.print(*shown(tinted=console.color_system is not None and not console.no_color), sep="\n\n")
        if self.svg is not None:
            write_svg(shown(), self.svg, title=f"{self.source}, row {self.row}, {weighting}")

    def _row(self) -> "ScoredRow":
        from tokenweight.scored import read_row, score_text

        if not self.source.is_file():
            if self.stride is not None or self.length is not None:
                raise ValueError(
                    f"--length and --stride are of a text: {self.source} is a folder of rows that has its own"
                )
            return read_row(self.source, self.row, self.model, size=self.size)
        if self.model is None:
            raise ValueError(f"--model: {self.source} is a text: name the model that scores it")
        return score_text(
            self.source, self.model, number=self.row, length=self.length, size=self.size, stride=self.stride
        )


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
        with _drawing():
            from tokenweight.canvas import write_figure
            from tokenweight.figures import draw
        from tokenweight.records import run_kind

        if not self.runs:
            raise ValueError("name at least one folder of scores, of a training, or of an evaluation")
        given = {name: getattr(self, name) for name in ("weighting", "row", "num_rows", "size")}
        given = {name: value for name, value in given.items() if value is not None}
        if given and "scored" not in map(run_kind, self.runs):
            name, value = next(iter(given.items()))
            raise ValueError(f"--{name} {value}: is of scored rows, and no folder of them is named")
        if self.num_rows is not None and self.num_rows < 1:
            raise ValueError(f"--num_rows {self.num_rows}: expected at least 1")
        weightings = _weightings("dense,sparse,longce" if self.weighting is None else self.weighting)
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
            write_figure(figure, self.out / name, style=self.style)
        print(f"{self.out}, each as .svg and .png: {', '.join(figures)}")


@contextlib.contextmanager
def _drawing() -> Iterator[None]:
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
    from tokenweight.weighting import parse_weighting

    words: list[str] = []
    for word in text.split(","):
        if words and "=" in word and ":" not in word:
            words[-1] += f",{word}"
        else:
            words.append(word)
    return {word.strip(): parse_weighting(word) for word in words}


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
        from tokenweight.report import Excerpt, write_report

        excerpt = Excerpt(rows=self.rows, num=self.num, size=self.size, model=self.model)
        num_bytes = write_report(self.runs, self.out, excerpt)
        print(f"{self.out}: {len(self.runs)} run{'s' * (len(self.runs) > 1)}, {num_bytes / 1e6:.2f} MB")


@dataclasses.dataclass(frozen=True)
class Plan(TrainSettings):
    """Say what a recipe will cost in FLOPs, memory and hours. Needs no weights, no data and no GPU.

    It reads what `train` reads: --config, and any setting as an option.
    """

    data: str = ""
    """Folder of rows; if it is there, it says how many there are and how long."""
    out: str = ""
    """Not written."""
    length: int | None = None
    """Tokens of a row; by default those of the data, else extend.length."""
    lengths: str = "32k,64k,128k,256k,512k,1M"
    """Also at these lengths, where k is 1024 tokens; "none" for none."""
    gpu: str | None = None
    """H100, A100 or 4090: gives hours from its peak in bfloat16."""
    mfu: float | None = None
    """Share of that peak that the FLOPs of a step reach, by default 0.4: an assumption."""
    tokens_per_s: float | None = None
    """Measured, instead of --gpu: of a uniform run of this recipe, all GPUs together."""
    num_gpus: int = 1
    """That train."""
    json: Path | None = None
    """Also write the numbers to this file."""
    figure: Path | None = None
    """Also draw how FLOPs and memory grow: this name with .svg and with .png."""

    def run(self) -> None:
        """Print the tables."""
        from rich.console import Console

        from tokenweight.plan import Speed, plan
        from tokenweight.plantables import plan_tables
        from tokenweight.records import write_json

        for option, path in (("json", self.json), ("figure", self.figure)):
            if path is not None and not path.parent.is_dir():
                raise ValueError(f"--{option} {path}: no such folder")
        if self.figure is not None and self.lengths == "none":
            raise ValueError("--figure: --lengths none leaves nothing to draw")
        if self.figure is not None:
            with _drawing():
                from tokenweight.canvas import write_figure
                from tokenweight.plots import cost_figure
        speed = Speed(self.gpu, self.mfu, self.tokens_per_s)
        lengths = _lengths(self.lengths)
        with progress("lengths") as advance:
            budget = plan(
                self, length=self.length, lengths=lengths, speed=speed, num_gpus=self.num_gpus, progress=advance
            )
        Console().print(*plan_tables(budget), sep="\n\n")
        if self.json is not None:
            write_json(self.json, budget.as_json())
        if self.figure is not None:
            write_figure(cost_figure([*budget.run, *budget.growth]), self.figure)


def _lengths(text: str) -> list[int]:
    if text == "none":
        return []
    units = {"k": 2**10, "M": 2**20}
    words = [(word[:-1], units[word[-1]]) if word[-1:] in units else (word, 1) for word in text.split(",")]
    numbers = [int(digits) * unit if digits.isdecimal() else 0 for digits, unit in words]
    if min(numbers) < 2:
        raise ValueError(f"--lengths {text}: expected numbers of tokens above 1, as in 4096,32k,1M, or none")
    return numbers
