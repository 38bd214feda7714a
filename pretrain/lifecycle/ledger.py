"""Where every second of an attempt goes: a line every few seconds in RUN/ledger.jsonl, written by the main process.

A process is in one section at every moment. `reporting/goodput.py` adds the lines of all attempts up and takes lost
work out of what seemed productive. Every line is JSON with the attempt and the time of writing; a line without `event`
holds seconds by section since the line before:

| key | |
| --- | --- |
| step | the step that the seconds belong to at the latest: the last finished one, or with `open` the one under way |
| seconds | by section |
| now, since_s | the section at the time of writing, and when it began |

| event | |
| --- | --- |
| start | the attempt's process started then |
| begin | the first step after `step` is about to start; steps after it that were taken before are lost |
| saved | a checkpoint of `step` is committed |
| skipped | the work of `step` was thrown away |
| rollback | the steps after `step` were thrown away |
| hanging | nothing has moved since `since_s` |
| end | the attempt ends in order; missing after a kill |
"""

import contextlib
import json
import os
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from enum import StrEnum
from pathlib import Path
from typing import Any

LEDGER = "ledger.jsonl"
_MIN_INTERVAL_S, _MAX_INTERVAL_S, _INTERVAL_SHARE = 1.0, 30.0, 1 / 500  # of an attempt's age: a share of its lines
SUSPENDED_S = 60.0  # a thread that should have written by then did not run: the process was stopped
_UNSENT_LINES = 1000
_OLDEST_START_S = 3600.0  # a process that is older did something else before


class Section(StrEnum):
    """What a second of a run was for. The last three are found by the reader, or told by a guard or a watchdog."""

    PRODUCTIVE = "productive"
    STARTUP = "startup"  # imports, loading and building, and leaving
    DATA_WAIT = "data_wait"
    SAVE = "save_stall"
    VALIDATION = "validation"
    SKIPPED = "skipped"  # steps whose work a guard threw away
    LOST = "lost"  # steps that were computed again
    HANGING = "hanging"
    WAITING = "waiting"  # between attempts


_OF_FINISHED_STEP = {Section.SAVE, Section.STARTUP, Section.HANGING}  # what does not belong to the step under way


