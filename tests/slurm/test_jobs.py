"""Training jobs on real Slurm: to the end, and through everything that can interrupt them."""

import re
import time

import pytest

from sambalm.pretrain.errors import ExitCode
from tests.support.slurm_client import wait_until
from tests.support.slurm_jobs import Job
from tests.support.whole_runs import changed, train


@pytest.fixture
def values(run_values):
    """Steps of tens of milliseconds over two ranks, validated on the way, and saved when asked or at the end."""
    return changed(
        run_values,
        train={"steps": 300},
        validation={"every_steps": 50},
        checkpoint={"every_steps": 100000, "keep": 100},
        parallel={"zero_stage": 1},
    )


def uninterrupted(values, tmp_path):
    """What the run logs without Slurm and without a stop."""
    return train(changed(values, run={"dir": str(tmp_path / "uninterrupted")}), ranks=2)


def test_a_job_told_of_its_time_limit_is_requeued_and_ends_with_the_same_bits(cluster, values, tmp_path):
    """The batch script gets what --signal=B:USR1@600 sends, right away."""
    job = Job(cluster, values, CHECK_LINKS="1")
    job.wait_for_step(5)
    cluster.run("scancel", "--batch", "--signal=USR1", job.number)
    assert job.wait_for_end() == "COMPLETED", job.text()
    first, second = job.attempts()
    assert (first.exit_code, second.exit_code) == (ExitCode.REQUEUE, ExitCode.FINISHED)
    assert 5 <= first.step == second.start_step < 300
    assert cluster.field(job.number, "Restarts") == "1"
    assert job.records() == uninterrupted(values, tmp_path)
    for attempt in (first, second):
        assert {log.name for log in attempt.path.glob("n*.log")} == {"n1.log", "n2.log"}
        assert {path.name for path in (attempt.path / "links").iterdir()} == {"n1.json", "n2.json"}
    assert "Traceback" not in job.text()


@pytest.mark.slow
def test_a_real_time_limit_requeues(cluster, values, tmp_path):
    values = changed(values, train={"steps": 5000}, validation={"every_steps": 100000})
    job = Job(cluster, values, "--time=2", "--signal=B:USR1@60")
    wait_until(lambda: len(job.attempts()) == 2, 240, job.text)
    assert job.attempts()[0].exit_code == ExitCode.REQUEUE
    assert job.attempts()[1].start_step == job.attempts()[0].step > 0
    cluster.run("scancel", job.number)
    assert job.wait_for_end() == "CANCELLED"


@pytest.mark.slow
def test_usr1_saves_and_scancel_ends_for_good(cluster, values):
    values = changed(values, train={"steps": 100000}, validation={"every_steps": 100000})
    job = Job(cluster, values)
    job.wait_for_step(2)
    cluster.run("scancel", "--signal=USR1", job.number)
    wait_until(lambda: len(job.saved_steps()) == 1, 60, job.text)
    job.wait_for_step(job.saved_steps()[0] + 2)
    cluster.run("scancel", job.number)
    assert job.wait_for_end() == "CANCELLED"
    time.sleep(8)  # a requeue of a cancelled job would have come to life by now
    assert cluster.field(job.number, "JobState") == "CANCELLED"
    assert len(job.attempts()) == 1
    assert job.saved_steps()[-1] == job.steps()[-1]  # scancel's TERM saves too


@pytest.mark.slow
def test_a_requeue_by_hand_goes_on(cluster, values, tmp_path):
    job = Job(cluster, values)
    job.wait_for_step(5)
    cluster.run("scontrol", "requeue", job.number)
    assert job.wait_for_end() == "COMPLETED", job.text()
    first, second = job.attempts()
    assert first.exit_code == ExitCode.REQUEUE  # saved in the time between TERM and KILL
    assert second.start_step == first.step >= 5
    assert job.records() == uninterrupted(values, tmp_path)


@pytest.mark.slow
def test_a_preempted_job_saves_and_comes_back(cluster, values, tmp_path):
    job = Job(cluster, values)
    job.wait_for_step(5)
    urgent = cluster.run(
        *("sbatch", "--parsable", "--partition=urgent", "--nodes=3", "--exclusive", f"--output={tmp_path}/urgent"),
        *("--wrap", "sleep 3"),
    ).stdout.strip()
    assert cluster.wait_for_end(urgent) == "COMPLETED"
    assert job.wait_for_end() == "COMPLETED", job.text()
    first, second = job.attempts()
    assert (first.exit_code, second.exit_code) == (ExitCode.REQUEUE, ExitCode.FINISHED)
    assert second.start_step == first.step >= 5
    assert job.records() == uninterrupted(values, tmp_path)


