"""Hangs end: real ranks that stop, or hang in one phase, and what they leave behind."""

import json
import os
import signal
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from sambalm.pretrain.config import WatchdogSection
from sambalm.pretrain.errors import ExitCode
from sambalm.pretrain.lifecycle import phases
from sambalm.pretrain.lifecycle import watchdog as watchdog_file
from sambalm.pretrain.lifecycle.attempts import read_attempts
from sambalm.pretrain.lifecycle.hang import Board, Position, judge
from sambalm.pretrain.lifecycle.ledger import Account, Ledger
from sambalm.pretrain.lifecycle.lost_ranks import RankProcesses
from sambalm.pretrain.lifecycle.phases import Marks, Phase
from sambalm.pretrain.lifecycle.watchdog import LEFT, Limits, Watchdog
from sambalm.pretrain.reporting.goodput import read_goodput
from tests.support import hangs
from tests.support.runs import Run
from tests.support.whole_runs import changed, endless


@pytest.fixture
def values(run_values):
    """Steps of tens of milliseconds, without an end. Only the limits of a test are short."""
    return endless(run_values, save_every_steps=5)


def outcome(run: Run) -> tuple[int, str]:
    (attempt,) = read_attempts(run.dir)
    return attempt.exit_code, attempt.reason


def stacks(run: Run) -> dict[int, str]:
    (folder,) = run.dir.glob("attempts/*/hang")
    return {int(path.stem.removeprefix("rank_")): path.read_text() for path in folder.glob("rank_*.txt")}


def test_a_rank_that_is_stopped_ends_the_others(values, tmp_path):
    run = Run(changed(values, watchdog={"step_s": 2}), tmp_path)
    with run.started() as (first, second):
        run.wait_for_step(6)
        second.send_signal(signal.SIGSTOP)
        assert first.wait(60) == ExitCode.HANGING
        code, reason = outcome(run)
        assert code == ExitCode.HANGING
        assert reason.startswith("rank 1: the rank does not answer; others have waited in phase step of step ")
        assert reason in run.text()
        assert stacks(run).keys() == {0}
        assert "in train_step" in stacks(run)[0]
        assert "MainThread" in stacks(run)[0]


