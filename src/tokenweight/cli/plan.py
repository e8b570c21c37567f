"""The command `plan`."""

import dataclasses
from pathlib import Path

from tokenweight import plan, records, view
from tokenweight.cli.common import drawing, progress_bar, token_counts
from tokenweight.cli.train import Data
from tokenweight.train import TrainSettings


@dataclasses.dataclass(frozen=True)
class Plan(TrainSettings):
    """Estimate what a recipe costs in FLOPs, memory and hours, without weights, data or a GPU.

    Takes the options of `train`: --config, and any setting.
    """

    data: Data = ""
    """Folder of sequences, or a mixture of some as in `train`; if they exist, they give their number and length."""
    out: str = ""
    """Ignored: nothing is trained."""
    length: int | None = None
    """Tokens per sequence; by default those of the data, else extend.length."""
    lengths: str = "32k,64k,128k,256k,512k,1M"
    """Further lengths to estimate for, where k is 1024 tokens; "none" for none."""
    gpu: str | None = None
    """GPU whose bfloat16 peak gives the hours: H100, A100 or 4090."""
    mfu: float | None = None
    """Assumed fraction of that peak that a step reaches; by default 0.4."""
    tokens_per_s: float | None = None
    """Measured throughput of a uniform run of this recipe on all GPUs together, in place of --gpu."""
    num_gpus: int = 1
    """Number of training GPUs."""
    json: Path | None = None
    """JSON file to write the numbers to as well."""
    figure: Path | None = None
    """Name, without ending, of a figure of how FLOPs and memory grow, which is drawn as .svg and .png."""

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
        lengths = [] if self.lengths == "none" else token_counts("lengths", self.lengths)
        with progress_bar("lengths") as advance:
            budget = plan.plan(
                self, length=self.length, lengths=lengths, speed=speed, num_gpus=self.num_gpus, progress=advance
            )
        Console().print(*plan.plan_tables(budget), sep="\n\n")
        if self.json is not None:
            records.write_json(self.json, budget.as_json())
        if self.figure is not None:
            write(draw([*budget.run, *budget.growth]), self.figure)
