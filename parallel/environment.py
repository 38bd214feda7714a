"""What torchrun tells a process of its run, known before any process group. Needs no torch."""

import os


def world_size() -> int:
    """Returns the processes of the run: torchrun's, or one."""
    return int(os.environ.get("WORLD_SIZE", 1))


def is_main_process() -> bool:
    """Returns whether this is the first process of the run."""
    return os.environ.get("RANK", "0") == "0"


def is_under_torchrun() -> bool:
    """Returns whether one of torchrun's agents has started this process."""
    return "TORCHELASTIC_RESTART_COUNT" in os.environ
