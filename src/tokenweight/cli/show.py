"""The command `show`."""

import dataclasses
import sys
from pathlib import Path
from typing import Annotated

import tyro

from tokenweight import data, method, view
from tokenweight.cli.common import OptionalTokens, drawing


@dataclasses.dataclass(frozen=True)
class Show:
    """Show a passage tinted by weight, and the tokens with the largest weights, of a scored sequence or of any text."""

    source: Annotated[tyro.conf.Positional[Path | None], tyro.conf.arg(metavar="FOLDER|FILE|-")] = None
    """Folder of scored sequences; or a text, which `--model` then scores: a file that `prepare` reads, or - (stdin)."""
    text: str | None = None
    """A text to score, in place of a source."""
    row: int = 0
    """Number of the sequence, from 0; a text is cut into sequences of `--length` tokens."""
    weighting: str = "dense"
    """Weighting, as in `train`."""
    start: int | None = None
    """Number of the first token shown; by default that of the passage with the most weight."""
    num: int = 300
    """Number of tokens in the passage."""
    top: int = 12
    """Number of tokens listed below it."""
    size: OptionalTokens = None
    """Tokens of the short context, where scores of several are stored. For a text, by default a quarter."""
    stride: OptionalTokens = None
    """Tokens of a text that each window scores; by default three quarters of the size."""
    length: OptionalTokens = None
    """Tokens per sequence of a text: the long context. By default 4096, or what the model reads if that is less."""
    model: str | None = None
    """Folder, hub id or .gguf file of the model that scores a text, or that computes the long losses anew."""
    attn_implementation: str | None = None
    """Attention kernel: sdpa, flash_attention_2, eager, … (docs/models.md); by default the choice of transformers."""
    save: Path | None = None
    """File to write the same to as well: a picture (.svg or .png), or a page (.html)."""

    def run(self) -> None:
        """Print the passage and the list."""
        from rich.console import Console

        weighting = method.parse_weighting(self.weighting)
        if self.num < 1:
            raise ValueError(f"--num {self.num}: expected at least 1 token")
        if self.top < 0:
            raise ValueError(f"--top {self.top}: expected a number of tokens, 0 or more")
        if self.save is not None:
            _check(self.save)
        name, row = self._row()
        shown = view.choose_passage(row, weighting, start=self.start, num=self.num, name=name)
        console = Console()
        tinted = console.color_system is not None and not console.no_color
        console.print(*view.parts(shown, top=self.top, tinted=tinted), sep="\n\n")
        if self.save is None:
            return
        if self.save.suffix.lower() == ".html":
            view.write_html(view.to_html(shown, top=self.top), self.save)
            return
        write = {".svg": view.write_svg, ".png": view.write_png}[self.save.suffix.lower()]
        write(view.parts(shown, top=self.top)[1:], self.save, title=shown.title)

    def _row(self) -> "tuple[str, data.ScoredRow]":
        """Name of the source, and the sequence."""
        text, source = self.text, self.source
        if (text is None) == (source is None):
            raise ValueError(
                "expected a folder of scored sequences, a file or - (standard input), or --text; one of them"
            )
        if str(source) == "-":
            text = sys.stdin.read()
        if text is None and source is not None and not source.is_file():
            return source.resolve().name, self._stored(source)
        name = "text" if source is None else "standard input" if text is not None else source.name
        if self.model is None:
            raise ValueError(f"--model: {name} is a text: name the model that scores it")
        path = source if source is not None and text is None else name
        windows = {"length": self.length, "size": self.size, "stride": self.stride}
        kernel = self.attn_implementation
        scored = data.score_text(path, self.model, text=text, number=self.row, attn_implementation=kernel, **windows)
        return name, scored

    def _stored(self, folder: Path) -> "data.ScoredRow":
        if not folder.exists():
            raise ValueError(f"{folder}: no such folder or file; a text itself is given by --text")
        if self.stride is not None or self.length is not None:
            raise ValueError(f"--length and --stride apply to a text: {folder} is a folder, which has its own")
        kernel = self.attn_implementation
        return data.read_row(folder, self.row, self.model, size=self.size, attn_implementation=kernel)


def _check(path: Path) -> None:
    """Raise early, before anything is computed, if that file cannot be written."""
    if path.suffix.lower() not in (".svg", ".png", ".html"):
        raise ValueError(f"--save {path}: expected a name that ends in .svg, .png or .html")
    if not path.parent.is_dir():
        raise ValueError(f"--save {path}: no such folder")
    if path.suffix.lower() == ".png":
        with drawing():
            import matplotlib  # noqa: F401
