"""How a run ends: exit codes, and the errors of this package that a user can cause, one sentence each."""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from enum import IntEnum, StrEnum
from pathlib import Path
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
    HANGING = 81
    REPLICAS_DIFFER = 82
    RANK_LOST = 83
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
    ExitCode.STOPPED: Meaning(
        "stopped by the file `stop`, or where a phase ends that has `stop_at_end`", Launchers.END
    ),
    ExitCode.RUN_IN_USE: Meaning("another process works in the run's folder", Launchers.END),
    ExitCode.DIVERGED: Meaning(
        "too many steps were skipped, and going back to a checkpoint did not help or could not", Launchers.END
    ),
    ExitCode.HANGING: Meaning(
        "a phase of the run was past its limit (`watchdog`); stacks are in the attempt's `hang/`", Launchers.RETRY
    ),
    ExitCode.REPLICAS_DIFFER: Meaning(
        "ranks that hold the same weights hold different ones: look at the hardware of the rank that it names",
        Launchers.END,
    ),
    ExitCode.RANK_LOST: Meaning("another rank is gone: the outcome names it, where that can be known", Launchers.RETRY),
    ExitCode.INTERRUPTED: Meaning("interrupted from the keyboard; saved after the first step", Launchers.END),
}


def not_a_run(path: Path, *, kind: str, lacks: str) -> str:
    """Says why a path is no run, for somebody who gave a wrong one or works in another folder.

    Args:
        kind: of run that was asked for, as "a run with checkpoints".
        lacks: what makes it one, as "checkpoints/step_*".
    """
    if not path.exists():
        where = "" if path.is_absolute() else f", seen from {Path.cwd()}"
        reason = f"there is no such folder{where}"
    else:
        reason = f"it holds no {lacks}" if path.is_dir() else "it is a file"
    return f"{path} is not {kind}: {reason}; give the folder that the config names under run.dir"


def one_sentence(error: BaseException | str) -> str:
    """What an error says, on one line of at most MAX_SENTENCE_CHARACTERS."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= MAX_SENTENCE_CHARACTERS else f"{text[: MAX_SENTENCE_CHARACTERS - 3]}..."


def write_line(text: str) -> None:
    """Prints a line to stderr at once: ranks share it, and under torchrun print writes the line's end on its own."""
    sys.stderr.write(f"{text}\n")
    sys.stderr.flush()


def print_error(error: Exception) -> None:
    """Prints the sentence of an error for its user."""
    write_line(str(error) if isinstance(error, Interrupted) else f"error: {error}")


def print_line(text: str) -> None:
    """Tells the user something without which the run goes on, also where the log is on a full disk."""
    with suppress(OSError):
        write_line(text)


def print_warning(sentence: str) -> None:
    """Tells the user of something that the run goes on after."""
    print_line(f"warning: {sentence}")


@contextmanager
def ending_in_a_sentence(report: Callable[[Exception], None] = print_error) -> Iterator[None]:
    """Ends the process without a traceback where the user can mend what went wrong: where an error has an `exit_code`.

    Args:
        report: shows such an error.
    """
    try:
        yield
    except KeyboardInterrupt:
        report(Interrupted())
        sys.exit(ExitCode.INTERRUPTED)
    except Exception as error:
        exit_code = getattr(error, "exit_code", None)
        if exit_code is None:
            raise
        report(error)
        sys.exit(exit_code)


class Interrupted(Exception):
    """Ctrl-C; the message may say what is kept and how to go on."""

    exit_code = ExitCode.INTERRUPTED

    def __init__(self, message: str = "interrupted from the keyboard") -> None:
        super().__init__(message)


class ConfigError(Exception):
    """A configuration that cannot run."""

    exit_code = ExitCode.BAD_INPUT


class FileError(Exception):
    """A file or folder that the operating system does not let the program use."""

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


class SaveBrokenError(NotSavedError):
    """Ranks lost each other while they wrote a checkpoint, which is not committed."""


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
    """Too many steps were skipped, or weights are not finite, and no checkpoint is left to go back to."""

    exit_code = ExitCode.DIVERGED


class ReplicasDifferError(Exception):
    """Ranks that should hold the same weights hold different ones."""

    exit_code = ExitCode.REPLICAS_DIFFER


class NoRunError(Exception):
    """A folder that was taken for a run and is none."""

    exit_code = ExitCode.BAD_INPUT


class RunInUseError(Exception):
    """Another process works in the run's folder."""

    exit_code = ExitCode.RUN_IN_USE


class RankLostError(Exception):
    """Another rank is gone, and this one cannot go on without it; the exit code is that of the attempt's outcome."""

    def __init__(self, sentence: str, exit_code: int = ExitCode.RANK_LOST) -> None:
        super().__init__(sentence)
        self.exit_code = exit_code


class RestartError(Exception):
    """torchrun starts a run again that ended on purpose; the exit code is that of the attempt before."""

    def __init__(self, sentence: str, exit_code: ExitCode) -> None:
        super().__init__(sentence, exit_code)
        self.exit_code = exit_code

    def __str__(self) -> str:
        return str(self.args[0])
