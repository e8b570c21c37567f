"""The table of models against sums by hand, and what it looks like in the terminal, in Markdown, and as CSV."""

import csv
import io
import math
from pathlib import Path

import pytest
import torch
from rich.console import Console

from tokenweight.evaluate import Entry, Measure, compare, notes, paired_difference, terminal_tables
from tokenweight.evaluate.intervals import Sums
from tokenweight.evaluate.tables import csv_text, grid_markdown, markdown

NUM = [10.0, 30.0, 0.0, 20.0]  # tokens of four documents, one of which has none
TOTALS = {
    "base": {"far": [20.0, 66.0, 0.0, 50.0], "near": [9.0, 30.0, 0.0, 21.0], "found": [4.0, 12.0, 0.0, 8.0]},
    "dense": {"far": [18.0, 60.0, 0.0, 41.0], "near": [9.5, 30.0, 0.0, 21.0], "found": [6.0, 18.0, 0.0, 15.0]},
    "sparse": {"far": [25.0, 66.0, 0.0, 45.0], "near": [8.0, 29.0, 0.0, 20.0], "found": [4.0, 12.0, 0.0, 8.0]},
}
KINDS = {"far": ("long", "nats", "lower"), "near": ("short", "nats", "lower"), "found": ("long", "share", "higher")}


def measure(model, name, /, **changes):
    group, unit, better = KINDS[name]
    return Measure(name, group, unit, better, TOTALS[model][name], NUM, True)._replace(**changes)


def some_models(**changes):
    return [(model, [measure(model, name, **changes) for name in KINDS]) for model in TOTALS]


def entries(table):
    return {(entry.model, entry.measure): entry for row in table for entry in row}


def test_values_and_changes_are_token_weighted_means_and_their_paired_differences():
    found = entries(compare(some_models(), seed=3))
    assert len(found) == 9
    for (model, name), entry in found.items():
        mean, base = (sum(TOTALS[which][name]) / 60 for which in (model, "base"))
        assert (entry.value, entry.num_documents) == (pytest.approx(mean, rel=1e-15), 3)
        assert (entry.group, entry.unit, entry.better) == KINDS[name]
        if model == "base":
            assert (entry.change, entry.low, entry.high, entry.clear) == (None, None, None, False)
            continue
        sums = [
            Sums(torch.tensor(TOTALS[which][name]).double(), torch.tensor(NUM).double()) for which in (model, "base")
        ]
        wanted = paired_difference(*sums, seed=3)
        assert (entry.change, (entry.low, entry.high)) == (wanted.value, wanted.interval)
        assert entry.change == pytest.approx(mean - base, abs=1e-15)
    # Every document of "dense" gets better at long range by .2 to .45, one of "sparse" worse by .5.
    assert [model for (model, name), entry in found.items() if name == "far" and entry.clear] == ["dense"]
    assert found["dense", "far"].high < 0 < found["dense", "found"].low
    assert {key for key, entry in found.items() if entry.best} == {
        ("dense", "far"), ("sparse", "near"), ("dense", "found"),
    }  # fmt: skip


def test_the_best_differs_clearly_from_the_baseline_and_the_baseline_from_all_others():
    base = measure("base", "far")

    def best(*changes):
        """Whether the baseline and each other model is the best, of which each differs by its changes in nats."""
        totals = [torch.tensor(base.total) + change * torch.tensor(base.num_tokens) for change in changes]
        models = [(str(place), [base._replace(total=total.tolist())]) for place, total in enumerate(totals)]
        return [entry.best for (entry,) in compare([("base", [base]), *models])]

    every, some = torch.tensor([1.0, 2.0, 1.0, 3.0]), torch.tensor([1.0, -1.0, 1.0, -0.5])
    assert best(every) == [True, False]
    assert best(every, 2 * every) == [True, False, False]
    assert best(-every, -2 * every) == [False, False, True]
    assert best(some) == best(-some) == [False, False]
    assert best(every, some) == [False, False, False]


def test_another_seed_draws_other_documents():
    limits = [realistic(seed=seed)[1][0][7:9] for seed in (0, 1)]
    assert limits[0] != limits[1]


def test_perplexities_are_exp_of_means_and_change_by_ratios():
    plain, found = (entries(compare(some_models(unit=unit))) for unit in ("nats", "perplexity"))
    for key, entry in found.items():
        assert entry.value == math.exp(plain[key].value)
        if key[0] == "base":
            assert entry.change is None
        else:
            assert (entry.change, entry.low, entry.high) == tuple(math.exp(number) for number in plain[key][6:9])
        assert (entry.clear, entry.best) == (plain[key].clear, plain[key].best)


