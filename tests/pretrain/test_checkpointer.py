"""What a run's checkpointer decides after each step, with a writer and guards that say what a test wants."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from sambalm.pretrain.checkpointing.write import SavedCheckpoint
from sambalm.pretrain.config_file import parse_config
from sambalm.pretrain.errors import ExitCode, NotSavedError, SaveBrokenError
from sambalm.pretrain.launched_step import StepResult
from sambalm.pretrain.lifecycle.checkpointer import DRAIN_AFTER_ERROR_S, Checkpointer, SaveState
from sambalm.pretrain.lifecycle.hooks import FinishedStep, Hook
from sambalm.pretrain.lifecycle.signals import Request
from tests.support.whole_runs import changed


class Writer:
    """Notes the saves that begin, each with the samples of its step; they end when they are asked for their result."""

    def __init__(self) -> None:
        self.started: list[tuple[int, int]] = []
        self.under_way = self.is_broken = self.is_done = False
        self.failing: set[int] = set()
        self.waited_s: list[float | None] = []
        self.states: dict[str, Any] = {}

    def start(self, chunks: object, *, step: int, samples: int, hooks: dict) -> None:
        assert not self.under_way
        self.under_way, self.states = True, hooks
        self.started.append((step, samples))

    def result(self, *, timeout_s: float | None = None) -> SavedCheckpoint:
        self.under_way = False
        self.waited_s.append(timeout_s)
        step = self.started[-1][0]
        if step in self.failing:
            raise NotSavedError(f"step {step}: the disk is full")
        return SavedCheckpoint(Path(f"step_{step}"), step, bytes=8, seconds=2.0)

    def close(self) -> None:
        self.is_closed = True


class Noting(Hook):
    """A hook with a state, which notes what it hears of saves."""

    name = "noting"

    def __init__(self) -> None:
        self.heard: list[str] = []

    def state(self) -> dict[str, Any]:
        return {"heard": len(self.heard)}

    def before_save(self, step: int) -> None:
        self.heard.append(f"before {step}")

    def after_save(self, checkpoint: Path) -> None:
        self.heard.append(f"after {checkpoint}")


class Host:
    """A run of 20 steps of 4 samples, of which a save is due after every third."""

    def __init__(self, run_values: dict, **checkpoint: object) -> None:
        values = changed(run_values, train={"steps": 20}, checkpoint={"every_steps": 3} | checkpoint)
        self.config = parse_config(values, source="test")
        self.unfit: dict[int, str] = {}
        self.asked: list[tuple[int, bool]] = []  # of the guards: the step, and whether the attempt ends with it
        self.hook, self.number = Noting(), 0
        world: Any = SimpleNamespace(is_main=True, of_save_thread=None)
        made: dict[str, Any] = {"guards": self, "hooks": [Hook(), self.hook], "data": {}}
        made["folder"] = SimpleNamespace(token="", check_lease=lambda: None)
        made["marks"] = None  # which only the thread of a real save uses
        self.checkpointer = Checkpointer(self.config, world=world, **made)
        self.writer = self.checkpointer.writer = Writer()
        self.checkpointer.parts = []

    def unfit_to_save(self, *, ends: bool) -> str | None:
        self.asked.append((self.number, ends))
        return self.unfit.get(self.number)

    def step(self, number: int, request: Request = Request.NOTHING, *, vote: SaveState | None = None) -> dict:
        """Takes a step as a run does, and returns the metrics of its record."""
        self.number = number
        tokens = 4 * self.config.data.sequence_length
        result = StepResult(number * tokens, tokens, loss=1, grad_norm=1, lr=1, step_time_s=1, skipped=False)
        state = (SaveState.UNDER_WAY if self.writer.under_way else SaveState.DONE) if vote is None else vote
        finished = FinishedStep(number, result, request, votes={self.checkpointer: state})
        self.checkpointer.settle(finished)
        self.checkpointer.after_step(finished)
        return finished.metrics

    def run(self, *numbers: int) -> list[int]:
        """Takes steps, each of which finds the save before it done; returns those that were saved."""
        for number in numbers:
            self.step(number, vote=SaveState.DONE)
        return [step for step, _ in self.writer.started]


@pytest.fixture
def host(run_values):
    return Host(run_values)


def test_a_state_that_was_not_fit_is_saved_as_soon_as_one_is(host, capsys):
    host.unfit = {3: "the last step was skipped", 4: "the last 2 steps were skipped"}
    assert [host.checkpointer.acts_on(step) for step in (3, 4)] == [True, False]
    assert host.run(1, 2, 3) == []
    assert host.checkpointer.acts_on(4)
    assert host.run(4, 5, 6, 7) == [5, 6]
    assert not host.checkpointer.acts_on(7)
    warnings = capsys.readouterr().err.splitlines()
    assert warnings == [
        f"warning: step {n} is not saved, since {why}: the next one may be" for n, why in host.unfit.items()
    ]
    assert host.asked == [(3, False), (4, False), (5, False), (6, False)]


def test_a_save_has_the_samples_so_far_and_the_states_of_hooks_with_names(host):
    assert host.run(1, 2, 3) == [3]
    assert host.writer.started == [(3, 12)]
    assert host.writer.states == {"noting": {"heard": 1}}  # once all hooks have prepared for it
    metrics = host.step(4, vote=SaveState.DONE)
    assert host.hook.heard == ["before 3", "after step_3"]
    assert metrics.pop("checkpoint_stall_s") < 1
    assert metrics == {"checkpoint_step": 3, "checkpoint_bytes": 8, "checkpoint_s": 2.0}
    assert host.step(5) == {}


@pytest.mark.parametrize(
    ("request_", "ends", "waits"),
    [(Request.SAVE, False, 0), (Request.LEAVE, True, 1), (Request.STOP, True, 1)],
    ids=lambda value: str(value),
)
def test_a_request_saves_and_the_run_waits_where_it_leaves(host, request_, ends, waits):
    host.step(1, request_)
    assert host.writer.started == [(1, 4)]
    assert host.asked == [(1, ends)]
    assert len(host.writer.waited_s) == waits


def test_the_last_step_is_saved_before_the_run_ends(host):
    host.step(20)
    assert host.asked == [(20, True)]
    assert host.writer.waited_s == [None]


@pytest.mark.parametrize("when_busy", ["wait", "skip"])
def test_a_save_that_is_due_meets_one_under_way(run_values, when_busy, capsys):
    host = Host(run_values, when_busy=when_busy)
    host.step(3)
    host.step(6)
    skips = when_busy == "skip"
    assert host.writer.started == [(3, 12)] + ([] if skips else [(6, 24)])
    assert ("no save after step 6" in capsys.readouterr().err) is skips
    assert host.step(7).get("checkpoint_skips") == (1 if skips else None)
    host.step(8, Request.SAVE)  # which is asked for, and waits
    assert host.writer.started[-1] == (8, 32)
    host.step(20)  # which leaves, and waits
    assert host.writer.started[-1] == (20, 80)


def test_a_request_that_found_no_fit_state_is_dropped_where_the_next_step_is_busy(run_values):
    host = Host(run_values, when_busy="skip")
    host.unfit = {4: "the last step was skipped"}
    host.step(3)
    host.step(4, Request.SAVE)
    assert host.checkpointer.acts_on(5)
    assert host.step(5) == {}
    assert not host.checkpointer.acts_on(7)
    assert host.writer.started == [(3, 12)]
    assert host.step(7)["checkpoint_skips"] == 1


def test_only_failures_in_a_row_end_a_run(run_values):
    host = Host(run_values, max_failed_saves=2)
    host.writer.failing = {3, 9, 12}
    assert host.run(3, 6, 9, 11) == [3, 6, 9]
    assert (host.checkpointer.failed, host.checkpointer.failed_in_a_row) == (2, 1)
    host.step(12, vote=SaveState.DONE)
    with pytest.raises(NotSavedError, match=r"^2 saves in a row failed; the last one: step 12: the disk is full$"):
        host.step(13, vote=SaveState.DONE)


def test_a_failure_before_a_save_that_may_go_well_ends_nothing(run_values):
    host = Host(run_values, max_failed_saves=1)
    host.writer.failing = {3}
    host.step(3)
    host.step(4, Request.LEAVE)
    assert host.writer.started == [(3, 12), (4, 16)]
    host.writer.failing = {6}
    host.step(6)
    with pytest.raises(NotSavedError, match="1 saves in a row failed"):
        host.step(9)


def test_a_save_that_ranks_cannot_agree_on_ends_the_run(host):
    host.step(4, vote=SaveState.BROKEN)  # of nothing that is under way
    host.step(6)
    with pytest.raises(SaveBrokenError):
        host.step(7, vote=SaveState.BROKEN)


@pytest.mark.parametrize(("exit_code", "waited_s"), [(None, DRAIN_AFTER_ERROR_S), (ExitCode.REQUEUE, None)])
def test_a_save_under_way_may_end_but_not_for_ever_after_an_error(host, exit_code, waited_s):
    host.step(3)
    host.checkpointer.on_end(exit_code)
    assert host.writer.waited_s == [waited_s]
    assert host.writer.is_closed
