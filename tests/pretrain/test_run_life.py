"""The life of a run: signals at any moment to any rank, switches, exit codes, leases, and what each attempt records."""

import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from sambalm.pretrain.checkpointing.format import checkpoint_folders, newest_checkpoint
from sambalm.pretrain.errors import ExitCode, RunInUseError
from sambalm.pretrain.lifecycle.attempts import read_attempts
from sambalm.pretrain.lifecycle.lease import Lease
from sambalm.pretrain.reporting.metrics_file import read_metrics
from tests.support import program
from tests.support.program import wait_until
from tests.support.runs import Run
from tests.support.whole_runs import changed, endless, train
from tests.support.worlds import run_world

PROGRAM = [sys.executable, "-m", "sambalm.pretrain.cli", "train"]
ENVIRONMENT = os.environ | {"COLUMNS": "200"}


@pytest.fixture
def long_values(run_values):
    """Steps of tens of milliseconds, more of them than a test lets pass, and no checkpoint unasked."""
    return endless(run_values)


@pytest.fixture
def run(long_values, tmp_path):
    run = Run(long_values, tmp_path)
    run.start()
    yield run
    run.end()


@pytest.mark.slow
def test_signals_to_single_ranks_save_on_all_at_the_same_step(run):
    """USR1 to one rank, to the other and to both saves and goes on; TERM, twice, to one rank makes all leave."""
    run.wait_for_step(2)
    assert "2 x cpu, ZeRO-1, from step 0; scan=" in run.text()
    for number, process in enumerate(reversed(run.processes), start=1):
        process.send_signal(signal.SIGUSR1)
        wait_until(lambda number=number: len(run.saved_steps()) == number, 60, run.text)
    # So that both have it before they next ask each other.
    for number in (signal.SIGSTOP, signal.SIGUSR1, signal.SIGCONT):
        for process in run.processes:
            process.send_signal(number)
    wait_until(lambda: len(run.saved_steps()) == 3, 60, run.text)
    run.wait_for_step(run.saved_steps()[-1] + 2)
    assert [process.poll() for process in run.processes] == [None, None]
    run.processes[1].send_signal(signal.SIGTERM)
    time.sleep(0.05)
    run.processes[1].send_signal(signal.SIGTERM)
    assert run.exit_codes() == [ExitCode.REQUEUE, ExitCode.REQUEUE]
    last = run.steps()[-1]
    assert run.saved_steps()[-1] == last == newest_checkpoint(run.dir, warn=pytest.fail).step
    (attempt,) = read_attempts(run.dir)
    assert (attempt.exit_code, attempt.step, attempt.start_step) == (ExitCode.REQUEUE, last, 0)


def train_while_another_takes_the_lease(values):
    """The message that this rank ends with. The lease goes to somebody else in the second step."""
    from torch.optim.optimizer import register_optimizer_step_post_hook

    from sambalm.pretrain.config_file import parse_config
    from sambalm.pretrain.trainer import train

    steps, lease = [], Path(values["run"]["dir"]) / "lease.json"

    def take(*_):
        steps.append(1)
        if len(steps) == 2 and os.environ["RANK"] == "0":
            lease.write_text(json.dumps(json.loads(lease.read_text()) | {"token": "another", "pid": 7, "host": "far"}))

    register_optimizer_step_post_hook(take)
    with pytest.raises(RunInUseError) as ended:
        train(parse_config(values, source="test"))
    return str(ended.value)


def test_a_lease_that_was_lost_between_steps_commits_nothing(run_values):
    values = changed(run_values, parallel={"zero_stage": 1})
    first, second = run_world(train_while_another_takes_the_lease, values, ranks=2)
    run_dir = Path(values["run"]["dir"])
    assert first == second
    assert first.startswith(f"{run_dir} is no longer this process's: process 7 on far took it")
    assert not (run_dir / "checkpoints").exists()
    assert json.loads((run_dir / "lease.json").read_text())["token"] == "another"  # which is not ours to remove
    (attempt,) = read_attempts(run_dir)
    assert attempt.exit_code == ExitCode.RUN_IN_USE


