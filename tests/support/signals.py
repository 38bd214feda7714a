"""The signals of the process that runs the tests, which some tests let the product take over."""

import contextlib
import signal
from collections.abc import Iterator


@contextlib.contextmanager
def restored_signals() -> Iterator[None]:
    """Gives signals back as they were: a reader that a test left behind would end the test process."""
    handlers = {number: signal.getsignal(number) for number in (signal.SIGUSR1, signal.SIGTERM, signal.SIGINT)}
    descriptor = signal.set_wakeup_fd(-1)
    try:
        yield
    finally:
        signal.set_wakeup_fd(descriptor)
        for number, handler in handlers.items():
            signal.signal(number, handler)
