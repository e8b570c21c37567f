"""A plan as tables for the terminal."""

from collections.abc import Sequence
from typing import Any

from rich.table import Table

from tokenweight.plan.run import Budget, Cost, StepCost

_GIB = 2**30


def plan_tables(budget: Budget) -> list[Any]:
    """What `tokenweight plan` prints: FLOPs of a step, memory, hours, growth, and what they leave out."""
    steps = "unknown" if budget.num_steps is None else f"{budget.num_steps:,}"
    size, stride = budget.context.size, budget.context.stride
    head = (
        f"{budget.model}: {steps} steps of {budget.rows_per_step:,} rows of {budget.length:,} tokens; "
        f"weighting {budget.weighting}; short context {size:,}, stride {stride:,}"
    )
    tables = [head, _steps(budget.steps), _memory(budget.run)]
    if budget.run[0].hours is not None:
        tables.append(_hours(budget.run, budget.speed))
    if budget.growth:
        tables.append(_growth(budget.growth))
    return [*tables, *(f"Note: {note}." for note in budget.notes)]


def _steps(costs: Sequence[StepCost]) -> Table:
    columns = ("forward", "scoring", "backward", "head", "again", "total", "ratio", "square")
    # "again": recomputed activations; "ratio": to uniform; "square": the total with every pair of tokens attended.
    table = _table("TFLOP of one step on all GPUs", ("mode", "weighting"), columns)
    for cost in costs:
        flops = cost.flops
        parts = (flops.forward, flops.scoring, flops.backward, flops.head, flops.recomputation, flops.total)
        ratio = f"{flops.total / costs[0].flops.total:.3f}"
        table.add_row(cost.mode, cost.weighting, *map(_tera, parts), ratio, _tera(cost.square))
    return table


def _memory(costs: Sequence[Cost]) -> Table:
    columns = ("weights", "grads", "optim", "activ", "loss", "scoring", "total")
    table = _table("GiB on one GPU, at the moment that holds most", ("mode", "moment"), columns)
    for cost in costs:
        parts = (*cost.peak[1:], cost.peak.total)
        table.add_row(cost.mode, cost.peak.moment, *(f"{part / _GIB:.2f}" for part in parts))
    return table


def _hours(costs: Sequence[Cost], speed: str) -> Table:
    table = _table(f"Hours ({speed})", ("mode",), ("training", "scoring once", "total"))
    for cost in costs:
        once = cost.scoring_hours
        total = (cost.hours or 0) + (once or 0)
        table.add_row(cost.mode, _hour(cost.hours), "" if once is None else _hour(once), _hour(total))
    return table


def _growth(costs: Sequence[Cost]) -> Table:
    with_hours = costs[0].hours is not None
    columns = ("TFLOP / step", "attention", "GiB", *(("hours", "scoring once") if with_hours else ()))
    table = _table("As rows grow", ("tokens", "mode"), columns)
    for cost in costs:
        hours = (_hour(cost.hours), _hour(cost.scoring_hours)) if with_hours else ()
        values = (_tera(cost.step_flops), f"{cost.attention:.1%}", f"{cost.peak.total / _GIB:.2f}", *hours)
        table.add_row(f"{cost.length:,}", cost.mode, *values)
    return table


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
    return "" if hours is None else f"{hours:,.3g}" if hours < 100 else f"{hours:,.0f}"
