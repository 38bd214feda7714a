"""What a run is asked for while it trains: by signals to any rank, files in the run's folder, or torchrun's death.

| asked by | request |
| --- | --- |
| SIGUSR1, or the file `save` in the run's folder | save and go on |
| SIGTERM | save and leave, to be started again |
| SIGINT (Ctrl-C) | save and leave; a second one, later than INTERRUPT_ONCE_S, leaves at once |
| the death of the torchrun that started this process | save and leave, to be started again |
| the file `stop` in the run's folder | save and leave, not to be started again while the file is there |
"""

import contextlib
import os
import select
import signal
import threading
import time
from collections.abc import Callable
from enum import IntEnum
from pathlib import Path

from sambalm.parallel.environment import is_main_process, is_under_torchrun
from sambalm.pretrain.errors import ExitCode, print_line

INTERRUPT_ONCE_S = 1.0  # torchrun passes a Ctrl-C on to ranks that the terminal has given it already
LOOK_S = 1.0  # between two looks at who this process's parent is
ORPHANED = "the torchrun that started the ranks is gone"
SAVE_SWITCH, KILL_SWITCH = "save", "stop"
_TOO_EARLY = "before the first step: leaving; the same command starts it again"


class Request(IntEnum):
    """The higher one wins where ranks were asked for different things."""

    NOTHING = 0
    SAVE = 1
    LEAVE = 2
    ORPHANED = 3
    INTERRUPT = 4
    STOP = 5


class Signals:
    """This process's signals as requests, once `listen` has been called, and the death of the torchrun above it.

    They are read by a thread, because Python runs no handler while the main thread waits in a collective. A TERM or INT
    before `training_starts` ends the process at once: there is nothing to save yet. A process that anything else than
    torchrun has started goes on when that ends, as under nohup.

    Attributes:
        before_leaving: called by that thread with the exit code and the reason, before it ends the process.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._training = self._save = False
        self._leave = Request.NOTHING
        self._interrupted_s: float | None = None
        self._agent: int | None = None  # torchrun's process, the parent of this one
        self.before_leaving: Callable[[ExitCode, str], None] = lambda *_: None

    def listen(self) -> None:
        """Takes SIGUSR1, SIGTERM and SIGINT over; from the main thread only."""
        self._agent = os.getppid() if is_under_torchrun() else None
        reader, writer = os.pipe()
        os.set_blocking(writer, False)
        for number in (signal.SIGUSR1, signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda *_: None)  # a handler must be there for its number to be written to the pipe
        signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
        threading.Thread(target=self._read, args=(reader,), name="signals", daemon=True).start()

    def training_starts(self) -> None:
        """From here on TERM and the first INT wait for the end of a step."""
        with self._lock:
            self._training = True

    def take(self) -> Request:
        """What was asked for since the last call; a request to leave stays."""
        with self._lock:
            save, self._save = self._save, False
            if self._leave:
                return self._leave
        return Request.SAVE if save else Request.NOTHING

    def _read(self, reader: int) -> None:
        while True:
            if select.select([reader], [], [], None if self._agent is None else LOOK_S)[0]:
                for number in os.read(reader, 64):
                    self._note(number)
            self._look_for_agent()

    def _look_for_agent(self) -> None:
        if self._agent is None or os.getppid() == self._agent:
            return
        self._agent = None
        with self._lock:
            if not self._training:
                self._leave_now(ExitCode.REQUEUE, f"{ORPHANED} {_TOO_EARLY}")
            self._leave = max(self._leave, Request.ORPHANED)
            if is_main_process():
                print_line(f"{ORPHANED}: saving after the step at hand, then leaving")

    def _note(self, number: int) -> None:
        with self._lock:
            if number == signal.SIGUSR1:
                self._save = True
            elif number == signal.SIGTERM and self._training:
                self._leave = max(self._leave, Request.LEAVE)
            elif number == signal.SIGTERM:
                self._leave_now(ExitCode.REQUEUE, f"SIGTERM {_TOO_EARLY}")
            elif number == signal.SIGINT:
                self._interrupt()

    def _interrupt(self) -> None:
        now_s = time.monotonic()
        if not self._training:
            self._leave_now(ExitCode.INTERRUPTED, "Ctrl-C before the first step: leaving")
        elif self._interrupted_s is None:
            self._interrupted_s, self._leave = now_s, max(self._leave, Request.INTERRUPT)
            if is_main_process():
                print_line("Ctrl-C: saving after the step at hand, then leaving; another one leaves at once")
        elif now_s - self._interrupted_s > INTERRUPT_ONCE_S:
            self._leave_now(ExitCode.INTERRUPTED, "Ctrl-C again: leaving at once, without a checkpoint of this step")

    def _leave_now(self, exit_code: ExitCode, sentence: str) -> None:
        print_line(sentence)
        with contextlib.suppress(OSError):
            self.before_leaving(exit_code, sentence)
        os._exit(exit_code)


def take_switches(run_dir: Path) -> Request:
    """What the files in a run's folder ask for; the save switch is removed by it."""
    if (run_dir / KILL_SWITCH).exists():
        return Request.STOP
    switch = run_dir / SAVE_SWITCH
    if switch.is_file():
        switch.unlink(missing_ok=True)
        return Request.SAVE
    return Request.NOTHING
