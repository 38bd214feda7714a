"""Where every second of an attempt goes: a line every few seconds in RUN/ledger.jsonl, written by the main process.

The phase that a process is in (`phases.py`) says for which account a second counts. `reporting/goodput.py` adds the
lines of all attempts up and takes lost work out of what seemed productive. Every line is JSON with the attempt and the
time of writing; a line without `event` holds seconds by account since the line before:

| key | |
| --- | --- |
| step | the step that the seconds belong to at the latest: the last finished one, or with `open` the one under way |
| seconds | by account |
| now, since_s | the phase at the time of writing, and when it began |

| event | |
| --- | --- |
| start | the attempt's process started then; at `seen_s` the attempt before had last written metrics |
| begin | the first step after `step` is about to start; steps after it that were taken before are lost |
| saved | a checkpoint of `step` is committed |
| skipped | the work of `step` was thrown away |
| rollback | the steps after `step` were thrown away |
| hanging | nothing has moved since `since_s`, and the watchdog ends the process |
| end | the attempt ends in order; missing after a kill |
"""

import json
import os
import threading
import time
from enum import StrEnum
from pathlib import Path
from typing import Any

from sambalm.pretrain.lifecycle.phases import Marks, Phase
from sambalm.pretrain.lifecycle.processes import process_age_s
from sambalm.pretrain.reporting.appended_file import AppendedFile
from sambalm.pretrain.reporting.metrics_file import METRICS

LEDGER = "ledger.jsonl"
MAX_INTERVAL_S = 30.0
_MIN_INTERVAL_S, _INTERVAL_SHARE = 1.0, 1 / 500  # of an attempt's age: a share of its lines
SUSPENDED_S = 60.0  # a thread that should have written by then did not run: the process was stopped
_OLDEST_START_S = 3600.0  # a process that is older did something else before


class Account(StrEnum):
    """What a second of a run was for. No phase has the last four: guards, the watchdog and the reader find them."""

    PRODUCTIVE = "productive"
    STARTUP = "startup"  # imports, loading and building, and leaving
    DATA_WAIT = "data_wait"
    SAVE = "save_stall"
    VALIDATION = "validation"
    SKIPPED = "skipped"  # steps whose work a guard threw away
    LOST = "lost"  # steps that were computed again
    HANGING = "hanging"
    WAITING = "waiting"  # between attempts


_ACCOUNTS = {
    Phase.START_UP: Account.STARTUP,
    Phase.FETCH: Account.DATA_WAIT,
    Phase.FIRST_STEP: Account.PRODUCTIVE,
    Phase.STEP: Account.PRODUCTIVE,
    Phase.VALIDATION: Account.VALIDATION,
    Phase.SAVE: Account.SAVE,
    Phase.LEAVE: Account.STARTUP,
}
_OF_FINISHED_STEP = {Account.SAVE, Account.STARTUP, Account.HANGING}  # what does not belong to the step under way