class Ledger:
    """This process's sections; those of the main process go to the file. A thread writes while the main one is away.

    A file that cannot be written stops nothing: lines wait for the next turn.

    Args:
        run_dir: None for a process that only keeps track, for `current`.
        attempt: the attempt's name.
    """

    def __init__(self, run_dir: Path | None = None, *, attempt: str = "") -> None:
        self._attempt, self._lock = attempt, threading.RLock()
        age_s, now_s = process_age_s(), time.monotonic()
        self._start_s = self._accounted_s = self._section_since_s = now_s - age_s
        self._beat_s = self._written_s = now_s
        self._section, self._step = Section.STARTUP, 0
        self._is_hanging = self._is_skipped = self._is_torn = self._has_warned = False
        self._finished: dict[Section, float] = {}  # not yet written, of steps up to the last finished one
        self._under_way: dict[Section, float] = {}  # and of the next
        self._unsent: deque[bytes] = deque()
        self._ended = threading.Event()
        self._path = run_dir / LEDGER if run_dir else None
        self._file: int | None = None
        if self._path:
            self._tell("start", at_s=time.time() - age_s)
            threading.Thread(target=self._keep_writing, name="ledger", daemon=True).start()

    @contextlib.contextmanager
    def section(self, section: Section | None, *, unless: Callable[[], bool] = lambda: False) -> Iterator[None]:
        """Counts the time of a block under a section; None: under the one that it is in.

        Args:
            unless: asked at the block's end whether its time cost nothing and counts as if it had not been marked.
        """
        if section is None:
            yield
            return
        outer = self._enter(section)
        try:
            yield
        finally:
            if unless():
                self._section = outer
            self._enter(outer)

    def current(self) -> tuple[Section, float]:
        """The section that this process is in, and since when by time.monotonic(). For a watchdog's thread."""
        return self._section, self._section_since_s

    def begin(self, step: int) -> None:
        """The first step after `step` is about to start."""
        with self._lock:
            self._enter(Section.PRODUCTIVE)
            self._step = step
            self.write()
            self._tell("begin", step=step)

    def skip(self) -> None:
        """What the step under way took counts as skipped. Call it before the step is counted as finished."""
        self._is_skipped = True

    def finish_step(self, step: int) -> None:
        """Counts a step as finished, and what was spent on it."""
        with self._lock:
            now_s = self._account()
            if self._is_skipped:
                self._under_way = {Section.SKIPPED: sum(self._under_way.values())}
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
        """Nothing has moved since a time by time.monotonic(): from then on until the next section counts as hanging."""
        with self._lock:
            if not self._is_hanging:
                self.write()
                self._is_hanging = True
                self._tell("hanging", since_s=self._wall_s(since_s))

    def write(self) -> None:
        """Writes what has passed since the last line. A save calls it first: a resumed run goes on from its end."""
        with self._lock:
            self._written_s = self._account()
            if len(self._unsent) >= _UNSENT_LINES:
                return self._send()
            if self._finished:
                self._tell_seconds(self._finished, step=self._step)
            if self._under_way:
                self._tell_seconds(self._under_way, step=self._step + 1, open=True)
            self._finished, self._under_way = {}, {}

    def leave(self, *, in_order: bool) -> None:
        """The steps are over. After an error the one under way never ended."""
        with self._lock:
            self._enter(Section.STARTUP)
            if in_order:
                self._settle()

    def close(self) -> None:
        """Ends the attempt."""
        self._ended.set()
        with self._lock:
            self.write()
            self._tell("end")
            if self._file is not None:
                os.close(self._file)
                self._file = None

    def _settle(self) -> None:
        """What has been counted belongs to the last finished step."""
        for section, seconds in self._under_way.items():
            _add(self._finished, section, seconds)
        self._under_way = {}

    def _enter(self, section: Section) -> Section:
        """Returns the section before."""
        with self._lock:
            self._section_since_s = self._account()
            self._is_hanging = False
            outer, self._section = self._section, section
            return outer

    def _account(self) -> float:
        """Adds the time since the last call to the section's; returns now."""
        now_s = time.monotonic()
        if self._path and now_s - self._beat_s > SUSPENDED_S + self._interval_s():
            stopped_s = max(self._accounted_s, self._beat_s)
            self._add(Section.HANGING, now_s - stopped_s)
            self._add(self._section, stopped_s - self._accounted_s)
            self._beat_s = now_s
        else:
            self._add(Section.HANGING if self._is_hanging else self._section, now_s - self._accounted_s)
        self._accounted_s = now_s
        return now_s

    def _add(self, section: Section, seconds: float) -> None:
        _add(self._finished if section in _OF_FINISHED_STEP else self._under_way, section, seconds)

    def _interval_s(self) -> float:
        age_s = self._accounted_s - self._start_s
        return min(_MAX_INTERVAL_S, max(_MIN_INTERVAL_S, age_s * _INTERVAL_SHARE))

    def _keep_writing(self) -> None:
        while not self._ended.wait(self._interval_s()):
            with self._lock:
                now_s = self._account()
                self._beat_s = now_s
                if now_s - self._written_s >= self._interval_s():
                    self.write()

    def _tell_seconds(self, seconds: dict[Section, float], **values: Any) -> None:
        shown = {section: round(value, 6) for section, value in seconds.items()}
        section = Section.HANGING if self._is_hanging else self._section
        self._tell(None, **values, seconds=shown, now=section, since_s=round(self._wall_s(self._section_since_s), 3))

    def _tell(self, event: str | None, **values: Any) -> None:
        if not self._path:
            return
        line: dict[str, Any] = {"attempt": self._attempt, "at_s": round(values.pop("at_s", time.time()), 3)}
        line |= ({"event": event} if event else {}) | values
        self._unsent.append(json.dumps(line).encode() + b"\n")
        self._send()

    def _send(self) -> None:
        try:
            while self._unsent:
                if self._file is None:
                    self._file = self._open()
                line = (b"\n" if self._is_torn else b"") + self._unsent[0]
                self._is_torn = os.write(self._file, line) < len(line)
                if self._is_torn:
                    raise OSError("the line did not fit")
                self._unsent.popleft()
        except OSError as error:
            if not self._has_warned:
                print(f"{LEDGER} could not be written and is tried again: {error}", file=sys.stderr)
            self._has_warned = True

    def _open(self) -> int:
        """Opens the file for whole lines at its end; a kill may have cut its last line short."""
        assert self._path
        self._path.parent.mkdir(parents=True, exist_ok=True)
        file = os.open(self._path, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o644)
        size = os.fstat(file).st_size
        self._is_torn = size > 0 and os.pread(file, 1, size - 1) != b"\n"
        return file

    @staticmethod
    def _wall_s(monotonic_s: float) -> float:
        return time.time() - (time.monotonic() - monotonic_s)


def _add(seconds: dict[Section, float], section: Section, value: float) -> None:
    seconds[section] = seconds.get(section, 0.0) + value


def process_age_s() -> float:
    """Seconds since this process was started, from the kernel; 0 where it does not tell or the process is old."""
    try:
        started_ticks = int(Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19])
        uptime_s = float(Path("/proc/uptime").read_text().split()[0])
    except (OSError, ValueError, IndexError):
        return 0.0
    age_s = uptime_s - started_ticks / os.sysconf("SC_CLK_TCK")
    return age_s if 0 <= age_s < _OLDEST_START_S else 0.0
