"""The page without a browser: what is embedded, what is written in its tables, and what is refused."""

import base64
import hashlib
import html
import json
import re
import sys

import numpy as np
import pytest
from pages import HOSTILE, LENGTH, make_runs

from tokenweight import cli
from tokenweight.data import read_row
from tokenweight.records import read_json, write_json
from tokenweight.view import Excerpt, report, write_report
from tokenweight.view.terminal import token_pieces


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    return make_runs(tmp_path_factory.mktemp("report"))


def page_of(runs, tmp_path, *names, **excerpt):
    assert write_report([runs / name for name in names], tmp_path / "page.html", Excerpt(**excerpt)) > 0
    return (tmp_path / "page.html").read_text(encoding="utf-8")


def element(page, start, end="</script>"):
    return page[page.index(start) + len(start) :].split(end)[0]


def embedded(page):
    return json.loads(element(page, '<script type="application/json" id="data">'))


@pytest.mark.parametrize("name", ["scored", "packed"])
def test_every_loss_is_embedded_to_the_last_bit(name, runs, tmp_path):
    (run,) = embedded(page_of(runs, tmp_path, name, rows=2))["runs"]
    assert [row["number"] for row in run["rows"]] == [0, 1]
    for number, found in enumerate(run["rows"]):
        row = read_row(runs / name, number)
        for key, losses in (("long", row.long_nll), ("short", row.short_nll)):
            assert [loss is not None for loss in found[key]] == row.mask[0].tolist()
            known = [np.float32(loss) for loss in found[key] if loss is not None]
            assert known == losses[row.mask].tolist()
        places = None if name == "scored" else [*range(40), *range(LENGTH - 40)]
        assert found["places"] == places


def test_the_passage_is_where_losses_differ_most_and_points_back_to_the_same_words(runs, tmp_path):
    (run,) = embedded(page_of(runs, tmp_path, "scored", num=20))["runs"]
    (found,), row = run["rows"], read_row(runs / "scored", 0)
    difference = (row.short_nll - row.long_nll).abs()[0].nan_to_num().tolist()
    sums = [sum(difference[start : start + 20]) for start in range(LENGTH - 19)]
    assert sums[found["start"]] == pytest.approx(max(sums))
    pieces = token_pieces(row.tokens[0].tolist(), row.tokenizer)
    assert found["pieces"] == pieces[found["start"] : found["start"] + 20]
    (whole,) = embedded(page_of(runs, tmp_path, "scored"))["runs"][0]["rows"]
    linked = [(place, seen) for place, seen in enumerate(whole["seen"]) if seen is not None]
    assert linked
    assert all(seen < place and pieces[seen].strip() == pieces[place].strip() for place, seen in linked)


def test_the_histogram_leaves_the_first_window_of_every_document_out(runs, tmp_path):
    for name, num in (("scored", LENGTH - 32), ("packed", 40 - 16 + LENGTH - 40 - 16)):
        (run,) = embedded(page_of(runs, tmp_path, name))["runs"]
        assert sum(run["histogram"]["counts"]) == num


def test_no_text_can_leave_its_place(runs, tmp_path):
    page = page_of(runs, tmp_path, "scored", rows=2)
    data = element(page, '<script type="application/json" id="data">')
    assert "<" not in data
    assert data.isascii()
    assert HOSTILE in "".join(embedded(page)["runs"][0]["rows"][1]["pieces"])
    assert "hacked" not in page.replace(data, "")
    assert page.count("<script") == 2


def test_the_page_may_load_nothing_and_run_only_its_own_script(runs, tmp_path):
    page = page_of(runs, tmp_path, "scored")
    policy = html.unescape(re.search(r'Content-Security-Policy" content="([^"]*)"', page)[1])
    assert policy.startswith("default-src 'none'; ")
    for name, text in (("script", element(page, "<script>")), ("style", element(page, "<style>", "</style>"))):
        digest = base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
        assert f"{name}-src 'sha256-{digest}'" in policy
    assert not re.search(r"\s(src|on\w+|style)=", page.replace(element(page, "<script>"), "").split('id="data"')[0])


