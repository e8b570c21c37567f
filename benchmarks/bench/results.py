"""Reading results.csv."""

import csv
import re
from collections.abc import Iterable
from pathlib import Path

RESULTS = Path(__file__).resolve().parents[1] / "results.csv"


class Results:
    """The newest row of each measurement."""

    def __init__(self, path: Path = RESULTS) -> None:
        with path.open(newline="") as file:
            rows = list(csv.DictReader(file))
        self.rows = {(row["benchmark"], row["implementation"], row["metric"], row["x"]): row for row in rows}

    def value(self, benchmark: str, implementation: str, metric: str, x: str | None = None) -> float:
        """The median; `x` is optional where a benchmark has one setting."""
        found = [
            row["p50"]
            for key, row in self.rows.items()
            if key[:3] == (benchmark, implementation, metric) and x in (None, key[3])
        ]
        if len(found) != 1:
            raise ValueError(f"results.csv has {len(found)} rows for {benchmark}, {implementation}, {metric}, {x}")
        return float(found[0])

    def conditions(self, benchmarks: Iterable[str]) -> list[str]:
        """Provenance of the numbers of some benchmarks: a line for each device, with its versions."""
        places: dict[str, list[str]] = {}
        for (benchmark, *_), row in self.rows.items():
            if benchmark in benchmarks:
                commits = places.setdefault(f"{row['device']}; {row['versions']}", [])
                commits.append(f"{benchmark} {row['commit']} ({row['date']})")
        return [f"{place}. Commits: {', '.join(dict.fromkeys(commits))}." for place, commits in places.items()]

    def settings(self, benchmark: str) -> str:
        """The settings of a benchmark."""
        return " / ".join(self.all_settings(benchmark))

    def all_settings(self, benchmark: str) -> list[str]:
        return list(dict.fromkeys(key[3] for key in self.rows if key[0] == benchmark))

    def implementations(self, benchmark: str, x: str | None = None) -> list[str]:
        """Implementations, in the order in which they were first measured."""
        return list(dict.fromkeys(key[1] for key in self.rows if key[0] == benchmark and x in (None, key[3])))


def by_length(results: Results, metric: str, of: str = "growth") -> dict[str, dict[int, float]]:
    """Results of a growth benchmark: type of step -> sequence length -> value, short sequences first."""
    found: dict[str, dict[int, float]] = {}
    for (benchmark, kind, name, x), row in results.rows.items():
        if (benchmark, name) == (of, metric):
            found.setdefault(kind, {})[int(re.search(r"1 x (\d+) tokens", x)[1])] = float(row["p50"])
    return {kind: dict(sorted(values.items())) for kind, values in found.items()}
