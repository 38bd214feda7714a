"""Examples in the help of `sambalm`."""


def example(*lines: str) -> str:
    """An epilog: each line of an example on a line of its own."""
    return "Example:\n\n" + "\n\n".join(lines)
