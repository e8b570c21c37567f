"""The page without a browser: what is embedded, what is written in its tables, and what is refused."""

import base64
import hashlib
import html
import itertools
import json
import re
import sys
from html.parser import HTMLParser

import pytest
from evaluations import settings as eval_settings
from pages import CURVES, EDGES, HOSTILE, LENGTH, element, embedded, make_runs, passages, tables, text_of

from tokenweight import ShortContext, cli, parse_weighting
from tokenweight.data import read_row, read_rows, token_pieces
from tokenweight.evaluate import evaluate
from tokenweight.records import read_json, write_json
from tokenweight.train import TrainSettings, train
from tokenweight.view import Excerpt, corpus_gains, report, write_report
from tokenweight.view.charts import Point
from tokenweight.view.excerpt import LOOKS, SETTINGS, START, look
from tokenweight.view.summaries import by_kind, by_position, row_kinds


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    return make_runs(tmp_path_factory.mktemp("report"))


def written(runs, place, *names, **excerpt):
    size = write_report([runs / name for name in names], place / "page.html", Excerpt(**excerpt))
    assert (place / "page.html").stat().st_size == size
    return (place / "page.html").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def pages(runs, tmp_path_factory):
    """A page of two rows of each scored folder."""
    place = tmp_path_factory.mktemp("pages")
    return {name: written(runs, place, name, rows=2) for name in ("scored", "packed")}


def rows_of(runs, name):
    rows = [read_row(runs / name, number) for number in (0, 1)]
    return rows, [token_pieces(row.tokens[0].tolist(), row.tokenizer) for row in rows]


def test_the_settings_are_every_weighting_at_every_stop_and_begin_at_its_default(pages):
    names = ("uniform", "dense", "sparse", "longce", "ppmi", "npmi", "gain", "boundedgain", "longfilter", "keytokens")
    for name, scheme in zip(names, embedded(pages["scored"])["schemes"], strict=True):
        own = SETTINGS[scheme["first"] : scheme["first"] + max(1, len(scheme["stops"]))]
        assert own[scheme["start"]] == parse_weighting(name)
        for stop, weighting in zip(scheme["stops"], own, strict=scheme["setting"] is not None):
            assert weighting == parse_weighting(f"{name}:{scheme['setting']}={stop}")
    assert SETTINGS[START] == parse_weighting("dense")


@pytest.mark.parametrize("name", ["scored", "packed"])
def test_weights_and_tints_are_those_of_every_weighting(name, runs, pages):
    data = embedded(pages[name])
    for number, found in enumerate(data["runs"][0]["rows"]):
        row = read_row(runs / name, number)
        for weighting, weights, looks in zip(SETTINGS, found["weights"], found["looks"], strict=True):
            expected = weighting(row.long_nll, row.short_nll, row.mask)[0].tolist()
            assert weights == pytest.approx(expected, rel=5e-3)  # three significant digits
            assert [ord(letter) - ord("a") for letter in looks] == list(map(look, expected))
    assert data["looks"] == LOOKS


@pytest.mark.parametrize(
    ("weight", "expected"),
    [(0.0, "zero"), (1.0, ""), (0.92, ""), (1.09, ""), (0.5, "down l4"), (0.01, "down l8"), (1.1, "up l1"),
     (1.9, "up l4"), (2.0, "up l4 far"), (2.1, "up l4 far"), (99.0, "up l8 far")],
)  # fmt: skip
def test_looks(weight, expected):
    assert LOOKS[look(weight)] == expected


@pytest.mark.parametrize("name", ["scored", "packed"])
def test_losses_have_four_decimals_and_none_where_no_token_is_predicted(name, runs, pages):
    for number, found in enumerate(embedded(pages[name])["runs"][0]["rows"]):
        row = read_row(runs / name, number)
        for key, losses in (("long", row.long_nll), ("short", row.short_nll)):
            assert [loss is not None for loss in found[key]] == row.mask[0].tolist()
            known = [loss for loss in found[key] if loss is not None]
            assert known == pytest.approx(losses[row.mask].tolist(), abs=5.1e-5)


