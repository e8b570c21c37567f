"""`tokenweight eval`: its options are `EvalSettings`."""

import dataclasses
from typing import Annotated

import tyro

from tokenweight import evaluate, view
from tokenweight.cli.common import progress_bar
from tokenweight.evaluate import EvalSettings


@dataclasses.dataclass(frozen=True)
class Eval(EvalSettings):
    """Measure a model at long and at short range, and compare it with its baseline in one table."""

    model: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="MODEL")]
    """Folder, Hub id or .gguf file of the model."""

    def run(self) -> None:
        """Evaluate, print the table, and write the model card's evaluation section."""
        from rich.console import Console

        with progress_bar("tokens") as advance:
            record = evaluate.evaluate(self, progress=advance)
        table = evaluate.read_table(record)
        console = Console()
        tables = evaluate.terminal_tables(table, width=console.width)
        console.print(*tables, *evaluate.notes(table, unit=record["unit"]), sep="\n")
        for model in record["models"]:
            if "heads" in model:
                console.print(*view.heads_view(model["model"], model["heads"]), sep="\n")
            if masked := model.get("heads", {}).get("masked"):
                console.print(f"{len(masked['heads'])} heads masked, and as many others:", highlight=False)
                console.print(*evaluate.terminal_tables(evaluate.read_table(masked), width=console.width), sep="\n")
        print(f"{self.out}: eval.json, table.csv, and table.md with every measure")
        if self.baseline is not None and evaluate.add_evaluation(self.model, record):
            print(f"{self.model}/README.md: the evaluation in the model card")
