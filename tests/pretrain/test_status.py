"""What `sambalm status` says of runs that train, hang, have ended in every way, or are no runs."""

import json
import os
import signal
import time
from pathlib import Path

import pytest
import yaml

from sambalm.pretrain.errors import ExitCode, NoRunError
from sambalm.pretrain.lifecycle.attempts import read_attempts, write_outcome, write_snapshot
from sambalm.pretrain.lifecycle.ledger import LEDGER
from sambalm.pretrain.reporting import status as status_file
from sambalm.pretrain.reporting.durations import date, duration
from sambalm.pretrain.reporting.status import State, read_status, show_status
from tests.support import program
from tests.support.program import wait_until
from tests.support.whole_runs import changed, run_dir, train


@pytest.fixture
def run_of_hours(tmp_path, monkeypatch):
    """A run of 1,000 steps without a ledger: two attempts, the second of which has been at it for 500 s."""
    now_s = [10_000.0]
    monkeypatch.setattr(time, "time", lambda: now_s[0])
    folder = tmp_path / "run"
    config = yaml.safe_dump({"train": {"steps": 1000}})
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)
    for name, started_s, step in (("first", 10_000.0, 0), ("second", 11_500.0, 100)):
        now_s[0] = started_s
        write_snapshot(folder / "attempts" / name, config_yaml=config, world_size=1, start_step=step)
    now_s[0] = 12_000.0
    records = [
        {
            "step": step,
            "loss": 3.0,
            "tokens": 50 * step,
            "step_time_s": 9.0 if step <= 50 else 5.0,
            "tokens_per_second": 10.0,
        }
        for step in range(1, 151)
    ]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    return folder, now_s


def top_lines(status) -> dict[str, str]:
    return {line[:18].strip(): line[18:] for line in show_status(status).partition("\n\n")[0].splitlines()}


def test_status_is_reckoned_from_the_recent_steps(run_of_hours):
    status = read_status(run_of_hours[0])
    assert (len(status.attempts), status.step, status.steps, status.tokens) == (2, 150, 1000, 7500)
    assert (status.tokens_per_s, status.left_s) == (10.0, 850 * 5.0)
    assert status.training_share == pytest.approx((50 * 9 + 100 * 5) / 2000)
    assert top_lines(status) == {
        "state": "killed",
        "attempts": "2",
        "step": "150 of 1,000 (15.0%)",
        "tokens": "7,500",
        "loss": "3.0000",
        "speed": "10 tokens/s",
        "left": "1 h 10 min",
        "time in training": "47.5%",
        "last error": "none",
    }


def test_the_speed_is_of_the_last_steps_alone(run_of_hours, monkeypatch):
    folder, _ = run_of_hours
    monkeypatch.setattr(status_file, "RECENT_STEPS", 100)
    assert read_status(folder).left_s == 850 * 5.0
    monkeypatch.setattr(status_file, "RECENT_STEPS", 200)
    assert read_status(folder).left_s == 850 * 5.0
    text = (folder / "metrics.jsonl").read_text().splitlines(keepends=True)
    (folder / "metrics.jsonl").write_text("".join(text[:51]))
    monkeypatch.setattr(status_file, "RECENT_STEPS", 1)
    assert read_status(folder).left_s == 949 * 5.0


@pytest.mark.parametrize(("age_s", "state"), [(5.0, State.TRAINING), (59.0, State.TRAINING), (61.0, State.KILLED)])
def test_a_lease_that_beats_is_a_run_that_trains(age_s, state, run_of_hours):
    """The lease of a process on another machine: its age alone tells whether the process lives."""
    folder, now_s = run_of_hours
    (folder / "lease.json").write_text(json.dumps({"pids": "another machine", "pid": 1, "process_start": "1"}))
    os.utime(folder / "lease.json", (now_s[0] - age_s, now_s[0] - age_s))
    assert read_status(folder).state == state


@pytest.mark.parametrize(
    ("exit_code", "state", "error", "ended"),
    [
        (ExitCode.FINISHED, "finished", None, True),
        (ExitCode.REQUEUE, "left (why)", None, False),
        (ExitCode.STOPPED, "left (why)", None, True),
        (ExitCode.INTERRUPTED, "left (why)", None, True),
        (ExitCode.HANGING, "failed (why)", "second: why", True),
        (ExitCode.DIVERGED, "failed (why)", "second: why", True),
        (ExitCode.NO_PROGRESS, "failed (why)", "second: why", True),
    ],
)
def test_status_tells_how_the_last_attempt_ended(exit_code, state, error, ended, run_of_hours):
    """The time of a run that is to go on goes on too."""
    folder, now_s = run_of_hours
    write_outcome(folder / "attempts" / "second", exit_code=exit_code, step=150, reason="why")
    now_s[0] += 2_000.0
    status = read_status(folder)
    assert (status.shown_state(), status.last_error) == (state, error)
    assert status.training_share == pytest.approx(950 / (2_000 if ended else 4_000))
    assert [attempt.state for attempt in status.attempts] == [State.KILLED, status.state]


