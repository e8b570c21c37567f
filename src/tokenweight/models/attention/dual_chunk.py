"""Dual Chunk Attention: a rotary model reads any length without a distance that it was not trained on.

    trained length L, chunk c = 3 L / 4, local window w = L / 8, step s = c - w
    key j stands at       j mod s
    query i stands at     i mod s                 for keys of its own chunk, i // s
                          min(i mod s + s, c)     for keys of the chunk before: exact within w tokens
                          min(2 s - 1, c)         for keys of older chunks

Source: An et al. 2024, "Training-Free Long-Context Scaling of Large Language Models", 2402.17463; c, w and the rule
for `mscale` are those of the authors' code (`chunkllama_attn_replace.py`).
"""

import dataclasses
import functools
import inspect
import itertools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor, nn
from transformers import AttentionInterface, Cache, PreTrainedConfig, PreTrainedModel
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

from tokenweight.models.attention.pieces import Scores, chunked, masked
from tokenweight.models.causal import causal_parts, evaluating
from tokenweight.models.rope import ANY_LENGTH, context_length, has_rotary, is_rotary, rope_depends_on_length
from tokenweight.records import token_count

_NAMED = "attention dual-chunk: "


@dataclass(frozen=True)
class DualChunk:
    """The settings of Dual Chunk Attention; its text is `dual-chunk:chunk=6144,local=1024`.

    Example:
        >>> model = with_dual_chunk(load_model("MODEL"), DualChunk())
        >>> token_nll(model, tokens)  # of any length
    """

    chunk: int | None = None
    """The longest distance, in tokens; by default 3/4 of the positions that the model has."""
    local: int | None = None
    """Distance up to which neighbouring chunks see each other as without chunks; by default 1/8 of the positions."""
    mscale: float = 0.0
    """Queries and keys are multiplied by 1 + mscale ln(n / positions) in documents of n > positions tokens. The
    authors' code has 0.05, their paper nothing."""

    def __post_init__(self) -> None:
        if not 0 <= self.mscale < math.inf:
            raise ValueError(f"{_NAMED}mscale={self.mscale}: expected a finite number from 0")

    def __str__(self) -> str:
        settings = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        given = [f"{name}={value}" for name, value in settings.items() if value]
        return ":".join(["dual-chunk", *filter(None, [",".join(given)])])

    @property
    def step(self) -> int:
        """Tokens of a chunk outside its local window."""
        assert self.chunk is not None
        assert self.local is not None
        return self.chunk - self.local

    def of(self, config: PreTrainedConfig) -> "DualChunk":
        """These settings for a model, with every default filled in.

        Raises:
            ValueError: if the model has no rotary embeddings, or some that depend on the length, or too few positions.
        """
        kind, positions = config.get_text_config().model_type, context_length(config)
        if not has_rotary(config):
            raise ValueError(f"{_NAMED}{kind} has no rotary embeddings: expected a model that has")
        if positions is None:
            raise ValueError(f"{_NAMED}{kind} reads sequences of any length already: expected one with a length")
        if rope_depends_on_length(config):
            raise ValueError(
                f"{_NAMED}rotary frequencies of {kind} depend on the length of the sequence (dynamic, "
                "longrope): expected frequencies that stay"
            )
        chunk = 3 * positions // 4 if self.chunk is None else self.chunk
        local = positions // 8 if self.local is None else self.local
        if not 1 < chunk < positions:  # the longest distance in so many positions is one less
            raise ValueError(f"{_NAMED}chunk={chunk}: expected 2 to {positions - 1}, below the positions of {kind}")
        if not 1 <= local < chunk:
            raise ValueError(f"{_NAMED}local={local}: expected 1 to {chunk - 1}, below chunk")
        return dataclasses.replace(self, chunk=chunk, local=local)

    def query_positions(self, positions: Int[Tensor, "*shape"]) -> tuple[Int[Tensor, "*shape"], ...]:
        """Positions of queries for the keys of their own chunk, of the one before, and of older ones."""
        own = positions.remainder(self.step)
        far = min(2 * self.step - 1, self.chunk or 0)
        return own, (own + self.step).clamp(max=self.chunk), torch.full_like(own, far)

    def relative_positions(self, positions: Int[Tensor, " seq"]) -> Int[Tensor, "seq seq"]:
        """The distance at which each query (row) sees each key (column) up to it, as a table: slow, for comparison."""
        apart = positions[:, None] // self.step - positions // self.step
        own, before, older = (one[:, None] for one in self.query_positions(positions))
        return torch.where(apart == 0, own, torch.where(apart == 1, before, older)) - positions.remainder(self.step)


