"""What a run's time went into, over all attempts: the lines of `lifecycle/ledger.py` added up. Needs no torch."""

import contextlib
import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sambalm.pretrain.lifecycle.ledger import LEDGER, MAX_INTERVAL_S, Account, changed_s
from sambalm.pretrain.lifecycle.phases import Phase
from sambalm.pretrain.reporting.metrics_file import METRICS

_LOSABLE = (Account.PRODUCTIVE, Account.DATA_WAIT, Account.VALIDATION, Account.SAVE)


@dataclass
class AttemptTime:
    """The time of an attempt as its process was alive, by the clock of its host."""

    name: str
    start_s: float  # since the epoch
    end_s: float  # of its last line; for a killed one, of its last record in metrics.jsonl where that is later
    first_step: int | None = None  # that it went on from; None: it ended before its first step
    last_step: int | None = None
    has_ended: bool = False  # in order, or at least with a last line
    seconds: dict[str, float] = field(default_factory=dict)  # by account


@dataclass(frozen=True)
class Event:
    """Something that an attempt wrote down besides seconds: start, begin, saved, skipped, rollback, hanging, end."""

    at_s: float  # since the epoch
    attempt: str
    what: str
    step: int | None


@dataclass(frozen=True)
class Goodput:
    """Where a run's time went, from its first attempt's start to the last line."""

    seconds: dict[str, float]  # by account, each of them
    wall_s: float
    attempts: list[AttemptTime]
    events: list[Event]
    phase: str  # of the last line
    last_progress_s: float  # since the epoch; when a step was last known to have ended, or the phase to have changed

    @property
    def productive_share(self) -> float:
        return self.seconds[Account.PRODUCTIVE] / self.wall_s if self.wall_s > 0 else 0.0


@dataclass
class _Entry:
    """The seconds of a line that may turn out to be lost."""

    attempt: AttemptTime
    to_s: float
    step: int
    is_open: bool
    seconds: dict[str, float]


def read_goodput(run_dir: Path, *, is_alive: bool) -> Goodput | None:
    """Adds the ledger of a run up; None for a run without one.

    Args:
        is_alive: whether the last attempt goes on. What a dead one has not saved is lost.
    """
    path = run_dir / LEDGER
    if not path.exists():
        return None
    sums = _Sums()
    for line in _lines(path):
        with contextlib.suppress(KeyError):  # of a damaged line
            sums.add(line)
    if not is_alive:
        sums.add_unwritten(until_s=changed_s(run_dir / METRICS))
    return sums.result(is_alive=is_alive)


def _lines(path: Path) -> Iterator[dict[str, Any]]:
    """Whole lines: a kill or a full disk may have cut some short, and damage of another kind leaves others out."""
    with contextlib.suppress(OSError), path.open("rb") as file:
        for text in file:
            try:
                line = json.loads(text)
            except ValueError:
                continue
            if isinstance(line, dict) and "attempt" in line and "at_s" in line and _is_sound(line):
                yield line


def _is_sound(line: dict[str, Any]) -> bool:
    """Whether every value is of its type."""
    seconds = line.get("seconds", {})
    return (
        all(isinstance(line.get(name, ""), str) for name in ("attempt", "event", "now"))
        and all(isinstance(line.get(name, 0), (int, float)) for name in ("at_s", "seen_s", "since_s"))
        and isinstance(line.get("step", 0), int)
        and isinstance(seconds, dict)
        and all(isinstance(value, (int, float)) for value in seconds.values())
    )


