"""The tables of README and of docs/evidence.md, scorers.md and evaluate.md, made from results.csv.

`make tables` rewrites them between their markers.
"""

import re
from collections.abc import Collection, Iterator
from pathlib import Path

from bench.results import Results, by_length

ROOT = Path(__file__).resolve().parents[2]
LOSS_SIZES = "4,096 tokens, vocabulary 128,256, hidden size 512, float32"
README, DOCS, SCORERS = ROOT / "README.md", ROOT / "docs/evidence.md", ROOT / "docs/scorers.md"
EVALUATE = ROOT / "docs/evaluate.md"
BEGIN, END = "<!-- begin: make tables -->\n", "<!-- end -->"
LOSS, LONG_LOSS = "N=4096 V=128256 D=512 float32", "N=32768 V=128256 D=512 float32"


def loss_table(results: Results) -> list[str]:
    memory = "peak memory over inputs and gradients"
    lines = [
        f"Weighted loss, forward and backward ({LOSS_SIZES}):",
        "",
        "| | time / full logits | time / its 3 matrix products | peak memory / full logits |",
        "|---|---|---|---|",
    ]
    for name in results.implementations("loss", LOSS):
        if name != "3 head products":
            time, floor = (
                results.value("loss", name, f"time / {unit}", LOSS) for unit in ("full logits", "3 head products")
            )
            share = results.value("loss", name, f"{memory} / full logits", LOSS)
            lines.append(f"| {name} | {time:.2f} | {floor:.2f} | {share:.3f} |")
    longest = results.value("loss", "tokenweight, dense weights", memory, LONG_LOSS)
    return [*lines, "", f"At 32,768 tokens the loss needs {longest:.2f} GiB over inputs and gradients."]


def training_table(results: Results, benchmark: str = "training") -> list[str]:
    metrics = ("time / uniform", "arithmetic / uniform", "measured / arithmetic")
    lines = []
    for x in results.all_settings(benchmark):
        lines += [
            f"Training step, forward and backward ({x}), relative to the uniform step:",
            "",
            "| | time | FLOP estimate | time / FLOP estimate |",
            "|---|---|---|---|",
        ]
        for name in results.implementations(benchmark, x):
            cells = (f"{results.value(benchmark, name, metric, x):.3f}" for metric in metrics)
            lines.append(f"| {name} | {' | '.join(cells)} |")
        lines.append("")
    return lines[:-1]


def gpu_table(results: Results, benchmark: str = "gpu") -> list[str]:
    forms = {
        **{f"error of the {part}": "{:.1e}" for part in ("loss", "states", "head")},
        "time": "{:.4f}",
        "time / floor": "{:.2f}",
        "peak memory over inputs": "{:.2f}",
        "synchronizing calls": "{:.0f}",
        "tokens per second": "{:,.0f}",
        "time / uniform": "{:.2f}",
        "arithmetic / uniform": "{:.2f}",
        "model FLOPs utilization": "{:.2f}",
        "peak memory": "{:.1f}",
        "longest row that fits": "{:,.0f}",
    }
    found = {key[1:]: row for key, row in results.rows.items() if key[0] == benchmark}
    lines = []
    for what, x in dict.fromkeys((row["what"], row["x"]) for row in found.values()):
        shown = [metric for metric in forms if any(key[1:] == (metric, x) for key in found)]
        lines += [f"On a GPU: {what} ({x}):", "", f"| | {' | '.join(shown)} |", "|" + "---|" * (len(shown) + 1)]
        for name in results.implementations(benchmark, x):
            rows = ((forms[metric], found.get((name, metric, x))) for metric in shown)
            cells = ("" if row is None else form.format(float(row["p50"])) for form, row in rows)
            lines.append(f"| {name} | {' | '.join(cells)} |")
        lines.append("")
    return lines[:-1]


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
    sizes = (
        f"{results.value('corpus', kind, 'per million tokens'):.1f}" for kind in ("rows", "scored", "scored --long")
    )
    return [
        f"From texts to scores (scoring: {results.settings('scoring')}):",
        "",
        "| | |",
        "|---|---|",
        f"| preparing: tokens per second / `datasets.map` with the same tokenizer | {prepare:.2f} |",
        f"| scoring: tokens read per second / plain forward pass over the same windows, with logits | {scorer:.2f} |",
        f"| the same, written to disk | {stored:.2f} |",
        f"| peak memory, a corpus / one ten times as large: preparing, GiB | {memory['prepare_rows']} |",
        f"| the same: scoring with a tiny model, GiB | {memory['score_rows']} |",
        f"| MB of a million tokens, prepared / scored / with long losses | {' / '.join(sizes)} |",
    ]


