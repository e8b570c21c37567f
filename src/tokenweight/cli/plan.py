"""The commands that show what weights do: each a dataclass of its options. Nothing heavy is imported before it runs."""

import dataclasses
from pathlib import Path

from tokenweight import plan, records, view
from tokenweight.cli.figures import drawing
from tokenweight.cli.progress import progress_bar
from tokenweight.train import TrainSettings


@dataclasses.dataclass(frozen=True)
class Plan(TrainSettings):
    """Say what a recipe will cost in FLOPs, memory and hours. Needs no weights, no data and no GPU.

    It reads what `train` reads: --config, and any setting as an option.
    """

    data: str = ""
    """Folder of rows; if it is there, it says how many there are and how long."""
    out: str = ""
    """Not written."""
    length: int | None = None
    """Tokens of a row; by default those of the data, else extend.length."""
    lengths: str = "32k,64k,128k,256k,512k,1M"
    """Also at these lengths, where k is 1024 tokens; "none" for none."""
    gpu: str | None = None
    """H100, A100 or 4090: gives hours from its peak in bfloat16."""
    mfu: float | None = None
    """Share of that peak that the FLOPs of a step reach, by default 0.4: an assumption."""
    tokens_per_s: float | None = None
    """Measured, instead of --gpu: of a uniform run of this recipe, all GPUs together."""
    num_gpus: int = 1
    """That train."""
    json: Path | None = None
    """Also write the numbers to this file."""
    figure: Path | None = None
    """Also draw how FLOPs and memory grow: this name with .svg and with .png."""

    def run(self) -> None:
        """Print the tables."""
        from rich.console import Console

        for option, path in (("json", self.json), ("figure", self.figure)):
            if path is not None and not path.parent.is_dir():
                raise ValueError(f"--{option} {path}: no such folder")
        if self.figure is not None and self.lengths == "none":
            raise ValueError("--figure: --lengths none leaves nothing to draw")
        if self.figure is not None:
            with drawing():
                draw, write = view.cost_figure, view.write_figure
        speed = plan.Speed(self.gpu, self.mfu, self.tokens_per_s)
        lengths = _lengths(self.lengths)
        with progress_bar("lengths") as advance:
            budget = plan.plan(
                self, length=self.length, lengths=lengths, speed=speed, num_gpus=self.num_gpus, progress=advance
            )
        Console().print(*plan.plan_tables(budget), sep="\n\n")
        if self.json is not None:
            records.write_json(self.json, budget.as_json())
        if self.figure is not None:
            write(draw([*budget.run, *budget.growth]), self.figure)


def _lengths(text: str) -> list[int]:
    if text == "none":
        return []
    units = {"k": 2**10, "M": 2**20}
    words = [(word[:-1], units[word[-1]]) if word[-1:] in units else (word, 1) for word in text.split(",")]
    numbers = [int(digits) * unit if digits.isdecimal() else 0 for digits, unit in words]
    if min(numbers) < 2:
        raise ValueError(f"--lengths {text}: expected numbers of tokens above 1, as in 4096,32k,1M, or none")
    return numbers
