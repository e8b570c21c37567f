"""The command `show`."""

import dataclasses
import functools
from pathlib import Path

import tyro

from tokenweight import data, method, view
from tokenweight.cli.common import OptionalTokens


@dataclasses.dataclass(frozen=True)
class Show:
    """Show a passage tinted by weight, and the tokens with the largest weights, of a scored sequence or of any text."""

    source: tyro.conf.Positional[Path]
    """Folder of scored sequences; or a file that `prepare` reads, which `--model` then scores on the spot."""
    row: int = 0
    """Number of the sequence, from 0."""
    weighting: str = "dense"
    """Weighting, as in `train`."""
    start: int | None = None
    """Number of the first token shown; by default that of the passage with the most weight."""
    num: int = 300
    """Number of tokens in the passage."""
    top: int = 12
    """Number of tokens listed below it."""
    size: OptionalTokens = None
    """Tokens of the short context, where scores of several are stored. Of a text, by default a quarter."""
    stride: OptionalTokens = None
    """Tokens of a text that each window scores; by default three quarters of the size."""
    length: OptionalTokens = None
    """Tokens per sequence of a text: the long context. By default 4096, or what the model reads if that is less."""
    model: str | None = None
    """Folder, hub id or .gguf file of the model that scores a text, or that computes the long losses anew."""
    attn_implementation: str | None = None
    """Attention kernel: sdpa, flash_attention_2, eager, … (docs/models.md); by default the choice of transformers."""
    svg: Path | None = None
    """SVG file to write the picture to as well."""

    def run(self) -> None:
        """Print the passage and the list."""
        from rich.console import Console

        weighting = method.parse_weighting(self.weighting)
        if self.num < 1:
            raise ValueError(f"--num {self.num}: expected at least 1 token")
        if self.top < 0:
            raise ValueError(f"--top {self.top}: expected a number of tokens, 0 or more")
        if self.svg is not None and not self.svg.parent.is_dir():
            raise ValueError(f"--svg {self.svg}: no such folder")
        console, row = Console(), self._row()
        shown = functools.partial(view.view, row, weighting, start=self.start, num=self.num, top=self.top)
        console.print(*shown(tinted=console.color_system is not None and not console.no_color), sep="\n\n")
        if self.svg is not None:
            view.write_svg(shown(), self.svg, title=f"{self.source}, row {self.row}, {weighting}")

    def _row(self) -> "data.ScoredRow":
        if not self.source.is_file():
            if self.stride is not None or self.length is not None:
                raise ValueError(f"--length and --stride apply to a text: {self.source} is a folder, which has its own")
            kernel = self.attn_implementation
            return data.read_row(self.source, self.row, self.model, size=self.size, attn_implementation=kernel)
        if self.model is None:
            raise ValueError(f"--model: {self.source} is a text: name the model that scores it")
        return data.score_text(
            self.source,
            self.model,
            number=self.row,
            length=self.length,
            size=self.size,
            stride=self.stride,
            attn_implementation=self.attn_implementation,
        )
