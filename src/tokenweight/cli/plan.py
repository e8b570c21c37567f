"""The command `plan`."""

import dataclasses
from pathlib import Path

from tokenweight import plan, records, view
from tokenweight.cli.common import OptionalTokens, drawing, progress_bar, token_counts
from tokenweight.cli.train import Data
from tokenweight.train import TrainSettings


@dataclasses.dataclass(frozen=True)
class Plan(TrainSettings):
    """Estimate what a recipe costs and whether it fits a GPU, without weights, data or a GPU.

    Takes the options of `train`: --config, and any setting.
    """

    data: Data = ""
    """Folder of sequences, or a mixture as in `train`; if it exists, it determines their number and length."""
    out: str = ""
    """Ignored: nothing is trained."""
    length: OptionalTokens = None
    """Tokens per sequence; by default those of the data, else extend.length, else the model's context length."""
    lengths: str = "32k,64k,128k,256k,512k,1M"
    """Further lengths to estimate for, where k is 1024 tokens; "none" for none."""
    gpu: str | None = None
    """GPU, in any case: H100, H200, A100-40GB, L40S, 4090, MI300X, … (docs/plan.md has the table)."""
    gpu_memory: float | None = None
    """GB of memory of one GPU, for one that is not in the table."""
    gpu_tflops: float | None = None
    """Peak of one GPU in TFLOP/s, dense products in bfloat16, for one that is not in the table."""
    mfu: float | None = None
    """Assumed fraction of the peak that a step reaches; by default 0.4."""
    tokens_per_s: float | None = None
    """Measured throughput of a uniform run of this recipe on all GPUs together, in place of the peak."""
    num_gpus: int = 1
    """Number of training GPUs."""
    price: float | None = None
    """Dollars for an hour of one GPU."""
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
        names = ("gpu", "num_gpus", "gpu_memory", "gpu_tflops", "mfu", "tokens_per_s", "price")
        hardware = plan.Hardware(**{name: getattr(self, name) for name in names})
        lengths = [] if self.lengths == "none" else token_counts("lengths", self.lengths)
        with progress_bar("lengths") as advance:
            budget = plan.plan(self, length=self.length, lengths=lengths, hardware=hardware, progress=advance)
        Console().print(*plan.plan_tables(budget), sep="\n\n")
        if self.json is not None:
            records.write_json(self.json, budget.as_json())
        if self.figure is not None:
            write(draw([*budget.run, *budget.growth]), self.figure)
