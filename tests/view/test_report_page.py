"""The page in a real browser: switching, walking, looking, and that it keeps to itself."""

import os
import shutil

import pytest
from pages import HOSTILE, LENGTH, embedded, make_runs

from tokenweight import parse_weighting
from tokenweight.data import read_row, token_pieces
from tokenweight.view import Excerpt, write_report
from tokenweight.view.excerpt import LOOKS, look

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
if not os.environ.get("CI"):
    pytest.importorskip("playwright", reason="playwright is not installed")
    if CHROMIUM is None:
        pytest.skip("no chromium is installed", allow_module_level=True)
pytestmark = pytest.mark.slow
QUIET = ["disable-background-networking", "disable-component-update", "disable-quic", "disable-sync", "no-first-run"]


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
    write_report(
        [root / name for name in ("scored", "packed", "run", "evaluated")], root / "page.html", Excerpt(rows=2)
    )
    return root


@pytest.fixture
def open_page(browser, runs):
    """Opens the page from disk; at the end it must not have asked for anything else, nor complained."""
    contexts, events = [], []

    def opened(**settings):
        contexts.append(browser.new_context(**settings))
        page = contexts[-1].new_page()
        page.on("console", lambda message: events.append(message.text))
        page.on("pageerror", lambda error: events.append(str(error)))
        page.on("request", lambda request: events.append(request.url))
        page.goto((runs / "page.html").as_uri())
        return page

    yield opened
    for context in contexts:
        context.close()
    assert events == [(runs / "page.html").as_uri()] * len(contexts)


def weights_of(runs, weighting):
    row = read_row(runs / "scored", 0)
    return parse_weighting(weighting)(row.long_nll, row.short_nll, row.mask)[0].tolist()


def looks_in(page):
    return page.locator("#text-0 .row:visible .t").evaluate_all("tokens => tokens.map((token) => token.className)")


def looks_of(runs, weighting):
    return [f"t {LOOKS[look(weight)]}" for weight in weights_of(runs, weighting)]


def test_the_switch_and_the_slider_change_tints_summary_chart_and_kinds(open_page, runs):
    page = open_page()

    def shown():
        return [page.inner_text(f"{part} [data-setting]:visible") for part in ("#text-0 .summary", "#kinds")] + [
            page.locator("figure [data-setting]:visible svg").inner_html()
        ]

    states = [shown()]
    assert looks_in(page) == looks_of(runs, "dense")
    for scheme, stop, weighting in (
        ("Sparse", None, "sparse"),
        (None, 4, "sparse:keep=0.5"),
        ("LongCE", 0, "longce:cap=1"),
        ("Uniform", None, "uniform"),
        ("Sparse", None, "sparse:keep=0.5"),  # what was chosen for a scheme stays
    ):
        if scheme is not None:
            page.get_by_label(scheme, exact=True).check()
        if stop is not None:
            page.locator("#slider").fill(str(stop))
        assert page.locator("#slider").is_visible() == (scheme != "Uniform")
        assert looks_in(page) == looks_of(runs, weighting)
        states.append(shown())
        assert all(new != old for new, old in zip(states[-1], states[-2]))
        assert str(parse_weighting(weighting)) in states[-1][0]
    assert page.inner_text("#slider-value") == "0.5"
    assert states[2] == states[-1]


def test_the_card_tells_of_the_token_under_the_pointer_and_one_walks_by_keyboard(open_page, runs):
    page = open_page()
    row = read_row(runs / "scored", 0)
    pieces = token_pieces(row.tokens[0].tolist(), row.tokenizer)
    ago = embedded((runs / "page.html").read_text(encoding="utf-8"))["runs"][0]["rows"][0]["ago"]
    place = next(t for t in range(100, LENGTH) if ago[t] and pieces[t].strip())
    token = page.locator("#text-0 .row:visible .t").nth(place)
    token.hover()
    long, short = row.long_nll[0, place].item(), row.short_nll[0, place].item()
    for text in (pieces[place].strip(), f"{place} of {LENGTH}", f"{long:.4f}", f"{short:.4f}"):
        assert text in page.inner_text("#card-0")
    for name in ("Uniform", "Dense", "Sparse", "LongCE", "PPMI", "NPMI"):
        cells = page.locator("#card-0 tr").filter(has=page.get_by_text(name, exact=True)).locator("td")
        assert float(cells.first.inner_text()) == pytest.approx(weights_of(runs, name.lower())[place], rel=5e-3)
    token.click()
    page.get_by_role("button", name=f"{ago[place]} tokens ago").click()
    assert f"{place - ago[place]} of {LENGTH}" in page.inner_text("#card-0")
    page.focus("#text-0 select")
    page.keyboard.press("Tab")  # all tokens are one stop
    assert page.evaluate("document.activeElement.getAttribute('aria-describedby')") == "card-0"
    for key, to in (("Home", 0), ("ArrowLeft", 0), ("ArrowRight", 1), ("End", LENGTH - 1), ("ArrowLeft", LENGTH - 2)):
        page.keyboard.press(key)
        assert f"{to} of {LENGTH}" in page.inner_text("#card-0")
    top = "document.activeElement.getBoundingClientRect().top - document.activeElement.parentNode.scrollTop"
    page.keyboard.press("Home")
    first = page.evaluate(top)
    page.keyboard.press("ArrowDown")
    assert page.evaluate(top) > first
    page.keyboard.press("ArrowUp")
    assert page.evaluate(top) == first
    names = page.locator("a, button, input, select, summary, [tabindex='0']").evaluate_all(
        "all => all.map((e) => e.labels?.[0]?.innerText || e.innerText || e.ariaLabel)"
    )
    assert all(names)


@pytest.mark.parametrize(("width", "scheme"), [(360, "dark"), (1280, "light")])
def test_nothing_is_wider_than_the_window_and_hostile_text_does_nothing(width, scheme, open_page):
    page = open_page(viewport={"width": width, "height": 780}, color_scheme=scheme)
    page.locator("#text-0 select").select_option("1")
    shown = HOSTILE.replace("\x00", r"\x00").replace("\x1b", r"\x1b").replace("\u202e", r"\u202e")
    assert shown.replace("\u2066", r"\u2066") in page.locator("#text-0 .passage:visible").text_content()
    assert page.evaluate("typeof window.hacked") == "undefined"
    page.evaluate("document.querySelectorAll('details').forEach((details) => (details.open = true))")
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    boxes = "[...document.querySelectorAll('main *:not(svg *), header *')].map((e) => e.getBoundingClientRect().right)"
    assert max(page.evaluate(boxes)) <= width + 1
    color = "getComputedStyle(document.body).%s.match(/\\d+/g).map(Number).reduce((a, b) => a + b)"
    background, ink = (page.evaluate(color % name) for name in ("backgroundColor", "color"))
    assert (background < 100 < 600 < ink) if scheme == "dark" else (ink < 200 < 600 < background)


def test_without_scripts_the_text_is_tinted_and_the_charts_are_drawn(open_page, runs):
    page = open_page(java_script_enabled=False)
    assert page.locator("#text-0 .t.up").count() > 9
    assert page.locator("#text-0 .passage:visible").count() == 2
    assert not page.locator("#controls").is_visible()
    assert page.locator("figure [data-setting]:visible svg path.line").count() == 2
