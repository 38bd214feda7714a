"""What a run is asked for while it trains: by signals to any rank, or by files in the run's folder.

| asked by | request |
| --- | --- |
| SIGUSR1, or the file `save` in the run's folder | save and go on |
| SIGTERM | save and leave, to be started again |
| the file `stop` in the run's folder | save and leave, not to be started again while the file is there |
"""

import os
import signal
import sys
import threading
from enum import IntEnum
from pathlib import Path

from sambalm.pretrain.errors import ExitCode

SAVE_SWITCH, KILL_SWITCH = "save", "stop"


class Request(IntEnum):
    """The higher one wins where ranks were asked for different things."""

    NOTHING = 0
    SAVE = 1
    LEAVE = 2
    STOP = 3


class Signals:
    """This process's signals as requests, once `listen` has been called.

    They are read by a thread, because Python runs no handler while the main thread waits in a collective. A TERM before
    `training_starts` ends the process at once: there is nothing to save yet.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._training = self._save = self._leave = False

    def listen(self) -> None:
        """Takes SIGUSR1 and SIGTERM over; from the main thread only."""
        reader, writer = os.pipe()
        os.set_blocking(writer, False)
        for number in (signal.SIGUSR1, signal.SIGTERM):
            signal.signal(number, lambda *_: None)  # a handler must be there for its number to be written to the pipe
        signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
        threading.Thread(target=self._read, args=(reader,), name="signals", daemon=True).start()

    def training_starts(self) -> None:
        """From here on TERM waits for the end of a step."""
        with self._lock:
            self._training = True

    def take(self) -> Request:
        """What was asked for since the last call; a request to leave stays."""
        with self._lock:
            save, self._save = self._save, False
        if self._leave:
            return Request.LEAVE
        return Request.SAVE if save else Request.NOTHING

    def _read(self, reader: int) -> None:
        while True:
            for number in os.read(reader, 64):
                self._note(number)

    def _note(self, number: int) -> None:
        with self._lock:
            if number == signal.SIGUSR1:
                self._save = True
            elif number == signal.SIGTERM and self._training:
                self._leave = True
            elif number == signal.SIGTERM:
                print("SIGTERM before the first step: leaving for requeue", file=sys.stderr, flush=True)
                os._exit(ExitCode.REQUEUE)


def take_switches(run_dir: Path) -> Request:
    """What the files in a run's folder ask for; the save switch is removed by it."""
    if (run_dir / KILL_SWITCH).exists():
        return Request.STOP
    switch = run_dir / SAVE_SWITCH
    if switch.is_file():
        switch.unlink(missing_ok=True)
        return Request.SAVE
    return Request.NOTHING