def test_the_passage_is_where_losses_differ_most_and_points_back_to_the_same_words(runs, pages, tmp_path):
    page = written(runs, tmp_path, "scored", num=20)
    (found,), row = embedded(page)["runs"][0]["rows"], read_row(runs / "scored", 0)
    difference = (row.short_nll - row.long_nll).abs()[0].nan_to_num().tolist()
    sums = [sum(difference[start : start + 20]) for start in range(LENGTH - 19)]
    assert sums[found["start"]] == pytest.approx(max(sums))
    shown = difference[found["start"] : found["start"] + 20]
    assert shown[found["selected"]] == max(shown)
    pieces = token_pieces(row.tokens[0].tolist(), row.tokenizer)
    assert passages(page) == ["".join(pieces[found["start"] : found["start"] + 20])]
    ago = embedded(pages["scored"])["runs"][0]["rows"][0]["ago"]
    linked = [(place, place - back) for place, back in enumerate(ago) if back is not None]
    assert linked
    assert all(0 <= seen < place and pieces[seen].strip() == pieces[place].strip() for place, seen in linked)


@pytest.mark.parametrize("name", ["scored", "packed"])
def test_tables_by_position_and_kind_are_those_of_python_and_only_the_first_setting_is_visible(name, runs, pages):
    rows, pieces = rows_of(runs, name)
    kinds = list(map(row_kinds, rows, pieces))
    numbered = [table for table in tables(pages[name]) if table[0] is not None]
    assert len(numbered) == 2 * len(SETTINGS)
    for number, hidden, cells in numbered:
        assert hidden == (number != START)
        weights = [SETTINGS[number](row.long_nll, row.short_nll, row.mask) for row in rows]
        if len(cells[0]) == 2:
            means = {f"{part.first} to {part.stop - 1}": part.mean_weight for part in by_position(rows, weights)}
            assert {label: float(mean) for label, mean in cells} == pytest.approx(means, rel=5e-4)
        else:
            expected = [
                [share.kind, f"{share.token_share:.1%}", f"{share.weight_share:.1%}", f"{share.mean_weight:.3f}"]
                for share in by_kind(rows, weights, kinds)
            ]
            assert [[cell.replace(" %", "%") for cell in line] for line in cells] == expected
    shown = [line for line in re.findall(r"<p data-setting[^>]*>([^<]*)</p>", pages[name]) if "keep=0.2" in line]
    assert len(shown) == 2 * 3
    assert "mean weight 1.00 · 80.3% weigh 0 · effective tokens 47.0 of 239 (19.7%)" in shown[0] or name == "packed"


@pytest.mark.slow
def test_every_chart_of_scores_says_of_how_many_sequences_it_is(runs, tmp_path):
    page = written(runs, tmp_path, "scored")
    notes = [text_of(part.split("</p>")[0]) for part in page.split("</figcaption>")[1:]]
    assert len(notes) == 2
    assert all("1 of 2 sequences" in note for note in notes)
    assert "saw-tooth of 16 tokens" in notes[0]
    assert "row 0 of 2: tokens 0 to 239 of 240" in text_of(page).lower()
    both = text_of(written(runs, tmp_path, "scored", "packed", rows=2))
    assert "scored: 2 of 2, packed: 2 of 2 sequences" in both


def test_a_smoothed_page_averages_over_windows(runs, tmp_path):
    (row,) = read_rows(runs / "scored", 0, 1)
    page = written(runs, tmp_path, "scored", smooth=True)
    (cells,) = [cells for number, _, cells in tables(page) if number == START and len(cells[0]) == 2]
    weights = [SETTINGS[START](row.long_nll, row.short_nll, row.mask)]
    parts = by_position([row], weights, windows=ShortContext(32, 16))
    assert [label for label, _ in cells] == [f"{part.first} to {part.stop - 1}" for part in parts]
    assert [float(mean) for _, mean in cells] == pytest.approx([part.mean_weight for part in parts], rel=5e-4)
    assert "saw-tooth" not in page


def test_the_first_section_is_of_all_sequences_and_the_page_begins_with_what_was_found(runs, tmp_path, monkeypatch):
    monkeypatch.setattr(report, "MIN_BARS", 2)
    page = written(runs, tmp_path, "scored", "run", num=9)
    (gain,) = corpus_gains(runs / "scored", name="scored")
    section = page.split('<section aria-labelledby="corpus-title">')[1].split("</section>")[0]
    assert page.index("corpus-title") < page.index("text-title")
    for number in (f"{gain.mean_gain:+.4f}", f"{gain.better:.1%}", f"{gain.sequences}"):
        assert f">{number}</td>" in section
    ((counts),) = [cells for _, _, cells in tables(section) if "below" in cells[0][0]]
    assert [int(count) for _, count in counts] == gain.histogram.counts
    assert [name in section for name in ("b, row 1", "a, row 0")] == [True, True]
    header = page.split("</header>")[0]
    assert f"mean gain {gain.mean_gain:+.4f} nats beyond 32 tokens" in header
    assert "2 steps, loss 6.5000 → 6.2500" in header
    links = re.findall(r'href="#([^"]+)"', header)
    assert len(links) == 2 + 5
    assert all(f'id="{link}"' in page for link in links)


