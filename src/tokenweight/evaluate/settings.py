"""The settings of an evaluation, and the plan that follows from them for sequences of a given length.

Nothing heavy is imported at module level, since the command line reads its options from here.
"""

import hashlib
import re
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from tokenweight.records import OptionalTokens, Tokens, token_count


@dataclass(frozen=True)
class EvalSettings:
    """Settings of an evaluation. Lists are written as on the command line: `256,512,1024`.

    Example:
        >>> settings = EvalSettings("runs/dense", Path("validation"), Path("runs/eval"), baseline="runs/uniform")
        >>> record = evaluate(settings)
    """

    model: str
    """Folder, Hub id or .gguf file of the model."""
    data: Path
    """Dataset folder, with or without scores."""
    out: Path
    """New folder for eval.json, table.md and table.csv."""
    baseline: str | None = None
    """Model to compare with; or the --out folder of an earlier eval, all of whose models then appear in the table."""
    sizes: str | None = None
    """Short contexts of the context-gain curve, in tokens; by default doubling from 256 to half of a sequence."""
    short: OptionalTokens = None
    """Tokens of the short range; by default 1024, or a quarter of sequences of less than 4096 tokens."""
    evaluator: str | None = None
    """A third model that finds the key tokens of LongPPL for all, possibly with another tokenizer; by default each
    model and its baseline do so together."""
    long_size: OptionalTokens = None
    """Window of LongPPL; by default that of its authors (5120) for longer sequences, else a quarter of a sequence."""
    long_stride: OptionalTokens = None
    """Tokens scored by each window of LongPPL; by default the authors' 1024, else three quarters of the window."""
    probes: str = "single,multi_key,variable_tracking"
    """Families of retrieval probes, or none."""
    probe_lengths: str | None = None
    """Tokens of the probes; by default a quarter, a half, and all of a sequence."""
    depths: str = "0.1,0.5,0.9"
    """Positions of the facts, from 0 (beginning) to 1 (end)."""
    distances: str | None = None
    """Instead of depths: tokens between the facts and the question, as in 128,512,2k, in all texts that are longer."""
    num_probes: int = 8
    """Number of probes of each family, length, and depth or distance."""
    probe_by: Literal["likelihood", "generation"] = "likelihood"
    """Whether the answer must be likelier than its decoys, or must appear in greedy output."""
    haystack: Path | None = None
    """Text file that probes hide their facts in; by default sentences of noise."""
    heads: bool = False
    """Find the attention heads that copy facts, by their retrieval score, with one forward pass per text."""
    mask_heads: str | None = None
    """Ask the probes again without some heads, and without as many others: top:10 for the model's own ten best, or
    3.5,4.1 (layer, head)."""
    suites: str | None = None
    """Standard suites, as in ruler,mmlu, or tasks of lm-evaluation-harness: docs/evaluate.md."""
    suite_lengths: str | None = None
    """Tokens of RULER and BABILong; by default half of a sequence."""
    suite_limit: int | None = None
    """Samples of each task; by default all."""
    num_rows: int | None = None
    """Read only the first rows."""
    seed: int = 0
    """Seed of the probes, the samples of suites, and the bootstrap over documents behind each interval."""
    dtype: str = "auto"
    """Dtype the models are loaded in."""
    attn_implementation: str | None = None
    """Attention kernel: sdpa, flash_attention_2, eager, … (docs/models.md); by default the choice of transformers."""
    attention: str | None = None
    """Attention beyond the length of the models: dual-chunk, or dual-chunk:chunk=6144,local=1024 (docs/evaluate.md)."""
    max_tokens: Tokens = 32768
    """Tokens read in one forward pass; halved when memory runs out."""