@pytest.mark.slow
def test_a_node_set_down_is_replaced_by_the_spare_within_the_job(cluster, values, tmp_path):
    values = changed(values, checkpoint={"every_steps": 20}, train={"steps": 1000})
    job = Job(cluster, values, "--nodes=2-3")  # as `sambalm slurm submit --spares 1` asks
    job.wait_for_step(45)
    try:
        cluster.run("scontrol", "update", "NodeName=n2", "State=DOWN", "Reason=test")
        assert job.wait_for_end() == "COMPLETED", job.text()
    finally:
        cluster.run("scontrol", "update", "NodeName=n2", "State=RESUME", check=False)  # it may have come back
    assert cluster.field(job.number, "Restarts") == "0"
    first, *_, last = job.attempts()
    assert (first.exit_code, last.exit_code) == (None, ExitCode.FINISHED)
    assert last.start_step >= 40
    assert {log.name for log in last.path.glob("n*.log")} == {"n1.log", "n3.log"}
    assert job.records() == uninterrupted(values, tmp_path)


@pytest.mark.slow
def test_a_node_that_loses_power_costs_a_requeue(cluster, values, tmp_path):
    values = changed(values, checkpoint={"every_steps": 20}, train={"steps": 1000})
    job = Job(cluster, values)
    job.wait_for_step(45)
    try:
        cluster.tell("kill", "n2")
        assert job.wait_for_end(450) == "COMPLETED", job.text()
    finally:
        cluster.tell("start", "n2")
        wait_until(lambda: "idle" in cluster.run("sinfo", "-h", "-n", "n2", "-p", "test", "-o", "%T").stdout, 90)
    first, *_, last = job.attempts()
    assert (first.exit_code, last.exit_code) == (None, ExitCode.FINISHED)
    assert last.start_step >= 40
    assert {log.name for log in last.path.glob("n*.log")} == {"n1.log", "n3.log"}
    assert job.records() == uninterrupted(values, tmp_path)


KILLER = """
import os, threading, time
def watch():
    while not os.path.exists({path!r}.format(**os.environ)):
        time.sleep(0.05)
    time.sleep({delay_s})
    os.kill(os.getpid(), 9)
if "RANK" in os.environ:
    threading.Thread(target=watch, daemon=True).start()
"""


@pytest.mark.slow
@pytest.mark.parametrize("moment", ["as they start", "in the first steps"])
def test_a_crash_loop_stops_by_itself(moment, cluster, values, tmp_path):
    """Each rank of each attempt kills itself, before the attempt is recorded or after it."""
    recorded = moment == "in the first steps"
    path = f"{values['run']['dir']}/attempts/{{SAMBALM_ATTEMPT}}/attempt.json" if recorded else "/"
    (tmp_path / "sitecustomize.py").write_text(KILLER.format(path=path, delay_s=0.5))
    values = changed(values, train={"steps": 100000})
    job = Job(cluster, values, PYTHONPATH=str(tmp_path))
    assert job.wait_for_end(400) == "FAILED", job.text()
    assert cluster.field(job.number, "ExitCode") == f"{int(ExitCode.NO_PROGRESS)}:0", job.text()
    assert cluster.field(job.number, "Restarts") == "0"
    expected = [None, None, None, ExitCode.NO_PROGRESS] if recorded else []
    assert [attempt.exit_code for attempt in job.attempts()] == expected
    assert job.saved_steps() == []


@pytest.mark.slow
def test_bad_nodes_are_excluded_as_long_as_enough_others_are_left(cluster, values):
    """Every node is bad, and one is excluded by hand: the job gets both others in turn, then one of them again."""
    limits = {"MIN_DISK_FREE_GIB": "1e9", "MAX_RESTARTS": "2"}
    job = Job(cluster, values, "--nodes=1", "--exclude=n3", SAMBALM_NODES="1", **limits)
    assert job.wait_for_end() == "FAILED", job.text()
    assert cluster.field(job.number, "ExitCode") == f"{int(ExitCode.REQUEUE)}:0", job.text()
    assert cluster.field(job.number, "ExcNodeList") == "n1,n3"
    left_out = re.findall(r"^node (n\d) is left out: .* free, of MIN_DISK_FREE_GIB=1e\+09$", job.text(), re.M)
    assert left_out == ["n1", "n2", "n2"]
    assert job.text().count("n2 may be given to this job again: partition test has too few others") == 1
    assert "not requeued: MAX_RESTARTS=2 is reached" in job.text()
