"""The settings of an evaluation, and what they mean for rows of a given length. Nothing heavy is imported at once."""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal


@dataclass(frozen=True)
class EvalSettings:
    """What `tokenweight eval` is told. Lists are written as on the command line: 256,512,1024."""

    model: str
    """Folder, hub id or .gguf file of the model."""
    data: Path
    """Folder of rows, scored or not."""
    out: Path
    """New folder for eval.json, table.md and table.csv."""
    baseline: str | None = None
    """Model to compare with; or the --out folder of an earlier eval, all of whose models are then in the table."""
    sizes: str | None = None
    """Short contexts of the benefit curve, in tokens; by default doubling from 256 to half of the row."""
    short: int | None = None
    """Tokens of the short range; by default 1024, or a quarter of a row of less than 4096 tokens."""
    evaluator: str | None = None
    """Model that finds the key tokens of LongPPL for all models; by default the baseline, else the model itself."""
    long_size: int | None = None
    """Window of LongPPL; by default that of its authors (5120) for longer rows, else a quarter of the row."""
    long_stride: int | None = None
    """Tokens scored by a window of LongPPL; by default the authors' 1024, else three quarters of the window."""
    probes: str = "single,multi_key,variable_tracking"
    """Families of retrieval probes, or none."""
    probe_lengths: str | None = None
    """Tokens of the probes; by default a quarter, a half, and the whole of a row."""
    depths: str = "0.1,0.5,0.9"
    """Where the facts lie: 0 (beginning) to 1 (end)."""
    num_probes: int = 8
    """Of each family, length and depth."""
    probe_by: Literal["likelihood", "generation"] = "likelihood"
    """Whether the answer must be likelier than its decoys, or is looked for in greedy output."""
    haystack: Path | None = None
    """Text file that probes hide their facts in; by default sentences of noise."""
    suites: str | None = None
    """Standard suites, as in ruler,mmlu, or tasks of lm-evaluation-harness: docs/evaluate.md."""
    suite_lengths: str | None = None
    """Tokens of RULER and BABILong; by default half of a row."""
    suite_limit: int | None = None
    """Samples of each task; by default all."""
    num_rows: int | None = None
    """Read only the first rows."""
    seed: int = 0
    """Of the probes, and of the draws of documents behind each interval."""
    dtype: str = "auto"
    """Of the models' weights."""
    max_tokens: int = 32768
    """Tokens read in one forward pass; halved when memory does not suffice."""


@dataclass(frozen=True)
class Plan:
    """The settings for rows of one length, all filled in. Two evaluations can be compared if theirs are equal."""

    length: int
    """Tokens of the longest row."""
    edges: list[int]
    """Of the bins of losses by position."""
    sizes: list[int]
    """Short contexts of the curve; the stride of each is half of it."""
    short: int
    long_context: list[int]
    """Size and stride of the windows of LongPPL."""
    long_context_is: str
    """Whose choice they are."""
    families: list[str]
    probe_lengths: list[int]
    depths: list[float]
    num_probes: int
    probe_by: Literal["likelihood", "generation"]
    haystack_sha256: str | None
    suites: list[str]
    suite_lengths: list[int]
    suite_limit: int | None
    num_rows: int | None
    seed: int
    dtype: str

    @property
    def half(self) -> int:
        """Tokens before the second half of a row."""
        return self.length // 2


