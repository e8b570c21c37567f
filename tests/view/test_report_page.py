"""The page in a real browser: what it computes, what it shows, how one walks in it, and that it keeps to itself."""

import itertools
import os
import shutil

import pytest
import torch
from pages import HOSTILE, LENGTH, make_runs

from tokenweight import parse_weighting
from tokenweight.data import read_row
from tokenweight.records import read_json
from tokenweight.view import Excerpt, write_report
from tokenweight.view.summaries import by_kind, by_position
from tokenweight.view.terminal import token_pieces

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
if not os.environ.get("CI"):
    pytest.importorskip("playwright", reason="playwright is not installed")
    if CHROMIUM is None:
        pytest.skip("no chromium is installed", allow_module_level=True)
pytestmark = pytest.mark.slow
QUIET = ["disable-background-networking", "disable-component-update", "disable-sync", "no-first-run"]
# Differences are float32 on both sides; the page divides by a float64 sum, torch by a float32 one: 240 roundings.
CLOSE = {"rel": 1e-5, "abs": 1e-6}
SETTINGS = {
    "uniform": [""],
    "dense": ["", ":interpolation=0", ":interpolation=0.35", ":interpolation=1"],
    "sparse": ["", ":keep=0.01", ":keep=0.5", ":keep=0.97"],
    "longce": ["", ":cap=0.5", ":cap=20"],
    "ppmi": ["", ":keep=0.8"],
    "npmi": ["", ":keep=0.8"],
}


@pytest.fixture(scope="module")
def browser():
    from playwright.sync_api import sync_playwright

    with sync_playwright() as driver:
        arguments = ["--no-sandbox", "--disable-gpu", *(f"--{name}" for name in QUIET)]
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=arguments)
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    root = make_runs(tmp_path_factory.mktemp("page"))
    names = [root / name for name in ("scored", "other", "packed", "run", "evaluated")]
    write_report(names, root / "all.html", Excerpt(rows=2))
    write_report([root / "scored"], root / "scored.html", Excerpt(rows=2))
    return root


@pytest.fixture
def open_page(browser, runs):
    """Opens a page from disk; at the end it must not have asked for anything else, nor complained."""
    contexts, events = [], []

    def opened(name="scored", **settings):
        contexts.append(browser.new_context(**settings))
        page = contexts[-1].new_page()
        page.on("console", lambda message: events.append(message.text))
        page.on("pageerror", lambda error: events.append(str(error)))
        page.on("request", lambda request: events.append(request.url))
        page.goto((runs / f"{name}.html").as_uri())
        return page

    yield opened
    for context in contexts:
        context.close()
    assert [event for event in events if not event.startswith(runs.as_uri())] == []
    assert len(events) == len(contexts)


def weights_of(row, name, settings=""):
    return parse_weighting(name + settings)(row.long_nll, row.short_nll, row.mask)


def in_page(page, name, settings, run, row):
    value = float(settings.partition("=")[2]) if settings else None
    script = "([n, v, r, i]) => weigh(n, v ?? data.schemes.find((s) => s.name === n).value, data.runs[r].rows[i])"
    return page.evaluate(script, [name, value, run, row])


def test_weights_are_those_of_python_ties_and_all(open_page, runs):
    page = open_page("all")
    for (run, folder), number in itertools.product(enumerate(("scored", "other", "packed")), (0, 1)):
        row = read_row(runs / folder, number)
        for name, choices in SETTINGS.items():
            for settings in choices:
                expected = weights_of(row, name, settings)[0].tolist()
                assert in_page(page, name, settings, run, number) == pytest.approx(expected, **CLOSE)


def test_equal_scores_are_kept_in_the_order_of_python(open_page):
    page = open_page()
    generator = torch.Generator().manual_seed(0)
    for length in (1, 2, 7, 60):
        for keep in (0.01, 0.3, 0.6, 1):
            losses = torch.randint(0, 3, (2, 1, length), generator=generator).float()
            mask = torch.rand(1, length, generator=generator) < 0.8
            for name in ("sparse", "ppmi", "npmi"):
                expected = parse_weighting(f"{name}:keep={keep}")(*losses, mask)[0].tolist()
                difference = (losses[1] - losses[0]).where(mask, 0)[0].tolist()
                row = {"difference": difference, "mask": mask[0].tolist(), "num": int(mask.sum())}
                script = "([n, v, row]) => formulas[n](row, v)"
                assert page.evaluate(script, [name, keep, row]) == pytest.approx(expected, **CLOSE)


