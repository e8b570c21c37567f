"""Retrieval heads of SmolLM2-135M, recall without them, and recall by distance and by the amount of text before.

    python benchmarks/heads.py            several minutes on one core
    python benchmarks/heads.py --quick    seconds, on a tiny random model: a smoke test

Facts are hidden in State of the Union messages. The retrieval score is that of `tokenweight eval --heads`. p50 of a
score is the mean over the texts, p20 and p80 are over texts. Recall is that of `tokenweight eval --mask_heads`; the
control heads are drawn anew with each seed, and p20 and p80 are over these draws. Chance accuracy is 1/4. At a fixed
distance, the text between fact and question is the same at every length: what grows is the text before the fact, for
"key_value" by other pairs.
"""

import statistics
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
import tyro

from bench.models import sotu_texts, tiny_llama
from bench.report import Bench, Report
from tokenweight import load_model, load_tokenizer
from tokenweight.cli.demo import packaged_model
from tokenweight.evaluate import EvalPlan, EvalSettings, HeadScores, make_plan, retrieval_scores, without_heads
from tokenweight.evaluate.heads import choose_heads, head_samples
from tokenweight.evaluate.probe_scoring import ProbeGrid, ProbeRecord, probe_grid

DEPTHS = (0.1, 0.5, 0.9)


@dataclass
class Heads(Bench):
    """Retrieval heads and recall."""

    rounds: tyro.conf.Suppress[int] = 1
    part: Literal["all", "heads", "distance"] = "all"
    """Part of the benchmark to run."""
    length: int = 1024
    """Tokens of the longest text; heads are masked in texts of half as many."""
    num: int = 4
    """Texts of each length and depth, and probes of each family, length and place."""
    masked: tuple[int, ...] = (10,)
    """Numbers of heads to mask."""
    draws: int = 3
    """Number of random draws of equally many other heads."""
    families: tuple[str, ...] = ("multi_key", "key_value")

    def run(self) -> None:
        if self.quick:
            self.num, self.masked, self.draws = 1, (2,), 1
        report = self.report("heads")
        self.tokenizer = load_tokenizer(packaged_model())
        self.model = tiny_llama(vocab_size=len(self.tokenizer)) if self.quick else load_model(packaged_model()).eval()
        self.name = "tiny random Llama" if self.quick else "SmolLM2-135M"
        self.haystack = " ".join(document.text for document in sotu_texts()[-8:])
        if self.part != "distance":
            plan = self.plan()
            scores = retrieval_scores(self.model, head_samples(self.tokenizer, plan))
            self.add_scores(report, plan, scores)
            self.add_masked(report, plan, scores)
        if self.part != "heads":
            self.add_distances(report)
        report.finish()

    def plan(self) -> EvalPlan:
        lengths = f"{self.length // 2},{self.length}"
        settings = EvalSettings("", Path(), Path(), heads=True, num_probes=self.num, probe_lengths=lengths)
        return replace(make_plan(settings, self.length), haystack=self.haystack)

    def add_scores(self, report: Report, plan: EvalPlan, scores: HeadScores) -> None:
        count = len(scores.scores[0])
        sizes = " and ".join(map(str, plan.probe_lengths))
        setting = {"what": "retrieval heads", "x": f"{self.name}, {count} texts of {sizes} tokens, float32"}
        ranked = scores.ranked()
        found = [one for one in ranked if one[2] > 0.1]
        for metric, value in (("heads", len(ranked)), ("heads above 0.1", len(found))):
            report.add(**setting, implementation="all", metric=metric, unit="1", values=[value])
        halves = [{one[:2] for one in scores.ranked(slice(half, None, 2))[:10]} for half in (0, 1)]
        shared = len(halves[0] & halves[1])
        metric = "top 10 by one half of the texts that are in the top 10 by the other"
        report.add(**setting, implementation="all", metric=metric, unit="1", values=[shared])
        for layer, head, score in ranked[:10]:
            each = scores.of([(layer, head)]).tolist()
            report.add(
                **setting, implementation=f"head {layer}.{head}", metric="retrieval score", unit="1", values=each
            )
            report.rows[-1] = replace(report.rows[-1], p50=round(score, 4))

    def add_masked(self, report: Report, plan: EvalPlan, scores: HeadScores) -> None:
        self.add_recall(report, "all heads", [self.ask([], plan.seed)])
        for num in self.masked:
            options = [replace(plan, mask_heads=num, seed=seed) for seed in range(self.draws)]
            chosen = [choose_heads(option, scores) for option in options]
            self.add_recall(report, f"top {num} masked", [self.ask(chosen[0][0], plan.seed)])
            self.add_recall(report, f"{num} others masked", [self.ask(own[1], plan.seed) for own in chosen])

    def ask(self, heads: Sequence[tuple[int, int]], seed: int, **options: Any) -> list[ProbeRecord]:
        given = {
            "lengths": [self.length // 2],
            "depths": DEPTHS,
            "num": self.num,
            "seed": seed,
            "haystack": self.haystack,
        }
        with without_heads(heads):
            return probe_grid(self.model, self.tokenizer, ProbeGrid(self.families, **{**given, **options}))

    def add_recall(self, report: Report, name: str, draws: Sequence[Sequence[ProbeRecord]], x: str = "") -> None:
        """Add mean accuracy, margin and loss of each family."""
        for family in dict.fromkeys(record.family for records in draws for record in records):
            own = [[record for record in records if record.family == family] for records in draws]
            at = x or f"{self.length // 2} tokens, {len(own[0])} depths"
            setting = {"what": "recall", "x": f"{self.name}, {family}, {at}, {self.num} probes each, float32"}
            for metric, unit in (("accuracy", "1"), ("margin", "nats"), ("loss", "nats")):
                means = [statistics.fmean(getattr(record, metric) for record in records) for records in own]
                report.add(**setting, implementation=name, metric=f"{metric} of the answer", unit=unit, values=means)

    def add_distances(self, report: Report) -> None:
        """Add every combination of length and distance that fits, each as a separate setting."""
        lengths = [self.length // 4, self.length // 2, self.length]
        distances = [self.length // 32, self.length // 8, 3 * self.length // 8, 3 * self.length // 4]
        for length in lengths:
            own = [distance for distance in distances if distance + 192 <= length]  # room for the pairs and examples
            for record in self.ask([], 0, lengths=[length], depths=(), distances=own):
                x = f"{length} tokens, distance {record.distance}"
                self.add_recall(report, "all heads", [[record]], x)


if __name__ == "__main__":
    torch.set_num_threads(1)
    tyro.cli(Heads).run()
