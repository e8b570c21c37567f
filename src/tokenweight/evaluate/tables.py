"""The comparison of models as tables: for the terminal, in Markdown and CSV, and in the model card."""

import csv
import io
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCard
from rich.box import SIMPLE_HEAD
from rich.table import Table
from rich.text import Text

from tokenweight.evaluate.comparison import Entry, Judge, is_flattered, short_names
from tokenweight.records import CARD_NAME, edit_card, section_marks, with_section

_NAME, _COLUMN = 12, 11
"""Width in characters for the name of a model, and for a metric: that of its widest word or number."""


def terminal_tables(table: Sequence[Sequence[Entry]], *, width: int = 100) -> list[Table]:
    """Show the metrics of the summary, a row per model: value, change, and the interval of the change below it.

    Args:
        table: what `compare` returns.
        width: characters of a line; a wider table is split.
    """
    columns = list(_columns([[entry for entry in row if entry.summary] for row in table]).values())
    num = max(1, (width - _NAME) // _COLUMN)
    return [_terminal_table(table, columns[i : i + num]) for i in range(0, len(columns), num)]


def _terminal_table(table: Sequence[Sequence[Entry]], columns: list[Entry]) -> Table:
    titles = [_title(entry).split() for entry in columns]
    height = max(map(len, titles))
    shown = Table("model", box=SIMPLE_HEAD, show_lines=True, padding=(0, 1), collapse_padding=True, pad_edge=False)
    shown.columns[0].overflow = "fold"
    group = ""
    for entry, words in zip(columns, titles):
        # One word per line, and the group above its first column, padded to the tallest title.
        lines = [entry.group.upper() if entry.group != group else "", *[""] * (height - len(words)), *words[:-2]]
        shown.add_column("\n".join([*lines, " ".join(words[-2:])]), justify="right")
        group = entry.group
    for name, row in zip(short_names(table), table):
        found = {entry.measure: entry for entry in row}
        shown.add_row(name, *(_terminal_cell(found.get(entry.measure)) for entry in columns))
    return shown


def _terminal_cell(entry: Entry | None) -> Text:
    if entry is None:
        return Text("-")
    text = Text().append(_value(entry), "bold" if entry.best else "")
    if entry.change is not None:
        text.append(f"\n{_change(entry)}")
        limits = "-" if entry.low is None else f"[{_changed(entry, entry.low)},\n{_changed(entry, entry.high)}]"
        text.append(f"\n{limits}", "dim")
    return text


def notes(table: Sequence[Sequence[Entry]], *, unit: str = "document") -> list[str]:
    """Notes for reading the tables, one line each.

    Args:
        unit: the resampling unit of losses, "document" or "row".
    """
    entries = [entry for row in table for entry in row]
    lines = ["Losses in nats; ↓ lower is better, ↑ higher is better; bold is the best, if changes are clear."]
    if len(table) > 1:
        lines.append(
            f"Changes are from the first model, with 95 % intervals from resampled {unit}s (for probes: facts)."
        )
        lines.append("* the interval excludes no change. Changes of % are in points; those of LongPPL are ratios (x).")
    first = {entry.measure: entry.judge for entry in table[0]}
    without = [entry for entry in entries if entry.change is not None and entry.low is None]
    flattered = [entry for entry in without if is_flattered(entry.judge, first.get(entry.measure))]
    if len(without) > len(flattered):
        lines.append(f"- for an interval: too few {unit}s have such a token.")
    if any(entry.value is None for entry in entries):
        lines.append("- for a value: there is no such token.")
    return [*lines, *_judge_notes({entry.judge for entry in entries}, bool(flattered)), *_benefit_notes(table)]


def _judge_notes(judges: set[Judge | None], is_flattered: bool) -> list[str]:
    if is_flattered:
        return ["No interval for LongPPL where one of the two models found the key tokens: that flatters it."]
    if "pair" in judges:
        return [
            "LongPPL: over the key tokens of the model and of the first, half a weight each; of the first, its own."
        ]
    if "self" in judges:
        return ["LongPPL: the model found its own key tokens, which flatters it."]
    return []


def _benefit_notes(table: Sequence[Sequence[Entry]]) -> list[str]:
    """Notes on context gains that are not improvements: the model became worse with less context."""
    lines = []
    for name, row in zip(short_names(table)[1:], table[1:]):
        rises = {entry.measure for entry in row if entry.clear and entry.change is not None and entry.change > 0}
        sizes = [measure.removeprefix("benefit_") for measure in rises if measure.startswith("benefit_")]
        if worse := [size for size in sorted(sizes, key=int) if f"context_{size}" in rises]:
            listed = ", ".join(f"benefit {size}" for size in worse)
            lines.append(f"{name}: {listed} rose as the loss with that little context rose, which is no gain.")
    return lines


def markdown(table: Sequence[Sequence[Entry]], *, unit: str = "document") -> str:
    """The summary, with a row per model, and below it every metric, with a column per model; `unit` as in `notes`."""
    columns = _columns([[entry for entry in row if entry.summary] for row in table])
    lines = [["model", *(f"{entry.group}: {_title(entry)}" for entry in columns.values())]]
    for row in table:
        found = {entry.measure: entry for entry in row}
        lines.append([row[0].model, *(_markdown_cell(found.get(name)) for name in columns)])
    whole = [["group", "measure", "unit", "documents", *(row[0].model for row in table)]]
    for name, entry in _columns(table).items():
        cells = [next((entry for entry in row if entry.measure == name), None) for row in table]
        head = [entry.group, _title(entry), entry.unit, str(entry.num_documents)]
        whole.append([*head, *map(_markdown_cell, cells)])
    text = "\n".join(f"- {line}" for line in notes(table, unit=unit))
    return f"{_markdown(lines)}\n\n{text}\n\n## Every measure\n\n{_markdown(whole)}\n"


def grid_markdown(models: Sequence[tuple[str, Sequence[dict[str, Any]]]]) -> str:
    """Accuracy, margin and loss of probes by length and place, one table per family; empty without probes.

    Args:
        models: name and records of probes, with the fields of `GRID`.
    """
    parts = []
    for family in dict.fromkeys(cell["family"] for _, cells in models for cell in cells):
        own = [(name, [cell for cell in cells if cell["family"] == family]) for name, cells in models]
        places = list(dict.fromkeys(map(_place, (cell for _, cells in own for cell in cells))))
        lines = [["model", "length", *places]]
        for name, cells in own:
            for length in dict.fromkeys(cell["length"] for cell in cells):
                found = {_place(cell): _grid_cell(cell) for cell in cells if cell["length"] == length}
                lines.append([name, str(length), *(found.get(place, "-") for place in places)])
        parts.append(f"\n## Probes: {family.replace('_', ' ')}\n\n{_markdown(lines)}\n")
    if any(cell.get("margin") is not None for _, cells in models for cell in cells):
        parts.append("\nEach: answers found; nats before the best decoy; loss per token of the answer, in nats.\n")
    return "".join(parts)


def _place(cell: dict[str, Any]) -> str:
    if cell.get("distance") is not None:
        return f"distance {cell['distance']}"
    return "any depth" if cell["depth"] is None else f"depth {cell['depth']:g}"


def _grid_cell(cell: dict[str, Any]) -> str:
    numbers = [f"{cell['accuracy']:.1%}"]
    numbers += [f"{cell['margin']:+.2f}"] if cell.get("margin") is not None else []
    numbers += [f"{cell['loss']:.3f}"] if cell.get("loss") is not None else []
    return "; ".join(numbers)


def _markdown(lines: list[list[str]]) -> str:
    rule = ["---", *["---:"] * (len(lines[0]) - 1)]
    cells = [[cell.replace("|", "\\|") for cell in line] for line in (lines[0], rule, *lines[1:])]
    return "\n".join(f"| {' | '.join(line)} |" for line in cells)


def _markdown_cell(entry: Entry | None) -> str:
    if entry is None:
        return "-"
    value = f"**{_value(entry)}**" if entry.best else _value(entry)
    if entry.change is None:
        return value
    limits = "-" if entry.low is None else f"[{_changed(entry, entry.low)}, {_changed(entry, entry.high)}]"
    return f"{value} ({_change(entry)} {limits})"


def csv_text(table: Sequence[Sequence[Entry]]) -> str:
    """One line per entry, with all digits."""
    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow(Entry._fields)
    writer.writerows(entry for row in table for entry in row)
    return file.getvalue()


def _columns(table: Sequence[Sequence[Entry]]) -> dict[str, Entry]:
    """One entry of each metric, by group."""
    entries = {entry.measure: entry for row in table for entry in row}
    groups = list(dict.fromkeys(["long", "short", "cost", *(entry.group for entry in entries.values())]))
    return dict(sorted(entries.items(), key=lambda item: groups.index(item[1].group)))


def _title(entry: Entry) -> str:
    arrow = {"lower": " ↓", "higher": " ↑"}.get(entry.better or "", "")
    return entry.measure.replace("_", " ").replace("longppl", "LongPPL") + arrow


def _value(entry: Entry) -> str:
    if entry.value is None:
        return "-"
    return f"{entry.value:.1%}" if entry.unit == "share" else f"{entry.value:.4f}"


def _change(entry: Entry) -> str:
    return _changed(entry, entry.change) + "*" * entry.clear


def _changed(entry: Entry, number: float | None) -> str:
    assert number is not None
    if entry.unit == "perplexity":
        return f"x {number:.3f}"
    return f"{100 * number:+.1f}" if entry.unit == "share" else f"{number:+.4f}"


def add_evaluation(folder: str | os.PathLike[str], record: dict[str, Any]) -> bool:
    """Write the evaluation section and `model-index` of a card made by `write_card`, replacing earlier ones.

    Args:
        folder: folder of the model in the last row of the table.
        record: the contents of `eval.json`.

    Returns:
        Whether there was such a card and it was written; a failure is logged.
    """
    path = Path(folder) / CARD_NAME
    if not path.is_file() or section_marks("training")[0] not in path.read_text(encoding="utf-8", errors="replace"):
        return False

    def edit(card: ModelCard) -> None:
        table = [[Entry(**entry) for entry in row if entry["summary"]] for row in record["comparison"]]
        card.text = with_section(card.text, "evaluation", _evaluation(record, table))
        name, fingerprint = Path(record["data"]).resolve().name, record["settings"]["rows_fingerprint"]
        data: Any = {"dataset_type": name, "dataset_name": name, "dataset_args": {"rows_fingerprint": fingerprint}}
        card.data.model_name = Path(folder).resolve().name
        card.data.eval_results = [
            EvalResult("text-generation", metric_type=entry.measure, metric_value=entry.value, **data)
            for entry in table[-1]
            if entry.value is not None
        ]

    return edit_card(Path(folder), edit)


def _evaluation(record: dict[str, Any], table: list[list[Entry]]) -> str:
    # The summary has a row per model and is too wide for a page. Notes mention metrics beyond it.
    measures = markdown(table).partition("\n\n## Every measure\n\n")[2]
    whole = [[Entry(**entry) for entry in row] for row in record["comparison"]]
    listed = "\n".join(f"- {line}" for line in notes(whole, unit=record["unit"]))
    made, judge = record.get("environment", {}), record["evaluator"]["model"]
    version = made.get("versions", {}).get("tokenweight")
    facts = {
        "rows": f"`{record['data']}`, fingerprint {record['settings']['rows_fingerprint']}",
        "key tokens of LongPPL found by": f"`{judge}`" if judge else None,
        "tokenweight": version,
        "commit": made.get("commit"),
        "date": made.get("date"),
    }
    said = "; ".join(f"{name}: {value}" for name, value in facts.items() if value)
    return f"## Evaluation\n\n{measures.strip()}\n\n{listed}\n- {said}."