def test_the_switch_and_the_slider_change_tints_summary_and_charts(open_page, runs):
    page = open_page()
    tokens, state = page.locator("#text-0 .t"), []
    assert tokens.count() == LENGTH

    def changed():
        looks = tokens.evaluate_all("tokens => tokens.map((token) => token.className)")
        state.append(
            [looks, page.inner_text("#text-0 .summary"), page.inner_html("#positions"), page.inner_html("#kinds")]
        )
        return all(new != old for new, old in zip(state[-1], state[-2])) if len(state) > 1 else None

    changed()
    page.get_by_label("Sparse", exact=True).check()
    assert changed()
    row = read_row(runs / "scored", 0)
    weights = weights_of(row, "sparse")[0]
    zero = [("zero" in look) for look in state[-1][0]]
    assert zero == (weights == 0).tolist()
    assert "mean weight 1.00 · 80.3 % weigh 0 · effective tokens 47.0 of 239 (19.7 %)" in state[-1][1]
    slider = page.get_by_label("keep")
    slider.fill("0.5")
    assert changed()
    assert page.inner_text("#slider-value") == "0.50"
    page.get_by_label("LongCE").check()
    assert changed()
    page.get_by_label("Uniform").check()
    assert not slider.is_visible()
    assert page.locator("#text-0 .t:not(.zero):not(.up):not(.down)").count() == LENGTH - 1
    page.get_by_label("Sparse", exact=True).check()
    assert page.inner_text("#slider-value") == "0.50"  # what was chosen for a scheme stays


def test_bins_and_kinds_are_those_of_python(open_page, runs):
    page = open_page("all")
    for (place, folder), name in itertools.product(((0, "scored"), (2, "packed")), ("dense", "npmi")):
        rows = [read_row(runs / folder, number) for number in (0, 1)]
        weights = [weights_of(row, name) for row in rows]
        value = f"data.schemes.find((s) => s.name === '{name}').value"
        bins = page.evaluate(f"weightByPosition(data.runs[{place}], '{name}', {value})")
        assert bins == pytest.approx([place.mean_weight for place in by_position(rows, weights)], **CLOSE)
        kinds = page.evaluate(f"weightByKind(data.runs[{place}], '{name}', {value})")
        pieces = [token_pieces(row.tokens[0].tolist(), row.tokenizer) for row in rows]
        for found, expected in zip(kinds, by_kind(rows, weights, pieces), strict=True):
            known = {key: found[key] for key in expected._fields}
            assert known == {
                **expected._asdict(),
                **{k: pytest.approx(v, **CLOSE) for k, v in expected._asdict().items() if k != "kind"},
            }


def test_the_card_tells_of_the_token_under_the_pointer(open_page, runs):
    page = open_page()
    row = read_row(runs / "scored", 0)
    pieces = token_pieces(row.tokens[0].tolist(), row.tokenizer)
    place = next(
        t for t in range(100, LENGTH) if page.evaluate(f"data.runs[0].rows[0].seen[{t}]") and pieces[t].strip()
    )
    seen = page.evaluate(f"data.runs[0].rows[0].seen[{place}]")
    page.hover(f"#text-0 [data-t='{place}']")
    card = page.inner_text("#card-0")
    long, short = row.long_nll[0, place].item(), row.short_nll[0, place].item()
    for text in (
        pieces[place].strip(),
        f"{place} of {LENGTH}",
        f"{long:.4f}",
        f"{short:.4f}",
        f"{abs(short - long):.4f}",
    ):
        assert text in card
    for name in SETTINGS:
        line = page.locator("#card-0 tr").filter(has_text=parse_weighting(name).__class__.__name__).first
        assert float(line.locator("td").first.inner_text()) == pytest.approx(
            weights_of(row, name)[0, place].item(), abs=6e-4
        )
    page.click(f"#text-0 [data-t='{place}']")
    page.get_by_role("button", name=f"{place - seen} tokens ago").click()
    assert page.evaluate("document.activeElement.dataset.t") == str(seen)
    page.evaluate("document.activeElement.blur()")
    page.hover("#text-0 [data-t='0']")
    assert "not predicted" in page.inner_text("#card-0")


def test_one_walks_by_keyboard_and_the_page_has_one_stop_for_all_tokens(open_page):
    page = open_page()
    active = "Number(document.activeElement.dataset.t)"
    page.focus("#slider")
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.tagName") == "SELECT"
    page.keyboard.press("Tab")
    start = page.evaluate(active)
    assert page.evaluate("document.activeElement.getAttribute('aria-describedby')") == "card-0"
    page.keyboard.press("Home")
    for key, place in (
        ("ArrowLeft", 0),
        ("ArrowRight", 1),
        ("ArrowRight", 2),
        ("End", LENGTH - 1),
        ("ArrowLeft", LENGTH - 2),
    ):
        page.keyboard.press(key)
        assert page.evaluate(active) == place
        assert f"{place} of {LENGTH}" in page.inner_text("#card-0")
    page.keyboard.press("Home")
    page.keyboard.press("ArrowDown")
    below = page.evaluate(active)
    top = "document.querySelector(`#text-0 [data-t='${%d}']`).getBoundingClientRect().top"
    assert page.evaluate(top % below) > page.evaluate(top % 0)
    page.keyboard.press("ArrowUp")
    assert page.evaluate(active) < below
    assert start >= 0
    assert page.locator("#text-0 .t[tabindex='0']").count() == 1
    focusable = page.locator("a, button, input, select, summary, [tabindex='0']")
    names = focusable.evaluate_all("all => all.map((e) => e.labels?.[0]?.innerText || e.innerText || e.ariaLabel)")
    assert all(names)