def parse_attention(text: str) -> DualChunk:
    """Read `dual-chunk`, or `dual-chunk:chunk=6144,local=1024,mscale=0.05`.

    Raises:
        ValueError: for another name, or a setting that is unknown or no number.
    """
    name, _, rest = text.partition(":")
    known: dict[str, Callable[[str], float]] = {"chunk": token_count, "local": token_count, "mscale": float}
    expected = "expected dual-chunk, or dual-chunk:chunk=...,local=...,mscale=..."
    settings: dict[str, Any] = {}
    for part in rest.split(",") if rest else []:
        key, _, value = part.partition("=")
        if key not in known or key in settings:
            raise ValueError(f"attention {text!r}: found setting {key!r}: {expected}")
        try:
            settings[key] = known[key](value)
        except ValueError:
            raise ValueError(f"attention {text!r}: {key} is {value!r}: expected a number") from None
    if name != "dual-chunk":
        raise ValueError(f"attention {text!r}: {expected}")
    return DualChunk(**settings)


def with_dual_chunk(model: PreTrainedModel, settings: DualChunk | None = None) -> PreTrainedModel:
    """Switch a rotary model to Dual Chunk Attention. The model is changed in place, for evaluation, and returned.

    Each layer computes its queries by its own code, at each of their positions, so that partial rotary embeddings,
    factors of a scaling, norms of queries and shared key heads are kept. Layers with sliding or chunked
    attention stay as they are. Packed documents (`position_ids`) have chunks of their own. Attention scores are held a
    few queries at a time, so that memory is linear in the length; a KV cache may be used.

    Raises:
        ValueError: if the model's attention does not go through the attention interface of transformers, or would
            change within a chunk (verified on a few tokens); and for a batch with padding, when it is read.
    """
    settings, trained = (settings or DualChunk()).of(model.config), context_length(model.config)
    decoder, before = causal_parts(model).decoder, model.config._attn_implementation
    expected = _few_states(model, decoder)
    layers = [_Layer(module, settings, trained) for module in _attention_modules(decoder)]
    rotary = [module for module in decoder.modules() if is_rotary(module)]
    replaced = {module: vars(module).get("forward") for module in [*rotary, *(layer.module for layer in layers)]}
    try:
        model.set_attn_implementation(ANY_LENGTH)
        for module in rotary:
            module.forward = functools.partial(_rotate, settings, module.forward)
        for layer in layers:
            vars(layer.module).update(forward=layer.forward, _dual_chunk=layer)
        _verify(model, decoder, layers, expected)
    except Exception as error:  # whatever a model raises that finds other embeddings than its own
        for module, forward in replaced.items():
            for name in ("forward", "_dual_chunk"):
                vars(module).pop(name, None)
            vars(module).update({} if forward is None else {"forward": forward})
        model.set_attn_implementation(before)
        reason = str(error).removeprefix(_NAMED)
        raise ValueError(f"{_NAMED}{type(model).__name__} is not supported: {reason}") from error
    return model


def _few_states(model: PreTrainedModel, decoder: nn.Module) -> Tensor:
    tokens = torch.arange(8, device=model.device).remainder(model.config.get_text_config().vocab_size)[None]
    with torch.no_grad(), evaluating(decoder):
        return decoder(input_ids=tokens, use_cache=False).last_hidden_state