@dataclass(frozen=True)
class EvalPlan:
    """The settings for sequences of one length, with all defaults filled in."""

    length: int
    """Tokens of the longest sequence."""
    edges: list[int]
    """Edges of the bins of losses by position."""
    sizes: list[int]
    """Short contexts of the curve; the stride of each is half of it."""
    short: int
    long_context: list[int]
    """Size and stride of the windows of LongPPL."""
    long_context_is: str
    """Origin of these windows, in words."""
    families: list[str]
    probe_lengths: list[int]
    depths: list[float]
    distances: list[int]
    num_probes: int
    probe_by: Literal["likelihood", "generation"]
    haystack: str | None
    """The text that probes hide their facts in; None for noise, and without probes."""
    heads: bool
    mask_heads: list[list[int]] | int | None
    """Layer and head of each, or the number of best-scoring heads."""
    suites: list[str]
    suite_lengths: list[int]
    suite_limit: int | None
    num_rows: int | None
    seed: int
    dtype: str
    attn_implementation: str | None
    attention: str | None
    """Attention of the models that are measured now; it may differ between compared models."""

    @property
    def half(self) -> int:
        """Tokens before the second half of a sequence."""
        return self.length // 2

    def comparable(self) -> dict[str, Any]:
        """Settings that comparable evaluations share: all except attention; the haystack as a checksum."""
        settings = asdict(self)
        del settings["attention"]
        text = settings.pop("haystack")
        settings["haystack_sha256"] = None if text is None else hashlib.sha256(text.encode()).hexdigest()[:16]
        return settings


