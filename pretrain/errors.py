"""How a run ends: exit codes, and the errors of this package that a user can cause, one sentence each."""

from enum import IntEnum


class ExitCode(IntEnum):
    """Exit codes of `sambalm train`; docs/operations.md says what follows from each."""

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


class ConfigError(Exception):
    """A configuration that cannot run."""

    exit_code = ExitCode.BAD_INPUT


class CheckpointError(Exception):
    """A checkpoint that cannot be read, or none where one was expected."""

    exit_code = ExitCode.BAD_INPUT


class CheckpointsDamagedError(CheckpointError):
    """Every checkpoint of a run is damaged."""

    exit_code = ExitCode.CHECKPOINTS_DAMAGED


class NotSavedError(CheckpointError):
    """A checkpoint could not be written; the one before it is as it was."""

    exit_code = ExitCode.NOT_SAVED


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
