"""The error of `sambalm generate` that a user can mend."""

from sambalm.pretrain.errors import ExitCode


class GenerationError(Exception):
    """Prompts, options or files that cannot be generated from; the message is one sentence."""

    exit_code = ExitCode.BAD_INPUT
