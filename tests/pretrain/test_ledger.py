"""Every second of a run is counted once, as what it was for: in runs that are killed, stopped, slow and resumed."""

import errno
import math
import os
import signal
import time
from pathlib import Path

import pytest
import yaml

from sambalm.pretrain.errors import ExitCode
from sambalm.pretrain.lifecycle import ledger as ledger_file
from sambalm.pretrain.lifecycle import phases
from sambalm.pretrain.lifecycle.attempts import read_attempts, read_outcome
from sambalm.pretrain.lifecycle.ledger import LEDGER, Account, Ledger
from sambalm.pretrain.lifecycle.phases import Marks, Phase
from sambalm.pretrain.reporting.goodput import read_goodput
from sambalm.pretrain.reporting.metrics_file import METRICS
from tests.support import program
from tests.support.program import wait_until
from tests.support.whole_runs import changed, run_dir, train
from tests.support.worlds import run_world

KEEP_WRITING = Ledger._keep_writing
FETCH_S, VALIDATION_S, SAVE_S, PAUSE_S = 0.02, 0.3, 0.25, 1.5


def slow_down():
    """Each step waits for data, and validations and saves take a while."""
    from sambalm.data_pipeline.loader import BatchLoader
    from sambalm.pretrain.lifecycle.checkpointer import Checkpointer
    from sambalm.pretrain.validation import Validator

    def slowed(real, seconds):
        def call(self, *args):
            time.sleep(seconds)
            return real(self, *args)

        return call

    BatchLoader.next_micro_batch = slowed(BatchLoader.next_micro_batch, FETCH_S)
    Validator.losses = slowed(Validator.losses, VALIDATION_S)
    Checkpointer.before_save = slowed(Checkpointer.before_save, SAVE_S)


def logged_steps(folder: Path) -> int:
    path = folder / "metrics.jsonl"
    return path.read_bytes().count(b"\n") if path.exists() else 0


@pytest.mark.slow
def test_a_run_that_is_killed_stopped_and_resumed_sums_to_its_wall_time(run_values, tmp_path):
    values = changed(
        run_values, train={"steps": 60}, validation={"every_steps": 20}, checkpoint={"every_steps": 10, "keep": 2}
    )
    folder, config, log = run_dir(values), tmp_path / "run.yaml", tmp_path / "log"
    config.write_text(yaml.safe_dump(values))
    program.run("--version")  # which starts the server of forks
    start_s = time.time()

    def attempt(until_step, number):
        with program.start("train", config, log=log, before=slow_down) as running:
            wait_until(lambda: logged_steps(folder) >= until_step, 60, log.read_text)
            running.send_signal(number)
            code = running.wait()
        time.sleep(PAUSE_S)
        return code

    assert attempt(27, signal.SIGKILL) == -signal.SIGKILL
    assert attempt(35, signal.SIGTERM) == ExitCode.REQUEUE
    assert attempt(60, signal.SIGCONT) == ExitCode.FINISHED
    end_s = time.time() - PAUSE_S

    found = read_goodput(folder, is_alive=False)
    seconds = found.seconds
    recorded = read_attempts(folder)
    recorded_s = read_outcome(recorded[-1].path)["ended_s"] - recorded[0].started_s
    assert recorded_s <= found.wall_s <= end_s - start_s + 0.02  # the kernel counts a start in hundredths
    assert sum(seconds.values()) == pytest.approx(found.wall_s, rel=0.01)
    first, second, third = found.attempts
    assert (first.first_step, second.first_step, third.last_step) == (0, 20, 60)
    assert second.last_step == third.first_step >= 35
    assert [attempt.has_ended for attempt in found.attempts] == [False, True, True]
    # Seven steps at least were lost, of 8 fetches each with what they computed; those that count waited likewise.
    fetches_s = 4 * FETCH_S
    assert first.seconds[Account.LOST] > 7 * fetches_s
    assert second.seconds.get(Account.LOST, 0) + third.seconds.get(Account.LOST, 0) < 0.01
    # The upper bounds are wide, for a machine with other work.
    assert 60 * fetches_s < seconds[Account.DATA_WAIT] < 60 * fetches_s * 3
    assert 3 * VALIDATION_S < seconds[Account.VALIDATION] < 3 * VALIDATION_S + 4
    assert 7 * SAVE_S < seconds[Account.SAVE] < 7 * SAVE_S + 6
    assert 2 * PAUSE_S < seconds[Account.WAITING] < 2 * PAUSE_S + 4
    assert seconds[Account.SKIPPED] == seconds[Account.HANGING] == 0
    assert seconds[Account.STARTUP] > 0
    assert seconds[Account.PRODUCTIVE] > 0