def evaluations(results: Results) -> Iterator[tuple[str, str, str, float]]:
    """(implementation, baseline, setting, time)"""
    named = {
        "time / forward passes": "native measures of a model",
        "time / longppl 0.3.0": "LongPPL, to the same value",
    }
    for (benchmark, name, metric, x), row in results.rows.items():
        if (
            (benchmark, name) == ("evaluation", "tokenweight")
            and metric in named
            and ("forward" in metric or "alpha" in x)
        ):
            yield named[metric], metric.removeprefix("time / "), x, float(row["p50"])


def evaluation_table(results: Results) -> list[str]:
    lines = ["Evaluation time:", "", "| measured / baseline | setting | ratio |", "|---|---|---|"]
    return lines + [f"| {what} / {beside} | {x} | {value:.2f} |" for what, beside, x, value in evaluations(results)]


def reference_table(results: Results) -> list[str]:
    over = "peak memory over model and gradients"
    shown = {"time": "time", over: "memory, resident", f"{over}, freed memory given back": "memory, held"}
    others = {"as published": "as published", "uniform, transformers": "uniform step of transformers"}
    columns = {f"{metric} / {other}": f"{shown[metric]} / {others[other]}" for other in others for metric in shown}
    lines = []
    for x in results.all_settings("reference"):
        lines += [
            f"A self-scored training step, forward and backward ({x}), beside the way it was published:",
            "",
            f"| | {' | '.join(columns.values())} |",
            "|" + "---|" * (len(columns) + 1),
        ]
        for name in results.implementations("reference", x)[1:]:  # all are compared with the first, the uniform step
            found = (results.rows.get(("reference", name, metric, x), {}).get("p50") for metric in columns)
            lines.append(f"| {name} | {' | '.join(f'{float(p50):.2f}' if p50 else '' for p50 in found)} |")
        lines.append("")
    return lines[:-1]


def growth_table(results: Results) -> list[str]:
    time, ratio, memory = (
        by_length(results, metric)
        for metric in (
            "time per token",
            "time / uniform",
            "peak memory over model and gradients per token, freed memory given back",
        )
    )
    others = [kind for kind in ratio if kind != "uniform"]
    model = re.split(", 1 x", results.settings("growth"))[0]
    model = re.sub(r"(\d+) wide, (\d+) words", r"hidden size \1, vocabulary \2", model)
    lines = [
        f"A training step as sequences get longer ({model}):",
        "",
        f"| sequence length | uniform, µs per token | {' | '.join(f'{kind}, time / uniform' for kind in others)} | "
        "uniform, KiB per token | self-scored dense, KiB per token |",
        "|" + "---|" * (len(others) + 4),
    ]
    for length, micros in time["uniform"].items():
        ratios = " | ".join(f"{ratio[kind][length]:.2f}" for kind in others)
        kib = " | ".join(f"{memory[kind][length]:.1f}" for kind in ("uniform", "self-scored dense"))
        lines.append(f"| {length:,} | {micros:.0f} | {ratios} | {kib} |")
    return lines


def length_table(results: Results) -> list[str]:
    over = "peak memory over model and gradients per token"
    seconds, held, planned = (
        by_length(results, metric, "length")
        for metric in ("CPU time of a step", f"{over}, freed memory given back", f"{over}, by plan")
    )
    model = re.split(", 1 x", results.all_settings("length")[0])[0]
    model = re.sub(r"(\d+) wide, (\d+) words", r"hidden size \1, vocabulary \2", model)
    lines = [
        f"One step on a long sequence ({model}): KiB per token, in brackets by `plan`, and seconds of one core:",
        "",
        f"| sequence length | {' | '.join(held)} |",
        "|" + "---|" * (len(held) + 1),
    ]
    for length in next(iter(held.values())):
        cells = []
        for kind in held:
            plan = f" ({planned[kind][length]:.2f})" if kind in planned else ""
            cells.append(f"{held[kind][length]:.2f}{plan}, {seconds[kind][length]:.0f} s")
        lines.append(f"| {length:,} | {' | '.join(cells)} |")
    return lines


def attention_table(results: Results) -> list[str]:
    lines = []
    for x in results.all_settings("attention"):
        metrics = dict.fromkeys(key[2] for key in results.rows if (key[0], key[3]) == ("attention", x))
        bins = [metric for metric in metrics if metric.startswith("loss")]
        edges = (map(int, re.findall("[0-9]+", metric)) for metric in bins)
        lines += [
            f"Loss by position, nats ({x}):",
            "",
            f"| tokens | {' | '.join(f'{start:,} to {stop:,}' for start, stop in edges)} |",
            "|" + "---|" * (len(bins) + 1),
        ]
        for way in results.implementations("attention", x):
            losses = (results.value("attention", way, metric, x) for metric in bins)
            lines.append(f"| {way} | {' | '.join(f'{loss:.2f}' for loss in losses)} |")
        lines.append("")
    return lines[:-1]


