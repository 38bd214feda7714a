"""The error that everything in this package raises for input it cannot use."""


class DataError(Exception):
    """Unusable data, tokenizer or option. The message is one sentence that names the culprit and the way out."""

    exit_code = 2


def first_line(error: Exception) -> str:
    """The first line of a library's message, which may go on over many."""
    return str(error).strip().split("\n")[0]
