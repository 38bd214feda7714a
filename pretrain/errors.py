"""How a run ends: exit codes, and the errors of this package that a user can cause, one sentence each."""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from enum import IntEnum, StrEnum
from typing import NamedTuple

MAX_SENTENCE_CHARACTERS = 500


class ExitCode(IntEnum):
    """Exit codes of `sambalm train`; EXIT_CODES says what each means and what the launchers do then."""

    FINISHED = 0
    BAD_INPUT = 2
    NOT_SAVED = 74
    REQUEUE = 75
    NO_PROGRESS = 76
    CHECKPOINTS_DAMAGED = 77
    STOPPED = 78
    RUN_IN_USE = 79
    DIVERGED = 80
    INTERRUPTED = 130


class Launchers(StrEnum):
    """What the launchers of slurm/ do after an attempt."""

    FINISH = "end the job; jobs that depend on it start"
    END = "end the job"
    RETRY = "try again"
    REQUEUE = "requeue the job"


class Meaning(NamedTuple):
    """A row of docs/operations.md's table of exit codes."""

    meaning: str
    launchers: Launchers


EXIT_CODES = {
    ExitCode.FINISHED: Meaning("`train.steps` is reached", Launchers.FINISH),
    ExitCode.BAD_INPUT: Meaning("bad input: config, data, layout, another model in the folder", Launchers.END),
    ExitCode.NOT_SAVED: Meaning("a checkpoint could not be written; the one before is intact", Launchers.RETRY),
    ExitCode.REQUEUE: Meaning("saved and left", Launchers.REQUEUE),
    ExitCode.NO_PROGRESS: Meaning(
        "no progress: the last `run.max_attempts_without_progress` attempts began at the same step", Launchers.END
    ),
    ExitCode.CHECKPOINTS_DAMAGED: Meaning(
        "every checkpoint is damaged, or those of a run that had saved are gone: never a silent fresh start",
        Launchers.END,
    ),
    ExitCode.STOPPED: Meaning("stopped by the file `stop`", Launchers.END),
    ExitCode.RUN_IN_USE: Meaning("another process works in the run's folder", Launchers.END),
    ExitCode.DIVERGED: Meaning("gradients were not finite, step after step", Launchers.END),
    ExitCode.INTERRUPTED: Meaning("interrupted from the keyboard", Launchers.END),
}


def one_sentence(error: BaseException | str) -> str:
    """What an error says in its first line that is not empty, cut to MAX_SENTENCE_CHARACTERS.

    Errors of torch.distributed.checkpoint hold those of each rank, tracebacks and all; the first rank's speaks.
    """
    failures = getattr(error, "failures", None)
    if isinstance(failures, dict) and failures:
        rank, (cause, _) = min(failures.items())
        return one_sentence(f"rank {rank}: {type(cause).__name__}: {one_sentence(cause)}")
    lines = [" ".join(line.split()) for line in str(error).splitlines()]
    text = next(filter(None, lines), "") or type(error).__name__
    return text if len(text) <= MAX_SENTENCE_CHARACTERS else f"{text[: MAX_SENTENCE_CHARACTERS - 3]}..."


def print_error(error: Exception) -> None:
    """Prints the sentence of an error for its user."""
    print(f"error: {error}", file=sys.stderr)


@contextmanager
def ending_in_a_sentence(report: Callable[[Exception], None] = print_error) -> Iterator[None]:
    """Ends the process without a traceback where the user can mend what went wrong: where an error has an `exit_code`.

    Args:
        report: shows such an error.
    """
    try:
        yield
    except KeyboardInterrupt:
        sys.exit(ExitCode.INTERRUPTED)
    except Exception as error:
        exit_code = getattr(error, "exit_code", None)
        if exit_code is None:
            raise
        report(error)
        sys.exit(exit_code)


class ConfigError(Exception):
    """A configuration that cannot run."""

    exit_code = ExitCode.BAD_INPUT


class CheckpointError(Exception):
    """A checkpoint that cannot be read, or none where one was expected."""

    exit_code = ExitCode.BAD_INPUT


class CheckpointsDamagedError(CheckpointError):
    """Every checkpoint of a run is damaged, or those that it had saved are gone."""

    exit_code = ExitCode.CHECKPOINTS_DAMAGED


class NotSavedError(CheckpointError):
    """A checkpoint could not be written; the one before it is as it was."""

    exit_code = ExitCode.NOT_SAVED


class RunFolderError(Exception):
    """A run's folder that cannot be used, for want of rights or because something else is in its place."""

    exit_code = ExitCode.BAD_INPUT


class NoProgressError(Exception):
    """Attempt after attempt began at the same step."""

    exit_code = ExitCode.NO_PROGRESS


class StoppedError(Exception):
    """The run's kill switch is set."""

    exit_code = ExitCode.STOPPED


class DivergedError(Exception):
    """Gradients were not finite, step after step."""

    exit_code = ExitCode.DIVERGED


class RunInUseError(Exception):
    """Another process works in the run's folder."""

    exit_code = ExitCode.RUN_IN_USE