def precision_table(results: Results) -> list[str]:
    weights = {
        "mean change of a weight, dense": "mean change of a weight, dense .75",
        "mean change of a weight, longce": "LongCE 5",
        "tokens of sparse that stay": "tokens kept by sparse .2 that stay",
    }
    of_losses = ("mean error of a short loss", "its 99th percentile", "mean error / mean |long - short|")
    mean, largest, share = (results.value("precision", "scorer", metric) for metric in of_losses)
    lines = [
        f"A scorer in bfloat16 beside one in float32 ({results.settings('precision')}): its short losses are off by "
        f"{mean:.3f} nats in the mean, {share:.2f} of the mean absolute difference of long and short losses, and by "
        f"{largest:.2f} at the 99th percentile. What that does to weights:",
        "",
        f"| bfloat16 in | {' | '.join(weights.values())} |",
        "|" + "---|" * (len(weights) + 1),
    ]
    for name in results.implementations("precision"):
        cells = (f"{results.value('precision', name, metric):.3f}" for metric in weights)
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return lines


def startup_table(results: Results) -> list[str]:
    found = (f"`{name}` {results.value('startup', name, 'time'):.2f}" for name in results.implementations("startup"))
    return [f"Seconds until help is printed, in a fresh process: {', '.join(found)}."]


def summary(results: Results) -> list[str]:
    """The table of README: each measurement relative to its baseline."""
    step, whole = results.all_settings("training")[0], results.settings("reference")
    lines = [
        f"Loss: {LOSS_SIZES}. Training step: {step}. Whole step: {whole}. Scoring: {results.settings('scoring')}.",
        "",
        "| | baseline | time | peak memory |",
        "|---|---|---|---|",
    ]

    def add(what: str, baseline: str, time: float, memory: float | None = None) -> None:
        lines.append(f"| {what} | {baseline} | {time:.2f} | {'' if memory is None else f'{memory:.2f}'} |")

    for kind in ("uniform", "dense"):
        time, memory = "time / full logits", "peak memory over inputs and gradients / full logits"
        found = (results.value("loss", f"tokenweight, {kind} weights", metric, LOSS) for metric in (time, memory))
        add(f"loss, {kind} weights", "full logits", *found)
    for name, shown in (("frozen dense", "precomputed, dense"), ("self-scored dense", "self-scored, dense")):
        time, floor = (results.value("training", name, f"{of} / uniform", step) for of in ("time", "arithmetic"))
        add(f"training step, {shown}", f"uniform weights (FLOP estimate: {floor:.2f}x)", time)
    for kind in ("dense", "sparse"):
        metrics = (f"{metric} / as published" for metric in ("time", "peak memory over model and gradients"))
        found = (results.value("reference", f"{kind}, tokenweight", metric) for metric in metrics)
        add(f"whole step, self-scored, {kind}", "as published", *found)
    read = results.value("scoring", "tokenweight.Scorer", "tokens read per second / forward of the windows")
    add("scoring", "forward pass over the same windows", 1 / read)
    times = {what: time for what, _, _, time in evaluations(results)}
    add("evaluation", "forward passes", times["native measures of a model"])
    return lines


def scorers_table(results: Results) -> list[str]:
    """Tables of scorers, one for each set of texts: a line for each scorer and each ranking by it."""
    shares = [f"{what} in the top {top} %" for what in ("key tokens", "net benefit") for top in (5, 20)]
    shares.append("overlap of the top 20 %")
    forms = {**dict.fromkeys(shares, "{:.0%}"), "rank correlation": "{:+.2f}", "time per million tokens": "{:,.0f}"}
    found = {key[1:]: row for key, row in results.rows.items() if key[0] == "scorers"}
    lines = []
    for x in results.all_settings("scorers"):
        lines += [
            f"{x}:",
            "",
            "| | puts first by | key tokens in the top 5 % | top 20 % | net benefit in the top 5 % | ",
        ]
        lines[-1] += "top 20 % | overlap of the top 20 % | rank correlation | s per million tokens |"
        lines.append("|" + "---|" * 9)
        for name in results.implementations("scorers", x):
            rows = [(form, found.get((name, metric, x))) for metric, form in forms.items()]
            if rows[-1][1] is not None:
                cells = ("" if row is None else form.format(float(row["p50"])) for form, row in rows)
                lines.append(f"| {name.replace('; ', ' | ')} | {' | '.join(cells)} |")
        lines.append("")
    return lines[:-1]