def test_curves_are_those_of_the_metrics_and_what_is_not_a_number_is_a_gap(runs, tmp_path):
    lines = [json.loads(line) for line in (runs / "run" / "metrics.jsonl").read_text().splitlines()]
    page = page_of(runs, tmp_path, "run")
    curves = embedded(page)["runs"][0]["curves"]
    assert set(curves) >= {"loss", "grad_norm", "learning_rate"}
    for name, points in curves.items():
        assert points == [[line["step"], line[name]] for line in lines if name in line]
    assert f"<dt>train runtime</dt><dd>{lines[-1]['train_runtime']}</dd>" in page
    assert "<dt>weighting</dt><dd>sparse:keep=0.2,seed=0</dd>" in page
    odd = tmp_path / "odd"
    odd.mkdir()
    write_json(odd / "run.json", {"settings": {}})
    (odd / "metrics.jsonl").write_text('{"step": 1, "loss": NaN, "weight_mean": 1}\n{"step": 2, "loss": 3}\n')
    assert embedded(page_of(tmp_path, tmp_path, "odd"))["runs"][0]["curves"] == {
        "loss": [[1, None], [2, 3]],
        "weight_mean": [[1, 1]],
    }


def test_long_curves_are_means_of_neighbors():
    points = [[step, step**2] for step in range(2500)]
    thinned = report._thinned(points)
    assert len(thinned) == 834
    assert thinned[1] == [4, (9 + 16 + 25) / 3]
    assert thinned[-1] == [2499, 2499**2]


def test_every_entry_of_an_evaluation_is_in_its_table(runs, tmp_path):
    record = read_json(runs / "evaluated" / "eval.json")
    page = page_of(runs, tmp_path, "evaluated")
    rows = element(page, '<table class="stacked" role="table">', "</table>").split("<tr ")[2:]
    assert len(rows) == len(record["comparison"][0]) > 10
    for row, before, after in zip(rows, *record["comparison"]):
        text = html.unescape(re.sub(r"<[^>]*>", "", row))
        assert before["measure"].replace("_", " ").replace("longppl", "LongPPL") in text
        if after["unit"] == "nats" and after["low"] is not None:
            shown = f"{after['value']:.4f} {after['change']:+.4f}{'*' * after['clear']}"
            assert f"{shown} [{after['low']:+.4f}, {after['high']:+.4f}]" in text
    (run,) = embedded(page)["runs"]
    assert run["models"] == ["base", "model"]
    for place, found in enumerate(run["bins"]):
        for model, row in enumerate(record["comparison"]):
            (entry,) = [entry for entry in row if entry["measure"] == f"position_{found['first']}"]
            assert run["bins"][place]["entries"][model] == entry


def test_a_page_that_would_be_too_large_is_refused_and_the_old_one_stays(runs, tmp_path, monkeypatch):
    (tmp_path / "page.html").write_text("old")
    monkeypatch.setattr(report, "MAX_BYTES", 9000)
    for names, options, hint in (
        (["scored"], {"rows": 2}, "lower --rows 2, or name fewer runs"),
        (["scored", "run"], {"num": 9}, "lower --num 9, or name fewer runs"),
        (["run"], {}, "0.009; name fewer runs"),
    ):
        with pytest.raises(ValueError, match=rf"page.html would have .* MB: expected at most .*{hint}"):
            page_of(runs, tmp_path, *names, **options)
    assert [path.name for path in tmp_path.iterdir()] == ["page.html"]
    assert (tmp_path / "page.html").read_text() == "old"


@pytest.mark.parametrize(
    ("names", "options", "message"),
    [
        ([], {}, "name at least one folder"),
        (["rows"], {}, "rows holds no scores.json, run.json, eval.json: expected a folder of `score`"),
        (["none"], {}, "none is no folder: expected"),
        (["scored"], {"rows": 0}, "--rows 0 --num 2048: expected at least 1 row"),
        (["scored"], {"num": 0}, "--rows 1 --num 0: expected"),
        (["run"], {"size": 16}, "choose from scored folders: found none"),
    ],
)
def test_what_makes_no_sense_is_refused(names, options, message, runs, tmp_path):
    with pytest.raises(ValueError, match=message):
        page_of(runs, tmp_path, *names, **options)
    assert not list(tmp_path.iterdir())


def test_the_command_writes_the_page_and_says_what_it_is(runs, tmp_path, capsys):
    words = [str(runs / "scored"), str(runs / "run"), "--out", str(tmp_path / "page.html"), "--rows", "2", "--num", "9"]
    assert cli.main(["report", *words]) == 0
    assert re.fullmatch(r".*page.html: 2 runs, 0\.\d\d MB\n", capsys.readouterr().out)
    scored, _ = embedded((tmp_path / "page.html").read_text(encoding="utf-8"))["runs"]
    assert [len(row["pieces"]) for row in scored["rows"]] == [9, 9]
    assert cli.main(["report", str(runs / "rows"), "--out", str(tmp_path / "page.html")]) == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_damaged_files_and_missing_folders_and_packages_are_named(runs, tmp_path, monkeypatch):
    with pytest.raises(ValueError, match=r"--out .*nowhere.page.html: no such folder"):
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
