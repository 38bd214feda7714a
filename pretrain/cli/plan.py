"""The commands `sambalm plan` and `sambalm params`."""

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from sambalm.pretrain.cli.examples import example

commands = typer.Typer()


class Device(StrEnum):
    """What a cluster is made of."""

    h100 = "h100"
    h200 = "h200"
    a100 = "a100"


@commands.command(epilog=example("sambalm plan configs/samba_3.8b.yaml --gpus 512 --gpu-memory-gib 80"))
def plan(
    config: Annotated[Path, typer.Argument(help="The run's YAML file; its layout and micro-batch size are searched.")],
    gpus: Annotated[int, typer.Option(min=1, help="GPUs of the cluster.")],
    gpu_memory_gib: Annotated[float, typer.Option(min=1.0, help="Memory of each GPU in GiB.")],
    overrides: Annotated[list[str] | None, typer.Argument(help="section.key=value, over the file's.")] = None,
    device: Annotated[Device, typer.Option(help="The kind of GPU.")] = Device.h100,
    top: Annotated[int, typer.Option(min=1, help="Layouts to show.")] = 10,
) -> None:
    """Estimate memory, speed and traffic of the layouts that fit a cluster, fastest first."""
    from sambalm.pretrain.config_file import load_config
    from sambalm.pretrain.planner.hardware import DEVICES
    from sambalm.pretrain.planner.search import find_plans
    from sambalm.pretrain.planner.table import print_plans

    hardware = DEVICES[device.value]
    plans = find_plans(
        load_config(config, overrides or []), world_size=gpus, memory_gib=gpu_memory_gib, hardware=hardware, top=top
    )
    print_plans(plans)


@commands.command(epilog=example("sambalm params configs/samba_3.8b.yaml"))
def params(
    config: Annotated[Path, typer.Argument(help="The run's YAML file.")],
    overrides: Annotated[list[str] | None, typer.Argument(help="section.key=value, over the file's.")] = None,
) -> None:
    """Count a model's parameters by part and in total."""
    from sambalm.model.parameters import count_parameters
    from sambalm.pretrain.config_file import load_config

    counts = count_parameters(load_config(config, overrides or []).model)
    for part, count in counts.items():
        print(f"{part:<16}{count:>14}")
