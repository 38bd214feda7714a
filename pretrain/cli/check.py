"""The command `sambalm check-layout`."""

from pathlib import Path
from typing import Annotated

import typer

from sambalm.pretrain.cli.examples import example

commands = typer.Typer()


@commands.command(
    "check-layout",
    epilog=example(
        "sambalm check-layout configs/samba_421m.yaml --world-size 4 parallel.tensor=2 parallel.sequence=true",
        "sambalm check-layout configs/samba_3.8b.yaml --world-size 8 parallel.context=2 parallel.pipeline=4 --json",
    ),
)
def check_layout(
    config: Annotated[Path, typer.Argument(help="The run's YAML file; its data are not read.")],
    world_size: Annotated[int, typer.Option(min=1, help="Ranks of the layout, all started on this machine.")],
    overrides: Annotated[list[str] | None, typer.Argument(help="section.key=value, over the file's.")] = None,
    shrink: Annotated[
        bool,
        typer.Option(
            help="Check a small model of the same layer pattern, heads and stages, whose widths divide by the ranks "
            "and whose window spans the sequence as the config's do; --no-shrink checks the config's own sizes, in "
            "fp32: 16 bytes a parameter and more."
        ),
    ] = True,
    steps: Annotated[
        int, typer.Option(min=1, help="Steps whose losses and gradient norms are compared; gradients are the first's.")
    ] = 1,
    tolerance: Annotated[
        float,
        typer.Option(
            min=0.0,
            help="Largest relative difference that passes. Sums in another order make 3e-6 in fp32 and 64 sublayers; "
            "the smallest of known mistakes makes 1e-3.",
        ),
    ] = 1e-4,
    seed: Annotated[int, typer.Option(min=0, max=2**40, help="Seed of the random tokens.")] = 0,
    timeout_s: Annotated[float, typer.Option(min=1.0, help="Seconds after which ranks that hang are ended.")] = 600.0,
    top: Annotated[int, typer.Option(min=1, help="Tensors to show.")] = 10,
    as_json: Annotated[bool, typer.Option("--json", help="Print everything as JSON, all tensors included.")] = False,
) -> None:
    """Compare every tensor's gradient on a layout with one process; exit code 1 when they differ.

    Both train on the same random tokens in fp32, on GPUs where there is one for each rank and on the CPU otherwise.
    """
    import json
    import signal
    import sys

    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # which ends the ranks on its way
    from sambalm.pretrain.check_layout import check_layout as run
    from sambalm.pretrain.config_file import load_config

    found = run(
        load_config(config, overrides or []),
        world_size=world_size,
        steps=steps,
        seed=seed,
        shrink=shrink,
        tolerance=tolerance,
        timeout_s=timeout_s,
    )
    print(json.dumps(found.as_json(), allow_nan=False) if as_json else found.describe(top=top))
    raise typer.Exit(0 if found.passed else 1)
