"""Ends a run that hangs: a thread of each rank compares the phase that the rank is in with its limit (`watchdog.*_s`).

A rank past a limit asks the others where they are (`hang.py`). When those that all wait for are past theirs, or do not
answer, every rank leaves the stacks of its threads, the attempt gets its outcome, and all end with ExitCode.HANGING,
whatever their other threads do. A rank that was stopped as a whole, and goes on, begins its phase anew.

A rank also ends some time after another's process is gone, where no lost connection has told it before: on GPUs, and
wherever it waits for something else (`lost_ranks.py`).

The ledger of the main rank books what it did not move for as hanging.
"""

import contextlib
import faulthandler
import json
import os
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from sambalm.parallel.compat.flight_recorder import nccl_trace
from sambalm.parallel.environment import world_size
from sambalm.pretrain.config import RunConfig
from sambalm.pretrain.errors import ExitCode, print_line, print_warning
from sambalm.pretrain.lifecycle.attempts import OUTCOME, write_outcome
from sambalm.pretrain.lifecycle.hang import Board, Position, judge
from sambalm.pretrain.lifecycle.ledger import Ledger
from sambalm.pretrain.lifecycle.lost_ranks import RankProcesses, ended_by
from sambalm.pretrain.lifecycle.phases import Marks, Phase
from sambalm.pretrain.lifecycle.processes import process_age_s
from sambalm.pretrain.lifecycle.signals import Signals

LEFT = "left.json"  # in the run's folder: a rank left before the first step, and others may wait for it
_POLLS_PER_LIMIT = 10
_MIN_POLL_S, _MAX_POLL_S, _POLL_S_PER_RANK = 0.1, 2.0, 1 / 200
_MIN_GRACE_S, _MAX_GRACE_S, _GRACE_SHARE = 3.0, 60.0, 0.1  # that ranks have to answer: of the shortest limit
_STOPPED_S = 30.0  # between two looks at the clock: the process as a whole did not run
_STUCK_S = 60.0  # without a look at the run's folder: what holds its files hangs too
_SPEAK_S = 5.0  # for the last words of a process
_LOST_S = 10.0  # in which a rank finds out by itself that another is gone


@dataclass(frozen=True)
class Limits:
    """How long each phase may last, in seconds; a phase that is missing has no limit."""

    seconds: Mapping[Phase, float]

    def of(self, phase: Phase) -> float | None:
        return self.seconds.get(phase)

    @property
    def poll_s(self) -> float:
        shortest_s = min(self.seconds.values(), default=_MAX_POLL_S * _POLLS_PER_LIMIT)
        return min(max(shortest_s / _POLLS_PER_LIMIT, _MIN_POLL_S), _MAX_POLL_S)

    @property
    def grace_s(self) -> float:
        shortest_s = min(self.seconds.values(), default=0.0)
        return min(max(shortest_s * _GRACE_SHARE, _MIN_GRACE_S), _MAX_GRACE_S)


