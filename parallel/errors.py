"""The error of this package that a user can cause."""


class ParallelError(Exception):
    """A layout that cannot work; the message is one sentence for the user, exit_code the program's exit code."""

    exit_code = 2
