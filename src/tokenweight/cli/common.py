"""Helpers of several commands: progress bars, numbers of tokens as text, and the extra that figures need."""

import contextlib
import sys
import time
from collections.abc import Callable, Iterator

from tokenweight import records
from tokenweight.records import OptionalTokens as OptionalTokens
from tokenweight.records import Tokens as Tokens


@contextlib.contextmanager
def progress_bar(unit: str) -> Iterator[Callable[..., None]]:
    """Progress bar on stderr; yields a function that takes the number of units done, and the total."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, Task, TimeRemainingColumn
    from rich.text import Text

    class Rate(ProgressColumn):
        def render(self, task: Task) -> Text:
            return Text(f"{unit}, {task.speed or 0:,.0f} a second")

    columns = (BarColumn(), MofNCompleteColumn(), Rate(), TimeRemainingColumn())
    console = Console(stderr=True)
    if not console.is_terminal:
        yield _Lines(unit)
        return
    with Progress(*columns, console=console, transient=True) as bars:
        task = bars.add_task(unit, total=None)

        def advance(done: int, total: int | None = None) -> None:
            bars.update(task, advance=done, total=total)

        yield advance


class _Lines:
    """Progress without a terminal, as in the log of a job: one line per minute."""

    def __init__(self, unit: str) -> None:
        self._unit, self._done = unit, 0
        self._total: int | None = None
        self._begin = self._last = time.monotonic()

    def __call__(self, done: int, total: int | None = None) -> None:
        self._done += done
        self._total = self._total if total is None else total
        now = time.monotonic()
        if now - self._last >= 60:
            self._last = now
            reached = f"{self._done:,}" if self._total is None else f"{self._done:,} of {self._total:,}"
            rate = self._done / (now - self._begin)
            print(f"{reached} {self._unit}, {rate:,.3g} a second", file=sys.stderr, flush=True)


@contextlib.contextmanager
def drawing() -> Iterator[None]:
    """Name the extra to install if matplotlib is missing."""
    try:
        yield
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] != "matplotlib":
            raise
        raise ValueError(f"figures need matplotlib: pip install 'tokenweight[plots]' ({error})") from error


def token_counts(option: str, text: str) -> list[int]:
    """Read the numbers of tokens in "4096", or in "512,32k,1M", where k is 1024.

    Raises:
        ValueError: if one is not a number of at least 1, naming the option.
    """
    try:
        return [records.token_count(word) for word in text.split(",")]
    except ValueError:
        raise ValueError(f"--{option} {text}: expected a number of tokens, or several as in 512,4096,32k") from None
