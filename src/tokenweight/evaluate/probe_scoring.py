"""Scoring of retrieval probes: by likelihood of answers against decoys, or by generation."""

import copy
import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice, product
from typing import Literal, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor
from transformers import DynamicCache, GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from tokenweight.evaluate.comparison import Measure
from tokenweight.evaluate.probes import FAMILIES, NUM_DECOYS, Family, Probe, make_probes, prompt_tokens
from tokenweight.evaluate.settings import EvalPlan
from tokenweight.method import linear_nll
from tokenweight.models import CausalParts, causal_parts, check_length, check_tokens, evaluating


@dataclass(frozen=True)
class ProbeGrid:
    """The probes to ask: `num` of each family at each length and depth, or at each length and distance below it;
    families without a depth only once per length."""

    families: Sequence[str]
    lengths: Sequence[int]
    depths: Sequence[float]
    num: int = 8
    seed: int = 0
    haystack: str | None = None
    """A text, or None for sentences of noise."""
    by: Literal["likelihood", "generation"] = "likelihood"
    """"likelihood" asks which candidate the model finds more likely, and separates even small base models; "generation"
    looks for the answers in greedy output, as RULER does, and reserves room for it in each length."""
    distances: Sequence[int] = ()
    """Instead of depths: tokens between the facts and the question."""

    def make(self, tokenizer: PreTrainedTokenizerBase, *, apart: bool = False) -> list[list[Probe]]:
        """Make the probes of each family, length and place: a list for each.

        Probe i of each list of a family asks for the same fact, so that lists can be compared in pairs.

        Args:
            apart: use different facts in each list.

        Raises:
            ValueError: if a setting is invalid, or a length is too short, naming the shortest possible.
        """
        if self.by not in ("likelihood", "generation"):
            raise ValueError(f"by {self.by!r}: expected likelihood or generation")
        cells: list[list[Probe]] = []
        for name, length in product(self.families, self.lengths):
            family = FAMILIES.get(name, Family())  # `make_probes` rejects unknown names
            room = family.budget if self.by == "generation" else 0
            for depth, distance in self._places(length) if family.has_depth else [(None, None)]:
                probes = make_probes(
                    name,
                    tokenizer,
                    length=length,
                    depth=depth,
                    distance=distance,
                    num=self.num,
                    seed=self.seed + apart * 1_000_003 * len(cells),
                    haystack=self.haystack,
                    room=room,
                )
                cells.append(probes)
        return cells

    def _places(self, length: int) -> list[tuple[float | None, int | None]]:
        """Depths and distances in a text."""
        if self.distances:
            return [(None, distance) for distance in self.distances if distance < length]
        return [(depth, None) for depth in self.depths]


class ProbeScore(NamedTuple):
    """Result of a model on one probe."""

    accuracy: float
    """Fraction of the answers found: more likely than each decoy, or part of the output."""
    margin: float | None
    """Log-probability of an answer minus that of its best decoy, in nats, averaged over answers; None if generated."""
    loss: float | None = None
    """Mean loss of the tokens of all answers and of the text between and after them, in nats, except tokens that all
    candidates begin with; None if generated."""


class ProbeRecord(NamedTuple):
    """The scores of the probes of one family, length and depth or distance, in their order, and their means."""

    family: str
    length: int
    depth: float | None
    distance: int | None
    by: str
    num: int
    chance: float
    """Accuracy of guessing among the answer and the decoys, or 0 if the answer is generated."""
    accuracy: float
    margin: float | None
    loss: float | None
    accuracies: tuple[float, ...]
    margins: tuple[float, ...] | None
    losses: tuple[float, ...] | None


def probe_grid(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, grid: ProbeGrid) -> list[ProbeRecord]:
    """Score all probes of a grid.

    Records of two models with one tokenizer can be compared probe by probe, in `accuracies`, `margins` and `losses`.

    Raises:
        ValueError: if the model has too few positions, or `ProbeGrid.make` fails; before any probe is scored.

    Example:
        >>> grid = ProbeGrid(["single", "multi_key"], lengths=[4096, 8192], depths=[0.1, 0.5, 0.9])
        >>> for record in probe_grid(model, tokenizer, grid):
        ...     print(record.family, record.length, record.depth, record.accuracy, record.chance)
    """
    for length in grid.lengths:
        check_length(model.config, length, "probes")
    return score_cells(model, tokenizer, grid.make(tokenizer), grid.by)


