"""Tables of a plan for the terminal."""

from collections.abc import Callable, Sequence
from typing import Any

from rich.table import Table

from tokenweight.plan.alternatives import MOST_GPUS, Advice
from tokenweight.plan.disk import Disk
from tokenweight.plan.run import Budget, Cost
from tokenweight.records import counted

_GIB = 2**30


_MODES = (
    "uniform: plain cross-entropy; precomputed: {weighting} with stored scores; self-scored: the same with the model "
    "that is trained as its scorer"
)
_PARTS = {
    "forward": "forward pass",
    "scoring": "scoring by windows",
    "backward": "backward pass",
    "head": "output head and loss",
    "recompute": "recomputation",
}


def plan_tables(budget: Budget) -> list[Any]:
    """Output of `tokenweight plan`: whether it fits, tables of FLOPs, memory, time, cost and growth, and notes."""
    size, stride, hardware = budget.context.size, budget.context.stride, budget.hardware
    steps = "number of steps unknown" if budget.num_steps is None else counted(budget.num_steps, "step")
    head = (
        f"{budget.model}: {steps} of {counted(budget.sequences_per_step, 'sequence')} of {budget.length:,} tokens "
        f"(by {budget.length_from}); weighting {budget.weighting}, {budget.mode}; short context {size:,}, "
        f"stride {stride:,}"
    )
    if budget.adapter is not None:
        head += f"; an adapter of {budget.adapter:,} parameters is trained"
    tables: list[Any] = [head, _answer(budget), _MODES.format(weighting=budget.weighting)]
    tables += [_shares(budget)] if budget.shares else []
    tables.append(_by_mode("TFLOP of one optimizer step, on all GPUs together", budget.run, _flops))
    limit = "" if hardware.memory is None else f", of {hardware.memory / _GIB:,.1f} ({hardware.name})"
    tables.append(_by_mode(f"GiB on one GPU{limit}, in the phase of a step that holds most", budget.run, _memory))
    if budget.run[0].step_seconds is not None:
        title = f"Time and cost: {hardware.num_gpus:,} {'GPUs' if hardware.num_gpus > 1 else 'GPU'}, {hardware.speed}"
        tables.append(_by_mode(title, budget.run, lambda cost: _cost(cost, budget.sequences_per_step)))
    tables.append(_disk(budget.disk))
    if budget.growth:
        tables.append(_growth(budget.growth))
        tables += [_advised(advice, budget) for advice in budget.advice if advice.length != budget.length]
    return [*tables, *(f"Note: {note}." for note in budget.notes)]


def _answer(budget: Budget) -> str:
    """Whether the recipe fits, and what to change if not."""
    needed = next(cost for cost in budget.run if cost.mode == budget.mode)
    if needed.fits is None:
        return "Does it fit? Name the GPU: --gpu, or --gpu_memory in GB."
    for advice in budget.advice:
        if advice.length == budget.length:
            return _advised(advice, budget)
    return f"Fits: {needed.peak.total / _GIB:,.2f} GiB on each {_limit(budget)}."


def _advised(advice: Advice, budget: Budget) -> str:
    text = f"{advice.length:,} tokens do not fit: {advice.needed / _GIB:,.2f} GiB on each {_limit(budget)}. "
    if advice.change is None or advice.peak is None:
        return text + (
            f"Nor do they with checkpointing, 16-bit products, one sequence at a time and FSDP over {MOST_GPUS} GPUs: "
            f"shorten the sequences, {'' if budget.adapter else 'train an adapter (--lora.r 16), '}or divide each "
            "sequence among GPUs (context parallelism)."
        )
    names, gpus = " and ".join(advice.change.names), ""
    if advice.change.num_gpus != budget.hardware.num_gpus:
        gpus = f"--num_gpus {advice.change.num_gpus} "
    return text + f"With {names} they do, in {advice.peak.total / _GIB:,.2f} GiB: {gpus}{advice.change.options}"


def _shares(budget: Budget) -> Table:
    """A line for each source of the data."""
    title = f"Predicted tokens with more context than the short one, {budget.context.size:,} tokens"
    table = _table(title, ("source",), ("of", "share"))
    for part in budget.shares:
        table.add_row(part.source, f"{part.tokens:,}", f"{part.share:.1%}")
    return table


