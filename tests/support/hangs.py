"""Ways for one rank of a run to hang, each to be called in the program before all else."""

import ctypes
import os
import time
from collections.abc import Callable

HANG_S = 300


def is_rank(rank: int) -> bool:
    return os.environ.get("RANK", "0") == str(rank)


def hang_at(owner: object, name: str, *, rank: int, when: Callable[..., bool], in_c: bool = False) -> None:
    """One rank's method sleeps for ever once, with its interpreter free for other threads.

    Args:
        when: called with the method's arguments.
        in_c: sleeps in a foreign function instead of Python's own.
    """
    method = getattr(owner, name)

    def hang(*args, **named):
        if is_rank(rank) and when(*args, **named):
            ctypes.CDLL(None).sleep(HANG_S) if in_c else time.sleep(HANG_S)
        return method(*args, **named)

    setattr(owner, name, hang)


def in_the_loader() -> None:
    """Rank 0 hangs as it fetches the micro-batch of step 6."""
    from sambalm.data_pipeline.loader import BatchLoader

    hang_at(BatchLoader, "next_micro_batch", rank=0, when=lambda self: self.consumed_samples >= 40)


def in_a_save() -> None:
    """Rank 1 hangs when step 5 is saved."""
    from sambalm.pretrain.lifecycle.checkpointer import Checkpointer

    hang_at(Checkpointer, "after_step", rank=1, when=lambda self, step: step.number == 5, in_c=True)


def in_the_writing() -> None:
    """A thread of rank 1 hangs as it writes what was copied after step 5; training goes on."""
    from sambalm.pretrain.checkpointing import write

    hang_at(write, "write_shards", rank=1, when=lambda *args, **named: True, in_c=True)


def before_the_world() -> None:
    """Rank 1 hangs before it meets the others."""
    from sambalm.pretrain import trainer

    start_world = trainer.start_world

    def hang(*args, **named):
        if is_rank(1):
            time.sleep(HANG_S)
        return start_world(*args, **named)

    trainer.start_world = hang