@pytest.mark.parametrize(
    ("before", "sentence", "frame"),
    [
        (hangs.in_the_loader, "rank 0: hanging in phase fetch of step 6 since ", (0, "in _micro_batch")),
        pytest.param(
            *(hangs.in_a_save, "ranks 0-1: hanging in phase save of step 5 since ", (1, "in _finish")),
            marks=pytest.mark.slow,
        ),
        pytest.param(
            *(hangs.in_the_writing, "ranks 0-1: hanging in phase save of step 5 since ", (1, "in _together")),
            marks=pytest.mark.slow,
        ),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_a_hang_is_found_in_its_phase(before, sentence, frame, values, tmp_path):
    """Whoever waits for the rank that fetches is past a limit long before it."""
    limits = {"fetch_s": 4, "step_s": 1, "save_s": 4}
    run = Run(changed(values, watchdog=limits), tmp_path)
    with run.started(before=before):
        assert run.exit_codes() == [ExitCode.HANGING] * 2
    code, reason = outcome(run)
    assert code == ExitCode.HANGING
    assert reason.startswith(sentence)
    assert stacks(run).keys() == {0, 1}
    rank, function = frame
    assert "in hang" in stacks(run)[rank]
    assert function in stacks(run)[rank]
    assert read_attempts(run.dir)[0].step in (5, 6)
    goodput = read_goodput(run.dir, is_alive=False)
    assert goodput.seconds[Account.HANGING] > 1
    assert sum(goodput.seconds.values()) == pytest.approx(goodput.wall_s, rel=0.01)


def position(phase: Phase, step: int, *, overdue: bool = False, is_beside: bool = False) -> Position:
    return Position(phase, step, since_s=0.0, limit_s=9.0, overdue=overdue, is_beside=is_beside)


def test_ranks_that_wait_for_another_do_not_hang():
    late, patient = position(Phase.STEP, 4, overdue=True), position(Phase.FETCH, 4)
    assert judge({0: patient, 1: late, 2: late}, silent=()) is None
    assert judge({0: position(Phase.STEP, 4), 1: patient}, silent=[2]) is None  # nobody is late
    fetches = position(Phase.FETCH, 4, overdue=True)
    assert judge({0: fetches, 1: late, 2: late}, silent=()).startswith("rank 0: hanging in phase fetch of step 4 ")
    behind = position(Phase.SAVE, 3, overdue=True)
    assert judge({0: late, 1: behind, 2: behind, 3: late}, silent=()).startswith("ranks 1-2: hanging in phase save ")
    assert judge({0: late, 2: late}, silent=[1, 3]).startswith("ranks 1, 3: the ranks do not answer; ")
    thread = position(Phase.SAVE, 2, overdue=True, is_beside=True)
    assert judge({0: position(Phase.STEP, 4), 1: thread}, silent=()).startswith("rank 1: hanging in phase save ")
    leaves, starts = position(Phase.LEAVE, 3, overdue=True), position(Phase.START_UP, 0, overdue=True)
    assert judge({0: leaves, 1: late}, silent=()).startswith("rank 1: hanging in phase step ")
    assert judge({0: starts, 1: late}, silent=()).startswith("rank 0: hanging in phase start_up since ")
    compiles = position(Phase.FIRST_STEP, 4)  # which is as far as a step that does not
    assert judge({0: compiles, 1: late}, silent=()).startswith("ranks 0-1: hanging in phase step ")
    assert judge({0: position(Phase.FIRST_STEP, 4, overdue=True), 1: patient}, silent=()) is None


def test_a_phase_that_ends_after_all_calls_the_alarm_off(tmp_path):
    boards = [Board(tmp_path, rank=rank, ranks=2, grace_s=0.2) for rank in range(2)]
    assert not boards[0].is_up()
    boards[0].answer(position(Phase.STEP, 4, overdue=True))
    assert boards[1].is_up()
    assert boards[0].read()[0].keys() == {0}
    boards[1].answer(position(Phase.FETCH, 4))
    assert boards[0].read()[0][1].phase is Phase.FETCH
    time.sleep(0.3)
    boards[0].answer(position(Phase.STEP, 5))
    positions, silent = boards[0].read()
    assert (positions.keys(), silent) == ({0}, [1])  # which has not answered since
    for board in boards:
        board.withdraw()
    assert not boards[0].is_up()


def test_only_another_rank_that_has_left_since_this_one_started_ends_it(tmp_path, monkeypatch):
    ended = []
    monkeypatch.setattr(Watchdog, "_end", lambda self, reason, code: ended.append((reason, code)))
    marks = Marks()
    watchdog, left = Watchdog(marks, Limits({}), run_dir=tmp_path, rank=0, ranks=2), tmp_path / LEFT
    for told in ({"rank": 1, "exit_code": ExitCode.REQUEUE}, {"rank": 0, "exit_code": ExitCode.REQUEUE}):
        left.write_text(json.dumps(told))
        if told["rank"] == 1:
            os.utime(left, (1e9, 1e9))  # of an earlier attempt
        watchdog._look()
    assert ended == []
    left.write_text(json.dumps({"rank": 1, "exit_code": ExitCode.REQUEUE}))
    watchdog._look()
    assert ended == [("rank 1 left before the first step", ExitCode.REQUEUE)]
    marks.enter(Phase.FETCH, step=1)
    watchdog._look()
    assert len(ended) == 1


class Waits:
    """Stands in for the event that ends the watchdog's threads: lasts as it is told to, and notes what it is asked."""

    def __init__(self, lasts_s) -> None:
        self.lasts_s, self.asked_s, self.now_s = iter(lasts_s), [], 1000.0

    def wait(self, seconds: float) -> bool:
        self.asked_s.append(seconds)
        lasts_s = next(self.lasts_s, None)
        self.now_s += lasts_s or 0
        return lasts_s is None

    def monotonic(self) -> float:
        return self.now_s

    time = monotonic


@pytest.mark.parametrize(("lasts_s", "overdue"), [([10, 45, 10], False), ([20, 20, 20], True)])
def test_a_process_that_was_stopped_as_a_whole_begins_its_phase_anew(lasts_s, overdue, tmp_path, monkeypatch):
    clock = Waits(lasts_s)
    for module in (watchdog_file, phases):
        monkeypatch.setattr(module, "time", clock)
    watchdog = Watchdog(Marks(), Limits({Phase.START_UP: 50.0}), run_dir=tmp_path, rank=0, ranks=1)
    monkeypatch.setattr(watchdog, "_ended", clock)
    ended = []
    monkeypatch.setattr(watchdog, "_end", ended.append)
    watchdog._watch_clock()
    assert watchdog._position().overdue == overdue
    assert ended == []


def test_a_rank_hangs_since_before_an_error_that_another_caused(tmp_path):
    marks = Marks()
    watchdog = Watchdog(marks, Limits({}), run_dir=tmp_path, rank=0, ranks=1)
    for phase, stands_since in ((Phase.STEP, True), (Phase.LEAVE, False)):
        marks.enter(phase, step=1)
        watchdog._look()
        assert (watchdog._stands_since_s == marks.main.since_s) == stands_since


def test_a_rank_that_leaves_by_itself_ends_its_ledger(tmp_path):
    marks = Marks()
    watchdog = Watchdog(marks, Limits({}), run_dir=tmp_path, rank=0, ranks=2)
    (tmp_path / "attempts" / "one").mkdir(parents=True)
    ledger = Ledger(marks, tmp_path, attempt="one")
    watchdog.watch_in(tmp_path / "attempts" / "one", ledger=ledger, processes=RankProcesses())
    watchdog.tell_of_leaving(ExitCode.REQUEUE, "SIGTERM")
    found = read_goodput(tmp_path, is_alive=False)
    assert found is not None
    assert found.attempts[0].has_ended
    assert json.loads((tmp_path / LEFT).read_text()) == {"rank": 0, "exit_code": ExitCode.REQUEUE}


@pytest.mark.parametrize(
    ("seconds", "poll_s", "grace_s"), [({}, 2, 3), ({"step": 0.5}, 0.1, 3), ({"step": 10, "save": 90}, 1, 3)]
)
def test_short_limits_are_looked_at_often(seconds, poll_s, grace_s):
    limits = Limits({Phase(name): limit_s for name, limit_s in seconds.items()})
    assert (limits.poll_s, limits.grace_s) == (poll_s, grace_s)


def test_long_limits_give_ranks_long_to_answer_and_many_ranks_look_at_the_folder_less_often(tmp_path):
    grace_s = [Limits({Phase.STEP: float(limit_s)}).grace_s for limit_s in (100, 600, 6000)]
    assert grace_s == [10, 60, 60]
    for ranks, polled_s in ((8, 2.0), (1000, 5.0)):
        watchdog = Watchdog(Marks(), Limits({}), run_dir=tmp_path, rank=0, ranks=ranks)
        watchdog._ended = waits = Waits([])
        watchdog._watch_folder()
        assert waits.asked_s == [polled_s]


def test_phases_are_marked_in_any_thread():
    marks, told = Marks(), []
    marks.before_changes(told.append)
    marks.enter(Phase.STEP, step=3)
    before = marks.main
    with marks.during(Phase.SAVE):
        assert (marks.main.phase, marks.main.step, marks.beside()) == (Phase.SAVE, 3, [])
    assert marks.main.phase is Phase.STEP
    assert marks.main.monotonic_s > before.monotonic_s  # it begins anew
    with marks.during(None), marks.during(Phase.FETCH, unless=lambda: True):
        assert marks.main.phase is Phase.FETCH
    assert told == [Phase.START_UP, Phase.STEP, Phase.SAVE, Phase.STEP, Phase.STEP]
    with ThreadPoolExecutor(1) as pool:
        assert pool.submit(beside, marks).result() == [(Phase.SAVE, 3)]
    assert marks.beside() == []
    assert len(told) == 5  # of the thread that trains alone


def beside(marks):
    with marks.during_beside(Phase.SAVE):
        return [(mark.phase, mark.step) for mark in marks.beside()]


def test_limits_follow_the_time_out_of_messages():
    section = WatchdogSection(save_s=7, fetch_s=0, leave_s=None)
    expected = {"start_up": 90.0, "first_step": 90.0, "step": 50.0, "validation": 90.0, "save": 7.0}
    assert section.limits(timeout_s=100.0) == expected
    assert {f"{phase}_s" for phase in Phase} == WatchdogSection.model_fields.keys()