def test_one_document_has_no_interval_and_no_token_no_value():
    one = [("a", [measure("base", "far", total=[3.0], num_tokens=[2.0])])]
    one += [("b", [measure("base", "far", total=[4.0], num_tokens=[2.0])])]
    table = compare(one)
    assert table[1][0][5:10] == (2.0, 0.5, None, None, False)
    assert any(line.startswith("- for an interval: too few rows") for line in notes(table, unit="row"))
    assert "2.0000 (+0.5000 -)" in markdown(table)
    none = [(name, [measure("base", "far", total=[0.0], num_tokens=[0.0])]) for name in "ab"]
    table = compare(none)
    assert table[1][0][5:11] == (None, None, None, None, False, False)
    assert notes(table)[-1].startswith("- for a value")
    assert "| long | far ↓ | nats | 0 | - | - |" in markdown(table)


def test_a_benefit_that_rose_as_less_context_got_worse_is_pointed_out():
    def model(full, short):
        nats = [Measure(name, "long", "nats", "lower", [value * 10 for value in values], [10.0] * 3)
                for name, values in (("context_full", full), ("context_256", short))]  # fmt: skip
        gains = [10 * (s - f) for f, s in zip(full, short)]
        return [*nats, Measure("benefit_256", "long", "nats", "higher", gains, [10.0] * 3)]

    models = {
        "base": model([2.0, 2.1, 2.3], [2.5, 2.6, 2.7]),
        "worse": model([2.0, 2.2, 2.3], [2.7, 2.9, 2.9]),
        "better": model([1.8, 1.9, 2.0], [2.5, 2.6, 2.7]),
    }
    table = compare(list(models.items()))
    rows = entries(table)
    assert all(rows[name, "benefit_256"].clear and rows[name, "benefit_256"].change > 0 for name in ("worse", "better"))
    assert [line.partition(":")[0] for line in notes(table) if "benefit 256" in line] == ["worse"]
    assert "benefit 256" in markdown(table).partition("## Every measure")[0]


def test_equal_models_change_by_nothing_and_none_is_best():
    table = compare([("a", [measure("base", "far")]), ("b", [measure("base", "far")])])
    assert table[1][0][6:11] == (0.0, 0.0, 0.0, False, False)


def test_a_measure_that_only_some_models_have_is_compared_where_it_can_be():
    extra = measure("dense", "near", name="suite", group="suites")
    models = some_models()
    models[1][1].append(extra)
    models[2][1].append(extra._replace(total=[1.0, 2.0, 0.0, 3.0]))
    table = compare(models)
    found = entries(table)
    assert ("base", "suite") not in found
    assert (found["dense", "suite"].change, found["sparse", "suite"].best) == (None, False)
    assert "| suites | suite ↓ | nats | 3 | - | 1.0083 | 0.1000 |" in markdown(table)
    assert "SUITES" in printed(table)


def printed(table, width=100):
    console = Console(width=width, record=True, file=io.StringIO())
    console.print(*terminal_tables(table, width=width), sep="\n")
    return console.export_text()


def realistic(names=("SmolLM2-135M", "runs/dense"), *, seed=0):
    """The summary of an evaluation as it is by default, with numbers as long as they get."""
    columns = {
        "beyond_half": ("long", "nats"), "benefit_256": ("long", "nats"), "longppl": ("long", "perplexity"),
        "probe_single": ("long", "share"), "probe_multi_key": ("long", "share"),
        "probe_variable_tracking": ("long", "share"), "short_range": ("short", "nats"), "all": ("cost", "nats"),
    }  # fmt: skip
    generator = torch.Generator().manual_seed(0)
    models = []
    for model in names:
        measures = []
        for name, (group, unit) in columns.items():
            total = (torch.rand(8, generator=generator) + (0 if unit == "share" else 1)).tolist()
            measures.append(
                Measure(name, group, unit, "higher" if unit == "share" else "lower", total, [1.0] * 8, True)
            )
        measures.append(Measure("hidden", "long", "nats", "lower", [1.0] * 8, [1.0] * 8))
        models.append((model, measures))
    return compare(models, seed=seed)


def test_the_terminal_shows_the_summary_whole_in_a_hundred_columns():
    table = realistic()
    text = printed(table)
    assert max(map(len, text.splitlines())) <= 100
    assert "…" not in text
    assert "hidden" not in text
    words = text.replace(",", " ").replace("[", " ").replace("]", " ").split()
    for row in table:
        assert Path(row[0].model).name in words
        for entry in (entry for entry in row if entry.summary):
            assert (f"{entry.value:.1%}" if entry.unit == "share" else f"{entry.value:.4f}") in words
            for number in filter(None, (entry.low, entry.high)):
                shown = f"{100 * number:+.1f}" if entry.unit == "share" else f"{number:+.4f}"
                assert (f"{number:.3f}" if entry.unit == "perplexity" else shown) in words
    assert text.count("LONG") == text.count("SHORT") == text.count("COST") == 1
    assert max(map(len, notes(table))) <= 100


