"""Time of the command line's help in a fresh process.

    python benchmarks/startup.py            a minute
    python benchmarks/startup.py --quick    seconds, one round

Help should feel instant: below a second on two cores. "import tyro", which parses the options, is the floor; torch and
transformers, which take seconds, are not imported for help (a test verifies that).
"""

import functools
import subprocess
import sys
from dataclasses import dataclass

import tyro

from bench.measure import alternately
from bench.report import Bench

FLOOR = "import tyro"
COMMANDS = {
    "tokenweight --help": ["-m", "tokenweight", "--help"],
    "tokenweight prepare --help": ["-m", "tokenweight", "prepare", "--help"],
    "tokenweight train --help": ["-m", "tokenweight", "train", "--help"],
    FLOOR: ["-c", "import tyro"],
}


@dataclass
class Startup(Bench):
    """Time of help in a fresh process."""

    rounds: int = 15

    def run(self) -> None:
        report = self.report("startup")
        runs = {
            name: functools.partial(subprocess.run, [sys.executable, *arguments], check=True, stdout=subprocess.DEVNULL)
            for name, arguments in COMMANDS.items()
        }
        seconds = alternately(runs, self.rounds)
        for name, values in seconds.items():
            setting = {"what": "help in a fresh process", "x": "modules compiled before", "implementation": name}
            report.add(**setting, metric="time", unit="s", values=values)
            report.add_ratio(**setting, metric=f"time / {FLOOR}", over=values, under=seconds[FLOOR])
        report.finish()


if __name__ == "__main__":
    tyro.cli(Startup).run()
