"""How long the command line takes to say what it can do, in a fresh process.

    python benchmarks/startup.py            a minute
    python benchmarks/startup.py --quick    seconds, one round

Help should be there before one wonders: below a second on two cores. "import tyro", which parses the options, is the
floor; torch and transformers, which take seconds, are not imported for help (a test holds that).
"""

import functools
import subprocess
import sys
from pathlib import Path

import tyro

from common import RESULTS, Report, alternately

FLOOR = "import tyro"
COMMANDS = {
    "tokenweight --help": ["-m", "tokenweight", "--help"],
    "tokenweight prepare --help": ["-m", "tokenweight", "prepare", "--help"],
    "tokenweight train --help": ["-m", "tokenweight", "train", "--help"],
    FLOOR: ["-c", "import tyro"],
}


def main(*, rounds: int = 15, quick: bool = False, csv: Path | None = None) -> None:
    """Time of help in a fresh process.

    Args:
        rounds: of timings, after one that is not counted.
        quick: one round, to see that the benchmark runs; writes no file unless `csv` is given.
        csv: file to append rows to; by default results.csv beside this script.
    """
    report = Report("startup", csv if quick or csv else RESULTS)
    runs = {
        name: functools.partial(subprocess.run, [sys.executable, *arguments], check=True, stdout=subprocess.DEVNULL)
        for name, arguments in COMMANDS.items()
    }
    seconds = alternately(runs, 1 if quick else rounds)
    for name, values in seconds.items():
        setting = {"what": "help in a fresh process", "x": "modules compiled before", "implementation": name}
        report.add(**setting, metric="time", unit="s", values=values)
        report.add_ratio(**setting, metric=f"time / {FLOOR}", over=values, under=seconds[FLOOR])
    report.finish()


if __name__ == "__main__":
    tyro.cli(main)