@pytest.mark.parametrize("width", [360, 1280])
def test_nothing_is_wider_than_the_window(width, open_page):
    page = open_page("all", viewport={"width": width, "height": 780})
    page.evaluate("document.querySelectorAll('details').forEach((details) => (details.open = true))")
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    boxes = "[...document.querySelectorAll('main *:not(svg *), header *')].map((e) => e.getBoundingClientRect().right)"
    assert max(page.evaluate(boxes)) <= width + 1


def test_dark_where_the_system_is_dark(open_page):
    shades = {}
    for scheme in ("light", "dark"):
        page = open_page(color_scheme=scheme)
        color = "getComputedStyle(document.body).%s.match(/\\d+/g).map(Number).reduce((a, b) => a + b)"
        shades[scheme] = [page.evaluate(color % name) for name in ("backgroundColor", "color")]
    assert shades["light"][0] > 600 > 200 > shades["light"][1]
    assert shades["dark"][0] < 100 < 600 < shades["dark"][1]


def test_hostile_text_is_shown_and_does_nothing(open_page):
    page = open_page()
    page.locator("#text-0 select").select_option("1")
    text = page.locator("#text-0 .passage").text_content()
    shown = HOSTILE.replace("\x00", r"\u0000").replace("\x1b", r"\u001b").replace("\u202e", r"\u202e")
    assert shown.replace("\u2066", r"\u2066") in text.replace("⏎", "")
    assert page.evaluate("typeof window.hacked") == "undefined"
    assert page.locator("img").count() == 0
    assert page.locator("script").count() == 2


def test_runs_stand_side_by_side(open_page, runs):
    page = open_page("all", viewport={"width": 1280, "height": 900})
    first, second = (page.locator(f"#text-{place}").bounding_box() for place in (0, 1))
    assert first["y"] == second["y"]
    assert first["x"] + first["width"] < second["x"]
    assert page.locator("#positions .keys .key").all_inner_texts() == [
        str(runs / n) for n in ("scored", "other", "packed")
    ]
    assert "leaves its tokens without a difference" in page.inner_text("#positions")
    assert page.locator("#positions path.line").count() == 3
    assert page.locator("#training figure").count() >= 3


def test_charts_of_training_and_evaluation_have_the_numbers_of_the_runs(open_page, runs):
    page = open_page("all")
    page.evaluate("document.querySelectorAll('details').forEach((details) => (details.open = true))")
    lines = page.evaluate("data.runs[3].curves.loss")
    loss = page.locator("#training figure").filter(has_text="Loss by step")
    assert [float(cell) for cell in loss.locator("td").all_inner_texts()] == pytest.approx(
        [y for _, y in lines], rel=5e-4
    )
    record = read_json(runs / "evaluated" / "eval.json")
    entries = [entry for entry in record["comparison"][1] if entry["measure"].startswith("position_")]
    values, changes = page.locator("#bins-4 figure").all()
    shown = [float(cell) for cell in values.locator("td:last-child").all_inner_texts()]
    assert shown == pytest.approx([entry["value"] for entry in entries], rel=5e-4)
    found = [
        cell.replace("[", "").replace("]", "").replace(",", "").split()
        for cell in changes.locator("td").all_inner_texts()
    ]
    for numbers, entry in zip(found, entries, strict=True):
        expected = [entry[name] for name in ("change", "low", "high") if entry[name] is not None]
        assert [float(number) for number in numbers] == pytest.approx(expected, rel=5e-4, abs=1e-4)
    assert changes.locator("svg line.line").count() == sum(entry["low"] is not None for entry in entries)
    rounded = [{"place": 0, "points": [{"x": 1, "y": 1}, {"x": 2, "y": 1 - 6e-9}]}]  # drawn flat: labels differ
    chart = {"title": "", "x": "", "y": "", "series": rounded}
    page.evaluate("(chart) => showChart(document.querySelector('#training figure'), chart)", chart)
    labels = page.locator("#training figure").first.locator("svg text[text-anchor='end']").all_text_contents()
    assert len(set(labels)) == len(labels) > 0
