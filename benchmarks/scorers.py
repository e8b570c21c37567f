"""Quality of scorers: agreement with SmolLM2-135M on the top-ranked tokens, and time.

    python benchmarks/scorers.py --texts texts --other gemma-3-270m-q4_k_m.gguf    half an hour on one core
    python benchmarks/scorers.py --quick    seconds, on random tokens and a tiny model: a smoke test

`--texts` is a folder with a subfolder for each type of text; the first 4,096 tokens of each text are read. All texts
are read by the reference and by counts, and `--few` of them, of all types, by slower scorers. The losses of each scorer
and text are kept in `--out`, so that an interrupted run resumes. `--other` is a model with another tokenizer.

The reference is SmolLM2-135M in float32 with 4,096 tokens beside windows of 1,024. Only tokens beyond the first 1,024
count. "key tokens" are those of LongPPL by the reference, "net benefit" is the sum of its short - long: the fraction of
them that is among the top 5 or 20 % of the tokens of each text by the scorer, as in `tokenweight compare-scores`. A
scorer ranks tokens by its short - long, or by that times its probability with the long context; counts also by their
divergence. "overlap" is the fraction of the reference's own top that is in the scorer's. p50 is over all tokens, p20
and p80 are over texts. Time is CPU time on one core, with both contexts. The benchmark is not to be tuned on.
"""

import functools
import itertools
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import tyro

from bench.models import tiny_llama
from bench.report import Bench, Report
from tokenweight import CountScorer, Scorer, ShortContext, load_model, load_tokenizer
from tokenweight.cli.demo import packaged_model
from tokenweight.data import text_tokens
from tokenweight.models import AlignedScorer, special_tokens
from tokenweight.view import Comparison, Losses

ORDERS = range(9)
READINGS = {"gain": "short - long", "likely_gain": "p(long) (short - long)", "divergence": "divergence"}
REFERENCE = "SmolLM2-135M"
Columns = dict[str, np.ndarray]
Texts = Mapping[str, torch.Tensor]
Measure = Callable[[str, torch.Tensor], Columns]