@pytest.mark.long
def test_a_run_whose_gradients_stay_infinite_ends(long_values, tmp_path):
    values = changed(long_values, optimizer={"peak_lr": 1e30}, train={"max_skipped_steps": 3})
    run = Run(values, tmp_path)
    run.start()
    assert run.exit_codes() == [ExitCode.DIVERGED, ExitCode.DIVERGED]
    norms = [record["grad_norm"] for record in read_metrics(run.dir)]
    assert [math.isfinite(norm) for norm in norms] == [True] + [False] * 4
    text = (run.dir / "metrics.jsonl").read_text()
    assert text.count('"grad_norm": null') == 4
    assert "NaN" not in text  # which is no JSON
    assert run.text().count("so the optimizer skipped it") == 4
    assert "steps 2 to 5 were skipped, more than train.max_skipped_steps 3 in a row" in run.text()
    assert "Traceback" not in run.text()
    (attempt,) = read_attempts(run.dir)
    assert attempt.exit_code == ExitCode.DIVERGED


@pytest.mark.long
def test_switches_in_the_run_folder_save_and_stop(run):
    run.wait_for_step(1)
    (run.dir / "save").touch()
    wait_until(lambda: len(run.saved_steps()) == 1, 60, run.text)
    assert not (run.dir / "save").exists()
    (run.dir / "stop").touch()
    assert run.exit_codes() == [ExitCode.STOPPED, ExitCode.STOPPED]
    assert run.saved_steps()[-1] == run.steps()[-1]
    run.ranks = 1
    run.start()
    assert run.exit_codes() == [ExitCode.STOPPED]
    assert f"error: {run.dir / 'stop'} is there" in run.text()
    assert "Traceback" not in run.text()


@pytest.mark.long
def test_a_stopped_run_logs_the_same_as_one_that_was_not(run_values, tmp_path):
    """TERM to one rank in the middle, then a resume, validation included."""
    values = changed(run_values, train={"steps": 150}, parallel={"zero_stage": 1}, checkpoint={"every_steps": 1000})
    values = changed(values, validation={"every_steps": 10})
    expected = train(changed(values, run={"dir": str(tmp_path / "whole")}), ranks=2)
    run = Run(values, tmp_path)
    run.start()
    try:
        run.wait_for_step(3)
        run.processes[0].send_signal(signal.SIGTERM)
        assert run.exit_codes() == [ExitCode.REQUEUE, ExitCode.REQUEUE]
        assert 3 <= run.steps()[-1] < 150
    finally:
        run.end()
    assert train(values, ranks=2) == expected


def listens_to_term(pid: int) -> bool:
    caught = next(line for line in Path(f"/proc/{pid}/status").read_text().splitlines() if line.startswith("SigCgt"))
    return bool(int(caught.split()[1], 16) >> (signal.SIGTERM - 1) & 1)


def test_a_signal_during_the_slow_imports_leaves_at_once(long_values, tmp_path):
    run = Run(long_values, tmp_path, ranks=1)
    with subprocess.Popen([*PROGRAM, run.config], stderr=subprocess.PIPE, text=True, env=ENVIRONMENT) as process:
        try:
            wait_until(lambda: listens_to_term(process.pid), 30)
            process.send_signal(signal.SIGTERM)
            assert process.wait(5) == ExitCode.REQUEUE
            assert process.stderr.read() == "SIGTERM before the first step: leaving; the same command starts it again\n"
        finally:
            process.kill()
    assert not run.dir.exists()


def test_a_signal_in_the_rendezvous_leaves_at_once(long_values, tmp_path):
    """The other rank never comes."""
    run = Run(long_values, tmp_path)
    first, other = run.start()
    other.kill()
    wait_until(lambda: (run.dir / "attempts").exists() and listens_to_term(first.pid), 30, run.text)
    time.sleep(0.5)
    first.send_signal(signal.SIGTERM)
    start_s = time.monotonic()
    assert first.wait() == ExitCode.REQUEUE
    assert time.monotonic() - start_s < 5
    run.end()
    assert run.text() == "SIGTERM before the first step: leaving; the same command starts it again\n"


@pytest.mark.slow
def test_a_second_run_in_the_folder_is_refused_while_the_first_lives(run, long_values, tmp_path):
    run.wait_for_step(1)
    (tmp_path / "second").mkdir()
    second = Run(long_values, tmp_path / "second", ranks=1)
    second.start()
    assert second.exit_codes() == [ExitCode.RUN_IN_USE]
    assert f"error: {run.dir} is in use by process {run.processes[0].pid} on " in second.text()
    for process in run.processes:
        process.kill()
    run.exit_codes()
    second.start()  # the lease's holder is known to be dead
    second.wait_for_step(1, timeout_s=30)
    second.end()


