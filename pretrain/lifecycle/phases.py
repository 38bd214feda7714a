"""What a rank is at: the loop and its hooks mark phases. The watchdog reads the marks, and the ledger counts them."""

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from enum import StrEnum


class Phase(StrEnum):
    """A stretch of a run, in the order in which a step meets them. The watchdog has a limit for each: `watchdog.*_s`.

    `FIRST_STEP` is a step in which kernels may be compiled or captured: the first few of an attempt, and the first
    after each validation.
    """

    START_UP = "start_up"
    FETCH = "fetch"
    FIRST_STEP = "first_step"
    STEP = "step"
    VALIDATION = "validation"
    SAVE = "save"
    LEAVE = "leave"


@dataclass(frozen=True)
class Mark:
    """A phase, its step (from 1; 0 before the first) and when it was entered, by time.monotonic() and time.time()."""

    phase: Phase
    step: int
    monotonic_s: float
    since_s: float

    @classmethod
    def now(cls, phase: Phase, step: int) -> "Mark":
        return cls(phase, step, time.monotonic(), time.time())


class Marks:
    """The phases that this process is in: one of the thread that trains, and one of each thread beside it."""

    def __init__(self) -> None:
        self._trains = threading.get_ident()
        self._marks = {self._trains: Mark.now(Phase.START_UP, 0)}
        self._before_change: Callable[[Phase], None] = lambda phase: None

    def before_changes(self, call: Callable[[Phase], None]) -> None:
        """From now on, `call` is called before the thread that trains comes from a phase into another.

        Its argument is the phase that the time since the change before belongs to.
        """
        self._before_change = call

    def enter(self, phase: Phase, *, step: int | None = None) -> None:
        """The thread that trains is in a phase from now on.

        Args:
            step: the one at hand from now on; None: as before.
        """
        self._before_change(self.main.phase)
        self._marks[self._trains] = Mark.now(phase, self.main.step if step is None else step)

    @contextmanager
    def during(self, phase: Phase | None, *, unless: Callable[[], bool] = lambda: False) -> Iterator[None]:
        """Marks a block of the thread that trains; the phase around it begins anew after it. None marks nothing.

        After an error the mark stays until another phase is entered: it says where the error came from.

        Args:
            unless: asked at the block's end whether its time cost nothing and belongs to the phase around it.
        """
        if phase is None:
            yield
            return
        outer = self.main
        self.enter(phase)
        yield
        self._before_change(outer.phase if unless() else phase)
        self._marks[self._trains] = Mark.now(outer.phase, outer.step)

    @contextmanager
    def during_beside(self, phase: Phase) -> Iterator[None]:
        """Marks a block of another thread."""
        thread = threading.get_ident()
        self._marks[thread] = Mark.now(phase, self.main.step)
        try:
            yield
        finally:
            del self._marks[thread]

    @property
    def main(self) -> Mark:
        """The mark of the thread that trains."""
        return self._marks[self._trains]

    def beside(self) -> list[Mark]:
        """The marks of other threads."""
        return [mark for thread, mark in self._marks.copy().items() if thread != self._trains]
