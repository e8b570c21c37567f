"""What several commands share: progress bars, numbers of tokens as text, and the extra that figures need."""

import contextlib
from collections.abc import Callable, Iterator

from tokenweight import records
from tokenweight.records import OptionalTokens as OptionalTokens
from tokenweight.records import Tokens as Tokens


@contextlib.contextmanager
def progress_bar(unit: str) -> Iterator[Callable[..., None]]:
    """A progress bar on standard error; yields a function that takes how many units were done, and of how many."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, Task, TimeRemainingColumn
    from rich.text import Text

    class Rate(ProgressColumn):
        def render(self, task: Task) -> Text:
            return Text(f"{unit}, {task.speed or 0:,.0f} a second")

    columns = (BarColumn(), MofNCompleteColumn(), Rate(), TimeRemainingColumn())
    console = Console(stderr=True)
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bars:
        task = bars.add_task(unit, total=None)

        def advance(done: int, total: int | None = None) -> None:
            bars.update(task, advance=done, total=total)

        yield advance


@contextlib.contextmanager
def drawing() -> Iterator[None]:
    """Name the extra that installs matplotlib, if it is missing."""
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
