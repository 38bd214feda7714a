"""How a node's agent ends: its exit code and what it records, for every way in which ranks can end."""

import json
import os
import signal
import sys

import pytest

from sambalm.pretrain.errors import ExitCode
from sambalm.slurm import agent
from tests.support.signals import restored_signals

ENDINGS = [
    # What the first rank to fail ended with, whether Slurm had told the node to leave, and what the agent makes of it.
    (0, False, 0),
    (0, True, 0),
    (1, False, 1),
    (1, True, 1),
    (-signal.SIGKILL, False, 137),
    (-signal.SIGKILL, True, 137),
    (-signal.SIGSEGV, True, 139),
    (-signal.SIGTERM, False, 143),
    (-signal.SIGTERM, True, 75),
    *((int(code), told, int(code)) for code in ExitCode if code for told in (False, True)),
]


@pytest.fixture
def node(tmp_path, monkeypatch):
    """Runs an agent whose ranks end as told; returns its exit code, torchrun's arguments and the outcome it wrote."""
    environment = {"SLURMD_NODENAME": "n2", "SLURM_NNODES": "2", "SLURM_JOB_ID": "7", "SLURM_STEP_ID": "3"}
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(agent, "_head_node", lambda: "n1")

    def run(ranks_exit_code, *, told=False):
        called = []

        def ranks(arguments):
            called.extend(arguments)
            if told:
                os.kill(os.getpid(), signal.SIGTERM)
            return ranks_exit_code

        monkeypatch.setattr(agent, "run_ranks", ranks)
        monkeypatch.setattr(sys, "argv", ["agent", str(tmp_path), "20001", "8", "some.module", "a", "b=c"])
        with pytest.raises(SystemExit) as ended:
            agent.main()
        outcome = tmp_path / "outcome.json"
        return int(ended.value.code), called, json.loads(outcome.read_text()) if outcome.exists() else None

    with restored_signals():
        yield run


@pytest.mark.parametrize(("of_ranks", "told", "expected"), ENDINGS)
def test_each_way_to_end_has_its_exit_code_and_outcome(of_ranks, told, expected, node):
    exit_code, _, outcome = node(of_ranks, told=told)
    assert exit_code == expected
    if expected in {int(code) for code in ExitCode} - {0}:
        assert (outcome["exit_code"], outcome["step"]) == (expected, None)
        assert f"a rank on n2 ended with exit code {expected};" in outcome["reason"]
    else:
        assert outcome is None


def test_what_the_run_recorded_of_its_end_stays(node, tmp_path):
    (tmp_path / "outcome.json").write_text('{"exit_code": 77}')
    exit_code, _, outcome = node(int(ExitCode.RUN_IN_USE))
    assert (exit_code, outcome) == (79, {"exit_code": 77})


def test_an_end_is_that_of_the_attempt_that_torchrun_started_last(node, tmp_path):
    last = tmp_path.with_name(f"{tmp_path.name}.restart1")
    last.mkdir()
    exit_code, _, outcome = node(int(ExitCode.BAD_INPUT))
    assert (exit_code, outcome) == (ExitCode.BAD_INPUT, None)
    assert json.loads((last / "outcome.json").read_text())["exit_code"] == ExitCode.BAD_INPUT


def test_torchrun_is_given_the_module_and_its_arguments(node, monkeypatch):
    for name in ("IN_JOB_RESTARTS", "TORCH_DISABLE_SHARE_RDZV_TCP_STORE"):
        monkeypatch.delenv(name, raising=False)
    assert node(0)[1][-5:] == ["--max-restarts=0", "-m", "some.module", "a", "b=c"]
    assert os.environ["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] == "1"
    monkeypatch.setenv("IN_JOB_RESTARTS", "1")
    _, arguments, _ = node(0)
    split = arguments.index("-m")
    assert arguments[split:] == ["-m", "some.module", "a", "b=c"]
    assert arguments[:split] == [
        "--nnodes=2",
        "--nproc-per-node=8",
        "--rdzv-id=7.3",
        "--rdzv-backend=c10d",
        "--rdzv-endpoint=n1:20001",
        "--rdzv-conf=is_host=0,join_timeout=600",
        "--local-addr=n2",
        "--shutdown-timeout=30",
        "--signals-to-handle=SIGINT,SIGHUP",
        "--max-restarts=1",
    ]


def test_the_first_node_of_the_step_hosts_the_rendezvous(tmp_path, monkeypatch):
    scontrol = tmp_path / "scontrol"
    scontrol.write_text('#!/bin/sh\n[ "$*" = "show hostnames n[1-2]" ] && printf "n1\\nn2\\n"\n')
    scontrol.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.setenv("SLURM_STEP_NODELIST", "n[1-2]")
    assert agent._head_node() == "n1"
    environment = {"SLURMD_NODENAME": "n1", "SLURM_NNODES": "2", "SLURM_JOB_ID": "7", "SLURM_STEP_ID": "3"}
    arguments = agent.torchrun_arguments(environment, port="1", ranks_per_node="1", head="n1", restarts="1")
    assert "--rdzv-conf=is_host=1,join_timeout=600" in arguments


@pytest.mark.parametrize(
    ("exit_codes", "expected", "says"),
    [
        ([], 0, ""),
        ([75], 75, "rank 0 on n1 ended with exit code 75\n"),
        ([-9, 1], -9, "rank 0 on n1 ended with SIGKILL\n"),  # the first in time
        (None, 1, "the agent of the first node is gone, and with it the rendezvous\n"),
    ],
)
def test_the_rank_that_failed_first_gives_the_exit_code(exit_codes, expected, says, monkeypatch, capsys):
    from torch.distributed import run as torchrun
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure
    from torch.distributed.elastic.rendezvous import RendezvousConnectionError

    def run(arguments):
        assert arguments.training_script == "rank.py"
        if exit_codes is None:
            raise RendezvousConnectionError
        if exit_codes:
            failures = {r: ProcessFailure(r, 100 + r, code, "no file") for r, code in enumerate(exit_codes)}
            for rank, failure in failures.items():
                failure.timestamp = rank
            raise ChildFailedError("rank.py", failures)

    monkeypatch.setattr(torchrun, "run", run)
    monkeypatch.setenv("SLURMD_NODENAME", "n1")
    assert agent.run_ranks(["--nnodes=1", "rank.py"]) == expected
    assert capsys.readouterr().err == says
