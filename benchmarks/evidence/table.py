"""The results of `run.py`: every arm beside uniform weights and beside no training, and what each cost.

python benchmarks/evidence/table.py runs/evidence-small/results.json      the summary that docs/evidence.md shows
"""

import json
import statistics
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from tokenweight.data import load_rows, row_lengths
from tokenweight.evaluate import Entry, Measure, Rows, compare, csv_text, grid_markdown, markdown, pair_measures
from tokenweight.records import read_json, write_json
from tokenweight.view import benefit_figure, loss_figure, write_figure

LINES = 6
"""Most lines in a figure, so that each looks different."""
STEP = ("learning_rate", "grad_norm", "grad_norm_x_rate", "weight_mean", "effective_tokens", "effective_share")
PRICE = (*STEP, "unweighted_loss", "tokens_per_second", "time_over_uniform")


def steps(runs: Sequence[Path]) -> list[dict[str, Any]]:
    """The logged metrics of each optimizer step."""
    lines = [json.loads(line) for run in runs for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if "grad_norm" in line]


def mean(runs: Sequence[Path], key: str) -> float:
    """Mean of a logged metric over all steps of all runs."""
    return statistics.fmean(line[key] for line in steps(runs))


def prices(runs: dict[str, list[Path]]) -> dict[str, dict[str, float]]:
    """How the steps of each arm were: means over all of them, and the median speed, beside that of uniform weights."""
    found = {}
    for arm, own in runs.items():
        row = {key: mean(own, key) for key in PRICE if key in steps(own)[0]}
        row["learning_rate"] = steps(own)[-1]["learning_rate"]  # after the warm-up
        row["grad_norm_x_rate"] = row["grad_norm"] * row["learning_rate"]
        row["tokens_per_second"] = statistics.median(line["tokens_per_second"] for line in steps(own))
        found[arm] = row
    for row in found.values():
        row["time_over_uniform"] = found["uniform"]["tokens_per_second"] / row["tokens_per_second"]
    return found


def averaged(runs: Sequence[Sequence[dict[str, Any]]]) -> list[Measure]:
    """The measures of one arm: of each document the mean of its sums over seeds.

    So a document is drawn with all its seeds, and `compare` pairs by both. Seeds themselves are not drawn: two or three
    are too few, which is why each is shown. A perplexity is the geometric mean over seeds.
    """
    joined = []
    for same in zip(*runs, strict=True):
        keys = [key for key in ("total", "num_tokens", "baseline_total") if same[0][key] is not None]
        sums = {key: [statistics.fmean(own) for own in zip(*(m[key] for m in same))] for key in keys}
        joined.append(Measure(**{**{name: same[0][name] for name in Measure._fields}, **sums}))
    return joined


def judged(
    out: Path, measures: dict[str, list[list[dict[str, Any]]]], runs: dict[str, list[Path]], base: str
) -> dict[str, list[list[dict[str, Any]]]]:
    """The measures of each arm and seed, where its model and that of `base` with the same seed judge LongPPL alike,
    unless a third model does."""
    if any(measure["judge"] == "third" for measure in measures["none"][0]):
        return measures
    data = load_rows(out / "rows-held-out")
    rows = Rows(data, row_lengths(data))
    folders = {"none": [out / "none"], **runs}
    weights = {
        arm: [np.load(out / "evals" / folder.name / "token_weights.npy", mmap_mode="r")[-1] for folder in own]
        for arm, own in folders.items()
    }
    found: dict[str, list[list[dict[str, Any]]]] = {}
    for arm, own in measures.items():
        found[arm] = []
        for seed, run in enumerate(own):
            beside = weights[base][seed % len(weights[base])]  # `none` has one run, no seed
            given = [Measure(*(measure[name] for name in Measure._fields)) for measure in run]
            pair = pair_measures(given, weights[arm][seed], beside, rows)
            if arm == base:
                pair = [m._replace(judge="self", baseline_total=None) if m.judge == "pair" else m for m in pair]
            found[arm].append([measure._asdict() for measure in pair])
    return found


def compared(models: dict[str, list[Measure]], base: str) -> list[list[Entry]]:
    """The table of all arms, `base` first."""
    names = [base, *(name for name in models if name != base)]
    return compare([(name, models[name]) for name in names], seed=0)


def by_seed(measures: dict[str, list[list[dict[str, Any]]]]) -> dict[str, dict[str, list[float]]]:
    """For each arm, the changes of the summarized measures from uniform weights with the same seed."""
    found: dict[str, dict[str, list[float]]] = {}
    for arm in measures:
        if arm in ("none", "uniform"):  # `none` has one run, no seed
            continue
        found[arm] = {}
        for pair in zip(measures["uniform"], measures[arm], strict=True):
            models = {name: averaged([own]) for name, own in zip(("uniform", arm), pair)}
            for entry in compared(models, "uniform")[1]:
                if entry.summary and entry.change is not None:
                    found[arm].setdefault(entry.measure, []).append(entry.change)
    return found


