"""The commands `sambalm plan` and `sambalm params`."""

from pathlib import Path
from typing import Annotated

import typer

from sambalm.pretrain.cli.examples import example

commands = typer.Typer()


AsJson = Annotated[bool, typer.Option("--json", help="Print JSON instead of tables.")]


@commands.command(
    epilog=example(
        "sambalm plan configs/samba_3.8b.yaml --gpus 512 --gpu-memory-gib 80",
        "sambalm plan configs/samba_1.3b.yaml --gpus 16 --gpu-memory-gib 96 --device configs/devices/h100_pcie.yaml",
    )
)
def plan(
    config: Annotated[Path, typer.Argument(help="The run's YAML file; its layout and micro-batch size are searched.")],
    gpus: Annotated[int, typer.Option(min=1, help="GPUs of the cluster.")],
    gpu_memory_gib: Annotated[float, typer.Option(min=1.0, help="Memory of each GPU in GiB.")],
    overrides: Annotated[list[str] | None, typer.Argument(help="section.key=value, over the file's.")] = None,
    device: Annotated[
        str, typer.Option(help="The kind of GPU: h100, h200, a100, b200, or a YAML file that describes another.")
    ] = "h100",
    top: Annotated[int, typer.Option(min=1, help="Layouts to show.")] = 10,
    as_json: AsJson = False,
) -> None:
    """Estimate memory, speed and traffic of the layouts that fit a cluster, fastest first."""
    from sambalm.pretrain.config_file import load_config
    from sambalm.pretrain.planner.hardware_file import find_hardware
    from sambalm.pretrain.planner.search import find_plans
    from sambalm.pretrain.planner.table import describe_phases, plans_as_json, print_plans
    from sambalm.pretrain.run_phases import phase_line

    hardware = find_hardware(device)
    schedule = load_config(config, overrides or []).schedule
    plans = [
        find_plans(phase.config, world_size=gpus, memory_gib=gpu_memory_gib, hardware=hardware, top=top)
        for phase in schedule.phases
    ]
    if as_json:
        print(plans_as_json(plans, are_phases=schedule.is_phased))
        return
    for phase, found in zip(schedule.phases, plans, strict=True):
        print_plans(found, title=phase_line(schedule, phase) if schedule.is_phased else None)
    if schedule.is_phased:
        print(describe_phases(plans))


@commands.command(epilog=example("sambalm params configs/samba_3.8b.yaml"))
def params(
    config: Annotated[Path, typer.Argument(help="The run's YAML file.")],
    overrides: Annotated[list[str] | None, typer.Argument(help="section.key=value, over the file's.")] = None,
    as_json: AsJson = False,
) -> None:
    """Count a model's parameters by part and in total."""
    import json

    from sambalm.model.parameters import count_parameters
    from sambalm.pretrain.config_file import load_config

    counts = count_parameters(load_config(config, overrides or []).model)
    if as_json:
        print(json.dumps(counts))
        return
    for part, count in counts.items():
        print(f"{part:<16}{count:>14}")
