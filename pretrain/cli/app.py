"""The commands of the program `sambalm` together. Each imports what it needs when it runs: help appears at once.

A file of this folder holds a group of commands; this one runs the one that is asked for, to its exit code.
"""

import errno
import json
import os
import sys
import time
import warnings
from pathlib import Path
from typing import Annotated

import typer

from sambalm.pretrain.cli import check, checkpoint, config, convert, data, evaluate, generate, plan, serve, slurm, train
from sambalm.pretrain.cli.interrupts import Interrupts

app = typer.Typer(
    name="sambalm",
    help="Pretrain Samba language models (Mamba + sliding-window attention), from text to a Hugging Face model.",
    no_args_is_help=True,
    add_completion=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)
GROUPS = (data, config, train, check, plan, checkpoint, convert, generate, evaluate, serve, slurm)
for commands in (group.commands for group in GROUPS):
    app.add_typer(commands)


def run(interrupts: Interrupts) -> None:
    """Runs a command. An error that carries an `exit_code` is the user's to mend: one sentence, no traceback.

    So is what the operating system says of a file that a user named, but for a run that trains: there a file that was
    readable before is a matter of the machine, after which the launchers try again.
    """
    warnings.filterwarnings("ignore", message=".*(Transformer Engine|Apex).*")  # optional, as megatron-core says
    warnings.filterwarnings("ignore", message=".*torch.distributed.* is deprecated", category=FutureWarning)
    from sambalm.pretrain.errors import ExitCode, FileError, Interrupted, ending_in_a_sentence

    with ending_in_a_sentence(_print_error):
        try:
            exit_code = app(prog_name="sambalm", standalone_mode=False)
            if exit_code == ExitCode.INTERRUPTED and interrupts.came:  # typer has made an exit code of the exception
                raise KeyboardInterrupt
        except typer.Abort:  # the input ended where an answer was expected
            exit_code = ExitCode.INTERRUPTED
        except Exception as error:
            if interrupts.came and not isinstance(error, Interrupted):  # what a library made of the interruption
                raise KeyboardInterrupt from None
            if isinstance(error, OSError) and error.errno in _FULL and sys.argv[1:2] != ["train"]:
                place = f" at {error.filename}" if error.filename else ""  # which a write does not know
                raise FileError(f"the disk is full{place}; make room, or choose another output") from None
            if isinstance(error, OSError) and _is_mended_by_user(error):
                raise FileError(f"cannot use {error.filename}: {error.strerror}; choose another path") from None
            raise
    sys.exit(exit_code or 0)


# Of an error of the operating system: what the user can mend by another path, or by making room.
_MENDED_BY_USER = {
    *(errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.EEXIST),
    *(errno.ENAMETOOLONG, errno.ELOOP),
}
_FULL = {errno.ENOSPC, errno.EDQUOT}


def _is_mended_by_user(error: OSError) -> bool:
    return sys.argv[1:2] != ["train"] and error.errno in _MENDED_BY_USER and error.filename is not None


def _usage(error: Exception) -> str | None:
    """What the command line lacks, as a sentence; None for errors of another kind."""
    shown = getattr(error, "format_message", None)
    if shown is None:
        return None
    context = getattr(error, "ctx", None)
    told = " ".join(shown().split()).rstrip(".").replace(". Did you mean", "; did you mean")
    told = told.replace(": Value error, ", ": ")  # as pydantic begins the messages of others
    hint = f" (`{context.command_path} --help` shows what it takes)" if context else ""
    if (
        type(error).__name__ == "NoSuchOption"
        and context
        and any(given.name == "overrides" for given in context.command.params)
    ):
        told = told.replace(" (Possible options: --help)", "")  # what stands nearest where nothing is near
        hint = f"; keys of the config follow without dashes, as train.steps=100{hint}"
    return f"{told[:1].lower()}{told[1:]}{hint}"


def _print_error(error: Exception) -> None:
    """Once for a whole run where every rank meets the same error, which is before their process group exists."""
    if type(error).__name__ == "NoArgsIsHelpError":  # click has shown the help
        return
    from sambalm.pretrain.errors import ConfigError, RankLostError, print_error, write_line

    error = ConfigError(usage) if (usage := _usage(error)) else error
    report = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if report:  # torchrun's summary at its end shows the message of the rank that failed first
        Path(report).write_text(json.dumps({"message": str(error), "timestamp": int(time.time())}))
    rank = os.environ.get("RANK")
    if rank is not None:
        import torch.distributed as dist

        if dist.is_initialized() or isinstance(error, RankLostError):  # when the first rank may be the one
            write_line(f"error on rank {rank}: {error}")
            return
    if rank in (None, "0"):
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