def tabulate(out: Path, records: dict[str, list[dict[str, Any]]], runs: dict[str, list[Path]]) -> None:
    """Write results.md, results.json, two tables of all digits, and figures.

    Args:
        records: `eval.json` of each arm and seed, whose last model is the arm's; and of `none`.
        runs: the folder of each arm and seed.
    """
    models = {arm: [record["models"][-1] for record in own] for arm, own in records.items()}
    measures = {arm: [model["measures"] for model in own] for arm, own in models.items()}
    beside = {base: judged(out, measures, runs, base) for base in ("uniform", "none")}
    tables = {
        base: compared({arm: averaged(own) for arm, own in found.items()}, base) for base, found in beside.items()
    }
    price, seeds, rates = prices(runs), by_seed(beside["uniform"]), read_json(out / "rates.json")["rates"]
    first, scoring = records["none"][0], out / "scoring.json"
    result = {"settings": read_json(out / "settings.json"), "rates": rates, "price": price}
    result |= {"scoring": read_json(scoring) if scoring.is_file() else None}  # None: killed before it was written
    result |= {"held_out": first["documents"], "change_by_seed": seeds}
    result |= {f"compared_with_{base}": [[e._asdict() for e in row] for row in table] for base, table in tables.items()}
    trained = read_json(runs["uniform"][0] / "run.json")
    made = {key: trained[key] for key in ("device", "versions", "commit", "date")}
    write_json(out / "results.json", {**result, "environment": made})
    parts = ["# Do the weights make a model better, and at what price?\n"]
    parts += ["Means over seeds; intervals draw documents, each with all its seeds (recipes/evidence/README.md).\n"]
    tried = [[f"{rate['learning_rate']:g}", f"{rate['loss']:.4f}"] for rate in rates]
    parts += ["## Learning rates tried with uniform weights\n", lines(["learning rate", "validation loss"], tried)]
    for base, table in tables.items():
        text = markdown(table, unit=first["unit"]).replace("## Every measure", f"### Every measure, beside {base}")
        parts += [f"## Beside {base}\n", text]
        (out / f"compared-with-{base}.csv").write_text(csv_text(table), encoding="utf-8")
    forms = {entry.measure: change_form(entry.unit) for entry in tables["uniform"][0]}
    changes = [[arm, name, ", ".join(map(forms[name], own[name]))] for arm, own in seeds.items() for name in own]
    parts += ["## Each seed: change from uniform weights with the same seed\n"]
    parts += [lines(["arm", "measure", "changes"], changes)]
    cells = [[arm, *(f"{row[key]:.4g}" if key in row else "-" for key in PRICE)] for arm, row in price.items()]
    parts += [
        "## Price: means over steps and seeds (learning rate: after warm-up; speed: medians)\n",
        lines(["arm", *PRICE], cells),
    ]
    runs_of = [(f"{arm}, run {number}", model) for arm, own in models.items() for number, model in enumerate(own)]
    grids = grid_markdown([(name, model["probe_grid"]) for name, model in runs_of])
    (out / "results.md").write_text("\n".join(parts) + grids, encoding="utf-8")
    draw(out, tables["uniform"], first["settings"])


def lines(head: list[str], rows: list[list[str]]) -> str:
    """A Markdown table."""
    return "".join(f"| {' | '.join(cells)} |\n" for cells in (head, ["---"] * len(head), *rows))


def draw(out: Path, table: list[list[Entry]], plan: dict[str, Any]) -> None:
    """Loss by position and benefit of every arm, beside uniform weights; several figures where there are many arms."""
    for number, first in enumerate(range(1, len(table), LINES - 1), start=1):
        chosen = [table[0], *table[first : first + LINES - 1]]
        write_figure(loss_figure(chosen, plan["edges"]), out / f"loss-by-position-{number}")
        write_figure(benefit_figure(chosen, plan["sizes"]), out / f"benefit-{number}")


def summary(result: dict[str, Any]) -> str:
    """The part of a `results.json` that docs/evidence.md shows: changes from uniform weights, and the price."""
    made, (uniform, *others) = result["environment"], result["compared_with_uniform"]
    forms = {e["measure"]: change_form(e["unit"]) for e in uniform if e["summary"] and e["value"] is not None}
    names = list(forms)
    head, table = ["", *(f"`{name}`" for name in names)], []
    for row in (uniform, *others):
        found = {entry["measure"]: entry for entry in row}
        table.append([row[0]["model"], *(_cell(found[name]) for name in names)])
    seeds = [
        [arm, *(", ".join(map(forms[name], own[name])) if name in own else "-" for name in names)]
        for arm, own in result["change_by_seed"].items()
    ]
    keys = [key for key in PRICE if key != "tokens_per_second"]
    price = [[arm, *(f"{row[key]:.3g}" if key in row else "-" for key in keys)] for arm, row in result["price"].items()]
    versions = ", ".join(f"{name} {number}" for name, number in made["versions"].items())
    return "\n".join(
        [
            f"{made['device']}; {versions}; commit {made['commit']}; {made['date'][:10]}; {len(result['held_out'])} "
            "documents held out. Value, change from uniform weights (of a perplexity the ratio), its 95 % interval; "
            "\\* where that excludes that nothing changed.\n",
            lines(head, table),
            "Each seed, beside uniform weights with the same seed:\n",
            lines(head, seeds),
            "Price, as means over steps and seeds (learning rate: after warm-up; time: of medians):\n",
            lines(["", *(f"`{key}`" for key in keys)], price),
        ]
    )


def change_form(unit: str) -> Callable[[float], str]:
    """How the change of a measure is written: of a perplexity, it is a ratio."""
    return ("x {:.4f}" if unit == "perplexity" else "{:+.4f}").format


def _cell(entry: dict[str, Any]) -> str:
    if entry["value"] is None:
        return "-"
    form, text = change_form(entry["unit"]), f"{entry['value']:.4f}"
    if entry["change"] is not None:
        text += "<br>" + form(entry["change"]) + "\\*" * bool(entry["clear"])
    if entry["low"] is not None and entry["high"] is not None:
        text += f" [{form(entry['low'])}, {form(entry['high'])}]"
    return text


if __name__ == "__main__":
    print(summary(json.loads(Path(sys.argv[1]).read_text())))
