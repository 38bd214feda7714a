"""The commands `sambalm checkpoint ...`: what a run has saved, whether it is whole, and which of it to keep."""

from pathlib import Path
from typing import Annotated, Any

import typer

from sambalm.pretrain.cli.examples import example

commands = typer.Typer()
checkpoint = typer.Typer(no_args_is_help=True, help="The checkpoints of a run: look at them, verify and remove them.")
commands.add_typer(checkpoint, name="checkpoint")

Run = Annotated[Path, typer.Argument(metavar="RUN_DIR", help="A run folder.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")]


@checkpoint.command("list", epilog=example("sambalm checkpoint list runs/demo"))
def list_checkpoints(run_dir: Run, as_json: AsJson = False) -> None:
    """List a run's checkpoints, oldest first: step, tokens, size, age, and whether each verifies or why not."""
    from sambalm.pretrain.checkpointing.retention import examine_checkpoints

    _check_run(run_dir)
    _show(examine_checkpoints(run_dir), as_json=as_json)


@checkpoint.command(epilog=example("sambalm checkpoint verify runs/demo --step 200"))
def verify(
    run_dir: Run,
    step: Annotated[int | None, typer.Option(min=0, help="The step of one checkpoint; default: all.")] = None,
    as_json: AsJson = False,
) -> None:
    """Read checkpoints and compare every file with its manifest; ends with exit code 2 where one is damaged."""
    from sambalm.pretrain.checkpointing.retention import examine_checkpoints
    from sambalm.pretrain.errors import CheckpointError

    _check_run(run_dir)
    reports = examine_checkpoints(run_dir, step=step)
    if not reports:
        raise CheckpointError(f"{run_dir} holds no checkpoint of step {step}: `sambalm checkpoint list` shows them")
    _show(reports, as_json=as_json)
    damaged = [report for report in reports if report.problem]
    if damaged:
        raise CheckpointError(f"{len(damaged)} of {len(reports)} checkpoints do not verify: {damaged[-1].problem}")


@checkpoint.command(epilog=example("sambalm checkpoint prune runs/demo --keep 2"))
def prune(
    run_dir: Run,
    keep: Annotated[int, typer.Option(min=1, help="Newest checkpoints to keep, damaged ones not counted.")],
    keep_every_steps: Annotated[
        int | None,
        typer.Option(min=1, help="Keep its multiples too.", show_default="the run's checkpoint.keep_every_steps"),
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show what would be removed, and remove nothing.")] = False,
    as_json: AsJson = False,
) -> None:
    """Remove what is older than the newest checkpoints that verify; no process may train in the folder meanwhile."""
    import json

    from sambalm.pretrain.checkpointing.retention import Retention, newest_keep_every_steps
    from sambalm.pretrain.lifecycle.lease import held_lease

    _check_run(run_dir)
    every = newest_keep_every_steps(run_dir) if keep_every_steps is None else keep_every_steps
    if dry_run:
        removed = Retention(run_dir, keep=keep, keep_every_steps=every).removable()
    else:
        with held_lease(run_dir) as lease:
            retention = Retention(run_dir, keep=keep, keep_every_steps=every, check_lease=lease.check)
            removed = retention.prune()
    if as_json:
        print(json.dumps({"removed": [str(folder) for folder in removed], "dry_run": dry_run}))
        return
    for folder in removed:
        print(f"{folder}: {'would be removed' if dry_run else 'removed'}")
    if not removed:
        print(f"{run_dir}: nothing to remove")


@checkpoint.command(epilog=example("sambalm checkpoint rollback runs/demo --step 200"))
def rollback(run_dir: Run, step: Annotated[int, typer.Option(min=0, help="The step to go on from.")]) -> None:
    """Let a run go on from an earlier checkpoint: the newer ones get other names, for you to remove."""
    from sambalm.pretrain.checkpointing.retention import set_newer_aside
    from sambalm.pretrain.lifecycle.lease import held_lease

    _check_run(run_dir)
    with held_lease(run_dir):
        moved = set_newer_aside(run_dir, step)
    for folder in moved:
        print(f"{folder}: set aside")
    print(f"{run_dir}: goes on from step {step}")


def _check_run(run_dir: Path) -> None:
    """
    Raises:
        CheckpointError: the folder holds no checkpoint.
    """
    from sambalm.pretrain.checkpointing.format import checkpoint_folders
    from sambalm.pretrain.errors import CheckpointError, not_a_run

    if not checkpoint_folders(run_dir):
        raise CheckpointError(not_a_run(run_dir, kind="a run with checkpoints", lacks="checkpoints/step_*"))


def _show(reports: list[Any], *, as_json: bool) -> None:
    """
    Args:
        reports: `CheckpointReport` of each checkpoint.
    """
    import json
    import time
    from dataclasses import asdict

    if as_json:
        rows = [asdict(report) | {"path": str(report.path), "verified": report.problem is None} for report in reports]
        print(json.dumps(rows, indent=1))
        return
    from rich.console import Console
    from rich.table import Column, Table

    verified = Column("verified", overflow="fold")
    table = Table("step", "tokens", "size", "age", verified, box=None, pad_edge=False, header_style="bold")
    for report in reports:
        table.add_row(
            f"{report.step:,}",
            "?" if report.tokens is None else f"{report.tokens:,}",
            f"{report.bytes / 1e6:,.1f} MB",
            _age(time.time() - report.saved_s),
            report.problem or "yes",
        )
    Console().print(table)


def _age(seconds: float) -> str:
    for unit, length_s in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= 2 * length_s:
            return f"{seconds // length_s:.0f} {unit}"
    return f"{max(0.0, seconds):.0f} s"
