"""The commands `sambalm train`, `sambalm status` and `sambalm report`."""

import os
from pathlib import Path
from typing import Annotated

import typer

from sambalm.pretrain.cli.examples import example

commands = typer.Typer()


@commands.command(
    epilog=example(
        "sambalm train configs/demo.yaml train.steps=50",
        "torchrun --nproc-per-node 8 -m sambalm.pretrain.cli train configs/samba_421m.yaml data.train=data/slimpajama",
    )
)
def train(
    config: Annotated[Path, typer.Argument(help="The run's YAML file; docs/config.md lists its keys.")],
    overrides: Annotated[list[str] | None, typer.Argument(help="section.key=value, over the file's.")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Check the config for its world and exit.")] = False,
    world_size: Annotated[
        int | None, typer.Option(min=1, help="Ranks to check for with --dry-run; default: torchrun's.")
    ] = None,
) -> None:
    """Train a model, alone or under torchrun; goes on from the run folder's newest checkpoint."""
    from sambalm.pretrain.lifecycle.signals import Signals

    signals = Signals()
    if not dry_run:
        signals.listen()  # before the slow imports, so that a signal meets them too
    from sambalm.pretrain.config_file import load_config

    checked = load_config(config, overrides or [])
    evaluation = None
    if checked.evaluation.tasks:
        from sambalm.evaluation.in_loop import InLoopEvaluation, check_tasks

        check_tasks(checked)
        evaluation = InLoopEvaluation
    if dry_run:
        from sambalm.pretrain.planner.search import describe_run

        print(describe_run(checked, world_size=world_size or int(os.environ.get("WORLD_SIZE", 1))))
        return
    if world_size is not None:
        raise typer.BadParameter("--world-size goes with --dry-run; torchrun says how many ranks train")
    from sambalm.pretrain.errors import print_warning
    from sambalm.pretrain.lifecycle.attempts import check_restart

    if "WORLD_SIZE" not in os.environ and (tasks := os.environ.get("SLURM_NTASKS", "1")) != "1":
        print_warning(
            f"Slurm counts {tasks} tasks here, and this process trains alone: start ranks with torchrun, or the run "
            "with `sambalm slurm submit`"
        )
    check_restart(Path(checked.run.dir))  # before the slow imports
    from sambalm.pretrain.trainer import train as run

    raise typer.Exit(run(checked, signals=signals, evaluation=evaluation))


@commands.command(epilog=example("sambalm status runs/demo"))
def status(
    run_dir: Annotated[Path, typer.Argument(help="A run folder.")],
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Show a run's state, step, losses, time left, where its time went, and how its attempts ended."""
    from sambalm.pretrain.reporting.status import read_status, show_status

    found = read_status(run_dir)
    print(found.as_json() if as_json else show_status(found))


@commands.command(epilog=example("sambalm report runs/demo", "sambalm report runs/a runs/b --output comparison.html"))
def report(
    run_dirs: Annotated[list[Path], typer.Argument(help="A run folder, or several to compare.")],
    output: Annotated[Path | None, typer.Option(help="The page; default: report.html in the first folder.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of tables.")] = False,
) -> None:
    """Summarise runs beside simple baselines, draw RUN_DIR/loss.png, and write one HTML page on all of them."""
    from sambalm.pretrain.reporting.summary import write_report

    write_report(run_dirs, output=output, as_json=as_json)