class Watchdog:
    """Watches this process from `start` to `close`.

    One thread looks at the clock alone. Another looks into the run's folder, which may hang itself: when it does, the
    first ends the process without it.

    Args:
        run_dir: the run's folder.
    """

    def __init__(self, marks: Marks, limits: Limits, *, run_dir: Path, rank: int, ranks: int) -> None:
        self.marks, self.limits, self._run_dir, self._rank, self._ranks = marks, limits, run_dir, rank, ranks
        self._awake_s = self._looked_s = time.monotonic()
        self._started_s = time.time() - process_age_s(os.getpid())
        self._stands_since_s = time.time()  # before an error that the end of another rank causes
        self._attempt: Path | None = None
        self._ledger: Ledger | None = None
        self._board: Board | None = None
        self._processes = RankProcesses()
        self._lost_since_s: float | None = None
        self._ended = threading.Event()

    def start(self) -> None:
        for target in (self._watch_clock, self._watch_folder):
            threading.Thread(target=target, name=target.__name__.strip("_"), daemon=True).start()

    def close(self) -> None:
        self._ended.set()

    def watch_in(self, attempt: Path, *, ledger: Ledger, processes: RankProcesses) -> None:
        """From here on this rank and the others find each other in the attempt's folder.

        Args:
            ledger: of this rank.
            processes: of all ranks, once they have met.
        """
        self._processes = processes
        if attempt == self._attempt:
            return
        self._ledger = ledger
        self._board = Board(attempt, rank=self._rank, ranks=self._ranks, grace_s=self.limits.grace_s)
        self._attempt = attempt

    def tell_of_leaving(self, exit_code: ExitCode, reason: str) -> None:
        """Records that this rank is about to leave by itself; before the first step, others learn of it."""
        if self._attempt:
            write_outcome(self._attempt, exit_code=exit_code, step=None, reason=reason)
        if self._ledger:
            self._ledger.close()
        if self.marks.main.phase is Phase.START_UP and self._run_dir.is_dir():
            (self._run_dir / LEFT).write_text(json.dumps({"rank": self._rank, "exit_code": exit_code}))

    def _watch_clock(self) -> None:
        before_s = time.monotonic()
        while not self._ended.wait(self.limits.poll_s):
            now_s = time.monotonic()
            if now_s - before_s > _STOPPED_S:
                self._awake_s = self._looked_s = now_s
            before_s = now_s
            position = self._position()
            if position.overdue and now_s - self._looked_s > _STUCK_S:
                sentence = judge({self._rank: position}, silent=()) or "hanging"
                self._stands_since_s = self.marks.main.since_s
                print_line(self._stacks())
                self._end(f"{sentence}; {self._run_dir} cannot be read either")

    def _watch_folder(self) -> None:
        poll_s = max(self.limits.poll_s, self._ranks * _POLL_S_PER_RANK)
        while not self._ended.wait(poll_s):
            self._looked_s = time.monotonic()
            try:
                self._look()
            except (OSError, ValueError) as error:  # of a file that is being written too
                if self._position().overdue:
                    print_warning(f"rank {self._rank}: the watchdog cannot use {self._run_dir}: {error}")

    def _look(self) -> None:
        self._leave_with_others()
        self._leave_without_lost_ranks()
        position, board, main = self._position(), self._board, self.marks.main
        if position.overdue or main.phase is not Phase.LEAVE:
            self._stands_since_s = main.since_s
        if board is None:
            if position.overdue:
                print_line(self._stacks())
                self._end(judge({self._rank: position}, silent=()) or "hanging")
            return
        if not position.overdue and not board.is_up():
            return
        if not board.has_answered:
            board.folder.mkdir(exist_ok=True)
            board.stacks.write_text(self._stacks())
            if trace := nccl_trace():
                board.nccl_trace.write_bytes(trace)
        board.answer(position)
        if reason := board.settled():
            self._end(reason)
        positions, silent = board.read()
        if not any(position.overdue for position in positions.values()):
            board.withdraw()
        elif len(positions) + len(silent) == self._ranks and (sentence := judge(positions, silent=silent)):
            reason = board.settle(f"{sentence}; all stacks are in {board.folder}")
            if self._attempt:
                write_outcome(self._attempt, exit_code=ExitCode.HANGING, step=position.step or None, reason=reason)
            self._end(reason)

    def _position(self) -> Position:
        """Where this rank is: in the phase that is past its limit, or in that of the thread that trains."""
        main = self.marks.main
        for mark in (main, *self.marks.beside()):
            limit_s = self.limits.of(mark.phase)
            if limit_s is not None and time.monotonic() - max(mark.monotonic_s, self._awake_s) > limit_s:
                return Position.of(mark, limit_s=limit_s, overdue=True, is_beside=mark is not main)
        return Position.of(main, limit_s=self.limits.of(main.phase), overdue=False, is_beside=False)

    def _leave_with_others(self) -> None:
        """Ends this process before the first step when another rank has: without torchrun nobody else tells it."""
        if self._ranks == 1 or self.marks.main.phase is not Phase.START_UP:
            return
        left = self._run_dir / LEFT
        if left.exists() and left.stat().st_mtime > self._started_s:
            told = json.loads(left.read_text())
            if told["rank"] != self._rank:
                self._end(f"rank {told['rank']} left before the first step", ExitCode(told["exit_code"]))

    def _leave_without_lost_ranks(self) -> None:
        """Ends this process where another rank is gone and nothing else has ended this one for a while."""
        attempt, now_s = self._attempt, time.monotonic()
        if attempt is None or len(self._processes.all) < 2 or self.marks.main.phase is Phase.LEAVE:
            return
        gone = self._processes.gone()
        if not gone and not (attempt / OUTCOME).exists():
            return
        self._lost_since_s = self._lost_since_s or now_s
        if now_s - self._lost_since_s > _LOST_S:
            ended = ended_by(self._processes, attempt, gone=gone)
            if ended and ended.exit_code == ExitCode.RANK_LOST:
                self._end(str(ended), ExitCode.RANK_LOST)

    def _stacks(self) -> str:
        """The stacks of all threads of this process, with their names."""
        names = "".join(f"0x{thread.ident:016x} is {thread.name}\n" for thread in threading.enumerate())
        with open(os.memfd_create("stacks"), "w+") as file:
            faulthandler.dump_traceback(file, all_threads=True)
            file.seek(0)
            return f"rank {self._rank}, process {os.getpid()}\n{names}\n{file.read()}"

    def _end(self, reason: str, exit_code: ExitCode = ExitCode.HANGING) -> None:
        """Ends this process at once, whatever its other threads do."""
        speaker = threading.Thread(target=self._speak, args=(reason, exit_code), daemon=True)
        speaker.start()
        speaker.join(_SPEAK_S)
        os._exit(exit_code)

    def _speak(self, reason: str, exit_code: ExitCode) -> None:
        """In a thread of its own: another may hold a stream or the ledger for ever."""
        os.write(2, f"error on rank {self._rank}: {reason}\n".encode())
        if self._ledger and exit_code is ExitCode.HANGING:
            self._ledger.hang(self._stands_since_s)
        sys.stdout.flush()
        sys.stderr.flush()


@contextlib.contextmanager
def watching(config: RunConfig, *, signals: Signals, marks: Marks) -> Iterator[Watchdog]:
    """Watches this process within a block, from a run's start on, and tells others when a signal ends it early."""
    run_dir, rank = Path(config.run.dir), int(os.environ.get("RANK", 0))
    seconds = config.watchdog.limits(timeout_s=config.parallel.timeout_s)
    limits = Limits({Phase(name): limit_s for name, limit_s in seconds.items()})
    watchdog = Watchdog(marks, limits, run_dir=run_dir, rank=rank, ranks=world_size())
    signals.before_leaving = watchdog.tell_of_leaving
    watchdog.start()
    try:
        yield watchdog
    finally:
        watchdog.close()
