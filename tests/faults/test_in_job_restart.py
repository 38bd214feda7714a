"""A rank that dies under torchrun, whose agent starts all ranks again, and an agent that dies above its ranks."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from sambalm.pretrain.errors import ExitCode
from sambalm.pretrain.lifecycle.attempts import read_attempts
from sambalm.pretrain.reporting.metrics_file import read_metrics
from tests.support.program import wait_until
from tests.support.runs import Run
from tests.support.whole_runs import changed, train, without_measured

TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--max-restarts=2", "--standalone"]


@pytest.fixture
def values(run_values):
    return changed(
        run_values,
        train={"steps": 60},
        validation={"every_steps": 1000},
        checkpoint={"every_steps": 20},
        parallel={"zero_stage": 1},
        stragglers={"every_steps": 0},
    )


def start(run: Run) -> subprocess.Popen:
    command = [*TORCHRUN, "-m", "sambalm.pretrain.cli", "train", str(run.config)]
    return subprocess.Popen(command, env=os.environ | {"SAMBALM_ATTEMPT": "job7.0"}, stderr=run.log.open("a"))


def ranks_of(process: subprocess.Popen) -> list[psutil.Process]:
    return [child for child in psutil.Process(process.pid).children() if "train" in child.cmdline()]


@pytest.mark.long
def test_a_killed_rank_does_not_end_the_job(values, tmp_path):
    expected = train(changed(values, run={"dir": str(tmp_path / "whole")}), ranks=2)
    run = Run(values, tmp_path)
    with start(run) as process:
        run.wait_for_step(30)
        killed = ranks_of(process)[-1]
        killed.kill()
        killed_s = time.time()
        wait_until(lambda: len(read_attempts(run.dir)) == 2, 120, run.text)
        recorded_s = time.time()
        left = run.dir / "metrics.jsonl"
        wait_until(lambda: left.stat().st_mtime > recorded_s, 120, run.text)
        first_step_s = time.time()
        assert process.wait(300) == 0, run.text()
    assert "failed (exitcode: -9) local_rank: 1 (pid: " in run.text()  # torchrun names the rank that died
    print(f"death to attempt {recorded_s - killed_s:.1f} s, to the first step {first_step_s - killed_s:.1f} s")
    first, second = read_attempts(run.dir)
    assert (first.path.name, second.path.name) == ("job7.0", "job7.0.restart1")
    assert (first.start_step, first.exit_code, second.exit_code) == (0, ExitCode.RANK_LOST, ExitCode.FINISHED)
    assert first.reason.startswith(f"rank 1 is gone (process {killed.pid} on ")
    assert second.start_step >= 20
    assert [without_measured(record) for record in read_metrics(run.dir)] == expected


@pytest.mark.long
def test_a_run_that_left_on_purpose_stays_so(values, tmp_path):
    """torchrun starts again whatever ends in another code than 0: a restart leaves as the attempt before did."""
    run = Run(values, tmp_path)
    with start(run) as process:
        run.wait_for_step(3)
        for rank in ranks_of(process):
            rank.send_signal(signal.SIGTERM)
        assert process.wait(120) == 1
    (attempt,) = read_attempts(run.dir)
    assert attempt.exit_code == ExitCode.REQUEUE
    # Once or more: torchrun ends a restart with the first rank that says so, and shows its sentence at the end.
    assert "torchrun does not start this run again: asked to leave: saved" in run.text()
    assert json.loads((Path(attempt.path) / "outcome.json").read_text())["step"] == run.steps()[-1]


@pytest.mark.long
def test_ranks_whose_torchrun_is_killed_save_and_leave(values, tmp_path):
    """They would go on without anybody who starts them again, and hold the run's lease."""
    run = Run(changed(values, train={"steps": 100_000}, checkpoint={"every_steps": 100_000}), tmp_path)
    with start(run) as process:
        run.wait_for_step(3)
        ranks = ranks_of(process)
        process.kill()
        _, alive = psutil.wait_procs(ranks, timeout=60)
        assert not alive
    (attempt,) = read_attempts(run.dir)
    reason = "the torchrun that started the ranks is gone: saved, to go on from there"
    assert (attempt.exit_code, attempt.reason) == (ExitCode.REQUEUE, reason)
    assert run.saved_steps() == [attempt.step] == run.steps()[-1:]
    with start(run) as process:  # the lease is free, and nobody refuses to go on
        run.wait_for_step(attempt.step + 2)
        for rank in ranks_of(process):
            rank.send_signal(signal.SIGTERM)
        process.wait(120)
    assert read_attempts(run.dir)[-1].start_step == attempt.step
