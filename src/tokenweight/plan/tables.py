"""A plan as tables for the terminal."""

from collections.abc import Callable, Sequence
from typing import Any

from rich.table import Table

from tokenweight.plan.run import Budget, Cost

_GIB = 2**30


def plan_tables(budget: Budget) -> list[Any]:
    """The tables that `tokenweight plan` prints: FLOPs of a step, memory, hours, growth, and notes."""
    steps = "unknown" if budget.num_steps is None else f"{budget.num_steps:,}"
    size, stride = budget.context.size, budget.context.stride
    head = (
        f"{budget.model}: {steps} steps of {budget.sequences_per_step:,} sequences of {budget.length:,} tokens; "
        f"weighting {budget.weighting}; short context {size:,}, stride {stride:,}"
    )
    tables = [head, _by_mode("TFLOP of one step on all GPUs", budget.run, _flops)]
    tables.append(_by_mode("GiB on one GPU, in the phase that holds most", budget.run, _memory))
    if budget.run[0].hours is not None:
        tables.append(_by_mode(f"Hours ({budget.speed})", budget.run, lambda cost: {"hours": _hour(cost.hours)}))
    if budget.growth:
        tables.append(_growth(budget.growth))
    return [*tables, *(f"Note: {note}." for note in budget.notes)]


def _by_mode(title: str, costs: Sequence[Cost], parts: Callable[[Cost], dict[str, str]]) -> Table:
    """A column for each mode, a line for each part."""
    table = _table(title, ("",), [cost.mode for cost in costs])
    columns = [parts(cost) for cost in costs]
    for name in columns[0]:
        table.add_row(name, *(column[name] for column in columns))
    return table


def _flops(cost: Cost) -> dict[str, str]:
    parts = {name: part for name, part in cost.flops._asdict().items() if name != "attention"}
    shown = {name: _tera(part) for name, part in {**parts, "total": cost.flops.total}.items()}
    return {**shown, "attention": _attention(cost)}


def _memory(cost: Cost) -> dict[str, str]:
    parts = {**cost.peak._asdict(), "total": cost.peak.total}
    return {name: part if name == "phase" else f"{part / _GIB:.2f}" for name, part in parts.items()}


def _growth(costs: Sequence[Cost]) -> Table:
    columns = ("TFLOP / step", "attention", "GiB", "hours")
    table = _table("Growth with the length of a sequence", ("tokens", "mode"), columns)
    for cost in costs:
        gib = f"{cost.peak.total / _GIB:.2f}"
        table.add_row(f"{cost.length:,}", cost.mode, _tera(cost.flops.total), _attention(cost), gib, _hour(cost.hours))
    return table


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


def _hour(hours: float | None) -> str:
    return "-" if hours is None else f"{hours:,.3g}" if hours < 100 else f"{hours:,.0f}"