def train_with_one_broken_step(values):
    """The third step's gradients are not finite."""
    from sambalm.pretrain import trainer

    real = trainer.gradient_norm
    calls = []

    def norm(engine):
        calls.append(1)
        time.sleep(0.3 * (len(calls) == 3))
        return real(engine) * (math.nan if len(calls) == 3 else 1.0)

    trainer.gradient_norm = norm
    from sambalm.pretrain.config_file import parse_config

    trainer.train(parse_config(values, source="test"))


def test_a_skipped_step_counts_as_such_and_one_rank_writes(run_values):
    values = changed(run_values, parallel={"zero_stage": 1})
    run_world(train_with_one_broken_step, values, ranks=2)
    found = read_goodput(run_dir(values), is_alive=False)
    assert 0.3 < found.seconds[Account.SKIPPED] < 2.0
    assert [(event.what, event.step) for event in found.events] == [
        ("start", None),
        ("begin", 0),
        ("skipped", 3),
        ("saved", 4),  # what was due after step 3: nothing is saved while steps are being skipped
        ("saved", 6),
        ("end", None),
    ]


def test_a_rank_alone_counts_its_time_too(run_values):
    train(run_values)
    found = read_goodput(run_dir(run_values), is_alive=False)
    assert sum(found.seconds.values()) == pytest.approx(found.wall_s, rel=0.01)
    assert (found.attempts[0].first_step, found.attempts[0].last_step, found.phase) == (0, 6, Phase.LEAVE)


class Clock:
    """Stands in for the module `time` of the ledger and the marks."""

    def __init__(self) -> None:
        self.now_s = 1000.0

    def monotonic(self) -> float:
        return self.now_s

    def time(self) -> float:
        return 5000.0 + self.now_s

    def sleep(self, seconds: float) -> None:
        self.now_s += seconds


class MarkedLedger(Ledger):
    """A ledger with the marks that it follows."""

    def __init__(self, run_dir: Path, *, attempt: str) -> None:
        self.marks = Marks()
        super().__init__(self.marks, run_dir, attempt=attempt)

    def begin(self, step: int) -> None:
        super().begin(step)
        self.marks.enter(Phase.STEP, step=step + 1)


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    for module in ledger_file, phases:
        monkeypatch.setattr(module, "time", clock)
    monkeypatch.setattr(ledger_file, "process_age_s", lambda pid: 4.0)
    monkeypatch.setattr(Ledger, "_keep_writing", lambda self: None)
    return clock


def steps(ledger, clock, numbers, seconds=2.0):
    for number in numbers:
        clock.sleep(seconds)
        ledger.finish_step(number)


def non_zero(goodput):
    assert sum(goodput.seconds.values()) == pytest.approx(goodput.wall_s)
    return {section: pytest.approx(seconds) for section, seconds in goodput.seconds.items() if abs(seconds) > 1e-6}


