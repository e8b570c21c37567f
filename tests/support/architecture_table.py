"""What works with each kind of causal language model, tried on a tiny one: `docs/architectures.md`.

PYTHONPATH=src:tests/support python tests/support/architecture_table.py    # writes the page again
"""

import copy
from pathlib import Path

import torch
from architectures import KINDS, build, some_tokens, tiny_config
from torch.nn.functional import cross_entropy
from transformers import PreTrainedConfig, PreTrainedModel

from tokenweight import Scorer, ShortContext, Uniform, token_nll, with_weighted_loss
from tokenweight.method import sliding_windows
from tokenweight.models import SETTINGS, causal_parts, extend_context, verify_rope
from tokenweight.models.rope import _layers, _rotary_dim

PAGE = Path(__file__).parents[2] / "docs" / "architectures.md"
HEAD = """# Architectures

What works with each kind of causal language model of transformers, tried on a tiny random one in
float32 on a CPU (`tests/models/test_architectures.py`, which fails when this page is out of date).

- **loss**: with `Uniform()`, the loss of a bound model and the gradients of all its parameters are
  those of `model(labels=...)` itself, in training mode without dropout; "balanced" where both hold
  the balancing loss of experts, too (`output_router_logits`).
- **scorer**: short losses are those of windows that were cut out by hand.
- **packing**: losses of packed documents are those of each document alone, in any batch; where a
  model lets documents see those before them, they are rejected.
- **extension**: the methods of [extend_context](models.md#longer-contexts) to four times the length,
  each verified; "all" are base, linear, dynamic, yarn, longrope and llama3.

| model type | loss | scorer | packing | extension |
|---|---|---|---|---|
"""
LENGTH, SIZE, STRIDE = 24, 8, 6
DOCUMENTS = [7, 1, 16]
TOLERANCE = 2e-5
"""Of losses, in nats, and of gradients, beside the largest: float32, two layers, sums in other orders."""


def quiet_config(kind: str) -> PreTrainedConfig:
    """The config of a kind, without anything that is random in training; experts are balanced if they can be."""
    config = tiny_config(kind)
    text = config.get_text_config()
    for name, value in text.to_dict().items():
        if isinstance(value, float) and any(part in name for part in ("drop", "jitter")):
            setattr(text, name, 0.0)
    if hasattr(text, "output_router_logits"):
        text.output_router_logits = True
    return config


def row(kind: str) -> str:
    """The line of the table."""
    model = build(quiet_config(kind))
    try:
        causal_parts(model)
    except ValueError as error:
        cells = [f"rejected: {refused(error)}", "rejected", "rejected"]
    else:
        cells = [loss(model), scorer(model), packing(model)]
    return f"| {' | '.join([kind, *cells, extension(kind)])} |"


REASONS = {
    "a table of positions": "a table of positions",
    "of any length already": "reads any length",
    "mscale_all_dim": "the scale of its attention scores would change",
    "llama_4_scaling_beta": "its queries are scaled by position, counted from the original length",
    "cannot extend proportional": "it turns a part of its pairs",
    "does not suit": "transformers allows no others",
}
"""The words of this page for what a refusal says."""


def refused(error: ValueError) -> str:
    """The reason of a refusal; in its own words, if the page has none."""
    assert "\n" not in str(error), error
    return next((words for part, words in REASONS.items() if part in str(error)), str(error))


def loss(model: PreTrainedModel) -> str:
    """Loss and all gradients, bound and not."""
    tokens = some_tokens(2, LENGTH)
    plain, bound = copy.deepcopy(model).train(), copy.deepcopy(model).train()
    try:
        with_weighted_loss(bound, Uniform())
    except ValueError as error:
        return f"rejected: {refused(error)}"
    expected, found = (one(input_ids=tokens, labels=tokens) for one in (plain, bound))
    for output in (expected, found):
        output.loss.backward()
    assert abs(expected.loss - found.loss) < TOLERANCE, (expected.loss, found.loss)
    gradients = {name: parameter.grad for name, parameter in plain.named_parameters()}
    largest = max(gradient.abs().max() for gradient in gradients.values() if gradient is not None)
    for name, parameter in bound.named_parameters():
        ours, theirs = (0 if one is None else one for one in (parameter.grad, gradients[name]))
        assert torch.as_tensor(ours - theirs).abs().max() < TOLERANCE * largest, name
    return "equal, balanced" if getattr(expected, "aux_loss", None) is not None else "equal"


def scorer(model: PreTrainedModel) -> str:
    """Short losses of windows, and of windows cut out by hand."""
    tokens = some_tokens(2, LENGTH)
    found = Scorer(model, ShortContext(SIZE, STRIDE))(tokens)
    for start, first, stop in sliding_windows(LENGTH, SIZE, STRIDE):
        with torch.no_grad():
            logits = model(input_ids=tokens[:, start:stop]).logits
        expected = cross_entropy(logits[:, :-1].transpose(1, 2), tokens[:, start + 1 : stop], reduction="none")
        first = max(first, start + 1)
        torch.testing.assert_close(found[:, first:stop], expected[:, first - start - 1 :], rtol=0, atol=TOLERANCE)
    return "equal"


def packing(model: PreTrainedModel) -> str:
    """Losses of packed documents, and of each alone."""
    most = causal_parts(model).max_packed_rows
    if not most:
        return "rejected"
    num_rows = int(min(most, 2))
    tokens = some_tokens(num_rows, sum(DOCUMENTS))
    positions = torch.tensor([[position for length in DOCUMENTS for position in range(length)]] * num_rows)
    alone = torch.cat([token_nll(model, document) for document in tokens.split(DOCUMENTS, dim=1)], dim=1)
    torch.testing.assert_close(token_nll(model, tokens, positions), alone, rtol=0, atol=TOLERANCE)
    return "equal" if num_rows > 1 else "equal, one row"


def extension(kind: str) -> str:
    """The methods that extend the context, and why others do not."""
    config, works, reasons = tiny_config(kind), [], []
    for method in SETTINGS:
        try:
            longer = extend_context(config, 256, method, **factors(config) if method == "longrope" else {})
        except ValueError as error:
            reasons.append(error)
            continue
        model = build(longer)
        verify_rope(model, longer)
        with torch.no_grad():
            assert model(input_ids=some_tokens(1, 100)).logits.isfinite().all()
        works.append(method)
    if len(works) == len(SETTINGS) - 1:
        return "all"
    if works == ["none"]:
        return "none: it has no positions"
    others = "; ".join(dict.fromkeys(refused(reason) for reason in reasons if "method 'none'" not in str(reason)))
    return f"{', '.join(works)}; others rejected: {others}" if works else f"rejected: {others}"


def factors(config: PreTrainedConfig) -> dict[str, list[float]]:
    """What longrope cannot do without, of a model with rotary frequencies."""
    try:
        layers = _layers(config)
    except ValueError:
        return {}
    layer_type = None if None in layers else "full_attention"
    count = _rotary_dim(config.get_text_config(), layers[layer_type], layer_type) // 2
    return {"short_factor": [1.0] * count, "long_factor": [1.0 + pair for pair in range(count)]}


if __name__ == "__main__":
    PAGE.write_text(HEAD + "\n".join(row(kind) for kind in sorted(KINDS)) + "\n")