def make_plan(settings: EvalSettings, length: int) -> EvalPlan:
    """Fill in the settings that depend on the length of the sequences.

    Raises:
        ValueError: naming the parameter that is invalid, or does not fit sequences of this length.
    """
    from tokenweight.evaluate.losses import position_edges

    if length < 8:
        raise ValueError(f"{settings.data} has sequences of up to {length} tokens: expected at least 8")
    first = 256 if length >= 512 else length // 4
    edges = position_edges(length, first=first)
    sizes = [edge for edge in edges[1:-1] if edge <= length // 2]
    if settings.sizes is not None:
        sizes = _numbers("sizes", settings.sizes, token_count)
    rising = bool(sizes) and sizes == sorted(set(sizes)) and sizes[0] >= 2 and sizes[-1] < length
    listed = ",".join(map(str, sizes))
    _require("sizes", listed, rising, f"rising numbers from 2 to {length - 1}, below the {length} tokens of a sequence")
    short = min(1024, length // 4) if settings.short is None else settings.short
    _require("short", short, 2 <= short <= length, f"2 to {length} tokens, the length of a sequence")
    _require("max_tokens", settings.max_tokens, settings.max_tokens >= 1, "at least 1")
    if settings.attention is not None:
        kernel = settings.attn_implementation
        _require("attn_implementation", kernel, kernel is None, "none beside attention, which has its own")
        expected = "none beside attention, of which a head has several queries for a token"
        _require("heads", "true", not settings.heads, expected)
    long_context, whose = _long_context(settings, length)
    return EvalPlan(
        length=length,
        edges=edges,
        sizes=sizes,
        short=short,
        long_context=long_context,
        long_context_is=whose,
        **_probe_plan(settings, length),
        **_suite_plan(settings, length),
        num_rows=settings.num_rows,
        seed=settings.seed,
        dtype=settings.dtype,
        attn_implementation=settings.attn_implementation,
        attention=settings.attention,
    )


def _long_context(settings: EvalSettings, length: int) -> tuple[list[int], str]:
    from tokenweight.evaluate.losses import PAPER_CONTEXT
    from tokenweight.method import ShortContext

    if settings.long_size is None:
        _require("long_stride", settings.long_stride, settings.long_stride is None, "long_size beside it")
        if length > PAPER_CONTEXT.size:
            return [PAPER_CONTEXT.size, PAPER_CONTEXT.stride], "that of the authors of LongPPL"
        size = length // 4
        return [
            size,
            ShortContext(size).stride,
        ], "a quarter of the sequence, too short for that of the authors"
    size = settings.long_size
    _require("long_size", size, 2 <= size < length, f"2 to {length - 1}, below the {length} tokens of a sequence")
    stride = ShortContext(size).stride if settings.long_stride is None else settings.long_stride
    _require("long_stride", stride, 1 <= stride < size, f"1 to {size - 1}, below long_size")
    return [size, stride], "as given"


def _probe_plan(settings: EvalSettings, length: int) -> dict[str, Any]:
    _require("num_probes", settings.num_probes, settings.num_probes >= 1, "at least 1")
    families, haystack = _families(settings.probes), _haystack(settings)
    lengths = [length // 4, length // 2, length // 2 * 2]  # from 2^k + 1 tokens, what a model of 2^k reads
    if settings.probe_lengths is not None:
        lengths = _numbers("probe_lengths", settings.probe_lengths, token_count)
    depths = _numbers("depths", settings.depths, float)
    within = all(0 <= depth <= 1 for depth in depths)
    _require("depths", settings.depths, within, "numbers from 0 (beginning) to 1 (end)")
    distances = [] if settings.distances is None else _numbers("distances", settings.distances, _distance)
    within = all(0 <= distance < max(lengths) for distance in distances)
    _require(
        "distances", settings.distances, within, f"0 or more tokens, below the {max(lengths)} of the longest probe"
    )
    masked = _masked_heads(settings, families)
    asked = bool(families) or settings.heads
    return {
        "families": families,
        "probe_lengths": lengths if asked else [],
        "depths": depths if asked and not distances else [],
        "distances": distances if asked else [],
        "num_probes": settings.num_probes if asked else 0,
        "probe_by": settings.probe_by if families else "likelihood",
        "haystack": haystack if asked else None,
        "heads": settings.heads,
        "mask_heads": masked,
    }


def _masked_heads(settings: EvalSettings, families: list[str]) -> list[list[int]] | int | None:
    text = settings.mask_heads
    if text is None:
        return None
    _require("mask_heads", text, settings.heads, "heads beside it")
    _require("mask_heads", text, bool(families), "probes beside it")
    if re.fullmatch(r"top:0*[1-9]\d*", text):
        return int(text[4:])
    expected = "top: and a number, as in top:10, or layers and heads, as in 3.5,4.1"
    _require("mask_heads", text, bool(re.fullmatch(r"\d+\.\d+(,\d+\.\d+)*", text)), expected)
    heads = [[int(number) for number in word.split(".")] for word in text.split(",")]
    _require("mask_heads", text, len({*map(tuple, heads)}) == len(heads), "each head once")
    return heads


def _families(text: str) -> list[str]:
    from tokenweight.evaluate.probes import FAMILIES

    if text == "none":
        return []
    families = text.split(",")
    for family in families:
        _require("probes", family, family in FAMILIES, f"none, or some of {', '.join(FAMILIES)}")
    _require("probes", text, len(set(families)) == len(families), "each family once")
    return families


def _haystack(settings: EvalSettings) -> str | None:
    """The text that probes hide their facts in; None for noise."""
    if settings.haystack is None:
        return None
    try:
        text = settings.haystack.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"haystack {settings.haystack}: cannot be read as UTF-8 text ({error})") from None
    _require("haystack", settings.haystack, bool(text.split()), "a file that holds text")
    return text


def _suite_plan(settings: EvalSettings, length: int) -> dict[str, Any]:
    suites = [] if settings.suites is None else settings.suites.split(",")
    unused = not suites and (settings.suite_lengths, settings.suite_limit) != (None, None)
    _require("suites", settings.suites, not unused, "suites, with suite_lengths or suite_limit")
    limit = settings.suite_limit
    _require("suite_limit", limit, limit is None or limit >= 1, "at least 1")
    lengths = [length // 2]
    if settings.suite_lengths is not None:
        lengths = _numbers("suite_lengths", settings.suite_lengths, token_count)
    return {
        "suites": suites,
        "suite_lengths": lengths if suites else [],
        "suite_limit": limit if suites else None,
    }


def _distance(word: str) -> int:
    return 0 if word.strip() == "0" else token_count(word)


def _numbers(name: str, text: str, kind: Callable[[str], Any]) -> list[Any]:
    try:
        return [kind(word) for word in text.split(",")]
    except ValueError:
        raise ValueError(f"{name} {text}: expected numbers, separated by commas") from None


def _require(name: str, value: object, holds: bool, expected: str) -> None:
    if not holds:
        raise ValueError(f"{name} {value}: expected {expected}")
