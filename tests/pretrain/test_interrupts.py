"""Ctrl-C, and signals before the first step: what each rank does, on its own and for the others."""

import signal
import time

import pytest

from sambalm.pretrain.errors import ExitCode
from sambalm.pretrain.lifecycle.attempts import read_attempts
from sambalm.pretrain.lifecycle.signals import INTERRUPT_ONCE_S, Request, Signals
from tests.support import hangs
from tests.support.program import wait_until
from tests.support.runs import Run
from tests.support.whole_runs import endless


@pytest.fixture
def values(run_values):
    return endless(run_values)


def test_ctrl_c_saves_and_leaves(values, tmp_path):
    """As from a terminal under torchrun: every rank gets it, and torchrun passes it on."""
    run = Run(values, tmp_path)
    with run.started() as ranks:
        run.wait_for_step(2)
        for process in [*ranks, *ranks]:
            process.send_signal(signal.SIGINT)
        assert run.exit_codes() == [ExitCode.INTERRUPTED] * 2
    assert run.saved_steps() == [run.steps()[-1]]
    assert run.text().count("Ctrl-C: saving after the step at hand, then leaving") == 1
    assert "Traceback" not in run.text()
    (attempt,) = read_attempts(run.dir)
    assert (attempt.exit_code, attempt.step) == (ExitCode.INTERRUPTED, run.steps()[-1])
    assert attempt.reason == "interrupted from the keyboard: saved"


def test_a_second_ctrl_c_leaves_at_once(values, tmp_path):
    """The first Ctrl-C waits for a step that never ends."""
    run = Run(values, tmp_path, ranks=1)
    with run.started(before=hangs.in_the_loader) as (process,):
        run.wait_for_step(5)
        process.send_signal(signal.SIGINT)
        wait_until(lambda: "Ctrl-C: saving" in run.text(), 30, run.text)
        time.sleep(INTERRUPT_ONCE_S)
        assert process.poll() is None
        process.send_signal(signal.SIGINT)
        assert process.wait(10) == ExitCode.INTERRUPTED
    assert "Ctrl-C again: leaving at once" in run.text()
    (attempt,) = read_attempts(run.dir)
    assert attempt.exit_code == ExitCode.INTERRUPTED


@pytest.mark.parametrize(
    ("rank", "number", "exit_code"),
    [(1, signal.SIGTERM, ExitCode.REQUEUE), (0, signal.SIGINT, ExitCode.INTERRUPTED)],
    ids=str,
)
def test_a_signal_before_the_first_step_makes_all_leave(rank, number, exit_code, values, tmp_path):
    """Rank 0 waits for rank 1 to come, which does not."""
    run = Run(values, tmp_path)
    with run.started(before=hangs.before_the_world) as ranks:
        wait_until(lambda: list(run.dir.glob("attempts/*/attempt.json")), 30, run.text)
        time.sleep(0.5)
        ranks[rank].send_signal(number)
        assert run.exit_codes() == [exit_code] * 2
    assert f"error on rank {1 - rank}: rank {rank} left before the first step" in run.text()


@pytest.mark.parametrize(
    ("numbers", "request_"),
    [
        ([signal.SIGINT, signal.SIGTERM], Request.INTERRUPT),
        ([signal.SIGTERM, signal.SIGINT], Request.INTERRUPT),
        ([signal.SIGTERM, signal.SIGTERM], Request.LEAVE),
    ],
)
def test_of_two_requests_to_leave_the_higher_one_stays(numbers, request_):
    signals = Signals()
    signals.training_starts()
    for number in numbers:
        signals._note(number)
    assert signals.take() == request_