def _verify(model: PreTrainedModel, decoder: nn.Module, layers: list["_Layer"], expected: Tensor) -> None:
    """Raise a ValueError unless all layers attend through our function, and as before within a chunk.

    Each layer learns from the masks that it is given whether its attention is local.
    """
    elsewhere = "its attention does not go through the attention interface of transformers"
    if model.config._attn_implementation != ANY_LENGTH or not layers:
        raise ValueError(elsewhere)
    try:
        found = _few_states(model, decoder)
    except (TypeError, AttributeError) as error:  # takes rotary embeddings apart before its layers have them
        raise ValueError(f"{elsewhere} ({error})") from error
    if any(layer.local is None for layer in layers):
        raise ValueError(elsewhere)
    # Eager attention computes weights in float32 whatever the model's dtype.
    eps = max(torch.finfo(dtype).eps for dtype in (found.dtype, torch.float32))
    if not (found - expected).abs().max() <= math.sqrt(eps) * expected.abs().max():
        raise ValueError("within a chunk, its states would not be what they were")


def _attention_modules(decoder: nn.Module) -> Iterator[nn.Module]:
    """The innermost modules that are given rotary embeddings."""
    given = [m for m in decoder.modules() if "position_embeddings" in inspect.signature(m.forward).parameters]
    for module in given:
        if not any(inner in given for inner in module.modules() if inner is not module):
            yield module


@dataclass(frozen=True)
class _Rotations:
    """The output of a rotary module for its layers, in place of one pair of cosine and sine."""

    positions: Int[Tensor, "rows seq"]
    """Positions of the tokens in their documents."""
    beyond: bool
    """Whether any token is beyond the first chunk."""
    plain: Any
    own: Any
    before: Any
    older: Any


def _rotate(
    settings: DualChunk, rotary: Callable[..., Any], x: Tensor, position_ids: Tensor, *args: Any, **kwargs: Any
) -> _Rotations:
    """Replaces the forward of a rotary module."""
    # Models that read pictures have three or four positions for each token, which are equal in text.
    axes = position_ids.reshape(-1, *position_ids.shape[-2:])
    if (axes != axes[0]).any():
        raise ValueError(_NAMED + "position_ids: found several for one token: expected text alone")
    beyond = bool(axes[0].max() >= settings.step)
    plain = rotary(x, position_ids, *args, **kwargs)
    others = (
        [rotary(x, one, *args, **kwargs) for one in settings.query_positions(position_ids)] if beyond else 3 * [plain]
    )
    return _Rotations(axes[0], beyond, plain, *others)


