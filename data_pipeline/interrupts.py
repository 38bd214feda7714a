"""Ctrl-C and child processes: a terminal sends it to all of them, and the one that started the others ends them."""

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing import resource_tracker


@contextmanager
def deaf_children() -> Iterator[None]:
    """Lets processes that the block starts not hear Ctrl-C, from their first instruction on; this process still does.

    A handler would be too late: Python starts for tenths of a second, in which Ctrl-C ends in a traceback.
    """
    _start_tracker()  # multiprocessing would start it with the first child, and then lets all signals in
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})  # which a child inherits
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _start_tracker() -> None:
    """Starts the process that removes the semaphores that are left by one that ends at once; it warns of each kind."""
    before = os.environ.get("PYTHONWARNINGS")
    os.environ["PYTHONWARNINGS"] = "ignore"
    try:
        resource_tracker.ensure_running()
    finally:
        if before is None:
            del os.environ["PYTHONWARNINGS"]
        else:
            os.environ["PYTHONWARNINGS"] = before