def test_more_measures_than_fit_take_another_table():
    models = [("m", [measure("base", "far", name=f"measure_{i}") for i in range(19)])]
    text = printed(compare(models))
    assert "…" not in text
    assert [line.split() for line in text.splitlines() if line.strip().startswith("model")] == [
        ["model", *(word for i in group for word in (str(i), "↓"))] for group in (range(8), range(8, 16), range(16, 19))
    ]


def test_the_terminal_names_models_by_their_last_part_where_it_tells_them_apart():
    text = printed(realistic(["/models/base", "org/other", "runs/dense"]))
    assert [name in text for name in ("/models/base", "base", "org/other", "runs/dense")] == [False, True, False, False]
    assert "/runs/dense" in printed(realistic(["/runs/base", "/runs/dense", "again/dense"]))


@pytest.mark.parametrize("width", [60, 80, 100, 200])
def test_narrow_terminals_and_long_names_of_models_take_lines_not_digits(width):
    table = realistic(["a" * 60, "organization/a-model-with-a-long-name-4x8B-base", "runs/dense"])
    text = printed(table, width)
    assert "…" not in text
    assert max(map(len, text.splitlines())) <= width
    assert text.count("a") > 60
    for entry in (entry for row in table for entry in row if entry.summary):
        value = f"{entry.value:.1%}" if entry.unit == "share" else f"{entry.value:.4f}"
        assert value in text
        if entry.unit == "nats" and entry.low is not None:
            assert f"[{entry.low:+.4f}," in text
            assert f"{entry.high:+.4f}]" in text


def test_columns_of_one_group_stand_together_long_then_short_then_cost():
    names = [("x", "cost"), ("a", "long"), ("s", "short"), ("b", "long"), ("z", "suites")]
    models = [("m", [measure("base", "far", name=name, group=group) for name, group in names])]
    header = printed(compare(models)).splitlines()
    assert header[1].split() == ["LONG", "SHORT", "COST", "SUITES"]
    assert [word for word in header[2].split() if word in "abxsz"] == ["a", "b", "s", "x", "z"]
    assert markdown(compare(models)).startswith("| model | long: a ↓ | long: b ↓ | short: s ↓ | cost: x ↓ | suites: z")


def test_csv_holds_every_entry_to_the_last_digit():
    table = realistic()
    lines = list(csv.DictReader(io.StringIO(csv_text(table))))
    assert len(lines) == 18
    for line, entry in zip(lines, (entry for row in table for entry in row)):
        assert {name: "" if value is None else str(value) for name, value in entry._asdict().items()} == line
        assert float(line["value"]) == entry.value


def test_markdown_holds_every_entry_with_its_interval():
    table = realistic()
    text = markdown(table)
    summary, whole = text.split("## Every measure")
    for row in table:
        for entry in row:
            value = f"{entry.value:.1%}" if entry.unit == "share" else f"{entry.value:.4f}"
            value = f"**{value}**" if entry.best else value
            if entry.change is not None:
                form = {"share": lambda x: f"{100 * x:+.1f}", "perplexity": lambda x: f"x {x:.3f}"}.get(
                    entry.unit, lambda x: f"{x:+.4f}"
                )
                mark = "*" if entry.clear else ""
                value += f" ({form(entry.change)}{mark} [{form(entry.low)}, {form(entry.high)}])"
            assert f"| {value} |" in whole
            assert (f"| {value} |" in summary) == entry.summary
    assert any(entry.clear for row in table for entry in row)
    assert {line.count("|") for line in summary.splitlines() if line.startswith("|")} == {10}
    assert {line.count("|") for line in whole.splitlines() if line.startswith("|")} == {7}


def test_a_bar_in_the_name_of_a_model_does_not_end_its_cell():
    assert "| a\\|b |" in markdown(compare([("a|b", [measure("base", "far")])]))


def test_an_entry_goes_through_json_by_its_names():
    entry = compare(some_models())[1][0]
    assert Entry(**entry._asdict()) == entry


def test_probes_are_tabulated_by_length_and_depth():
    def cell(family, length, depth, accuracy):
        return {"family": family, "length": length, "depth": depth, "accuracy": accuracy, "margin": None}

    base = [cell("single", 64, 0.1, 1.0), cell("single", 64, 0.9, 0.5), cell("common_words", 64, None, 0.25)]
    longer = [*base[:2], cell("single", 128, 0.1, 0.125)]
    assert grid_markdown([("base", base), ("longer", longer)]).splitlines() == [
        "",
        "## Probes: single",
        "",
        "| model | length | depth 0.1 | depth 0.9 |",
        "| --- | ---: | ---: | ---: |",
        "| base | 64 | 100.0% | 50.0% |",
        "| longer | 64 | 100.0% | 50.0% |",
        "| longer | 128 | 12.5% | - |",
        "",
        "## Probes: common words",
        "",
        "| model | length | any depth |",
        "| --- | ---: | ---: |",
        "| base | 64 | 25.0% |",
    ]
    assert grid_markdown([("base", []), ("longer", [])]) == ""
