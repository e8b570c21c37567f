"""Lines of a metrics file: appended and read."""

import json
from pathlib import Path
from typing import Any

from tokenweight.records.files import reached


def append_line(path: Path, value: dict[str, Any]) -> None:
    """Append one line to a .jsonl file."""
    reached("append", path)
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(value) + "\n")
    reached("append", path)


def read_metrics(folder: Path) -> list[dict[str, Any]]:
    """The numbers in each line of a training's `metrics.jsonl`; none, if it has not logged anything yet.

    Raises:
        ValueError: naming a line that is damaged.
    """
    path, lines = folder / "metrics.jsonl", []
    for number, text in enumerate(path.read_text(encoding="utf-8").splitlines() if path.is_file() else [], 1):
        try:
            values = json.loads(text)
            step = values["step"] + 0
        except (ValueError, TypeError, KeyError) as error:
            raise ValueError(f"{path}, line {number}: expected an object with a step ({error!r})") from None
        lines.append({"step": step, **{key: value for key, value in values.items() if isinstance(value, int | float)}})
    return lines