def test_a_lease_is_taken_over_without_a_beat_and_its_holder_finds_out(tmp_path, monkeypatch):
    """Holders on another host, whose process ids say nothing, are known by their beat alone."""
    monkeypatch.setattr("sambalm.pretrain.lifecycle.lease.pid_space", lambda: os.urandom(4).hex())
    beating, silent = Lease(tmp_path, beat_s=0.05, stale_s=1.0), Lease(tmp_path / "b", beat_s=1000.0)
    beating.acquire()
    silent.acquire()
    with pytest.raises(RunInUseError, match="is in use by process"):
        Lease(tmp_path, stale_s=1.0).acquire()
    taken = Lease(tmp_path / "b", stale_s=0.3)
    taken.acquire()
    taken.check()
    with pytest.raises(RunInUseError, match="no longer this process's"):
        silent.check()
    silent.release()  # of what is no longer its own: nothing happens
    taken.check()
    taken.release()
    beating.check()


def crash_at_step_4():
    from sambalm.pretrain import trainer

    launch_step = trainer.Trainer._launch_step

    def crash(self):
        if self.step == 4:
            wait_until(lambda: checkpoint_folders(Path(self.config.run.dir)), 60)  # of step 3, which a thread writes
            os.kill(os.getpid(), signal.SIGKILL)
        return launch_step(self)

    trainer.Trainer._launch_step = crash


@pytest.mark.slow
def test_a_crash_loop_without_progress_stops_by_itself(run_values, tmp_path):
    """Killed at step 4 each time, after the checkpoint of step 3: the first attempt made progress, three did not."""
    run = Run(run_values, tmp_path, ranks=1)

    def attempt():
        return program.run("train", run.config, before=crash_at_step_4)

    assert [attempt().returncode for _ in range(4)] == [-signal.SIGKILL] * 4
    refused = program.run("train", run.config)
    assert refused.returncode == ExitCode.NO_PROGRESS
    assert "the last 3 attempts in" in refused.stderr
    assert "began at step 3" in refused.stderr
    assert "Traceback" not in refused.stderr
    assert attempt().returncode == -signal.SIGKILL  # a start by hand after it is let through
    assert len(train(run_values)) == 6


@pytest.mark.long
def test_an_attempt_records_what_it_started_from(run_values, tmp_path):
    """In a real process: the environment is what it was started with."""
    run = Run(run_values, tmp_path, ranks=1)
    environment = ENVIRONMENT | {"SAMBALM_ATTEMPT": "first", "WANDB_API_KEY": "not to be seen"}
    ended = subprocess.run([*PROGRAM, run.config], env=environment, capture_output=True, text=True)
    assert ended.returncode == ExitCode.FINISHED, ended.stderr
    folder = Path(run_values["run"]["dir"]) / "attempts" / "first"
    started = json.loads((folder / "attempt.json").read_text())
    head = subprocess.run(["git", "rev-parse", "HEAD"], cwd=Path(__file__).parent, capture_output=True, text=True)
    assert started["revision"] == (head.stdout.strip() or None)
    assert (started["start_step"], started["world_size"]) == (0, 1)
    assert (
        yaml.safe_load((folder / "config.yaml").read_text())["model"]
        == (yaml.safe_load((folder.parents[1] / "config.yaml").read_text())["model"])
    )
    packages = (folder / "packages.txt").read_text().splitlines()
    assert any(line.startswith("torch==") for line in packages)
    environment = (folder / "environment.txt").read_text()
    assert "SAMBALM_ATTEMPT=first\n" in environment
    assert "WANDB_API_KEY=(hidden)\n" in environment
    assert "not to be seen" not in environment
    assert json.loads((folder / "outcome.json").read_text())["exit_code"] == ExitCode.FINISHED
    assert not (folder.parents[1] / "lease.json").exists()


def test_leftovers_of_a_killed_save_or_removal_are_removed(run_values):
    run_dir = Path(run_values["run"]["dir"])
    for leftover in ".step_00000001.removed", ".step_00000002.partial":
        (run_dir / "checkpoints" / leftover).mkdir(parents=True)
    train(run_values)
    assert sorted(path.name for path in (run_dir / "checkpoints").iterdir()) == ["step_00000003", "step_00000006"]
