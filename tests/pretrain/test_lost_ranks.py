"""Ranks that no launcher watches name the one that is gone: real ranks that are killed, and what one cannot know."""

import re
import signal
import socket
import subprocess
import sys
import time
from dataclasses import replace

import pytest
import torch.distributed as dist

from sambalm.pretrain.errors import ExitCode, NotSavedError, RankLostError, SaveBrokenError
from sambalm.pretrain.lifecycle import lost_ranks
from sambalm.pretrain.lifecycle.attempts import read_attempts, read_outcome, write_outcome
from sambalm.pretrain.lifecycle.lost_ranks import RankProcess, RankProcesses, naming_lost_ranks
from sambalm.slurm.outcome import describe_outcome
from tests.support.hangs import in_the_loader
from tests.support.runs import Run
from tests.support.whole_runs import changed, endless

CLOSED = "[gloo/transport/tcp/pair.cc:553] Connection closed by peer [10.0.0.2]:28574. This is"


@pytest.mark.parametrize("victim", [0, pytest.param(2, marks=pytest.mark.slow)])
def test_survivors_name_the_rank_that_was_killed(victim, run_values, tmp_path):
    """And no other, though each of them is gone too when the next one finds out."""
    run = Run(endless(run_values), tmp_path, ranks=4)
    with run.started() as ranks:
        run.wait_for_step(2)
        ranks[victim].kill()
        expected = [ExitCode.RANK_LOST] * 4
        expected[victim] = -signal.SIGKILL
        assert run.exit_codes() == expected
        (attempt,) = read_attempts(run.dir)
        assert attempt.exit_code == ExitCode.RANK_LOST
        assert attempt.reason.startswith(f"rank {victim} is gone (process {ranks[victim].pid} on ")
        assert describe_outcome(attempt.path) == f"retry 83 {attempt.reason}"
    for rank in {0, 1, 2, 3} - {victim}:
        assert f"error on rank {rank}: {attempt.reason}\n" in run.text()
    assert "Traceback" not in run.text()


def wait_in_the_loader() -> None:
    """Rank 0 never fetches the batch of step 6, and finds out soon that another rank is gone."""
    from sambalm.pretrain.lifecycle import watchdog

    watchdog._LOST_S = 0.2
    in_the_loader()


def test_a_rank_that_waits_for_something_else_finds_out_too(run_values, tmp_path):
    """No message of its own is under way, as for a rank whose GPU waits."""
    run = Run(changed(endless(run_values), watchdog={"save_s": 2}), tmp_path)  # so that it looks often
    with run.started(before=wait_in_the_loader) as (first, second):
        run.wait_for_step(5)
        second.kill()
        assert first.wait(30) == ExitCode.RANK_LOST
        (attempt,) = read_attempts(run.dir)
        assert (attempt.exit_code, attempt.reason) == (83, re.search("error on rank 0: (.*)", run.text())[1])
        assert attempt.reason.startswith(f"rank 1 is gone (process {second.pid} on ")


@pytest.fixture
def processes(monkeypatch):
    """This process is rank 0; rank 1 is on its host, ranks 2 and 3 on another."""
    monkeypatch.setattr(lost_ranks, "EVIDENCE_S", 0.1)
    other = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    own = RankProcess.own()
    neighbour = replace(own, pid=other.pid, start=lost_ranks.process_start(other.pid))
    far = replace(own, host="far", pids="another boot")
    try:
        yield RankProcesses([own, neighbour, far, far]), other
    finally:
        other.kill()
        other.wait()


def ended(processes: RankProcesses, attempt, error: Exception) -> Exception:
    with pytest.raises((type(error), RankLostError)) as found, naming_lost_ranks(processes, attempt):
        raise error
    return found.value


def test_what_another_host_has_is_not_guessed(processes, tmp_path):
    ranks, _ = processes
    found = ended(ranks, tmp_path, RuntimeError(CLOSED))
    assert found.exit_code == ExitCode.RANK_LOST
    assert "ranks 0-1 on " in str(found)
    assert " live, so one of ranks 2-3 or the network to it is gone, and which cannot be known from here (" in str(
        found
    )
    alone = RankProcesses(ranks.all[:2])
    assert "it cannot be known which rank closed it" in str(ended(alone, tmp_path, RuntimeError(CLOSED)))
    broken = SaveBrokenError("ranks lost each other")
    broken.__cause__ = RuntimeError(CLOSED)  # which says it in its place
    assert "it cannot be known which rank closed it" in str(ended(alone, tmp_path, broken))
    assert not read_outcome(tmp_path)  # a rank on the other host may still know better


def test_a_process_has_a_moment_to_end_after_its_connections(processes, tmp_path, monkeypatch):
    ranks, other = processes
    monkeypatch.setattr(lost_ranks, "EVIDENCE_S", 20)
    subprocess.Popen(["sh", "-c", f"sleep 0.3; kill -9 {other.pid}"])
    start_s = time.monotonic()
    found = ended(ranks, tmp_path, dist.DistBackendError("NCCL communicator was aborted"))
    assert time.monotonic() - start_s < 10
    assert str(found).startswith(f"rank 1 is gone (process {other.pid} on ")
    assert read_outcome(tmp_path)["reason"] == str(found)


def test_the_first_outcome_stands(processes, tmp_path):
    """Ranks that leave for a hang close their connections too."""
    ranks, other = processes
    other.kill()
    other.wait()
    write_outcome(tmp_path, exit_code=ExitCode.HANGING, step=4, reason="rank 3: hanging in phase fetch")
    found = ended(ranks, tmp_path, RuntimeError(CLOSED))
    assert (found.exit_code, str(found)) == (ExitCode.HANGING, "rank 3: hanging in phase fetch")


def test_only_a_lost_connection_is_one(processes, tmp_path):
    """A save that broke is one where a rank is gone; other errors say what they say."""
    ranks, other = processes
    broken = SaveBrokenError("ranks lost each other")
    others = (RuntimeError("[gloo/transport/tcp/unbound_buffer.cc:78] Timed out"), dist.DistBackendError("NCCL: usage"))
    for error in (RuntimeError("shapes differ"), OSError("Broken pipe"), NotSavedError("full"), *others, broken):
        assert ended(ranks, tmp_path, error) is error
    other.kill()
    other.wait()
    with pytest.raises(RankLostError, match="rank 1 is gone"), naming_lost_ranks(ranks, tmp_path):
        raise broken
    with pytest.raises(RuntimeError, match="closed by peer"), naming_lost_ranks(RankProcesses(ranks.all[:1]), tmp_path):
        raise RuntimeError(CLOSED)


TELLS = """
from sambalm.pretrain.errors import print_error, print_line
print_line("a line")
print_error(ValueError("an error"))
"""


def test_ranks_that_share_a_log_write_each_line_at_once():
    ours, its = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)  # a message is one write
    with ours, its:
        subprocess.run([sys.executable, "-u", "-c", TELLS], check=True, stderr=its)  # as torchrun starts ranks
        assert [ours.recv(100) for _ in range(2)] == [b"a line\n", b"error: an error\n"]
