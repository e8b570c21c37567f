"""Settings shared by all benchmarks, and the table of results with the conditions of each number."""

import csv
import shlex
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table

from tokenweight.records import environment

RESULTS = Path(__file__).resolve().parents[1] / "results.csv"
VERSIONS = ("torch", "transformers", "tokenweight")


@dataclass
class Bench:
    """Settings of every benchmark; each adds its own, and a `run`."""

    rounds: int = 5
    """Timed rounds, after one warm-up round."""
    quick: bool = False
    """Smoke test: tiny sizes and one round; writes no file unless --csv is given."""
    csv: Path | None = None
    """File to append rows to; by default results.csv beside this script."""

    def __post_init__(self) -> None:
        if self.quick:
            self.rounds = 1

    def report(self, benchmark: str) -> "Report":
        """An empty table of results."""
        return Report(benchmark, self.csv if self.quick or self.csv else RESULTS)


@dataclass(frozen=True)
class Row:
    """One measurement and its conditions: a line of `results.csv`."""

    benchmark: str
    what: str
    implementation: str
    metric: str
    unit: str
    x: str
    """The setting: sizes and dtype."""
    p50: float
    p20: float
    p80: float
    device: str
    versions: str
    commit: str
    date: str
    command: str


@dataclass
class Report:
    """Collects rows; `finish` prints the new ones and appends them to a CSV file."""

    benchmark: str
    csv: Path | None
    rows: list[Row] = field(default_factory=list)

    def __post_init__(self) -> None:
        made = environment()  # taken before the first measurement: the tree may change while they run
        self.conditions = {
            "device": made["device"],
            "versions": ", ".join(f"{name} {made['versions'][name]}" for name in VERSIONS),
            "commit": made["commit"] or "unknown",
            "date": made["date"][:10],
            "command": shlex.join(["python", f"benchmarks/{Path(sys.argv[0]).name}", *sys.argv[1:]]),
        }

    def add(self, *, what: str, x: str, implementation: str, metric: str, unit: str, values: Sequence[float]) -> None:
        """Add the median and the 20th and 80th percentiles of `values`, one per round."""
        p20, p50, p80 = (_rounded(value) for value in np.percentile(list(values), [20, 50, 80]))
        self.rows.append(Row(self.benchmark, what, implementation, metric, unit, x, p50, p20, p80, **self.conditions))

    def add_each(
        self, measured: Mapping[tuple[str, str], Sequence[float]], *, what: str, x: str, implementation: str
    ) -> None:
        """Add several metrics of one implementation: their values, by (metric, unit)."""
        for (metric, unit), values in measured.items():
            self.add(what=what, x=x, implementation=implementation, metric=metric, unit=unit, values=values)

    def add_ratio(
        self, *, what: str, x: str, implementation: str, metric: str, over: Sequence[float], under: Sequence[float]
    ) -> None:
        """Add a ratio: p50 is that of the medians, p20 and p80 those of the ratios within a round."""
        ratios = [a / b for a, b in zip(over, under)]
        self.add(what=what, x=x, implementation=implementation, metric=metric, unit="1", values=ratios)
        self.rows[-1] = replace(self.rows[-1], p50=_rounded(np.median(list(over)) / np.median(list(under))))

    def finish(self) -> None:
        for what, x in dict.fromkeys((row.what, row.x) for row in self.rows):
            self._print_table(what, x)
        if self.csv is not None:
            is_new = not self.csv.exists()
            with self.csv.open("a", newline="") as file:
                writer = csv.DictWriter(file, [column.name for column in fields(Row)], lineterminator="\n")
                if is_new:
                    writer.writeheader()
                writer.writerows(asdict(row) for row in self.rows)
        self.rows = []

    def _print_table(self, what: str, x: str) -> None:
        """Print implementations down and metrics across: median and, below it, p20 .. p80."""
        rows = {(row.implementation, row.metric): row for row in self.rows if (row.what, row.x) == (what, x)}
        units = {row.metric: "" if row.unit == "1" else f", {row.unit}" for row in rows.values()}
        headers = ["", *(metric + unit for metric, unit in units.items())]
        table = Table(*headers, title=f"{what}\n{x}", caption=", ".join(self.conditions.values()), show_lines=True)
        for name in dict.fromkeys(implementation for implementation, _ in rows):
            found = [rows.get((name, metric)) for metric in units]
            table.add_row(name, *("" if r is None else f"{r.p50:.4g}\n{r.p20:.3g} .. {r.p80:.3g}" for r in found))
        Console(width=None if sys.stdout.isatty() else 140).print(table)


def _rounded(value: float) -> float:
    return float(f"{value:.5g}")
