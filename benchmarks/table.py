"""The table that README shows, made from results.csv: `python benchmarks/table.py` rewrites it between its markers."""

import csv
from pathlib import Path

FOLDER = Path(__file__).resolve().parent
README = FOLDER.parent / "README.md"
BEGIN, END = "<!-- begin: python benchmarks/table.py -->\n", "<!-- end -->"
LOSS, LONG_LOSS = "N=4096 V=128256 D=512 float32", "N=32768 V=128256 D=512 float32"


class Results:
    """The newest row of each measurement."""

    def __init__(self, path: Path = FOLDER / "results.csv") -> None:
        with path.open(newline="") as file:
            rows = list(csv.DictReader(file))
        self.rows = {(row["benchmark"], row["implementation"], row["metric"], row["x"]): row for row in rows}

    def value(self, benchmark: str, implementation: str, metric: str, x: str | None = None) -> float:
        """The median; `x` may be left out where a benchmark has one setting."""
        found = [
            row["p50"]
            for key, row in self.rows.items()
            if key[:3] == (benchmark, implementation, metric) and x in (None, key[3])
        ]
        if len(found) != 1:
            raise ValueError(f"results.csv has {len(found)} rows for {benchmark}, {implementation}, {metric}, {x}")
        return float(found[0])

    def conditions(self, benchmark: str) -> str:
        """Where the numbers of a benchmark come from, in words."""
        rows = [row for key, row in self.rows.items() if key[0] == benchmark]
        device, versions, commit, date = (
            " / ".join(dict.fromkeys(row[name] for row in rows)) for name in ("device", "versions", "commit", "date")
        )
        return f"{device}; {versions}; commit {commit}; {date}"

    def settings(self, benchmark: str) -> str:
        """The setting of a benchmark that has one."""
        return " / ".join(dict.fromkeys(key[3] for key in self.rows if key[0] == benchmark))


def loss_table(results: Results) -> list[str]:
    memory = "peak memory over inputs and gradients"
    lines = [
        "Weighted loss, forward and backward, 4,096 tokens and 128,256 words (D = 512, float32):",
        "",
        "| | time / full logits | time / its 3 matrix products | peak memory / full logits |",
        "|---|---|---|---|",
    ]
    names = [key[1] for key in results.rows if key[0] == "loss" and key[2:] == ("time / full logits", LOSS)]
    for name in names:
        if name != "3 head products":
            time, floor = (
                results.value("loss", name, f"time / {unit}", LOSS) for unit in ("full logits", "3 head products")
            )
            share = results.value("loss", name, f"{memory} / full logits", LOSS)
            lines.append(f"| {name} | {time:.2f} | {floor:.2f} | {share:.3f} |")
    longest = results.value("loss", "tokenweight, dense weights", memory, LONG_LOSS)
    return [*lines, "", f"At 32,768 tokens the loss needs {longest:.2f} GiB over inputs and gradients."]


def training_table(results: Results) -> list[str]:
    lines = [
        f"Training step, forward and backward ({results.settings('training')}), in units of the uniform step:",
        "",
        "| | measured | arithmetic | measured / arithmetic |",
        "|---|---|---|---|",
    ]
    names = [key[1] for key in results.rows if key[0] == "training" and key[2] == "time / uniform"]
    for name in names:
        metrics = ("time / uniform", "arithmetic / uniform", "measured / arithmetic")
        cells = (f"{results.value('training', name, metric):.3f}" for metric in metrics)
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return lines


def corpus_table(results: Results) -> list[str]:
    read = "tokens read per second / forward of the windows"
    scorer, stored = (
        results.value("scoring", name, read) for name in ("tokenweight.Scorer", "tokenweight.score_rows, to disk")
    )
    prepare = results.value("corpus", "tokenweight.prepare_rows", "tokens per second / datasets.map")
    memory = {
        name: " / ".join(
            f"{results.value('corpus', f'tokenweight.{name}', f'most anonymous memory, {times} x'):.2f}"
            for times in (1, 10)
        )
        for name in ("prepare_rows", "score_rows")
    }
    sizes = (results.value("corpus", kind, "per million tokens") for kind in ("rows", "scored", "scored --long"))
    return [
        f"From texts to scores (scoring: {results.settings('scoring')}):",
        "",
        "| | |",
        "|---|---|",
        f"| preparing: tokens per second / `datasets.map` with the same tokenizer | {prepare:.2f} |",
        f"| scoring: tokens read per second / plain forward pass over the same windows, with logits | {scorer:.2f} |",
        f"| the same, written to disk | {stored:.2f} |",
        f"| memory for a corpus / ten times as large: preparing, GiB | {memory['prepare_rows']} |",
        f"| memory for a corpus / ten times as large: scoring with a tiny model, GiB | {memory['score_rows']} |",
        f"| a million tokens as rows / scored / with long losses, MB | {' / '.join(f'{size:.1f}' for size in sizes)} |",
    ]


def evaluation_table(results: Results) -> list[str]:
    found = {key[1:]: float(row["p50"]) for key, row in results.rows.items() if key[0] == "evaluation"}
    rows = {"time / forward passes": "native measures of a model", "time / longppl 0.3.0": "LongPPL, to the same value"}
    lines = ["Evaluation, in time:", "", "| | setting | |", "|---|---|---|"]
    for (name, metric, x), value in found.items():
        if name == "tokenweight" and metric in rows and ("forward" in metric or "alpha" in x):
            lines.append(f"| {rows[metric]} / {metric.removeprefix('time / ')} | {x} | {value:.2f} |")
    return lines


def table() -> str:
    """Markdown."""
    results = Results()
    spread = (
        "Medians of a few rounds on a shared machine: a tenth more or less may be noise (the file has p20 and p80)."
    )
    conditions = [
        f"{name}: {results.conditions(name)}." for name in ("loss", "training", "scoring", "corpus", "evaluation")
    ]
    parts = (
        loss_table(results),
        training_table(results),
        corpus_table(results),
        evaluation_table(results),
        [spread, *conditions],
    )
    return "\n".join(line for part in parts for line in [*part, ""])


def main() -> None:
    """Rewrite the table in README."""
    text = README.read_text()
    before, after = text[: text.index(BEGIN) + len(BEGIN)], text[text.index(END) :]
    README.write_text(before + "\n" + table() + "\n" + after)


if __name__ == "__main__":
    main()
