"""The command `figures`, with tiny folders of scores, trainings and evaluations."""

import json
import sys

import pytest

from models import LENGTH, some_rows, tiny
from texts import trained_tokenizer
from tokenweight import ShortContext, cli
from tokenweight.cli.report import _weightings
from tokenweight.data import read_rows, score_folder
from tokenweight.evaluate import Measure, compare
from tokenweight.method import PPMI, Dense, Sparse
from tokenweight.view import draw
from tokenweight.view.summaries import by_position, difference_histogram

SCORES = ["differences", "passage", "weight-by-kind", "weight-by-position"]


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A folder of scores, of a training, of an evaluation, and one of nothing that can be drawn."""
    root = tmp_path_factory.mktemp("runs")
    some_rows().save_to_disk(str(root / "rows"))
    tiny().save_pretrained(root / "model")
    trained_tokenizer().save_pretrained(root / "model")
    score_folder(root / "rows", str(root / "model"), [ShortContext(8, 5)], root / "scored", with_long=True)
    (root / "run").mkdir()
    lines = [{"step": 2, "loss": 9.0}, {"step": 1, "loss": 3.0}, {"step": 2, "loss": 2.0}, {"step": 2, "runtime": 7}]
    (root / "run" / "run.json").write_text("{}")
    (root / "run" / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    names = ["position_0", "position_6", "benefit_6"]
    models = [
        (name, [Measure(key, "long", "nats", "lower", [total, 2.0], [1.0, 1.0]) for key in names])
        for name, total in (("a", 3.0), ("b", 2.5))
    ]
    record = {"settings": {"edges": [0, 6, 12], "sizes": [6]}}
    record["comparison"] = [[entry._asdict() for entry in row] for row in compare(models)]
    heads = {"layers": [0], "scores": [[0.5]], "retrieval_heads": [[0, 0, 0.5]], "samples": 1}
    record["models"] = [{}, {"heads": heads}]
    (root / "evaluated").mkdir()
    (root / "evaluated" / "eval.json").write_text(json.dumps(record))
    return root


@pytest.mark.slow
def test_the_command_draws_every_figure_that_the_folders_give(runs, tmp_path, capsys):
    folders = [str(runs / name) for name in ("scored", "run", "evaluated")]
    assert cli.main(["figures", *folders, "--out", str(tmp_path / "a" / "out"), "--num_rows", "2"]) == 0
    names = [f"scored-{what}" for what in SCORES]
    names += ["evaluated-loss-by-position", "evaluated-benefit-by-context", "evaluated-heads-b", "loss-by-step"]
    files = {file.name for file in (tmp_path / "a" / "out").iterdir()}
    assert files == {f"{name}.{ending}" for name in names for ending in ("svg", "png")}
    printed = capsys.readouterr().out
    assert all(name in printed for name in names)


def test_scores_are_drawn_as_summaries_have_them_with_the_first_window_left_out_of_the_differences(runs):
    weightings = {"dense": Dense(), "mine": Sparse(keep=0.5)}
    figures = draw([runs / "scored"], weightings, first_row=3, num_rows=2)
    rows = read_rows(runs / "scored", 3, 2)
    assert len(rows) == 2
    (axes,) = figures["scored-differences"].axes
    for row in rows:
        row.mask[:, :8] = False
    assert [bar.get_height() for bar in axes.patches] == difference_histogram(rows).counts
    assert sum(bar.get_height() for bar in axes.patches) == 2 * (LENGTH - 8)
    rows = read_rows(runs / "scored", 3, 2)
    lines = {line.get_label(): list(line.get_ydata()) for line in figures["scored-weight-by-position"].axes[0].lines}
    assert list(lines) == ["dense", "mine"]
    for name, weighting in weightings.items():
        weights = [weighting(row.long_nll, row.short_nll, row.mask) for row in rows]
        assert lines[name] == [part.mean_weight for part in by_position(rows, weights)]
    assert figures["scored-weight-by-position"].axes[0].patches[0].get_width() == 8


@pytest.mark.slow
def test_smooth_averages_over_windows_and_labels_say_how_many_sequences_and_what_the_saw_tooth_is(
    runs, capsys, tmp_path
):
    rows, dense = read_rows(runs / "scored", 3, 2), {"dense": Dense()}
    weights = [Dense()(row.long_nll, row.short_nll, row.mask) for row in rows]
    for smooth, windows in ((False, None), (True, ShortContext(8, 5))):
        figures = draw([runs / "scored"], dense, first_row=3, num_rows=2, smooth=smooth)
        (line,) = figures["scored-weight-by-position"].axes[0].lines
        assert list(line.get_ydata()) == [part.mean_weight for part in by_position(rows, weights, windows=windows)]
        labels = {name: figure.get_label() for name, figure in figures.items()}
        assert labels.pop("scored-passage").startswith("1 of 7 sequences, number 3, from token ")
        assert all(label.startswith("2 of 7 sequences.") for label in labels.values())
        assert ("saw-tooth of 5 tokens" in labels["scored-weight-by-position"]) == (not smooth)
    screen = draw([runs / "scored"], dense, num_rows=2, style="screen")
    assert all("of 7 sequences" in figure.get_supxlabel() for figure in screen.values())
    assert (
        cli.main(["figures", str(runs / "scored"), "--num_rows", "3", "--out", str(tmp_path / "out"), "--smooth"]) == 0
    )
    assert capsys.readouterr().out.count(": 3 of 7 sequences.") == 3


def test_a_training_that_went_on_after_an_interruption_has_one_loss_for_each_step(runs):
    (line,) = draw([runs / "run"], {})["loss-by-step"].axes[0].lines
    assert (list(line.get_xdata()), list(line.get_ydata())) == ([1, 2], [3, 2])


def test_without_a_tokenizer_there_are_no_kinds(folders):
    score_folder(folders / "rows", str(folders / "model"), [ShortContext(8, 5)], folders / "plain", with_long=True)
    assert list(draw([folders / "plain"], {"dense": Dense()})) == ["plain-differences", "plain-weight-by-position"]


def test_weightings_are_told_apart_from_their_settings():
    found = _weightings("ppmi:shift=2,keep=0.1,dense,sparse:keep=0.3")
    assert found == {
        "ppmi:shift=2,keep=0.1": PPMI(shift=2.0, keep=0.1),
        "dense": Dense(),
        "sparse:keep=0.3": Sparse(0.3),
    }
    nested = "mix(dense(interpolation=0.5), uniform, share=0.25)"
    assert list(_weightings(f"dense,{nested},floor(sparse,minimum=0.5),longce")) == [
        "dense",
        nested,
        "floor(sparse,minimum=0.5)",
        "longce",
    ]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["model"], "model holds no scores.json, run.json, eval.json: expected a folder of `score`, `train` or `eval`"),
        (["gone"], "gone is no folder"),
        (["run", "--row", "3"], "--row 3: applies to scored sequences"),
        (["run", "--smooth"], "--smooth True: applies to scored sequences"),
        (["scored", "--num_rows", "0"], "--num_rows 0: expected at least 1"),
        (["scored", "--row", "7"], "scored has rows 0 to 6"),
        (["scored", "--weighting", "dens"], "unknown weighting 'dens'"),
        (["run", "run"], "run: two folders have this name"),
        (["broken"], "metrics.jsonl, line 2: expected an object with a step"),
        (["empty"], "metrics.jsonl holds no loss"),
        (["torn"], "eval.json is not what `tokenweight eval` writes"),
    ],
)
def test_errors_are_one_line_and_nothing_is_written(arguments, message, runs, tmp_path, capsys, monkeypatch):
    for name, file, text in (
        ("broken", "metrics.jsonl", '{"step": 1, "loss": 2}\n{"step": 2, "lo'),
        ("empty", "metrics.jsonl", '{"step": 1}\n'),
        ("torn", "eval.json", '{"comparison": [], "settings": {}}'),
    ):
        (tmp_path / name).mkdir()
        (tmp_path / name / file).write_text(text)
        if file == "metrics.jsonl":
            (tmp_path / name / "run.json").write_text("{}")
    for name in ("scored", "run", "model"):
        (tmp_path / name).symlink_to(runs / name)
    monkeypatch.chdir(tmp_path)
    assert cli.main(["figures", *arguments, "--out", "out"]) == 2
    printed = capsys.readouterr()
    assert message in printed.err
    assert printed.err.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_missing_matplotlib_is_named_with_the_command_that_installs_it(runs, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert cli.main(["figures", str(runs / "run"), "--out", str(tmp_path / "out")]) == 2
    assert "pip install 'tokenweight[plots]'" in capsys.readouterr().err
