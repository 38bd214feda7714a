"""The commands `sambalm slurm ...`."""

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from sambalm.pretrain.cli.examples import example

commands = typer.Typer()
slurm = typer.Typer(no_args_is_help=True, help="Runs as jobs of a Slurm cluster.")
commands.add_typer(slurm, name="slurm")


class Then(StrEnum):
    """What may follow a run."""

    convert = "convert"


@slurm.command(epilog=example("sambalm slurm submit configs/samba_3.8b.yaml --nodes 64 --spares 2 --then convert"))
def submit(
    config: Annotated[Path, typer.Argument(help="The run's YAML file.")],
    nodes: Annotated[int, typer.Option(min=1, help="Nodes to train on.")],
    overrides: Annotated[list[str] | None, typer.Argument(help="section.key=value, over the file's.")] = None,
    spares: Annotated[int, typer.Option(min=0, help="Nodes to take besides, to replace lost ones at once.")] = 0,
    gpus_per_node: Annotated[int, typer.Option(min=1, help="GPUs, and ranks, of each node.")] = 8,
    chain: Annotated[int, typer.Option(min=1, help="Jobs in a row, each going on where the one before left.")] = 1,
    then: Annotated[Then | None, typer.Option(help="A job to start when the run has finished.")] = None,
    script: Annotated[Path | None, typer.Option(help="The sbatch file; default: a shipped one.")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show commands and Slurm's judgement only.")] = False,
) -> None:
    """Submit a run with a shipped sbatch file, once its config fits and `sbatch --test-only` accepts it.

    Partition, account and time limit come from SBATCH_PARTITION, SBATCH_ACCOUNT and SBATCH_TIMELIMIT, the cluster's
    file in configs/clusters from SAMBALM_CLUSTER.
    """
    from sambalm.pretrain.data_parts import data_warning
    from sambalm.pretrain.errors import print_warning
    from sambalm.slurm.submission import Submission, write_submission
    from sambalm.slurm.submit import convert_job, submit_all, training_job

    job, checked = training_job(
        config, nodes=nodes, spares=spares, gpus_per_node=gpus_per_node, script=script, overrides=overrides or []
    )
    run_dir = checked.run.dir
    after = [convert_job(run_dir)] if then else []
    if dry_run:
        for part in (job, *after):
            print(f"{part.shown()}\n  {part.test()}")
        if warning := data_warning(checked):
            print_warning(warning)
        return
    numbers = submit_all(job, chain=chain, after=after)
    print(f"{'job' if len(numbers) == 1 else 'jobs'} {', '.join(numbers)}: watch with `sambalm slurm status {run_dir}`")
    if warning := data_warning(checked):
        print_warning(warning)
    write_submission(Path(run_dir), Submission(jobs=numbers[:chain], steps=checked.train.steps))


@slurm.command(epilog=example("sambalm slurm status runs/samba_3.8b"))
def status(
    run_dir: Annotated[Path, typer.Argument(help="A run folder.")],
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Show what `sambalm status` does, and what Slurm says of the run's job."""
    from sambalm.pretrain.reporting.status import show_status
    from sambalm.slurm.status import slurm_status

    found = slurm_status(run_dir)
    print(found.as_json() if as_json else show_status(found))


@slurm.command(
    "estimate", epilog=example("sambalm slurm estimate configs/samba_3.8b.yaml --nodes 64 --nodes 128 --nodes 1024")
)
def slurm_estimate(
    config: Annotated[Path, typer.Argument(help="The run's YAML file; its layout is searched.")],
    nodes: Annotated[list[int], typer.Option(min=1, help="Nodes, each with the device's GPUs (8); may be repeated.")],
    overrides: Annotated[list[str] | None, typer.Argument(help="section.key=value, over the file's.")] = None,
    device: Annotated[
        str, typer.Option(help="The kind of GPU: h100, h200, a100, b200, or a YAML file that describes another.")
    ] = "h100",
    gpu_memory_gib: Annotated[float, typer.Option(min=1.0, help="Memory of each GPU in GiB.")] = 80.0,
) -> None:
    """Estimate a run on so many nodes, phase by phase: step, saves, failures, goodput, days.

    docs/scaling.md explains the rows.
    """
    from sambalm.pretrain.config_file import load_config
    from sambalm.pretrain.planner.hardware_file import find_hardware
    from sambalm.pretrain.planner.run_estimate import Cluster, estimate, print_estimates

    cluster = Cluster(hardware=find_hardware(device), gpu_memory_gib=gpu_memory_gib)
    checked = load_config(config, overrides or [])
    print_estimates(checked.schedule, [estimate(checked, nodes=number, cluster=cluster) for number in nodes])
