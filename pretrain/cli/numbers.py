"""Numbers on the command line as people write them: 1e3, 1_000, 20B, 3.2T."""

from collections.abc import Callable

import typer

# What torch takes, less room for the seeds of several samples.
LARGEST_SEED = 2**62
LARGEST_SAMPLE = 2**48  # 10^18 tokens of samples of 4,096, whose place is found in fp64


def count(least: int = 1) -> Callable[[object], int]:
    """Makes the parser of an option that takes a whole number from `least` on."""

    def number(text: object) -> int:
        from sambalm.pretrain.config_errors import whole_number

        value = whole_number(text)
        if value is None:
            raise typer.BadParameter(f"{text!r} is no whole number such as 4096, 1e6, 20B or 3.2T")
        if value < least:
            raise typer.BadParameter(f"{text} is less than {least}")
        return value

    return number
