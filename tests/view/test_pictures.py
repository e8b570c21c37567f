"""Pictures of what the terminal shows: complete, in color, for light and dark pages, and nothing of the text acts."""

import logging
import re
import xml.etree.ElementTree as ET

import pytest
import torch
from PIL import Image
from rich.cells import cell_len
from rich.text import Text

from tokenweight.view import passage, write_png, write_svg
from tokenweight.view.terminal import legend, tint

TEXT = passage([" Ahab", " <&", " 世界", "\ufffe", "\x00"], torch.tensor([4.0, 1, 0.5, 0, 1]))


def test_svg(tmp_path, monkeypatch):
    monkeypatch.setenv("NO_COLOR", "1")
    path = tmp_path / "tinted.svg"
    write_svg([TEXT, legend(), "[bold]"], path, title="a {title} & more", width=60)
    svg = path.read_text(encoding="utf-8")
    words = [element.text for element in ET.fromstring(svg).iter() if element.tag.endswith("text")]
    assert {"Ahab", "a\xa0{title}\xa0&\xa0more", "[bold]", "世界", r"\ufffe"} <= set(words)
    assert "#f59132" in svg  # in full color all the same
    assert "url(http" not in svg
    assert "<circle" not in svg
    assert len(svg) < 20_000
    widths = re.findall(r'textLength="([\d.]+)"[^>]*>([^<&\n]+)<', svg)
    assert {round(float(width) / cell_len(word), 3) for width, word in widths} == {12.2}  # wide ones have two columns
    with pytest.raises(FileNotFoundError):
        write_svg([Text("a")], tmp_path / "none" / "a.svg", title="")
    assert [file.name for file in tmp_path.iterdir()] == ["tinted.svg"]


def test_on_a_dark_page_the_frame_and_all_letters_but_tinted_ones_change(tmp_path):
    write_svg([TEXT, legend()], tmp_path / "a.svg", title="title")
    svg = (tmp_path / "a.svg").read_text(encoding="utf-8")
    style = re.search(r"<style>(.*)</style>", svg, re.DOTALL)[1]
    light, dark = style.split("@media (prefers-color-scheme: dark)")
    known, changed = (dict(re.findall(r"\.([\w-]+) { fill: (#\w+)", rules)) for rules in (light, dark))
    ink = tint(2.0).color.get_truecolor().hex
    assert {name for name, color in known.items() if color == ink}
    assert {name for name in known if name not in changed} == {name for name, color in known.items() if color == ink}
    used = set(re.findall(r'class="([\w-]+)"', svg))
    assert set(changed) <= used

    def brightness(color):
        return sum(int(color[i : i + 2], 16) for i in (1, 3, 5))

    assert brightness(changed.pop("frame")) < 100
    assert all(brightness(color) > 350 for color in changed.values())


def test_png_has_the_tints_and_every_column_in_its_place(tmp_path, caplog):
    path = tmp_path / "tinted.png"
    with caplog.at_level(logging.WARNING):
        write_png([passage([" Ahab", " $x$"], torch.tensor([4.0, 0.25])), legend()], path, title="title", width=40)
    assert not caplog.messages
    image = Image.open(path)
    found = []
    for weight in (4.0, 0.25):
        color = tuple(tint(weight).bgcolor.get_truecolor())
        box = [(x, y) for y in range(image.height // 2) for x in range(image.width) if image.getpixel((x, y)) == color]
        found.append((min(x for x, _ in box), max(x for x, _ in box)))
    (first, last), (after, end) = found
    column = (last + 1 - first) / 4
    assert column == pytest.approx((end + 1 - after) / 3, abs=0.5)
    assert after - last - 1 == pytest.approx(column, abs=1)
    assert [file.name for file in tmp_path.iterdir()] == ["tinted.png"]


def test_letters_that_a_png_cannot_show_are_warned_of(tmp_path, caplog):
    write_png([TEXT], tmp_path / "a.png", title="title")
    (warning,) = caplog.messages
    assert "界" in warning
    assert ".svg" in warning.lower() or "SVG" in warning
