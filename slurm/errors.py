"""The error of this package that a user can cause."""


class SlurmError(Exception):
    """A job that cannot be submitted or a run that cannot be told of; one sentence for the user."""

    exit_code = 2