def test_scores_without_gains_are_shown_and_the_page_says_how_to_get_them(runs, tmp_path):
    (tmp_path / "short").symlink_to(runs / "short")
    page = written(tmp_path, tmp_path, "short", num=9)
    assert "short stores no gain per sequence: score it with --long" in page
    assert len(embedded(page)["runs"]) == 1


def test_runs_are_named_by_their_folder_and_shown_once(runs, tmp_path):
    page = written(runs, tmp_path, "run", "run", "evaluated")
    assert "<title>tokenweight: run, evaluated</title>" in page
    assert page.count(str(runs / "run")) == 1  # among its settings


def rerecorded(runs, folder, change):
    """An evaluation like the one of `runs`, changed by a function of its record."""
    record = read_json(runs / "evaluated" / "eval.json")
    change(record)
    folder.mkdir()
    write_json(folder / "eval.json", record)


def test_bold_is_the_best(runs, tmp_path):
    def bold(name):
        page = element(written(tmp_path, tmp_path, name), '<table class="stacked" role="table">', "</table>")
        return [re.findall(r'class="number( best)?">(?=[\d.])', row) for row in page.split("<tr ")[2:]]

    def changed(best, low):
        def change(record):
            for place, row in enumerate(record["comparison"]):
                for entry in row:
                    entry.update({"best": place == best} | ({"low": low, "high": low} if place else {}))

        return change

    for name, best, low, expected in (
        ("first", 0, 0.1, [" best", ""]),
        ("second", 1, -0.1, ["", " best"]),
        ("unknown", None, None, ["", ""]),
    ):
        rerecorded(runs, tmp_path / name, changed(best, low))
        assert bold(name) == [expected] * 5
    assert "without intervals: too few documents" in written(tmp_path, tmp_path, "unknown")


def test_changes_beyond_half_and_at_short_range_are_at_the_top_and_chance_is_beside_probes(runs, tmp_path):
    def change(record):
        for row in record["comparison"]:
            row[0]["measure"], row[1]["measure"] = "beyond_half", "short_range"
            row[-1]["measure"] = "probe_single_60"
            row.append({**row[2], "measure": "position_0"})
        for model in record["models"]:
            model["probe_grid"] = [{"family": "single", "length": 60, "chance": 0.25}]

    rerecorded(runs, tmp_path / "evaluated", change)
    page = written(tmp_path, tmp_path, "evaluated")
    after = {entry["measure"]: entry for entry in read_json(tmp_path / "evaluated" / "eval.json")["comparison"][1]}
    shown = [
        f"{entry['change']:+.4f} [{entry['low']:+.4f}, {entry['high']:+.4f}] {words}"
        for entry, words in (
            (after["beyond_half"], "beyond half of a sequence"),
            (after["short_range"], "at short range"),
        )
    ]
    assert f"model against base, nats: {'; '.join(shown)}" in page.split("</header>")[0]
    assert "probe single 60 ↑ long, share, chance 25.0 %" in text_of(page)


def test_the_map_of_heads_has_a_cell_for_each(runs, tmp_path):
    def change(record):
        record["models"][1]["heads"] = {
            "layers": [0, 3], "scores": [[0.0, 0.31], [0.05, 1.0]], "retrieval_heads": [[3, 1, 1.0], [0, 1, 0.31]],
            "samples": 4,
        }  # fmt: skip

    rerecorded(runs, tmp_path / "evaluated", change)
    page = written(tmp_path, tmp_path, "evaluated")
    assert page.count('class="heads"') == 1
    assert "Retrieval heads of model: " in page
    assert "2 of 4 heads (50.0%)" in page
    cells = re.findall(r'title="(layer \d, head \d: [\d.]+)"><span class="t ([\w ]+)">(.)<', page)
    assert cells == [
        ("layer 0, head 0: 0.00", "zero", "·"),
        ("layer 0, head 1: 0.31", "up l2", "3"),
        ("layer 3, head 0: 0.05", "zero", "·"),
        ("layer 3, head 1: 1.00", "up l8", "9"),
    ]


def test_the_histogram_leaves_the_first_window_of_every_document_out(runs):
    for name, num in (("scored", LENGTH - 32), ("packed", 40 - 16 + LENGTH - 40 - 16)):
        assert sum(report.read_scored(runs / name, Excerpt(num=1))["histogram"].counts) == num


