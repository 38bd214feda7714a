"""The error of this package that a user can cause."""


class HFError(Exception):
    """A folder, model or tokenizer that cannot be used; the message is one sentence that names the way out."""

    exit_code = 2