def make_plan(settings: EvalSettings, length: int) -> Plan:
    """Fill in what depends on the length of the rows.

    Raises:
        ValueError: naming the option that makes no sense, or does not fit rows of so many tokens.
    """
    from tokenweight.evaluate.losses import position_edges

    if length < 8:
        raise ValueError(f"{settings.data} has rows of up to {length} tokens: expected at least 8")
    first = 256 if length >= 512 else length // 4
    edges = position_edges(length, first=first)
    sizes = [edge for edge in edges[1:-1] if edge <= length // 2]
    if settings.sizes is not None:
        sizes = _numbers("--sizes", settings.sizes, int)
    if not sizes or sizes != sorted(set(sizes)) or sizes[0] < 2 or sizes[-1] >= length:
        raise ValueError(
            f"--sizes {','.join(map(str, sizes))}: expected rising numbers from 2 to {length - 1}, below the "
            f"{length} tokens of a row"
        )
    short = min(1024, length // 4) if settings.short is None else settings.short
    _require("--short", short, 2 <= short <= length, f"2 to {length} tokens, the length of a row")
    _require("--max_tokens", settings.max_tokens, settings.max_tokens >= 1, "at least 1")
    long_context, whose = _long_context(settings, length)
    return Plan(
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
    )


def _probe_plan(settings: EvalSettings, length: int) -> dict[str, Any]:
    _require("--num_probes", settings.num_probes, settings.num_probes >= 1, "at least 1")
    text, families = read_haystack(settings), _families(settings.probes)
    lengths = [length // 4, length // 2, length]
    if settings.probe_lengths is not None:
        lengths = _numbers("--probe_lengths", settings.probe_lengths, int)
    depths = _numbers("--depths", settings.depths, float)
    for depth in depths:
        _require("--depths", settings.depths, 0 <= depth <= 1, "numbers from 0 (beginning) to 1 (end)")
    return {
        "families": families,
        "probe_lengths": lengths if families else [],
        "depths": depths if families else [],
        "num_probes": settings.num_probes if families else 0,
        "probe_by": settings.probe_by if families else "likelihood",
        "haystack_sha256": hashlib.sha256(text.encode()).hexdigest()[:16] if text and families else None,
    }


def _suite_plan(settings: EvalSettings, length: int) -> dict[str, Any]:
    suites = [] if settings.suites is None else settings.suites.split(",")
    given = (settings.suite_lengths, settings.suite_limit)
    _require(
        "--suites",
        settings.suites,
        bool(suites) or given == (None, None),
        "suites, with --suite_lengths or --suite_limit",
    )
    _require(
        "--suite_limit", settings.suite_limit, settings.suite_limit is None or settings.suite_limit >= 1, "at least 1"
    )
    lengths = [length // 2]
    if settings.suite_lengths is not None:
        lengths = _numbers("--suite_lengths", settings.suite_lengths, int)
    return {
        "suites": suites,
        "suite_lengths": lengths if suites else [],
        "suite_limit": settings.suite_limit if suites else None,
    }


def read_haystack(settings: EvalSettings) -> str | None:
    """The text that probes hide their facts in; None for noise.

    Raises:
        ValueError: if the file cannot be read, or holds no text.
    """
    if settings.haystack is None:
        return None
    try:
        text = settings.haystack.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"--haystack {settings.haystack}: cannot be read as UTF-8 text ({error})") from None
    if not text.split():
        raise ValueError(f"--haystack {settings.haystack}: holds no text")
    return text


def _long_context(settings: EvalSettings, length: int) -> tuple[list[int], str]:
    from tokenweight.evaluate.losses import PAPER_CONTEXT
    from tokenweight.method import ShortContext

    if settings.long_size is None:
        if settings.long_stride is not None:
            raise ValueError(f"--long_stride {settings.long_stride}: expected --long_size beside it")
        if length > PAPER_CONTEXT.size:
            return [PAPER_CONTEXT.size, PAPER_CONTEXT.stride], "that of the authors of LongPPL"
        size = length // 4
        return [size, ShortContext(size).stride], "a quarter of the row, which is too short for that of the authors"
    size = settings.long_size
    stride = ShortContext(size).stride if settings.long_stride is None else settings.long_stride
    _require("--long_size", size, 2 <= size < length, f"2 to {length - 1}, below the {length} tokens of a row")
    _require("--long_stride", stride, 1 <= stride < size, f"1 to {size - 1}, below --long_size")
    return [size, stride], "asked for"


def _families(text: str) -> list[str]:
    from tokenweight.evaluate.probes import FAMILIES

    if text == "none":
        return []
    families = text.split(",")
    for family in families:
        if family not in FAMILIES:
            raise ValueError(f"--probes: unknown family {family!r}: expected none, or some of {', '.join(FAMILIES)}")
    if len(set(families)) < len(families):
        raise ValueError(f"--probes {text}: a family is named twice")
    return families


def _numbers(option: str, text: str, kind: Callable[[str], Any]) -> list[Any]:
    try:
        return [kind(word) for word in text.split(",")]
    except ValueError:
        raise ValueError(f"{option} {text}: expected numbers, separated by commas") from None


def _require(option: str, value: object, holds: bool, expected: str) -> None:
    if not holds:
        raise ValueError(f"{option} {value}: expected {expected}")