def test_status_shows_the_last_telling_line_of_the_newest_log(run_of_hours):
    folder, _ = run_of_hours
    logs = {
        "first/n1.log": "CUDA error: unspecified\n",
        "second/n1.log": "Error of before\nstep 3\n",
        "second/n2.log": "RuntimeError: one\nRuntimeError: the GPU is gone\nstep 7\n",
    }
    for age, (name, text) in enumerate(reversed(logs.items())):
        path = folder / "attempts" / name
        path.write_text(text)
        os.utime(path, (1000 - age, 1000 - age))
    assert read_status(folder).last_error == "second, n2.log: RuntimeError: the GPU is gone"
    (folder / "attempts" / "second" / "n2.log").write_text("step 7\n")
    assert read_status(folder).last_error == "second, n1.log: Error of before"


@pytest.mark.parametrize(
    ("seconds", "shown"),
    [(59, "59 s"), (121, "2 min"), (3600 * 23.99, "23 h 59 min"), (86400 * 2 + 3600 * 3 + 60, "2 d 3 h 1 min")],
)
def test_days_hours_and_minutes(seconds, shown):
    assert duration(seconds) == shown


def ledger_lines(folder: Path, lines: list[dict]) -> None:
    (folder / LEDGER).write_text("".join(json.dumps({"attempt": "second", **line}) + "\n" for line in lines))


BEGUN = {"at_s": 11_690.0, "event": "begin", "step": 100}


def in_phase(phase: str, since_s: float) -> dict:
    """A line that the ledger's thread writes within a step."""
    return {"at_s": 11_740.0, "step": 101, "open": True, "seconds": {}, "now": phase, "since_s": since_s}


@pytest.mark.parametrize(
    ("lines", "at_s", "state"),
    [
        ([], 11_700.0, "starting"),
        ([BEGUN], 11_700.0, "training"),
        ([BEGUN, in_phase("step", 11_695.0)], 11_750.0, "training"),
        ([BEGUN, in_phase("step", 11_695.0)], 11_760.0, f"hanging (since {date(11_695.0)}, in phase step)"),
        ([BEGUN, in_phase("fetch", 11_695.0)], 11_760.0, f"hanging (since {date(11_695.0)}, in phase fetch)"),
        ([BEGUN, in_phase("validation", 11_695.0)], 11_900.0, "training (validating)"),
        ([BEGUN, in_phase("save", 11_695.0)], 11_900.0, "training (saving)"),
        ([BEGUN, in_phase("first_step", 11_695.0)], 11_900.0, "training"),  # it may compile for long
        ([BEGUN, in_phase("start_up", 11_695.0)], 11_900.0, "starting"),  # anew, from an earlier checkpoint
        ([BEGUN, in_phase("a later version's", 11_695.0)], 11_900.0, "training"),
    ],
)
def test_a_run_whose_steps_do_not_end_hangs(lines, at_s, state, run_of_hours):
    folder, now_s = run_of_hours
    now_s[0] = at_s
    (folder / "lease.json").write_text(json.dumps({"pids": "another machine"}))
    os.utime(folder / "lease.json", (at_s, at_s))
    ledger_lines(folder, [{"at_s": 11_500.0, "event": "start"}, *lines])
    assert read_status(folder).shown_state() == state


def test_long_steps_are_waited_for(run_of_hours):
    """Ten of them, where that is more than a minute."""
    folder, now_s = run_of_hours
    text = (folder / "metrics.jsonl").read_text()
    (folder / "metrics.jsonl").write_text(text.replace('"step_time_s": 5.0', '"step_time_s": 20.0'))
    (folder / "lease.json").write_text(json.dumps({"pids": "another machine"}))
    ledger_lines(folder, [{"at_s": 11_500.0, "event": "start"}, BEGUN, in_phase("step", 11_695.0)])
    for age_s, state in ((200.0, State.TRAINING), (201.0, State.HANGING)):
        now_s[0] = 11_695.0 + age_s
        os.utime(folder / "lease.json", (now_s[0], now_s[0]))
        assert read_status(folder).state == state