class Tags(HTMLParser):
    """The elements of a page, without the text of its script and its style."""

    def __init__(self, page):
        super().__init__()
        self.found, self.attributes = set(), set()
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        self.found.add(tag)
        self.attributes |= {name for name, _ in attrs}


def test_no_text_can_leave_its_place(pages):
    page = pages["scored"]
    shown = HOSTILE.replace("\x00", r"\x00").replace("\x1b", r"\x1b").replace("\u202e", r"\u202e")
    assert shown.replace("\u2066", r"\u2066") in passages(page)[1]
    tags = Tags(page)
    assert not tags.found & {"img", "iframe", "object", "link", "base"}
    assert not [name for name in tags.attributes if name.startswith("on") or name in ("src", "style", "srcdoc")]
    assert page.count("<script") == 2
    data = element(page, '<script type="application/json" id="data">')
    assert "<" not in data
    assert data.isascii()


def test_names_of_folders_are_text_everywhere(runs, tmp_path):
    name = "<b onload='x'>&amp;"
    (tmp_path / name).symlink_to(runs / "scored")
    page = written(tmp_path, tmp_path, name, num=9)
    assert not {"b"} & Tags(page).found
    assert page.count(html.escape(name, quote=False)) > 5


def test_the_page_may_load_nothing_and_run_only_its_own_script(pages):
    page = pages["scored"]
    policy = html.unescape(re.search(r'Content-Security-Policy" content="([^"]*)"', page)[1])
    assert policy.startswith("default-src 'none'; ")
    for name, text in (("script", element(page, "<script>")), ("style", element(page, "<style>", "</style>"))):
        digest = base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
        assert f"{name}-src 'sha256-{digest}'" in policy


def test_curves_are_those_of_the_metrics_and_what_is_not_a_number_is_a_gap(runs, tmp_path):
    page = written(runs, tmp_path, "run")
    found = [cells for _, _, cells in tables(page)]
    names = ["loss", "grad_norm", "learning_rate", "weight_mean"]
    assert [[float(cell) for _, cell in cells] for cells in found] == [
        [pytest.approx(line[name], rel=5e-4) for line in CURVES if name in line] for name in names
    ]
    assert "<dt>train runtime (s)</dt><dd>1.5</dd>" in page
    assert "<dt>weighting</dt><dd>sparse:keep=0.2,seed=0</dd>" in page
    odd = tmp_path / "odd"
    odd.mkdir()
    write_json(odd / "run.json", {"settings": {}})
    (odd / "metrics.jsonl").write_text('{"step": 1, "loss": NaN, "weight_mean": 1}\n{"step": 2, "loss": 3}\n')
    assert [cells for _, _, cells in tables(written(tmp_path, tmp_path, "odd"))] == [
        [["1", "\N{EN DASH}"], ["2", "3"]],
        [["1", "1"]],
    ]


def test_long_curves_are_means_of_neighbors():
    thinned = report._thinned([(step, step**2) for step in range(2500)])
    assert len(thinned) == 834
    assert thinned[1] == Point(4, (9 + 16 + 25) / 3)
    assert thinned[-1] == Point(2499, 2499**2)


def test_every_entry_of_an_evaluation_is_in_its_table_and_those_by_position_in_charts(runs, tmp_path):
    record = read_json(runs / "evaluated" / "eval.json")
    page = written(runs, tmp_path, "evaluated")
    rows = element(page, '<table class="stacked" role="table">', "</table>").split("<tr ")[2:]
    assert len(rows) == len(record["comparison"][0]) == 5
    for row, before, after in zip(rows, *record["comparison"]):
        text = text_of(row)
        assert before["measure"].replace("_", " ") in text
        if after["unit"] == "nats" and after["low"] is not None:
            shown = f"{after['value']:.4f} {after['change']:+.4f}{'*' * after['clear']}"
            assert f"{shown} [{after['low']:+.4f}, {after['high']:+.4f}]" in text
    values, changes = [cells for _, _, cells in tables(page) if "to" in cells[0][0]]
    assert [row[0] for row in values] == [f"{first} to {stop - 1}" for first, stop in itertools.pairwise(EDGES)]
    entries = [[entry for entry in row if entry["measure"].startswith("position_")] for row in record["comparison"]]
    for number, own in enumerate(entries, 1):
        assert [float(row[number]) for row in values] == pytest.approx([entry["value"] for entry in own], rel=5e-4)
    for (_, cell), entry in zip(changes, entries[1], strict=True):
        found = [float(number) for number in re.findall(r"-?[\d.]+", cell)]
        known = [entry[name] for name in ("change", "low", "high")]
        assert found == pytest.approx(known if None not in known else known[:1], rel=5e-4, abs=1e-4)
    assert {len(re.findall(r"-?[\d.]+", cell)) for _, cell in changes} == {1, 3}


