"""The errors of this package that a user can cause: one sentence each, and the program's exit code."""


class ConfigError(Exception):
    """A configuration that cannot run."""

    exit_code = 2


class CheckpointError(Exception):
    """A checkpoint that cannot be read, or none where one was expected."""

    exit_code = 2