@dataclass
class Scorers(Bench):
    """Scorers compared with a language model."""

    rounds: tyro.conf.Suppress[int] = 1
    texts: Path | None = None
    """Folder with a subfolder for each type of text."""
    other: str | None = None
    """A model with another tokenizer."""
    bfloat16: bool = False
    """Also run the reference in bfloat16, which is slow on a CPU without instructions for it."""
    few: int = 4
    """Number of texts that slower scorers read."""
    sizes: tuple[int, ...] = (256, 512, 2048)
    """Other windows of the reference, in tokens."""
    out: Path = Path("runs/scorers")
    """Folder that keeps the losses."""
    length: int = 4096
    """Tokens of each text."""
    size: int = 1024
    """Tokens of the short context."""

    def run(self) -> None:
        if self.quick:
            self.length, self.size, self.few, self.sizes = 128, 32, 1, (16,)
        report, texts = self.report("scorers"), dict(self.read())
        few = dict(itertools.islice(texts.items(), self.few))
        for chosen, scorers in ((texts, self.cheap()), (few, self.dear())):
            if not chosen:
                continue
            kinds = sorted({name.partition("-")[0] for name in chosen})
            x = f"{len(chosen)} texts ({', '.join(kinds)}), {self.length} tokens beside {self.size}"
            reference = {name: self.own(self.size)(name, tokens) for name, tokens in chosen.items()}
            for name, measure in scorers.items():
                found = {text: measure(text, tokens) for text, tokens in chosen.items()}
                self.add(report, {"what": f"scorers beside {REFERENCE}", "x": x}, name, found, reference)
        report.finish()

    def read(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Name and tokens of each text, alternating between types."""
        if self.quick:
            for seed in range(2):
                yield f"random-{seed}", torch.randint(40, (1, self.length), generator=torch.manual_seed(seed))
            return
        if self.texts is None:
            raise SystemExit("--texts: expected a folder with a folder of texts for each kind")
        tokenizer = load_tokenizer(packaged_model())
        kinds = [sorted(kind.glob("*")) for kind in sorted(self.texts.iterdir())]
        for path in filter(None, itertools.chain.from_iterable(itertools.zip_longest(*kinds))):
            ids = text_tokens(tokenizer, [path.read_text(encoding="utf-8")])[0][: self.length]
            if len(ids) < self.length:
                raise SystemExit(f"{path} has {len(ids)} tokens: expected at least {self.length}")
            yield f"{path.parent.name}-{path.stem}", torch.tensor([ids])

    def cheap(self) -> dict[str, Measure]:
        """The scorers that read all texts."""
        counts = {f"count:order={order}": functools.partial(self.count, order) for order in ORDERS}
        return {f"{REFERENCE}, {self.size:,}": self.own(self.size), **counts}

    def dear(self) -> dict[str, Measure]:
        """The scorers that read few texts, with the reference and counts for comparison."""
        found = {f"{REFERENCE}, {size:,}": self.own(size) for size in (self.size, *self.sizes)}
        if self.bfloat16:
            found[f"{REFERENCE} in bfloat16, {self.size:,}"] = self.own(self.size, "bfloat16")
        if self.other is not None:
            found[f"{Path(self.other).stem}, {self.size:,}"] = self.aligned
        return {**found, "count:order=4": functools.partial(self.count, 4)}

    def kept(self, part: str, text: str, make: Callable[[], Any], run: Callable[[Any], dict[str, Any]]) -> Columns:
        """The columns that `run` computes with what `make` loads, and its seconds; or those cached in the folder."""
        path = self.out / part / f"{text}.npz"
        if self.quick or not path.is_file():
            made = make()
            begun = time.process_time()
            columns = {name: np.asarray(one) for name, one in run(made).items()}
            columns["seconds"] = np.asarray(time.process_time() - begun)
            if self.quick:
                return columns
            path.parent.mkdir(parents=True, exist_ok=True)
            new = path.with_name(f".{path.name}")
            with new.open("wb") as file:
                np.savez(file, **columns)
            new.rename(path)
            print(f"{part}, {text}: {columns['seconds']:.1f} s", flush=True)
        return dict(np.load(path))

    def own(self, size: int, dtype: str = "float32") -> Measure:
        """The reference with windows of another size; its long losses are reused."""

        def measure(text: str, tokens: torch.Tensor) -> Columns:
            def scorer() -> Scorer:
                return Scorer(_reference(dtype, quick=self.quick), ShortContext(size))

            long = self.kept(f"{dtype}-long", text, scorer, lambda one: {"long_nll": one.long_nll(tokens)[0].float()})
            known = torch.from_numpy(long["long_nll"])[None]
            short = self.kept(
                f"{dtype}-{size}", text, scorer, lambda one: {"short_nll": one(tokens, long_nll=known)[0].float()}
            )
            return {**short, **long, "seconds": short["seconds"] + long["seconds"]}

        return measure

    def count(self, order: int, text: str, tokens: torch.Tensor) -> Columns:
        context, found = ShortContext(self.size), {}
        for divergence in (False, True):
            scorer = CountScorer(order, vocab_size=49152, divergence=divergence)
            part = f"count-{order}{'-divergence' * divergence}"
            columns = self.kept(part, text, lambda one=scorer: one, lambda one: _columns(one(tokens, context)))
            found |= {"divergence_seconds": columns.pop("seconds"), **columns} if divergence else columns
        return found

    def aligned(self, text: str, tokens: torch.Tensor) -> Columns:
        def run(scorer: AlignedScorer) -> dict[str, Any]:
            before = scorer.groups, scorer.shared_groups
            found = _columns(scorer(tokens, ShortContext(self.size)))
            return found | {"groups": scorer.groups - before[0], "shared": scorer.shared_groups - before[1]}

        return self.kept("aligned", text, lambda: _aligned(str(self.other)), run)

    def add(
        self,
        report: Report,
        setting: dict[str, str],
        scorer: str,
        found: Mapping[str, Columns],
        reference: Mapping[str, Columns],
    ) -> None:
        """Add the numbers of a scorer over all texts, for each of its rankings."""
        whole, parts = Comparison(), [Comparison() for _ in found]
        for part, (text, columns) in zip(parts, found.items()):
            pair = [self.losses(one) for one in (reference[text], columns)]
            whole.add(*pair)
            part.add(*pair)
        results = [one.result() for one in (whole, *parts)]
        for reading in results[0].rank_correlation:
            setting = {**setting, "implementation": f"{scorer}; {READINGS[reading]}"}
            values: dict[str, list[float | None]] = {
                "rank correlation": [one.rank_correlation[reading] for one in results]
            }
            for picks in zip(*([one for one in result.picks if one.ranking == reading] for result in results)):
                top = f"{100 * picks[0].share:.0f} %"
                values[f"key tokens in the top {top}"] = [one.key_tokens[0] for one in picks]
                values[f"net benefit in the top {top}"] = [one.benefit[0] for one in picks]
                values[f"overlap of the top {top}"] = [one.overlap for one in picks]
            for metric, (over_all, *each) in values.items():
                if over_all is not None:
                    report.add(**setting, metric=metric, unit="1", values=[one for one in each if one is not None])
                    report.rows[-1] = replace(report.rows[-1], p50=float(f"{over_all:.4g}"))
            own = f"{reading}_seconds"  # with the divergence, which is not needed to read the losses
            seconds = [1e6 * float(one.get(own, one["seconds"])) / self.length for one in found.values()]
            report.add(**setting, metric="time per million tokens", unit="s", values=seconds)
        if shares := [float(one["shared"] / one["groups"]) for one in found.values() if "groups" in one]:
            metric = "groups of several tokens of the texts"
            report.add(**setting, metric=metric, unit="1", values=shares)

    def losses(self, columns: Columns) -> Losses:
        """Losses of the tokens that count."""
        return Losses(
            *(columns[name][self.size :].astype(np.float64) if name in columns else None for name in Losses._fields)
        )


@functools.cache
def _reference(dtype: str, *, quick: bool) -> Any:
    return tiny_llama() if quick else load_model(packaged_model(), dtype=dtype).eval()


@functools.cache
def _aligned(other: str) -> AlignedScorer:
    theirs = load_tokenizer(other)
    options = {"tokenize": text_tokens, "prefix": special_tokens(theirs)[0]}
    return AlignedScorer(load_model(other, dtype="float32").eval(), theirs, load_tokenizer(packaged_model()), **options)


def _columns(contrast: Any) -> dict[str, Any]:
    return {name: values[0] for name, values in contrast._asdict().items() if values is not None}


if __name__ == "__main__":
    tyro.cli(Scorers).run()
