"""Ctrl-C and child processes: a terminal sends it to all of them, and the one that started the others ends them."""

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing import resource_tracker


@contextmanager
def deaf_children() -> Iterator[None]:
    """Lets processes that the block starts not hear Ctrl-C, from their first instruction on; this process still does.

    A handler would be too late: Python starts for tenths of a second, in which Ctrl-C ends in a traceback.
    """
    resource_tracker.ensure_running()  # which multiprocessing starts with the first child, and then lets all signals in
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})  # which a child inherits
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