def test_a_page_that_would_be_too_large_is_refused_and_the_old_one_stays(runs, tmp_path, monkeypatch):
    (tmp_path / "page.html").write_text("old")
    monkeypatch.setattr(report, "MAX_BYTES", 9000)
    for names, options, hint in (
        (["scored"], {"rows": 2, "num": 9}, "lower rows 2, or"),
        (["scored", "run"], {"num": 9}, "lower num 9, or"),
        (["run"], {}, "name fewer runs"),
    ):
        with pytest.raises(ValueError, match=rf"page.html .* MB: expected at most 0.009; {hint}"):
            written(runs, tmp_path, *names, **options)
    assert [path.name for path in tmp_path.iterdir()] == ["page.html"]
    assert (tmp_path / "page.html").read_text() == "old"


@pytest.mark.parametrize(
    ("names", "options", "message"),
    [
        ([], {}, "name at least one folder"),
        (["rows"], {}, r"rows holds no scores.json, run.json, eval.json"),
        (["none"], {}, "none is no folder"),
        (["scored"], {"rows": 0}, "rows 0: expected at least 1"),
        (["scored"], {"num": 0}, "num 0: expected at least 1"),
        (["run"], {"size": 16}, "rows, num, size, model and smooth .* found none"),
    ],
)
def test_what_makes_no_sense_is_refused(names, options, message, runs, tmp_path):
    with pytest.raises(ValueError, match=message):
        written(runs, tmp_path, *names, **options)
    assert not list(tmp_path.iterdir())


def test_the_command_writes_the_page_and_says_what_it_is(runs, tmp_path, capsys):
    words = [str(runs / "scored"), str(runs / "run"), "--out", str(tmp_path / "page.html"), "--rows", "2", "--num", "9"]
    assert cli.main(["report", *words]) == 0
    assert re.fullmatch(r".*page.html: 2 runs, 0\.\d\d MB\n", capsys.readouterr().out)
    rows = embedded((tmp_path / "page.html").read_text(encoding="utf-8"))["runs"][0]["rows"]
    assert [len(row["long"]) for row in rows] == [9, 9]
    assert cli.main(["report", str(runs / "rows"), "--out", str(tmp_path / "page.html")]) == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_damaged_files_and_missing_folders_and_packages_are_named(runs, tmp_path, monkeypatch):
    with pytest.raises(ValueError, match=r"out .*nowhere.page.html: no such folder"):
        write_report([runs / "run"], tmp_path / "nowhere" / "page.html", Excerpt())
    for name, text in (("run.json", "{}"), ("metrics.jsonl", '{"step": 1}\n{"loss": 2}\n'), ("eval.json", "{}")):
        (tmp_path / name).write_text(text)
    with pytest.raises(ValueError, match=r"metrics.jsonl, line 2: expected an object with a step"):
        write_report([tmp_path], tmp_path / "page.html", Excerpt())
    (tmp_path / "run.json").unlink()
    with pytest.raises(ValueError, match=r"eval.json has no comparison, models, settings, unit"):
        write_report([tmp_path], tmp_path / "page.html", Excerpt())
    monkeypatch.setitem(sys.modules, "jinja2", None)
    with pytest.raises(ValueError, match=r"pip install 'tokenweight\[report\]'"):
        write_report([runs / "run"], tmp_path / "page.html", Excerpt())


@pytest.mark.slow
def test_what_training_and_evaluation_write_is_shown(runs, tmp_path):
    trainer = {"max_steps": 3, "save_strategy": "no", "disable_tqdm": True, "use_cpu": True}
    train(TrainSettings(str(runs / "model"), str(runs / "scored"), str(tmp_path / "run"), "sparse", trainer=trainer))
    evaluate(eval_settings(runs, tmp_path / "evaluated", model="model", baseline="model"))
    page = written(tmp_path, tmp_path, "run", "evaluated")
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    losses = [[str(line["step"]), pytest.approx(line["loss"], rel=5e-4)] for line in lines if "loss" in line]
    assert [[step, float(loss)] for step, loss in tables(page)[0][2]] == losses
    record = read_json(tmp_path / "evaluated" / "eval.json")
    rows = element(page, '<table class="stacked" role="table">', "</table>").split("<tr ")[2:]
    assert len(rows) == len(record["comparison"][0]) > 10