def heads_table(results: Results) -> list[str]:
    """Tables of the best heads, recall without heads, and recall by distance, a line for each length."""
    found = {key[1:]: float(row["p50"]) for key, row in results.rows.items() if key[0] == "heads"}
    lines = []
    for x in dict.fromkeys(x for _, metric, x in found if metric == "retrieval score"):
        count, above, shared = (value for (name, _, at), value in found.items() if (name, at) == ("all", x))
        best = [(name, value) for (name, metric, at), value in found.items() if (metric, at) == ("retrieval score", x)]
        listed = ", ".join(f"{name.removeprefix('head ')} ({value:.2f})" for name, value in best)
        lines += [
            f"{x}: {above:.0f} of {count:.0f} heads ({above / count:.1%}) have a score above 0.1; the best are "
            f"{listed}. Of the ten best by one half of the texts, {shared:.0f} are among the ten best by the other.",
            "",
        ]
    recall = list(dict.fromkeys(x for _, metric, x in found if metric == "accuracy of the answer"))
    masked = [x for x in recall if "distance" not in x]
    names = list(dict.fromkeys(name for name, _, x in found if x in masked))
    if masked:
        lines += [f"| accuracy; margin; loss of the answer | {' | '.join(names)} |", "|---|" + "---|" * len(names)]
        lines += [f"| {x} | {' | '.join(_answer(found, name, x) for name in names)} |" for x in masked]
        lines.append("")
    apart = [re.fullmatch(r"(.+, (.+?), )(\d+) tokens, distance (\d+)(.*)", x) for x in recall if x not in masked]
    cells = {(one[2], int(one[3]), int(one[4])): one[0] for one in apart if one}
    distances = sorted({distance for *_, distance in cells})
    heads_row = " | ".join(f"distance {distance}" for distance in distances)
    lines += [f"| accuracy; margin; loss | text, tokens | {heads_row} |", "|---|" + "---|" * (1 + len(distances))]
    for family, length in dict.fromkeys(key[:2] for key in cells):
        own = [cells.get((family, length, distance)) for distance in distances]
        shown = ("" if x is None else _answer(found, "all heads", x) for x in own)
        lines.append(f"| {family} | {length} | {' | '.join(shown)} |")
    return lines


def _answer(found: dict[tuple[str, str, str], float], name: str, x: str) -> str:
    accuracy, margin, loss = (found[name, f"{metric} of the answer", x] for metric in ("accuracy", "margin", "loss"))
    return f"{accuracy:.0%}; {margin:+.1f}; {loss:.2f}"


MAKERS = {
    "loss": loss_table,
    "training": training_table,
    "weightings": lambda results: training_table(results, "weightings"),
    "compiled": lambda results: training_table(results, "compiled"),
    "gpu": gpu_table,
    "gpu-loss": lambda results: gpu_table(results, "gpu-loss"),
    "reference": reference_table,
    "growth": growth_table,
    "length": length_table,
    "attention": attention_table,
    "scoring": corpus_table,
    "evaluation": evaluation_table,
    "precision": precision_table,
    "startup": startup_table,
}
"""The tables of docs/evidence.md, by benchmark; that of `corpus` is included in `scoring`."""


def tables(results: Results) -> list[str]:
    """Tables of all benchmarks with results."""
    measured = {key[0] for key in results.rows}
    return [line for name, make in MAKERS.items() if name in measured for line in [*make(results), ""]]


SUMMARY = ("loss", "training", "reference", "scoring", "evaluation")
"""The benchmarks that `summary` reads."""


def conditions(results: Results, benchmarks: Collection[str]) -> list[str]:
    spread = "Medians of a few rounds on a shared machine; a tenth may be noise (results.csv has p20 and p80)."
    return [spread, *results.conditions(benchmarks)]


def pages() -> dict[Path, str]:
    """The Markdown between the markers of each page."""
    results = Results()
    return {
        README: "\n".join(
            [*summary(results), "", *(line.split(" Commits: ")[0] for line in conditions(results, SUMMARY))]
        ),
        DOCS: "\n".join([*tables(results), *conditions(results, {*MAKERS, "corpus"})]),
        EVALUATE: "\n".join([*heads_table(results), "", *results.conditions({"heads"})]),
        SCORERS: "\n".join([*scorers_table(results), "", *results.conditions({"scorers"})]),
    }


def main() -> None:
    for path, made in pages().items():
        text = path.read_text()
        begin = text.index(BEGIN) + len(BEGIN)
        path.write_text(f"{text[:begin]}\n{made}\n\n{text[text.index(END, begin) :]}")


if __name__ == "__main__":
    main()