def test_an_attempt_from_an_earlier_step_makes_the_later_ones_lost(clock, tmp_path):
    first = MarkedLedger(tmp_path, attempt="first")
    clock.sleep(6.0)
    first.begin(0)
    steps(first, clock, range(1, 5))
    with first.marks.during(Phase.SAVE):
        first.write()
        clock.sleep(1.0)
        first.saved(4)
    steps(first, clock, range(5, 8))
    with first.marks.during(Phase.VALIDATION):
        clock.sleep(3.0)
    first.write()  # then it is killed
    goodput = read_goodput(tmp_path, is_alive=True)
    assert non_zero(goodput) == {"startup": 10.0, "productive": 14.0, "save_stall": 1.0, "validation": 3.0}
    assert non_zero(read_goodput(tmp_path, is_alive=False))["lost"] == pytest.approx(9.0)
    clock.sleep(100.0)
    second = MarkedLedger(tmp_path, attempt="second")  # its process is 4 s old
    clock.sleep(1.0)
    second.begin(4)
    steps(second, clock, [5, 6])
    second.close()
    expected = {"startup": 15.0, "productive": 12.0, "save_stall": 1.0, "lost": 9.0, "waiting": 96.0}
    assert non_zero(read_goodput(tmp_path, is_alive=True)) == expected
    clock.sleep(1.0)
    third = MarkedLedger(tmp_path, attempt="third")  # it imported while the second was at its end
    third.begin(0)  # whose checkpoints are all gone
    steps(third, clock, [1])
    third.saved(1)
    third.close()
    expected = {"startup": 16.0, "productive": 2.0, "lost": 9.0 + 12.0 + 1.0, "waiting": 96.0}
    assert non_zero(read_goodput(tmp_path, is_alive=False)) == expected


def test_what_a_killed_attempt_did_after_its_last_line_is_lost(clock, tmp_path):
    """Until it last wrote metrics, but no longer than it may go without a line: a copied file is newer."""
    ledger = MarkedLedger(tmp_path, attempt="first")
    ledger.begin(0)
    steps(ledger, clock, [1])
    ledger.saved(1)  # then it takes steps and is killed
    metrics = tmp_path / METRICS
    metrics.touch()
    clock.sleep(7.0)
    os.utime(metrics, (clock.time(), clock.time()))
    expected = {"startup": 4.0, "productive": 2.0, "lost": 7.0}
    assert non_zero(read_goodput(tmp_path, is_alive=False)) == expected
    assert non_zero(read_goodput(tmp_path, is_alive=True)) == {"startup": 4.0, "productive": 2.0}
    clock.sleep(15.0)
    MarkedLedger(tmp_path, attempt="second").begin(1)
    os.utime(metrics, (clock.time() + 1e6, clock.time() + 1e6))  # the second writes
    expected = {"startup": 8.0, "productive": 2.0, "lost": 7.0, "waiting": 11.0}
    assert non_zero(read_goodput(tmp_path, is_alive=True)) == expected
    expected["lost"] += 2 * ledger_file.MAX_INTERVAL_S
    assert non_zero(read_goodput(tmp_path, is_alive=False)) == expected


def test_a_guard_may_throw_steps_away(clock, tmp_path):
    ledger = MarkedLedger(tmp_path, attempt="a")
    ledger.begin(0)
    steps(ledger, clock, range(1, 4))
    ledger.saved(3)
    steps(ledger, clock, range(4, 6))
    ledger.roll_back(3)
    steps(ledger, clock, [4])
    clock.sleep(1.0)
    ledger.write()  # of a step under way
    clock.sleep(1.0)
    ledger.skip()
    ledger.finish_step(5)
    steps(ledger, clock, [6])
    ledger.close()
    assert non_zero(read_goodput(tmp_path, is_alive=True)) == {"startup": 4.0, "productive": 10.0, "skipped": 6.0}


def test_hanging_counts_from_when_nothing_moved(clock, tmp_path):
    ledger = MarkedLedger(tmp_path, attempt="a")
    ledger.begin(0)
    steps(ledger, clock, [1])
    hangs_since_s = clock.time()
    for _ in range(3):
        clock.sleep(10.0)
        ledger.write()
    clock.sleep(5.0)
    ledger.hang(hangs_since_s)
    assert non_zero(read_goodput(tmp_path, is_alive=True)) == {"startup": 4.0, "hanging": 35.0, "productive": 2.0}
    assert ledger._ended.is_set()  # its thread writes no more


