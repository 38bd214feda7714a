"""Ctrl-C for every command: one sentence and its exit code, whatever the libraries of the command make of it.

`sambalm train` takes signals over itself (`pretrain/lifecycle/signals.py`), and so do `generate` and `serve` for what
they can end well. This file imports nothing slow, for it is there before all else.
"""

import atexit
import os
import select
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from types import FrameType
from typing import NoReturn

INTERRUPTED = 128 + signal.SIGINT  # ExitCode.INTERRUPTED
SENTENCE = "interrupted from the keyboard"
DEAF_S = 3.0  # for the main thread to hear of it: it does not while it is in a library's C++ code
UNWINDING_S = 30.0  # for it to end, and to remove what is unfinished
ONCE_S = 1.0  # torchrun passes a Ctrl-C on to ranks that the terminal has given it already


class Interrupts:
    """Ctrl-C as a KeyboardInterrupt in the main thread, once; a thread ends the process where that does not.

    Attributes:
        came: whether the main thread has been interrupted.
    """

    def __init__(self) -> None:
        self.came = self._is_over = False

    def listen(self) -> None:
        """Takes SIGINT over; from the main thread only."""
        reader, writer = os.pipe()
        os.set_blocking(writer, False)
        signal.signal(signal.SIGINT, self._interrupt)
        signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
        # The last thing before Python takes handlers away and removes modules, in which it would die of the signal.
        atexit.register(signal.signal, signal.SIGINT, signal.SIG_IGN)
        threading.Thread(target=self._watch, args=(reader,), name="interrupts", daemon=True).start()

    def end(self) -> None:
        """Lets the process end by itself: Python would die of the signal, or show a traceback."""
        self._is_over = True

    def _interrupt(self, number: int, frame: FrameType | None) -> None:
        if self.came or self._is_over:
            return
        self.came = True
        sys.unraisablehook = lambda _: None  # what the exception meets on its way, such as a weak reference's callback
        threading.excepthook = lambda _: None
        raise KeyboardInterrupt

    def _watch(self, reader: int) -> None:
        """Ends the process at a second Ctrl-C, or where the first one leads to no end in time."""
        first_s: float | None = None
        while True:
            if first_s is not None and self._left_s(first_s) <= 0:
                leave()
            if not select.select([reader], [], [], None if first_s is None else self._left_s(first_s))[0]:
                continue
            if signal.SIGINT not in os.read(reader, 64):
                continue
            now_s = time.monotonic()
            if first_s is not None and now_s - first_s > ONCE_S:
                leave()
            first_s = now_s if first_s is None else first_s

    def _left_s(self, first_s: float) -> float:
        return first_s + (UNWINDING_S if self.came or self._is_over else DEAF_S) - time.monotonic()


def leave() -> NoReturn:
    """Ends the process at once, in a sentence that is said once for a whole run."""
    from sambalm.pretrain.errors import print_line

    if os.environ.get("RANK", "0") == "0":
        print_line(SENTENCE)
    end_now(INTERRUPTED)


def end_now(code: int) -> NoReturn:
    """Ends the process without what Python does at its end.

    After an interruption in some library's code, Python would end by the signal instead of with the exit code.
    """
    with suppress(OSError, ValueError):
        sys.stdout.flush()
        sys.stderr.flush()
    os._exit(code)


@contextmanager
def heeding_ctrl_c() -> Iterator[Interrupts]:
    """Yields what hears Ctrl-C in the block, which ends the program there, without a traceback of any kind."""
    interrupts = Interrupts()
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # as a shell has it for what it runs in the background
        yield interrupts
        return
    try:
        interrupts.listen()
        yield interrupts
    except SystemExit as end:
        if interrupts.came and isinstance(end.code, int):
            end_now(end.code)
        raise
    except BaseException:
        if not interrupts.came:
            raise
        leave()  # of the imports
    finally:
        interrupts.end()
