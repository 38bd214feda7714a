"""The commands `sambalm train` and `sambalm report`."""

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
    if dry_run:
        from sambalm.pretrain.planner.search import describe_run

        print(describe_run(checked, world_size=world_size or int(os.environ.get("WORLD_SIZE", 1))))
        return
    if world_size is not None:
        raise typer.BadParameter("--world-size goes with --dry-run; torchrun says how many ranks train")
    from sambalm.pretrain.lifecycle.attempts import check_restart

    check_restart(Path(checked.run.dir))  # before the slow imports
    from sambalm.pretrain.trainer import train as run

    raise typer.Exit(run(checked, signals=signals))


@commands.command(epilog=example("sambalm report runs/demo"))
def report(run_dir: Annotated[Path, typer.Argument(help="A run folder.")]) -> None:
    """Summarise a run beside simple baselines, and draw its losses to RUN_DIR/loss.png."""
    from sambalm.pretrain.reporting.summary import print_report

    print_report(run_dir)