def test_a_hang_may_begin_between_two_lines(clock, tmp_path):
    ledger = MarkedLedger(tmp_path, attempt="a")
    ledger.begin(0)
    ledger.saved(0)
    clock.sleep(0.5)
    ledger.finish_step(1)
    clock.sleep(4.0)
    hangs_since_s = clock.time()
    clock.sleep(6.0)
    ledger.hang(hangs_since_s)
    assert non_zero(read_goodput(tmp_path, is_alive=True)) == {"startup": 4.0, "hanging": 6.0, "productive": 4.5}


def test_a_process_that_was_stopped_was_hanging(clock, tmp_path):
    ledger = MarkedLedger(tmp_path, attempt="a")
    ledger.begin(0)
    steps(ledger, clock, [1])
    clock.sleep(500.0)
    steps(ledger, clock, [2, 3])
    ledger.close()
    expected = {"startup": 4.0, "productive": 4.0, "hanging": 502.0}
    assert non_zero(read_goodput(tmp_path, is_alive=True)) == expected


def test_a_process_that_is_stopped_before_its_first_step_had_started_up_before(clock, tmp_path):
    ledger = MarkedLedger(tmp_path, attempt="a")
    clock.sleep(500.0)
    ledger.begin(0)
    ledger.close()
    assert non_zero(read_goodput(tmp_path, is_alive=True)) == {"startup": 4.0, "hanging": 500.0}


def test_a_process_that_did_something_else_before_starts_with_its_ledger(clock, tmp_path, monkeypatch):
    monkeypatch.setattr(ledger_file, "process_age_s", lambda pid: 3601.0)
    ledger = MarkedLedger(tmp_path, attempt="a")
    clock.sleep(2.0)
    ledger.begin(0)
    ledger.close()
    assert non_zero(read_goodput(tmp_path, is_alive=True)) == {"startup": 2.0}


class Ticks:
    """Stands in for the event that ends a ledger's thread: so many waits, with a line that another writes in each."""

    def __init__(self, ledger, clock, count) -> None:
        self.ledger, self.clock, self.left = ledger, clock, count

    def wait(self, seconds: float) -> bool:
        for _ in range(2):
            self.clock.sleep(seconds / 2)
            self.ledger.finish_step(1)
        self.left -= 1
        return self.left < 0


def test_a_thread_shows_that_the_process_lives_and_writes_no_more_than_it_must(clock, tmp_path):
    ledger = MarkedLedger(tmp_path, attempt="a")
    ledger.begin(0)
    before = (tmp_path / LEDGER).read_bytes().count(b"\n")
    ledger._ended = Ticks(ledger, clock, 100)
    KEEP_WRITING(ledger)
    assert (tmp_path / LEDGER).read_bytes().count(b"\n") == before + 2 * 101  # at each finished step that is due
    assert non_zero(read_goodput(tmp_path, is_alive=True)) == {"startup": 4.0, "productive": 101.0}


@pytest.mark.parametrize(("age_s", "interval_s"), [(10.0, 1.0), (996.0, 2.0), (1e6, 30.0)])
def test_lines_are_a_share_of_an_attempt_s_age_apart(age_s, interval_s, clock, tmp_path):
    ledger = MarkedLedger(tmp_path, attempt="a")  # its process is 4 s old
    clock.sleep(age_s)
    ledger.finish_step(1)
    assert ledger._interval_s() == pytest.approx(interval_s)


def test_a_wait_that_cost_nothing_counts_as_what_was_around_it(clock, tmp_path):
    ledger = MarkedLedger(tmp_path, attempt="a")
    ledger.begin(0)
    for hidden in (True, False):
        with ledger.marks.during(Phase.FETCH, unless=lambda hidden=hidden: hidden):
            clock.sleep(1.0 + hidden)
    with ledger.marks.during(None):
        clock.sleep(4.0)
    ledger.finish_step(1)
    ledger.close()
    found = read_goodput(tmp_path, is_alive=True)
    assert non_zero(found) == {"startup": 4.0, "productive": 6.0, "data_wait": 1.0}


