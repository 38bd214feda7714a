"""The command `sambalm config show`."""

from pathlib import Path
from typing import Annotated

import typer

from sambalm.pretrain.cli.examples import example

commands = typer.Typer()
config_group = typer.Typer(no_args_is_help=True, help="The configuration of a run.")
commands.add_typer(config_group, name="config")


@config_group.command(
    "show",
    epilog=example(
        "sambalm config show configs/demo.yaml train.steps=1e3",
        "sambalm config show runs/demo/config.yaml --json",
    ),
)
def show(
    config: Annotated[Path, typer.Argument(help="The run's YAML file.")],
    overrides: Annotated[list[str] | None, typer.Argument(help="section.key=value, over the file's.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Show every key of a config with its value and where that came from: a line of the file, an override, a default.

    What it prints is a config itself.
    """
    import json

    from sambalm.pretrain.config_file import resolve_config

    resolved = resolve_config(config, overrides or [])
    if as_json:
        shown = {key: {"value": value, "from": place} for key, (value, place) in resolved.values().items()}
        print(json.dumps(shown, indent=2))
    else:
        print(resolved.show())