def _limit(budget: Budget) -> str:
    memory = budget.hardware.memory or 0.0
    return f"{budget.hardware.name}, which has {memory / _GIB:,.1f} GiB (a tenth is left free)"


def _by_mode(title: str, costs: Sequence[Cost], parts: Callable[[Cost], dict[str, str]]) -> Table:
    """A column for each mode, a line for each part."""
    table = _table(title, ("",), [cost.mode for cost in costs])
    columns = [parts(cost) for cost in costs]
    for name in columns[0]:
        table.add_row(name, *(column[name] for column in columns))
    return table


def _flops(cost: Cost) -> dict[str, str]:
    shown = {label: _tera(getattr(cost.flops, part)) for part, label in _PARTS.items()}
    return {**shown, "total": _tera(cost.flops.total), "of which attention": _attention(cost)}


def _memory(cost: Cost) -> dict[str, str]:
    parts = {**cost.peak._asdict(), "total": cost.peak.total}
    shown = {name: part if name == "phase" else f"{part / _GIB:.2f}" for name, part in parts.items()}
    return shown if cost.fits is None else {**shown, "fits": _fits(cost)}


def _cost(cost: Cost, sequences: int) -> dict[str, str]:
    seconds = cost.step_seconds or 0.0
    shown = {"seconds per step": _number(seconds), "tokens per second": f"{sequences * cost.length / seconds:,.0f}"}
    if cost.hours is not None:
        shown |= {"hours, all steps": _number(cost.hours), "GPU-hours": _number(cost.gpu_hours)}
    if cost.dollars is not None:
        shown["dollars"] = _number(cost.dollars)
    if cost.dollars_per_million_tokens is not None:
        shown["dollars per million tokens"] = _number(cost.dollars_per_million_tokens)
    return shown


def _disk(disk: Disk) -> Table:
    """A line for each item written to disk."""
    num = "" if disk.num_checkpoints is None else f"{disk.num_checkpoints} x "
    lines = {
        "sequences, prepared": _giga(disk.sequences),
        "sequences, scored": _giga(disk.scored),
        "checkpoints": num + _giga(disk.checkpoint),
        "trained model": _giga(disk.model),
        "total": _giga(disk.total),
    }
    table = _table("GB on disk (10^9 bytes)", ("",), ("",))
    table.show_header = False
    for name, shown in lines.items():
        if shown != "0":
            table.add_row(name, shown)
    return table


def _growth(costs: Sequence[Cost]) -> Table:
    """A line for each length and mode, with columns only for what is known."""
    columns: dict[str, Callable[[Cost], str]] = {
        "TFLOP/step": lambda cost: _tera(cost.flops.total),
        "attention": _attention,
        "GiB/GPU": lambda cost: f"{cost.peak.total / _GIB:.2f}",
    }
    if costs[0].fits is not None:
        columns["fits"] = _fits
    if costs[0].hours is not None:
        columns["hours"] = lambda cost: _number(cost.hours)
    if costs[0].dollars is not None:
        columns["dollars"] = lambda cost: _number(cost.dollars)
    title = "Growth with the tokens of a sequence (attention: its part of the FLOPs)"
    table = _table(title, ("tokens", "mode"), tuple(columns))
    for cost in costs:
        table.add_row(f"{cost.length:,}", cost.mode, *(shown(cost) for shown in columns.values()))
    return table


def _fits(cost: Cost) -> str:
    return "yes" if cost.fits else "no"


def _attention(cost: Cost) -> str:
    return f"{cost.flops.attention / cost.flops.total:.1%}"


def _table(title: str, names: Sequence[str], numbers: Sequence[str]) -> Table:
    table = Table(title=title, title_justify="left", title_style="bold", box=None, pad_edge=False)
    for name in names:
        table.add_column(name, no_wrap=True)
    for name in numbers:
        table.add_column(name, justify="right")
    return table


def _tera(flops: float) -> str:
    return f"{flops / 1e12:,.4g}" if flops < 1e15 else f"{flops / 1e12:,.0f}"


def _giga(size: float | None) -> str:
    return _number(None if size is None else size / 1e9)


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:,.3g}" if value < 100 else f"{value:,.0f}"
