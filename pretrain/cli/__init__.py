"""The program `sambalm`. Commands import what they need when they run, so that help appears at once.

A file of this folder holds a group of commands; this one puts them together and ends every run of the program.
"""

import json
import os
import sys
import time
import warnings
from pathlib import Path
from typing import Annotated

import typer

from sambalm.pretrain.cli import check, checkpoint, convert, data, evaluate, generate, plan, serve, slurm, train

app = typer.Typer(
    name="sambalm",
    help="Pretrain Samba language models (Mamba + sliding-window attention), from text to a Hugging Face model.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)
GROUPS = (data, train, check, plan, checkpoint, convert, generate, evaluate, serve, slurm)
for commands in (group.commands for group in GROUPS):
    app.add_typer(commands)


def main() -> None:
    """Runs the program. An error that carries an `exit_code` is the user's to mend: one sentence, no traceback."""
    warnings.filterwarnings("ignore", message=".*(Transformer Engine|Apex).*")  # optional, as megatron-core says
    warnings.filterwarnings("ignore", message=".*torch.distributed.* is deprecated", category=FutureWarning)
    from sambalm.pretrain.errors import ending_in_a_sentence

    with ending_in_a_sentence(_print_error):
        app()


def _print_error(error: Exception) -> None:
    """Once for a whole run where every rank meets the same error, which is before their process group exists."""
    report = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if report:  # torchrun's summary at its end shows the message of the rank that failed first
        Path(report).write_text(json.dumps({"message": str(error), "timestamp": int(time.time())}))
    rank = os.environ.get("RANK")
    if rank is not None:
        import torch.distributed as dist

        if dist.is_initialized():
            print(f"error on rank {rank}: {error}", file=sys.stderr)
            return
    if rank in (None, "0"):
        from sambalm.pretrain.errors import print_error

        print_error(error)


def _show_version(wanted: bool) -> None:
    if wanted:
        from importlib.metadata import version

        print(f"sambalm {version('sambalm')}")
        raise typer.Exit


@app.callback()
def _root(
    show_version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None: ...