@pytest.mark.parametrize(
    ("in_order", "seconds"), [(True, {"productive": 5.0}), (False, {"productive": 2.0, "lost": 3.0})]
)
def test_what_an_error_cut_short_was_no_step(in_order, seconds, clock, tmp_path):
    """A run that leaves in order has nothing under way but its leaving, so all its steps stay productive."""
    ledger = MarkedLedger(tmp_path, attempt="a")
    ledger.begin(0)
    steps(ledger, clock, [1])
    ledger.saved(1)
    clock.sleep(3.0)
    ledger.marks.enter(Phase.LEAVE)
    ledger.leave(in_order=in_order)
    ledger.close()
    assert non_zero(read_goodput(tmp_path, is_alive=False)) == {"startup": 4.0} | seconds


def test_torn_lines_and_a_full_disk_lose_nothing(clock, tmp_path, monkeypatch, capsys):
    real, room = os.write, [10_000]

    def write(file, data):
        if room[0] <= 0:
            raise OSError(errno.ENOSPC, "No space left on device")
        written = real(file, data[: room[0]])
        room[0] -= written
        return written

    monkeypatch.setattr(os, "write", write)
    (tmp_path / LEDGER).write_text('{"attempt": "old", "at_')  # a kill cut it short
    ledger = MarkedLedger(tmp_path, attempt="a")
    ledger.begin(0)
    room[0] = 30  # of a line
    steps(ledger, clock, range(1, 6))
    room[0] = 10_000
    steps(ledger, clock, range(6, 9))
    ledger.close()
    assert non_zero(read_goodput(tmp_path, is_alive=True)) == {"startup": 4.0, "productive": 16.0}
    (warning,) = capsys.readouterr().err.splitlines()
    assert warning == f"warning: {tmp_path / LEDGER} cannot be written, and the run goes on: No space left on device"


def test_an_attempt_that_was_displaced_is_not_listened_to(clock, tmp_path):
    first = MarkedLedger(tmp_path, attempt="first")
    first.begin(0)
    steps(first, clock, [1])
    second = MarkedLedger(tmp_path, attempt="second")
    second.begin(0)
    steps(first, clock, [2])
    steps(second, clock, [1])
    first.close()
    second.close()
    found = read_goodput(tmp_path, is_alive=True)
    assert [attempt.name for attempt in found.attempts] == ["first", "second"]
    assert found.seconds[Account.PRODUCTIVE] == pytest.approx(4.0)


def test_the_file_grows_slowly_and_cheaply(clock, tmp_path):
    ledger = MarkedLedger(tmp_path, attempt="a")
    ledger.begin(0)
    start_s = time.perf_counter()
    steps(ledger, clock, range(1, 86_401), seconds=1.0)
    assert (time.perf_counter() - start_s) / 86_400 < 1e-3  # of a step's time at the most
    ledger.close()
    assert (tmp_path / LEDGER).stat().st_size < 2_000_000
    assert sum(read_goodput(tmp_path, is_alive=True).seconds.values()) == pytest.approx(86_404)


def test_a_damaged_line_is_left_out(clock, tmp_path):
    ledger = MarkedLedger(tmp_path, attempt="a")
    ledger.begin(0)
    steps(ledger, clock, [1])
    ledger.close()
    path = tmp_path / LEDGER
    for old, new in (("seconds", "secinds"), ('"begin"', "7"), ('"startup"', "[]"), ("at_s", "at_t")):
        whole = path.read_text()
        path.write_text(whole.replace(old, new, 1))
        assert (read_goodput(tmp_path, is_alive=False) is None) == (old == "at_s")  # the start
        path.write_text(whole)


def test_a_run_without_a_ledger_has_no_goodput(tmp_path):
    assert read_goodput(tmp_path, is_alive=False) is None
    (tmp_path / LEDGER).write_text("")
    assert read_goodput(tmp_path, is_alive=False) is None
