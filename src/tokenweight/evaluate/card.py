"""The evaluation section of the model card (README.md) of a trained folder."""

import os
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCard

from tokenweight.evaluate.compare import Entry
from tokenweight.evaluate.tables import markdown
from tokenweight.records import NAME, _edit, _marks, _with_section


def add_evaluation(folder: str | os.PathLike[str], record: dict[str, Any]) -> bool:
    """Write the evaluation section of a card that `write_card` made, and its `model-index`, in place of earlier ones.

    Args:
        folder: folder of the model in the last row of the table.
        record: the contents of `eval.json`.

    Returns:
        Whether there was such a card and it was written; a failure is logged.
    """
    path = Path(folder) / NAME
    if not path.is_file() or _marks("training")[0] not in path.read_text(encoding="utf-8", errors="replace"):
        return False

    def edit(card: ModelCard) -> None:
        table = [[Entry(**entry) for entry in row if entry["summary"]] for row in record["comparison"]]
        card.text = _with_section(card.text, "evaluation", _evaluation(record, table))
        name, fingerprint = Path(record["data"]).resolve().name, record["settings"]["rows_fingerprint"]
        data: Any = {"dataset_type": name, "dataset_name": name, "dataset_args": {"rows_fingerprint": fingerprint}}
        card.data.model_name = Path(folder).resolve().name
        card.data.eval_results = [
            EvalResult("text-generation", metric_type=entry.measure, metric_value=entry.value, **data)
            for entry in table[-1]
            if entry.value is not None
        ]

    return _edit(Path(folder), edit)


def _evaluation(record: dict[str, Any], table: list[list[Entry]]) -> str:
    notes, _, measures = markdown(table, unit=record["unit"]).partition("\n\n## Every measure\n\n")
    notes = notes[notes.index("\n\n- ") :].strip()  # the summary above has a row per model and is too wide for a page
    made = record.get("environment", {})
    version = made.get("versions", {}).get("tokenweight")
    facts = {
        "rows": f"`{record['data']}`, fingerprint {record['settings']['rows_fingerprint']}",
        "key tokens of LongPPL found by": f"`{record['evaluator']['model']}`",
        "tokenweight": version,
        "commit": made.get("commit"),
        "date": made.get("date"),
    }
    said = "; ".join(f"{name}: {value}" for name, value in facts.items() if value)
    return f"## Evaluation\n\n{measures.strip()}\n\n{notes}\n- {said}."
