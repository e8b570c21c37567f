"""What the terminal shows as an SVG picture."""

import html
import io
import re
from pathlib import Path

from rich.cells import cell_len
from rich.console import CONSOLE_SVG_FORMAT, Console, RenderableType
from rich.terminal_theme import TerminalTheme

from tokenweight.records import replaced

# A picture in a README may not load fonts, so those that machines have are named, and on white it needs a gray frame.
_SVG = (
    re.sub(r"@font-face {{.*?}}\s*", "", CONSOLE_SVG_FORMAT, flags=re.DOTALL)
    .replace("Fira Code,", 'ui-monospace, Menlo, Consolas, "DejaVu Sans Mono",')
    .replace("arial;", "arial, sans-serif;")
)
_PAPER = TerminalTheme((255, 255, 255), (31, 35, 40), [(31, 35, 40)] * 8)


def write_svg(renderables: list[RenderableType], path: str | Path, *, title: str, width: int = 100) -> None:
    """Draw the renderables below one another, a blank line between them, as a picture on white that loads nothing.

    The file is complete or absent, and in full color whatever the terminal can do.

    Args:
        renderables: what `view` returns, or anything that rich can print; markup in a string is not interpreted.
        path: path of the picture; an existing one is replaced.
        title: title above the text.
        width: number of characters per line.
    """
    path = Path(path)
    # Where TERM=dumb, rich ignores a width that comes without a height.
    console = Console(
        record=True, file=io.StringIO(), width=width, height=100, color_system="truecolor", no_color=False,
        force_terminal=True, force_jupyter=False, legacy_windows=False, markup=False, emoji=False, highlight=False,
    )  # fmt: skip
    console.print(*renderables, sep="\n\n")
    svg = console.export_svg(title=title, theme=_PAPER, code_format=_SVG).replace("rgba(255,255,255,0.35)", "#d0d7de")
    with replaced(path) as part:
        part.write_text(_widen(svg), encoding="utf-8")


def _widen(svg: str) -> str:
    """Give CJK and emoji the two columns that they take: rich places them so, but squeezes each into one column."""

    def widened(found: re.Match[str]) -> str:
        text = html.unescape(found[3])
        return f'textLength="{float(found[1]) * cell_len(text) / len(text):g}"{found[2]}{found[3]}<'

    return re.sub(r'textLength="([\d.]+)"([^>]*>)([^<\n]+)<', widened, svg)