def test_a_ledger_tells_what_the_records_of_attempts_lack(run_of_hours):
    """When a killed one last wrote and its last step; and a process is older than what it first writes down."""
    folder, now_s = run_of_hours
    now_s[0] = 11_800.0
    (folder / "metrics.jsonl").unlink()
    seconds = {"seconds": {"productive": 90.0}, "now": "step", "since_s": 10_000.0}
    first = [
        {"at_s": 9_990.0, "event": "start"},
        {"at_s": 10_010.0, "event": "begin", "step": 0},
        {"at_s": 10_100.0, "step": 100, **seconds},
        {"at_s": 10_100.0, "event": "saved", "step": 100},
        {"at_s": 11_600.0, "step": 140, **seconds},
    ]
    lines = [{"attempt": "first", **line} for line in first]
    (folder / "lease.json").write_text(json.dumps({"pids": "another machine"}))
    os.utime(folder / "lease.json", (now_s[0], now_s[0]))
    ledger_lines(folder, lines)
    assert read_status(folder).shown_state() == "training"  # the second could not write there yet
    ledger_lines(folder, [*lines, {"at_s": 11_490.0, "event": "start"}])
    status = read_status(folder)
    assert status.shown_state() == "starting"
    killed, last = status.attempts
    assert (killed.started_s, killed.ended_s, killed.step) == (9_990.0, 11_600.0, 140)
    assert (last.started_s, last.ended_s, last.step) == (11_500.0, None, None)
    write_outcome(folder / "attempts" / "first", exit_code=ExitCode.HANGING, step=130, reason="why")
    now_s[0] += 1.0
    killed = read_status(folder).attempts[0]
    assert (killed.ended_s, killed.step) == (11_800.0, 130)  # as it said itself


def test_the_state_of_a_run(run_values):
    train(run_values)
    folder = run_dir(run_values)
    status = read_status(folder)
    assert (status.state, len(status.attempts), status.step, status.steps) == ("finished", 1, 6, 6)
    assert (status.tokens, status.left_s, status.last_error) == (1536, 0, None)
    assert 0 < status.training_share < 1
    assert sum(status.seconds.values()) == pytest.approx(status.wall_s, rel=0.01)
    assert set(status.held_out_losses) == {32, 64}
    assert f"{status.held_out_losses[64]:.4f} held out at 64 tokens" in show_status(status)
    assert "  startup " in show_status(status)
    assert "  hanging " not in show_status(status)  # of which there was none
    config = (folder / "config.yaml").read_text().replace("steps: 6", "steps: 12")
    later = folder / "attempts" / "later"
    write_snapshot(later, config_yaml=config, world_size=1, start_step=6)
    (later / "n1.log").write_text("step 7\nRuntimeError: the GPU is gone\n[rank1] bye\n")
    status = read_status(folder)
    assert (status.state, len(status.attempts)) == ("killed", 2)
    assert status.last_error == "later, n1.log: RuntimeError: the GPU is gone"
    assert status.left_s > 0
    write_outcome(later, exit_code=ExitCode.NOT_SAVED, step=None, reason="no space")
    write_outcome(later, exit_code=ExitCode.BAD_INPUT, step=None, reason="what followed from it")
    assert read_status(folder).shown_state() == "failed (no space)"
    assert read_attempts(folder)[-1].exit_code == ExitCode.NOT_SAVED


def test_a_run_trains_is_stopped_and_is_killed(run_values, tmp_path):
    """The real program, seen from outside; the JSON is the same."""
    values = changed(run_values, train={"steps": 4000}, checkpoint={"every_steps": 100_000})
    folder, config, log = run_dir(values), tmp_path / "run.yaml", tmp_path / "log"
    config.write_text(yaml.safe_dump(changed(values, validation={"every_steps": 100_000})))
    with program.start("train", config, log=log) as running:
        wait_until(lambda: (folder / "metrics.jsonl").exists(), 60, log.read_text)
        wait_until(lambda: read_status(folder).step >= 2, 60, log.read_text)
        assert read_status(folder).state == State.TRAINING
        running.send_signal(signal.SIGSTOP)
        beat_s = time.time() - 100
        os.utime(folder / "lease.json", (beat_s, beat_s))  # as after 100 s
        assert read_status(folder).shown_state() == "hanging (its process has not answered for 100 s)"
    shown = json.loads(program.run("status", folder, "--json").stdout)
    assert (shown["state"], shown["steps"], shown["attempts"][0]["state"]) == ("killed", 4000, "killed")
    assert shown["seconds"]["lost"] > 0
    assert shown["seconds"]["productive"] == 0
    assert "state             killed\n" in program.run("status", folder).stdout


def test_a_folder_that_is_no_run_has_no_state(tmp_path):
    with pytest.raises(NoRunError, match="is not a run that has started"):
        read_status(tmp_path)
