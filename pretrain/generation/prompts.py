"""Prompts from options, files and stdin."""

import sys
from collections.abc import Sequence
from pathlib import Path

from sambalm.pretrain.generation.errors import GenerationError

STDIN = "-"


def read_prompts(given: Sequence[str] | None, file: str | None, *, lines: bool) -> list[str] | None:
    """Returns the prompts, None where there are none.

    Args:
        given: prompts as they are.
        file: a file's name, or "-" for stdin. One newline at its end is no part of the prompt.
        lines: whether each of its lines is a prompt.

    Raises:
        GenerationError: prompts come from both, the file cannot be read, or it is not UTF-8.
    """
    if given and file:
        raise GenerationError("--prompt and --prompt-file exclude each other; leave one out")
    if file is None:
        if lines:
            raise GenerationError("--lines is about a prompt file; give one with --prompt-file")
        return list(given) if given else None
    try:
        content = sys.stdin.buffer.read() if file == STDIN else Path(file).read_bytes()
        text = content.decode("utf-8").removesuffix("\n")
    except OSError as error:
        raise GenerationError(f"the prompt file {file} cannot be read ({error.strerror}); give another") from error
    except UnicodeDecodeError as error:
        name = "stdin" if file == STDIN else f"the prompt file {file}"
        raise GenerationError(f"{name} is not UTF-8 at byte {error.start}; convert it") from error
    return text.split("\n") if lines else [text]