class _Sums:
    """Lines in their order. An attempt that a later one has displaced is not listened to any more."""

    def __init__(self) -> None:
        self._attempts: list[AttemptTime] = []
        self._events: list[Event] = []
        self._entries: list[_Entry] = []  # by step, which only grows: those that are lost have left
        self._waiting_s = 0.0
        self._saved_step = 0
        self._phase, self._progress_s = "", 0.0

    def add(self, line: dict[str, Any]) -> None:
        event = line.get("event")
        if event == "start":
            return self._start(line)
        if not self._attempts or self._attempts[-1].name != line["attempt"]:
            return
        attempt = self._attempts[-1]
        if event is None:
            self._add_seconds(attempt, line)
        else:
            self._events.append(Event(line["at_s"], attempt.name, event, line.get("step")))
            self._mark(attempt, event, line)
        attempt.end_s = max(attempt.end_s, line["at_s"])

    def result(self, *, is_alive: bool) -> Goodput | None:
        if not self._attempts:
            return None
        if not is_alive:
            self._throw_away(self._saved_step, as_account=Account.LOST)
        seconds = {str(account): 0.0 for account in Account}
        for entry in self._entries:
            _merge(entry.attempt.seconds, entry.seconds)
        self._entries.clear()
        for attempt in self._attempts:
            _merge(seconds, attempt.seconds)
        seconds[Account.WAITING] += self._waiting_s
        return Goodput(
            seconds=seconds,
            wall_s=self._attempts[-1].end_s - self._attempts[0].start_s,
            attempts=self._attempts,
            events=self._events,
            phase=self._phase,
            last_progress_s=self._progress_s,
        )

    def add_unwritten(self, *, until_s: float | None) -> None:
        """Counts what a killed attempt did after its last line: it took steps until it last wrote metrics.

        Args:
            until_s: when metrics.jsonl was last changed, as by a copy of the folder too; None where there is none.
        """
        if until_s is None or not self._attempts:
            return
        attempt = self._attempts[-1]
        until_s = min(until_s, attempt.end_s + 2 * MAX_INTERVAL_S)  # later, a living process would have written
        if attempt.has_ended or attempt.last_step is None or until_s <= attempt.end_s:
            return
        seconds: dict[str, float] = {Account.PRODUCTIVE: until_s - attempt.end_s}
        entry = _Entry(attempt, until_s, step=attempt.last_step + 1, is_open=True, seconds=seconds)
        self._entries.append(entry)
        attempt.end_s = until_s

    def _start(self, line: dict[str, Any]) -> None:
        self.add_unwritten(until_s=line.get("seen_s"))
        start_s = line["at_s"]
        early_s = 0.0
        if self._attempts:
            before_s = self._attempts[-1].end_s
            early_s = max(0.0, before_s - start_s)  # it imported while the one before still ran
            start_s = max(start_s, before_s)
            self._waiting_s += start_s - before_s
        attempt = AttemptTime(line["attempt"], start_s=start_s, end_s=start_s)
        attempt.seconds[Account.STARTUP] = -early_s
        self._attempts.append(attempt)
        self._events.append(Event(start_s, attempt.name, "start", None))
        self._phase, self._progress_s = Phase.START_UP, start_s

    def _add_seconds(self, attempt: AttemptTime, line: dict[str, Any]) -> None:
        seconds = {account: value for account, value in line["seconds"].items() if account in _LOSABLE}
        _merge(attempt.seconds, {account: v for account, v in line["seconds"].items() if account not in _LOSABLE})
        is_open = line.get("open", False)
        if seconds:
            self._entries.append(_Entry(attempt, line["at_s"], line["step"], is_open, seconds))
        progress_s = self._progress_s if is_open else line["at_s"]
        self._phase, self._progress_s = line["now"], max(progress_s, line["since_s"])
        if not is_open and attempt.first_step is not None:
            attempt.last_step = line["step"]

    def _mark(self, attempt: AttemptTime, event: str, line: dict[str, Any]) -> None:
        if event == "begin":
            self._throw_away(line["step"], as_account=Account.LOST)
            attempt.first_step = attempt.last_step = self._saved_step = line["step"]
            self._phase, self._progress_s = Phase.FIRST_STEP, line["at_s"]
        elif event == "rollback":
            self._throw_away(line["step"], as_account=Account.SKIPPED)
            attempt.last_step = self._saved_step = line["step"]
        elif event == "saved":
            self._saved_step = line["step"]
        elif event == "skipped":
            self._skip(line["step"])
        elif event == "hanging":
            self._hang(line["since_s"])
        elif event == "end":
            attempt.has_ended = True

    def _throw_away(self, step: int, *, as_account: Account) -> None:
        """What was spent on the steps after `step` counts as something else."""
        while self._entries and self._entries[-1].step > step:
            entry = self._entries.pop()
            _merge(entry.attempt.seconds, {as_account: sum(entry.seconds.values())})

    def _skip(self, step: int) -> None:
        """What was written of a step while it was under way, before it was found to be skipped."""
        for entry in reversed(self._entries):
            if not entry.is_open or entry.step != step:
                break
            _merge(entry.attempt.seconds, {Account.SKIPPED: sum(entry.seconds.values())})
            entry.seconds = {}

    def _hang(self, since_s: float) -> None:
        """What seemed to be at work after a time did not move."""
        left_s = self._entries[-1].to_s - since_s if self._entries else 0.0  # which the newest lines may share
        for entry in reversed(self._entries):
            if entry.to_s <= since_s or entry.attempt is not self._attempts[-1]:
                break
            spent_s = sum(entry.seconds.values())
            share = min(spent_s, left_s) / max(1e-9, spent_s)
            left_s -= share * spent_s
            moved = {account: seconds * share for account, seconds in entry.seconds.items()}
            entry.seconds = {account: seconds - moved[account] for account, seconds in entry.seconds.items()}
            _merge(entry.attempt.seconds, {Account.HANGING: sum(moved.values())})


def _merge(sums: dict[str, float], added: dict[str, float]) -> None:
    for account, seconds in added.items():
        sums[str(account)] = sums.get(str(account), 0.0) + seconds