class _Layer:
    """The attention of one layer: replaces the forward of its module and the attention function that it calls."""

    def __init__(self, module: nn.Module, settings: DualChunk, trained: int) -> None:
        self.module, self.settings, self.trained = module, settings, trained
        self.own_forward = module.forward
        self.local: bool | None = None
        """Whether a mask keeps its tokens near each other; not known before the first pass."""
        self.noting = False
        self.noted: list[list[Tensor]] = []
        self.calls = 0
        self.rotations: Any = None

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run the module as often as its queries have positions; all but the last time only for the queries."""
        self.rotations = next((one for one in (*args, *kwargs.values()) if isinstance(one, _Rotations)), None)
        if self.rotations is None:
            raise ValueError(_NAMED + "a layer was not given the embeddings of its rotary module")
        chunks = self.local is False and self.rotations.beyond
        self.noting, self.noted = True, []
        for name in ("before", "older") if chunks else ():
            self.noted.append([])
            self._run(name, args, kwargs)
        self.noting, self.calls = False, 0
        return self._run("own" if chunks else "plain", args, kwargs)

    def _run(self, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        def given(value: Any) -> Any:
            if isinstance(value, Cache):
                return None if self.noting else value
            return getattr(value, name) if isinstance(value, _Rotations) else value

        return self.own_forward(*map(given, args), **{key: given(value) for key, value in kwargs.items()})

    def attend(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scores: Scores) -> Tensor:
        """The attention function that the module calls."""
        if self.noting:
            self.noted[-1].append(query)
            return value.new_zeros(()).expand(query.shape[0], query.shape[2], query.shape[1], value.shape[-1])
        if self.local is None:
            self.local = mask is not None
        if (mask is not None) != self.local:
            raise ValueError(_NAMED + "found an attention mask of another kind than before")
        number, self.calls = self.calls, self.calls + 1
        if mask is not None:
            return masked(scores, query, key, value, mask)
        queries = (query, *(noted[number] for noted in self.noted))
        positions = self.rotations.positions
        if len(positions) > 1 and (positions != positions[0]).any():
            rows = [slice(row, row + 1) for row in range(len(query))]
        else:
            rows, positions = [slice(None)], positions[:1]
        found = [
            self._documents([one[row] for one in queries], key[row], value[row], positions[row][0], scores)
            for row in rows
        ]
        return torch.cat(found)

    def _documents(
        self, queries: list[Tensor], key: Tensor, value: Tensor, positions: Tensor, scores: Scores
    ) -> Tensor:
        """Attention in rows whose tokens have the same positions, document by document."""
        num, total = len(positions), key.shape[2]
        begins = (positions == 0).nonzero().flatten().tolist() if num == total else []
        if num != total:  # the keys before are those of a cache
            all_positions = torch.arange(total, device=key.device)
            if not torch.equal(positions, all_positions[total - num :]):
                raise ValueError(_NAMED + "found padding beside a KV cache: expected rows without it")
            positions = all_positions
        edges = [0, *(begin for begin in begins if begin), total]
        found = []
        for start, stop in itertools.pairwise(edges):
            span = slice(start, stop)
            here = span if num == total else slice(None)
            grown = 1 + self.settings.mscale * math.log(max(1.0, (stop - start) / self.trained))
            parts = tuple(query[:, :, here] for query in queries)
            step = self.settings.step if len(queries) > 1 else total + int(positions.max()) + 1
            found.append(
                chunked(scores.scaled(grown**2), parts, key[:, :, span], value[:, :, span], positions[span], step)
            )
        return torch.cat(found, dim=1)


def _attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    sliding_window: int | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """The attention function that transformers calls under the name `ANY_LENGTH`."""
    layer = vars(module).get("_dual_chunk")
    if layer is None or dropout:
        raise ValueError(_NAMED + "expected a model of with_dual_chunk, in evaluation mode")
    if (attention_mask is not None) != _is_local(module, sliding_window):
        raise ValueError(_NAMED + "found an attention mask that the model made by itself")
    scores = Scores(query.shape[-1] ** -0.5 if scaling is None else scaling, softcap, s_aux)
    return layer.attend(query, key, value, attention_mask, scores), None


def _is_local(module: nn.Module, sliding_window: int | None) -> bool:
    config: Any = getattr(module, "config", None)
    types, number = getattr(config, "layer_types", None), getattr(module, "layer_idx", None)
    if types and number is not None:
        return types[number] in ("sliding_attention", "chunked_attention")
    return sliding_window is not None


def _mask(*args: Any, attention_mask: Tensor | None = None, local_size: int | None = None, **kwargs: Any) -> Any:
    """The mask that transformers makes for layers with local attention; none for others, which see whole documents."""
    if attention_mask is not None and not attention_mask.all():
        raise ValueError(_NAMED + "attention_mask: found padding: expected rows without it")
    if kwargs.get("use_vmap"):
        raise ValueError(_NAMED + "found a mask that is not causal: expected text alone")
    if local_size is None:
        return None
    kwargs["allow_is_causal_skip"] = False
    return sdpa_mask(*args, attention_mask=attention_mask, local_size=local_size, **kwargs)


AttentionInterface.register(ANY_LENGTH, _attention)
AttentionMaskInterface.register(ANY_LENGTH, _mask)
