"""The error of this package that a user can cause."""


class EvaluationError(Exception):
    """A model, a task's setting or data that cannot be evaluated; one sentence for the user."""

    exit_code = 2
