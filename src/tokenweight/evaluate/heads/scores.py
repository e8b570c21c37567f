"""Retrieval scores of attention heads, teacher-forced: one forward pass over text, question and answer.

Source: Wu et al. 2024, "Retrieval Head Mechanistically Explains Long-Context Factuality" (arXiv 2404.15574), Eq. 1 and
its threshold; teacher-forced as in arXiv 2604.02650, where nothing is generated.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from tokenweight.evaluate.heads.attention import Attend, around_attention, attention_rows, check_rows, layer_number
from tokenweight.evaluate.probe_scoring import ProbeGrid
from tokenweight.evaluate.probes import Probe, prompt_tokens
from tokenweight.evaluate.settings import EvalPlan
from tokenweight.models import causal_parts, check_length, check_tokens, evaluating

THRESHOLD = 0.1
"""A head with a higher score is a retrieval head."""
_ANSWER = "Answer:"


class HeadSample(NamedTuple):
    """A text that contains a fact, and ends with a question and the fact as its answer."""

    tokens: Sequence[int]
    needle: range
    """Positions of the tokens of the fact."""
    answer: int
    """Position of the first token of the answer."""


class HeadScores(NamedTuple):
    """The retrieval score of each head in each sample."""

    layers: Sequence[int]
    """Layers with queries and keys."""
    scores: Sequence[Float[Tensor, "samples heads"]]
    """For each layer: the fraction of the fact's tokens that a head copies."""

    def means(self, samples: slice = slice(None)) -> list[list[float]]:
        """The mean score of each head of each layer over some samples, by default all."""
        return [own[samples].mean(dim=0).tolist() for own in self.scores]

    def ranked(self, samples: slice = slice(None)) -> list[tuple[int, int, float]]:
        """Layer, head and mean score of all heads, best first."""
        pairs = zip(self.layers, self.means(samples))
        found = [(layer, head, score) for layer, own in pairs for head, score in enumerate(own)]
        return sorted(found, key=lambda one: -one[2])

    def has(self, heads: Sequence[Sequence[int]]) -> bool:
        """Whether all of these heads (layer, head) exist."""
        sizes = {layer: own.shape[1] for layer, own in zip(self.layers, self.scores)}
        return all(head < sizes.get(layer, 0) for layer, head in heads)

    def of(self, heads: Sequence[Sequence[int]], samples: slice = slice(None)) -> Float[Tensor, " samples"]:
        """The mean score of the given heads (layer, head) in each of the samples."""
        return torch.stack([self.scores[self.layers.index(layer)][samples, head] for layer, head in heads]).mean(dim=0)


def head_samples(tokenizer: PreTrainedTokenizerBase, plan: EvalPlan) -> list[HeadSample]:
    """Samples at the lengths and depths (or distances) of the probes, each about a different fact.

    Raises:
        ValueError: if a length is too short, naming the shortest possible.
    """
    options = {name: getattr(plan, name) for name in ("depths", "distances", "seed", "haystack")}
    grid = ProbeGrid(["question"], plan.probe_lengths, num=plan.num_probes, **options)
    return [_sample(tokenizer, probe) for probes in grid.make(tokenizer, apart=True) for probe in probes]


def _sample(tokenizer: PreTrainedTokenizerBase, probe: Probe) -> HeadSample:
    text = probe.prompt + probe.continuations()[0][0]
    answer = text.rindex(_ANSWER) + len(_ANSWER)
    needle = text[answer:].strip()
    start = text.index(needle)
    tokens = prompt_tokens(tokenizer, text)

    def whole(place: int) -> int:
        """Number of tokens that end before this character."""
        own = prompt_tokens(tokenizer, text[:place])
        return next((t for t, pair in enumerate(zip(own, tokens)) if pair[0] != pair[1]), len(own))

    return HeadSample(tokens, range(whole(start), whole(start + len(needle))), whole(answer))


def retrieval_scores(model: PreTrainedModel, samples: Sequence[HeadSample]) -> HeadScores:
    """The retrieval score |g ∩ k| / |k| of every head: k are the tokens of the fact, g those that the head copies.

    A head copies a token of the answer if, when the model is about to produce it, the most attended key is that token
    inside the fact. Equal tokens count once. Each sample is read once; attention probabilities are computed for the
    answer only, and verified against the output of the layer.

    Args:
        model: any decoder of transformers whose layers with queries and keys use its attention interface.
        samples: read one by one.

    Raises:
        ValueError: if no layer has queries and keys, attention is not a softmax of their products, a token is not in
            the model's vocabulary, or it has too few positions.
    """
    parts = causal_parts(model)
    check_length(model.config, max(len(sample.tokens) for sample in samples), "a sample")
    found: dict[int, list[Tensor]] = {}
    with evaluating(model), torch.no_grad():
        for sample in samples:
            check_tokens(model.config, min(sample.tokens), max(sample.tokens), "a sample")
            read = torch.tensor([sample.tokens], device=model.device)
            watched: dict[int, Tensor] = {}
            with around_attention(_watching(watched, sample.answer - 1)):
                parts.decoded(read[:, :-1])
            if not watched:
                raise ValueError(
                    f"heads: {type(model).__name__} has no attention with queries and keys at the attention interface "
                    "of transformers: expected a model that has"
                )
            for layer, looked_at in watched.items():
                found.setdefault(layer, []).append(_shares(looked_at, read[0].cpu(), sample))
    return HeadScores(sorted(found), [torch.stack(found[layer]) for layer in sorted(found)])


def _watching(watched: dict[int, Tensor], first: int) -> Any:
    """Record, for each layer, the key that each head attends to most, for each query from `first` on."""

    def around(
        attend: Attend, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Any, **settings: Any
    ) -> tuple[Tensor, Any]:
        output, weights = attend(module, query, key, value, mask, **settings)
        rows = attention_rows(query, key, mask, first, settings)
        check_rows(rows, value, output[0, first:], module)
        watched[layer_number(module)] = rows.argmax(dim=2).cpu()
        return output, weights

    return around


def _shares(
    looked_at: Int[Tensor, "heads answer"], tokens: Int[Tensor, " seq"], sample: HeadSample
) -> Float[Tensor, " heads"]:
    """The fraction of the distinct tokens of the fact that each head copies."""
    answer = tokens[sample.answer :]
    # A sink, which is beyond all keys, is not a token.
    inside = (looked_at >= sample.needle.start) & (looked_at < sample.needle.stop)
    copies: Bool[Tensor, "heads answer"] = inside & (tokens[looked_at.clamp(max=len(tokens) - 1)] == answer)
    fact = tokens[sample.needle.start : sample.needle.stop].unique()
    return (copies[:, None] & (answer == fact[:, None])).any(dim=2).double().mean(dim=1)
