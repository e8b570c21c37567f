"""The commands `stats` and `compare-scores`, which summarize scored folders."""

import csv
import dataclasses
import io
from pathlib import Path
from typing import Annotated

import tyro

from tokenweight import records, view
from tokenweight.cli.common import OptionalTokens, token_counts


@dataclasses.dataclass(frozen=True)
class Stats:
    """Summarize the gain from long context in scored folders: mean, key tokens, documents with most and least.

    It reads only the statistics that `score --long` stores for each sequence, no tokens.
    """

    folders: Annotated[
        tyro.conf.Positional[tuple[Path, ...]], tyro.conf.arg(metavar="FOLDERS …", help_behavior_hint="(required)")
    ]
    """Folders that `score --long` has written."""
    size: OptionalTokens = None
    """Tokens of the only short context to summarize; by default all that are stored."""
    by: str | None = None
    """Column of names that distinguishes sources within a folder."""
    top: int = 5
    """Number of documents listed with most gain, and with least."""
    save: Path | None = None
    """File to write the numbers to as well: .json (all), or .csv (a line for each folder and context)."""

    def run(self) -> None:
        """Print the numbers."""
        from rich.console import Console

        if not self.folders:
            raise ValueError("name at least one folder that `tokenweight score --long` has written")
        _check(self.save, ".json", ".csv")
        names = view.name_folders(self.folders)
        gains = [
            gain
            for folder, name in zip(self.folders, names)
            for gain in view.corpus_gains(folder, size=self.size, by=self.by, top=self.top, name=name)
        ]
        console = Console()
        console.print(*view.corpus_view(gains), sep="\n")
        if self.save is not None:
            _write(view.corpus_records(gains), self.save)


@dataclasses.dataclass(frozen=True)
class CompareScores:
    """Compare two scorers by their scores of the same sequences: do they rank the same tokens first?

    For the tokens beyond the first window, it prints their rank correlation, the overlap of the top 5 and 20 % of each
    scorer, the fractions of one scorer's LongPPL key tokens and net benefit that are among the top tokens of the
    other, and the tokens about which they differ most.
    """

    first: tyro.conf.Positional[Path]
    """Folder that `score --long` has written, by the scorer that the other is compared with."""
    second: tyro.conf.Positional[Path]
    """Another folder of the same sequences; or the same folder, with two sizes."""
    size: str | None = None
    """Tokens of the short context, by default the only one stored; or one per folder, as in 1k,512."""
    top: int = 8
    """Number of tokens in each of the two lists of those that the scorers differ about."""
    save: Path | None = None
    """File to write the numbers to as well (.json)."""

    def run(self) -> None:
        """Print the numbers and the lists."""
        from rich.console import Console

        _check(self.save, ".json")
        sizes = [None] if self.size is None else token_counts("size", self.size)
        if len(sizes) > 2:
            raise ValueError(f"--size {self.size}: expected one number of tokens, or one for each of the two folders")
        agreement = view.compare_scores(self.first, self.second, sizes=(sizes[0], sizes[-1]), top=self.top)
        Console().print(*view.agreement_view(agreement), sep="\n")
        if self.save is not None:
            records.write_json(self.save, agreement.as_json())


def _check(path: Path | None, *endings: str) -> None:
    """Raise early, before anything is computed, if that file cannot be written."""
    if path is not None and path.suffix.lower() not in endings:
        raise ValueError(f"--save {path}: expected a name that ends in {' or '.join(endings)}")
    if path is not None and not path.parent.is_dir():
        raise ValueError(f"--save {path}: no such folder")


def _write(numbers: list[dict], path: Path) -> None:
    if path.suffix.lower() == ".json":
        records.write_json(path, numbers)
        return
    lines = [{**one, **one["quantiles"]} for one in numbers]
    names = [name for name, value in lines[0].items() if not isinstance(value, dict | list)]
    file = io.StringIO()
    writer = csv.DictWriter(file, names, extrasaction="ignore", lineterminator="\n")
    writer.writeheader()
    writer.writerows(lines)
    with records.replaced(path) as part:
        part.write_text(file.getvalue(), encoding="utf-8")
