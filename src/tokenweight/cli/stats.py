"""The command `stats`."""

import csv
import dataclasses
import io
from pathlib import Path
from typing import Annotated

import tyro

from tokenweight import records, view
from tokenweight.cli.common import OptionalTokens


@dataclasses.dataclass(frozen=True)
class Stats:
    """Sum up what the long context gives in scored folders: mean gain, key tokens, the documents with most and least.

    It reads the numbers that `score --long` stores for each sequence, and no token.
    """

    folders: Annotated[
        tyro.conf.Positional[tuple[Path, ...]], tyro.conf.arg(metavar="FOLDERS …", help_behavior_hint="(required)")
    ]
    """Folders that `score --long` has written."""
    size: OptionalTokens = None
    """Tokens of the only short context to sum up; by default all that are stored."""
    by: str | None = None
    """Column of names that tells sources apart within a folder."""
    top: int = 5
    """Number of documents listed with most gain, and with least."""
    save: Path | None = None
    """File to write the numbers to as well: .json (all), or .csv (a line for each folder and context)."""

    def run(self) -> None:
        """Print the numbers."""
        from rich.console import Console

        if not self.folders:
            raise ValueError("name at least one folder that `tokenweight score --long` has written")
        if self.save is not None and self.save.suffix.lower() not in (".json", ".csv"):
            raise ValueError(f"--save {self.save}: expected a name that ends in .json or .csv")
        if self.save is not None and not self.save.parent.is_dir():
            raise ValueError(f"--save {self.save}: no such folder")
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