def score_cells(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, cells: Sequence[Sequence[Probe]], by: str
) -> list[ProbeRecord]:
    """Score the probes of `ProbeGrid.make`: a record for each of its lists."""
    score = score_by_likelihood if by == "likelihood" else score_by_generation
    scores = iter(score(model, tokenizer, [probe for probes in cells for probe in probes]))
    return [_record(probes, list(islice(scores, len(probes))), by) for probes in cells]


def _record(probes: Sequence[Probe], scores: list[ProbeScore], by: str) -> ProbeRecord:
    accuracies, margins, losses = zip(*scores)
    num, generated = len(scores), by == "generation"
    return ProbeRecord(
        *probes[0][3:],
        by=by,
        num=num,
        chance=0.0 if generated else 1 / (1 + NUM_DECOYS),
        accuracy=sum(accuracies) / num,
        margin=None if generated else sum(margins) / num,
        loss=None if generated else sum(losses) / num,
        accuracies=accuracies,
        margins=None if generated else margins,
        losses=None if generated else losses,
    )


def score_by_likelihood(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, probes: Sequence[Probe]
) -> list[ProbeScore]:
    """Compare the probability of each answer, after the earlier ones, with those of the decoys in its place.

    Candidates end in the same mark and exclude each other, so total probabilities count, not means over tokens. A
    prompt and a continuation are tokenized as one text, and what all of them begin with is read once, whether or not it
    ends where the prompt does: its probability is the same for all. A tie with a decoy counts as not found.

    The memory needed is that of the KV cache of `2 + len(decoys)` rows.

    Raises:
        ValueError: if the model is not supported, a token is not in its vocabulary, or it has too few positions.
    """
    parts = causal_parts(model)
    with evaluating(model), torch.no_grad():
        return [_likelihood_score(model, parts, tokenizer, probe) for probe in probes]


def _likelihood_score(
    model: PreTrainedModel, parts: CausalParts, tokenizer: PreTrainedTokenizerBase, probe: Probe
) -> ProbeScore:
    groups = [[prompt_tokens(tokenizer, probe.prompt + text) for text in group] for group in probe.continuations()]
    rows = [row for group in groups for row in group]
    _check(model, rows, 0)
    # Continuations exclude each other, so their rows differ before the end of the shortest.
    shared = next(t for t, column in enumerate(zip(*rows)) if len(set(column)) > 1)
    cache = _read(model, parts, rows[0][: shared - 1])
    margins = []
    for group in groups:
        nll = _continuation_nll(parts, [row[shared - 1 :] for row in group], copy.deepcopy(cache), model.device)
        margins.append((nll[1:].min() - nll[0]).item())
    # The last group contains all answers, concatenated.
    loss = nll[0].item() / (len(groups[-1][0]) - shared)
    return ProbeScore(sum(margin > 0 for margin in margins) / len(margins), sum(margins) / len(margins), loss)


def _read(model: PreTrainedModel, parts: CausalParts, tokens: list[int]) -> DynamicCache:
    """The model's KV cache after reading these tokens."""
    cache = DynamicCache(config=model.config)
    if tokens:
        parts.states(torch.tensor([tokens], device=model.device), **_with_cache(parts, cache))
    # Recurrent layers that already have a state treat several more tokens at once as a new text.
    if any(hasattr(layer, "conv_states") for layer in cache.layers) or cache.get_seq_length() != len(tokens):
        raise ValueError(
            f"{type(model).__name__} has layers without a KV cache: probes can be scored by generation only"
        )
    return cache


def _with_cache(parts: CausalParts, cache: DynamicCache) -> dict[str, DynamicCache]:
    """The cache as a keyword argument under the decoder's name for it, before transformers 5.24 `past_key_values`."""
    return {"cache" if "cache" in inspect.signature(parts.decoder.forward).parameters else "past_key_values": cache}


