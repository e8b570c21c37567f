"""Terminal views as pictures: SVG or PNG."""

import html
import io
import logging
import re
from collections.abc import Sequence
from itertools import accumulate
from pathlib import Path

from rich.cells import cell_len
from rich.color import ColorTriplet, blend_rgb
from rich.console import CONSOLE_SVG_FORMAT, Console, Group, RenderableType
from rich.style import Style
from rich.table import Table
from rich.terminal_theme import TerminalTheme

from tokenweight.records import replaced

logger = logging.getLogger(__name__)
# A picture in a README cannot load fonts, so common installed ones are named; on white it needs a gray frame.
_SVG = (
    re.sub(r"@font-face {{.*?}}\s*", "", CONSOLE_SVG_FORMAT, flags=re.DOTALL)
    .replace("Fira Code,", 'ui-monospace, Menlo, Consolas, "DejaVu Sans Mono",')
    .replace("arial;", "arial, sans-serif;")
)
_WHITE, _INK = ColorTriplet(255, 255, 255), ColorTriplet(31, 35, 40)
_FAINT = blend_rgb(_INK, _WHITE, 0.4)  # dim text, as in rich
_PAPER = TerminalTheme(_WHITE, _INK, [_INK] * 8)
# For dark pages and systems. Tinted words keep their tint and its ink.
_FRAME = "#d0d7de"
_DARK = {_WHITE.hex: "#0d1117", _INK.hex: "#e6edf3", _FAINT.hex: "#8b949e", _FRAME: "#3d444d"}
_LETTERS = 26  # height of letters in a PNG, in pixels


def write_svg(renderables: Sequence[RenderableType], path: str | Path, *, title: str, width: int = 100) -> None:
    """Draw the renderables below one another, separated by blank lines, as a self-contained picture.

    It is dark on white, or light on black where the system or the page is dark. The file is complete or absent, and in
    full color regardless of the terminal.

    Args:
        renderables: what `view` returns, or anything that rich can print; markup in a string is not interpreted.
        path: path of the picture; an existing one is replaced.
        title: title above the text.
        width: number of characters per line.
    """
    console = _console(width)
    console.print(*renderables, sep="\n\n")
    svg = console.export_svg(title=title, theme=_PAPER, code_format=_SVG)
    svg = re.sub(r'<g transform="translate\(26,22\)">.*?</g>', "", svg, flags=re.DOTALL)  # the window buttons
    with replaced(Path(path)) as part:
        part.write_text(_darkened(_widened(svg)), encoding="utf-8")


def write_png(renderables: Sequence[RenderableType], path: str | Path, *, title: str, width: int = 100) -> None:
    """Draw the same as `write_svg` as PNG, with the font included in matplotlib, on white.

    A character missing from this font is drawn as a box, with a warning.

    Raises:
        ModuleNotFoundError: without matplotlib.
    """
    import matplotlib
    from matplotlib.ft2font import FT2Font
    from PIL import Image, ImageDraw, ImageFont

    files = [Path(matplotlib.get_data_path(), f"fonts/ttf/DejaVuSansMono{weight}.ttf") for weight in ("", "-Bold")]
    plain, bold = (ImageFont.truetype(str(file), _LETTERS) for file in files)
    console = _console(width)
    lines = console.render_lines(Group(*_separated(renderables)), console.options.update(height=None), pad=False)
    across, down, margin = plain.getlength("M"), round(1.4 * _LETTERS), _LETTERS
    image = Image.new("RGB", (round(width * across) + 2 * margin, down * (len(lines) + 2) + 2 * margin), _WHITE)
    draw, known, missing = ImageDraw.Draw(image), {*map(chr, FT2Font(str(files[0])).get_charmap())}, set()
    draw.text((image.width / 2, margin), title, _INK, bold, anchor="ma")
    for number, line in enumerate(lines, 2):
        top, ends = margin + down * number, list(accumulate((segment.cell_length for segment in line), initial=0))
        for segment, start, stop in zip(line, ends, ends[1:]):
            style, x = segment.style or Style(), [round(margin + across * place) for place in (start, stop)]
            if style.bgcolor is not None:
                draw.rectangle((x[0], top, x[1] - 1, top + down - 1), style.bgcolor.get_truecolor())
            ink = style.color.get_truecolor() if style.color is not None else _FAINT if style.dim else _INK
            if style.underline:
                draw.line((x[0], top + down - 6, x[1], top + down - 6), ink, 2)
            place = start
            for letter in segment.text:  # one by one, so that each is in its column
                draw.text((margin + across * place, top + 2), letter, ink, bold if style.bold else plain)
                place += cell_len(letter)
                missing |= {letter} - known
    if missing:
        shown = "".join(sorted(missing))[:20]
        logger.warning("%s: no letters for %d characters (%s): boxes are drawn; save an SVG", path, len(missing), shown)
    with replaced(Path(path)) as part:
        image.save(part, format="png", optimize=True)


def _console(width: int) -> Console:
    # With TERM=dumb, rich ignores a width given without a height.
    return Console(
        record=True, file=io.StringIO(), width=width, height=100, color_system="truecolor", no_color=False,
        force_terminal=True, force_jupyter=False, legacy_windows=False, markup=False, emoji=False, highlight=False,
    )  # fmt: skip


def _separated(renderables: Sequence[RenderableType]) -> list[RenderableType]:
    """Insert a blank line between two renderables; a table already begins with one."""
    first, *rest = renderables
    return [first, *(part for one in rest for part in ([one] if isinstance(one, Table) else ["", one]))]


def _darkened(svg: str) -> str:
    """Give frame, title and letters, but not tints, dark-mode colors where the page is dark."""
    svg = svg.replace('stroke="rgba(255,255,255,0.35)"', f'class="frame" stroke="{_FRAME}"')
    rules = [f".frame {{ fill: {_DARK[_WHITE.hex]}; stroke: {_DARK[_FRAME]} }}"]
    rules += [f"{name} {{ fill: {_DARK[color]} }}" for name, color in _letters(svg) if color in _DARK]
    return svg.replace("</style>", f"@media (prefers-color-scheme: dark) {{ {' '.join(rules)} }}\n    </style>", 1)


def _letters(svg: str) -> list[tuple[str, str]]:
    """The classes of letters, and their colors."""
    titles = re.findall(r'class="([\w-]+-title)" fill="(#\w+)"', svg)
    return [(f".{name}", color) for name, color in titles] + re.findall(r"(\.[\w-]+) { fill: (#\w+)", svg)


def _widened(svg: str) -> str:
    """Widen CJK and emoji to two columns: rich reserves these, but squeezes each character into one."""

    def widened(found: re.Match[str]) -> str:
        text = html.unescape(found[3])
        return f'textLength="{float(found[1]) * cell_len(text) / len(text):g}"{found[2]}{found[3]}<'

    return re.sub(r'textLength="([\d.]+)"([^>]*>)([^<\n]+)<', widened, svg)
