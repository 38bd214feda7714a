"""Plans as tables for a terminal."""

import json
from collections.abc import Sequence
from dataclasses import asdict

from rich.console import Console
from rich.table import Table

from sambalm.model.registry import all_mixers
from sambalm.pretrain.planner.memory import RankMemory
from sambalm.pretrain.planner.search import GIB, LONG_RUN_TOKENS, Plan

STATES = {
    "weights": "weights_bytes",
    "rounded": "rounded_bytes",
    "gradients": "gradients_bytes",
    "optimizer": "optimizer_bytes",
}
REST = {"workspace": "workspace_bytes", "buffers": "communication_bytes", "total": "total_bytes"}
TABLE_WIDTH = 200  # of output that is no terminal


def plans_as_json(phases: Sequence[Sequence[Plan]], *, are_phases: bool = False) -> str:
    """The same as JSON, fastest layout first; sizes in bytes, times in seconds.

    Args:
        phases: the plans of each phase.
        are_phases: whether each plan says which phase it is for, from 1.
    """
    found = [
        ({"phase": number} if are_phases else {})
        | {
            "layout": plan.layout,
            "data_parallel": plan.world_size // plan.config.parallel.model_ranks,
            "parallel": plan.config.parallel.model_dump(),
            "micro_batch_size": plan.config.train.micro_batch_size,
            "micro_batches": plan.micro_batches,
            "step_s": plan.time.total_s,
            "time": asdict(plan.time),
            "tokens_per_s": plan.tokens_per_s,
            "run_tokens": plan.config.run_tokens,
            "run_days": plan.run_days,
            "sent_bytes": plan.wire_bytes,
            "memory_bytes": plan.memory.total_bytes,
            "stages": [asdict(stage) | {"total_bytes": stage.total_bytes} for stage in plan.stages],
            "kernels": str(plan.kernels),
        }
        for number, plans in enumerate(phases, start=1)
        for plan in plans
    ]
    return json.dumps(found, indent=2)


def describe_phases(phases: Sequence[Sequence[Plan]]) -> str:
    """A line on the whole run, each phase on the layout that is its fastest."""
    fastest = [plans[0] for plans in phases]
    return describe_days([(plan, plan.run_days) for plan in fastest])


def describe_days(phases: Sequence[tuple[Plan, float]]) -> str:
    """A line on what all phases take, and another where they have several layouts.

    Args:
        phases: the fastest layout and the days of each.
    """
    days = " + ".join(f"{days:.1f}" for _, days in phases)
    text = f"all phases, each on its fastest layout: {days} = {sum(days for _, days in phases):.1f} days"
    if len({plan.layout for plan, _ in phases}) > 1:
        text += "\nA run goes on from its checkpoint on another layout: stop_at_end has it leave where a phase ends"
    return text


def describe_tokens(tokens: int) -> str:
    """A run's tokens as in `100B`, or as in `0.3M` where they are less than a billion."""
    return f"{tokens / 1e9:,.0f}B" if tokens >= 1e9 else f"{tokens / 1e6:,.1f}M"


def print_plans(plans: Sequence[Plan], *, title: str | None = None) -> None:
    """One table of the plans, and one of the memory by pipeline stage and part of the first, under a title."""
    console = Console()
    if not console.is_terminal:
        console = Console(width=TABLE_WIDTH)
    if title:
        console.print(title, highlight=False)
    console.print(_speed_table(plans))
    console.print(f"Kernels of the first: {plans[0].kernels}")
    console.print(_memory_table(plans))
    if len(plans[0].stages) > 1:
        console.print(_stage_table(plans[0]))


def _table(title: str, *columns: str) -> Table:
    table = Table(title=title, title_justify="left")
    for number, column in enumerate(columns):
        table.add_column(column, justify="right" if number else "left", no_wrap=True)
    return table


def _speed_table(plans: Sequence[Plan]) -> Table:
    run_tokens = plans[0].config.run_tokens
    is_long = round(run_tokens / 1e9) == LONG_RUN_TOKENS / 1e9  # the columns would be one
    table = _table(
        "Estimated step of the slowest stage, fastest layout first",
        "layout",
        "DP",
        "recompute",
        "micro-batches x size",
        "step s",
        "bubble",
        "tokens/s",
        f"days to {describe_tokens(run_tokens)}",
        *([] if is_long else [f"days to {LONG_RUN_TOKENS / 1e12:g}T"]),
        "GB sent a rank and step",
    )
    for plan in plans:
        config = plan.config
        table.add_row(
            plan.layout,
            str(plan.world_size // config.parallel.model_ranks),
            config.parallel.recompute,
            f"{plan.micro_batches} x {config.train.micro_batch_size}",
            f"{plan.time.total_s:.2f}",
            f"{plan.time.bubble_s / plan.time.total_s:.1%}",
            f"{plan.tokens_per_s:,.0f}",
            f"{plan.run_days:.1f}",
            *([] if is_long else [f"{plan.days_to(LONG_RUN_TOKENS):.1f}"]),
            f"{plan.wire_bytes / 1e9:.1f}",
        )
    return table


def _memory_table(plans: Sequence[Plan]) -> Table:
    table = _table("Memory of the fullest rank in GiB", "layout", *_memory_cells(plans[0].memory))
    for plan in plans:
        table.add_row(plan.layout, *_memory_cells(plan.memory).values())
    return table


def _stage_table(plan: Plan) -> Table:
    table = _table(f"Memory of each stage of {plan.layout} in GiB", "stage", *_memory_cells(plan.memory))
    for stage, memory in enumerate(plan.stages):
        table.add_row(str(stage), *_memory_cells(memory).values())
    return table


def _memory_cells(memory: RankMemory) -> dict[str, str]:
    """Returns GiB by the title of a column: states, what each kind of layer saves, and the rest."""
    titles = {one.name: one.title for one in all_mixers()}
    saved = {titles.get(kind, kind): kept for kind, kept in memory.saved_by_kind.items()}
    states, rest = ({name: getattr(memory, key) for name, key in keys.items()} for keys in (STATES, REST))
    return {name: f"{size / GIB:.2f}" for name, size in (states | saved | rest).items()}