def _continuation_nll(
    parts: CausalParts, rows: list[list[int]], cache: DynamicCache, device: torch.device
) -> Float[Tensor, " rows"]:
    """Losses of each row except its first token, given the cache, which is consumed."""
    width = max(map(len, rows))
    tokens = torch.tensor([row + row[-1:] * (width - len(row)) for row in rows])
    counts = torch.tensor([[0 < t < len(row) for t in range(width)] for row in rows])
    tokens, counts = tokens.to(device), counts.to(device)
    cache.reorder_cache(torch.zeros(len(rows), dtype=torch.long, device=device))
    states = parts.states(tokens, **_with_cache(parts, cache))
    targets = tokens.where(counts, -100).flatten()
    losses = linear_nll(states.flatten(0, 1), parts.head.weight, targets, **parts.head.after)
    return losses.view(tokens.shape).double().sum(dim=1)


def score_by_generation(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, probes: Sequence[Probe]
) -> list[ProbeScore]:
    """Fraction of the answers found in the greedy output, whose length is the budget of their family.

    Raises:
        ValueError: if a token is not in the model's vocabulary, or the model has too few positions.

    Source: `string_match_all` of NVIDIA/RULER.
    """
    scores = []
    for probe in probes:
        tokens, budget = prompt_tokens(tokenizer, probe.prompt), FAMILIES[probe.family].budget
        _check(model, [tokens], budget)
        output = _generated(model, tokens, budget)
        text = tokenizer.decode(output, skip_special_tokens=True)
        scores.append(ProbeScore(share_found(text, probe.answers), None))
    return scores


def share_found(text: str, answers: Sequence[str]) -> float:
    """Fraction of the answers found in a text, ignoring case."""
    return sum(answer.casefold() in text.casefold() for answer in answers) / len(answers)


def _generated(model: PreTrainedModel, tokens: list[int], budget: int) -> list[int]:
    # Other settings come from the model's own config, which may penalize repetition, and an answer is one.
    plain = GenerationConfig(
        max_new_tokens=budget,
        do_sample=False,
        num_beams=1,
        repetition_penalty=1.0,
        no_repeat_ngram_size=0,
        pad_token_id=0,
    )
    read = torch.tensor([tokens], device=model.device)
    with evaluating(model), torch.no_grad():
        output = model.generate(read, attention_mask=torch.ones_like(read), generation_config=plain)
    return output[0, len(tokens) :].tolist()


def _check(model: PreTrainedModel, rows: list[list[int]], budget: int) -> None:
    check_tokens(model.config, min(map(min, rows)), max(map(max, rows)), "probes")
    check_length(model.config, max(map(len, rows)) + budget, "a probe")


def probe_measures(grid: Sequence[ProbeRecord], plan: EvalPlan) -> list[Measure]:
    """Accuracy, margin and loss of the answer by family, by family and length, and, for probes at distances, by family
    and distance.

    The resampling unit is the fact asked for, the same at every depth and length: its answers are correlated.
    """
    measures: list[Measure] = []
    for family in plan.families:
        own = [record for record in grid if record.family == family]
        cells = {f"probe_{family}": own}
        cells |= {
            f"probe_{family}_{length}": [one for one in own if one.length == length] for length in plan.probe_lengths
        }
        for distance in plan.distances:
            cells[f"probe_{family}_distance_{distance}"] = [one for one in own if one.distance == distance]
        for name, records in cells.items():
            measures += _cell_measures(name, records, summary=records is own) if records else []
    return measures


def _cell_measures(name: str, records: Sequence[ProbeRecord], *, summary: bool) -> list[Measure]:
    num = [float(len(records))] * records[0].num

    def measure(ending: str, unit: str, better: str, values: list[tuple[float, ...] | None]) -> list[Measure]:
        known = [own for own in values if own is not None]
        total = [sum(column) for column in zip(*known)]
        return [Measure(name + ending, "long", unit, better, total, num, summary)] if known else []

    return [
        *measure("", "share", "higher", [record.accuracies for record in records]),
        *(
            one._replace(summary=False)
            for one in measure("_margin", "nats", "higher", [record.margins for record in records])
        ),
        *measure("_loss", "nats", "lower", [record.losses for record in records]),
    ]