class Ledger:
    """Books the time of this process by its phases. A thread writes while the one that trains is away.

    A file that cannot be written stops nothing: lines wait for the next turn.

    Args:
        run_dir: None for a process that writes nothing.
        attempt: the attempt's name.
    """

    def __init__(self, marks: Marks, run_dir: Path | None = None, *, attempt: str = "") -> None:
        self._marks, self._attempt, self._lock = marks, attempt, threading.RLock()
        age_s, now_s = process_age_s(os.getpid()), time.monotonic()
        age_s = age_s if age_s < _OLDEST_START_S else 0.0
        self._start_s = self._booked_s = now_s - age_s
        self._beat_s = self._written_s = now_s
        self._step, self._is_skipped = 0, False
        self._finished: dict[Account, float] = {}  # not yet written, of steps up to the last finished one
        self._under_way: dict[Account, float] = {}  # and of the next
        self._ended = threading.Event()
        self._file = AppendedFile(run_dir / LEDGER) if run_dir else None
        if self._file and run_dir:
            self._file.append(b"\n")  # a kill may have cut the last line short
            self._tell("start", at_s=time.time() - age_s, seen_s=changed_s(run_dir / METRICS))
            threading.Thread(target=self._keep_writing, name="ledger", daemon=True).start()
        marks.before_changes(self._before_change)

    def begin(self, step: int) -> None:
        """The first step after `step` is about to start."""
        with self._lock:
            self._step = step
            self.write()
            self._tell("begin", step=step)

    def skip(self) -> None:
        """What the step under way took counts as skipped. Call it before the step is counted as finished."""
        self._is_skipped = True

    def finish_step(self, step: int) -> None:
        """Counts a step as finished, and what was spent on it."""
        with self._lock:
            now_s = self._book()
            if self._is_skipped:
                self._under_way = {Account.SKIPPED: sum(self._under_way.values())}
                self._tell("skipped", step=step)
            self._step, self._is_skipped = step, False
            self._settle()
            if now_s - self._written_s >= self._interval_s():
                self.write()

    def saved(self, step: int) -> None:
        """A checkpoint is committed."""
        with self._lock:
            self.write()
            self._tell("saved", step=step)

    def roll_back(self, step: int) -> None:
        """A guard has thrown the steps after `step` away, and the run goes on from it."""
        with self._lock:
            self.write()
            self._step = step
            self._tell("rollback", step=step)

    def hang(self, since_s: float) -> None:
        """Nothing has moved since a time by time.time(), which counts as hanging; the process is about to end."""
        self._ended.set()
        with self._lock:
            self.write()
            self._tell("hanging", since_s=round(since_s, 3))

    def write(self) -> None:
        """Writes what has passed since the last line. A save calls it first: a resumed run goes on from its end."""
        with self._lock:
            self._written_s = self._book()
            if self._finished:
                self._tell_seconds(self._finished, step=self._step)
            if self._under_way:
                self._tell_seconds(self._under_way, step=self._step + 1, open=True)
            self._finished, self._under_way = {}, {}

    def leave(self, *, in_order: bool) -> None:
        """The steps are over. After an error the one under way never ended."""
        with self._lock:
            if in_order:
                self._settle()

    def close(self) -> None:
        """Ends the attempt."""
        self._ended.set()
        with self._lock:
            self.write()
            self._tell("end")
            if self._file:
                self._file.close()
                self._file = None

    def _settle(self) -> None:
        """What has been counted belongs to the last finished step."""
        for account, seconds in self._under_way.items():
            _add(self._finished, account, seconds)
        self._under_way = {}

    def _before_change(self, phase: Phase) -> None:
        with self._lock:
            self._book(phase)

    def _book(self, phase: Phase | None = None) -> float:
        """Adds the time since the last call to a phase's account, None: of the phase at hand; returns now."""
        now_s, account = time.monotonic(), _ACCOUNTS[phase or self._marks.main.phase]
        if self._file and now_s - self._beat_s > SUSPENDED_S + self._interval_s():
            stopped_s = max(self._booked_s, self._beat_s)
            self._add(Account.HANGING, now_s - stopped_s)
            self._add(account, stopped_s - self._booked_s)
            self._beat_s = now_s
        else:
            self._add(account, now_s - self._booked_s)
        self._booked_s = now_s
        return now_s

    def _add(self, account: Account, seconds: float) -> None:
        _add(self._finished if account in _OF_FINISHED_STEP else self._under_way, account, seconds)

    def _interval_s(self) -> float:
        age_s = self._booked_s - self._start_s
        return min(MAX_INTERVAL_S, max(_MIN_INTERVAL_S, age_s * _INTERVAL_SHARE))

    def _keep_writing(self) -> None:
        while not self._ended.wait(self._interval_s()):
            with self._lock:
                now_s = self._book()
                self._beat_s = now_s
                if now_s - self._written_s >= self._interval_s():
                    self.write()

    def _tell_seconds(self, seconds: dict[Account, float], **values: Any) -> None:
        shown, mark = {account: round(value, 6) for account, value in seconds.items()}, self._marks.main
        self._tell(None, **values, seconds=shown, now=mark.phase, since_s=round(mark.since_s, 3))

    def _tell(self, event: str | None, *, at_s: float | None = None, **values: Any) -> None:
        """Writes a line; times of None are left out."""
        if self._file:
            line = {"attempt": self._attempt, "at_s": round(time.time() if at_s is None else at_s, 3), "event": event}
            known = {name: value for name, value in (line | values).items() if value is not None}
            self._file.append(json.dumps(known).encode() + b"\n")


def _add(seconds: dict[Account, float], account: Account, value: float) -> None:
    seconds[account] = seconds.get(account, 0.0) + value


def changed_s(path: Path) -> float | None:
    """When a file was last written, to milliseconds; None where there is none."""
    try:
        return round(path.stat().st_mtime, 3)
    except OSError:
        return None
