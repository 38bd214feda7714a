"""One node's part of a job step: torchrun's agent under Slurm, started by slurm/common.sh.

    srun ... python -m sambalm.slurm.agent ATTEMPT_DIR PORT RANKS_PER_NODE sambalm.pretrain.cli train CONFIG ...

The rendezvous is at the step's first node; rank 0 is where torchrun puts it, and torchrun tells the others. Slurm's
signals reach the ranks too, so the agent itself only remembers them.
"""

import logging
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from sambalm.pretrain.errors import ExitCode, write_line
from sambalm.pretrain.lifecycle.attempts import newest_restart, write_outcome

RESTARTS_VARIABLE = "IN_JOB_RESTARTS"
SHUTDOWN_S = 30  # that the other ranks of the node have to end after one has failed


def main() -> None:
    attempt_dir, port, ranks_per_node, module, *arguments = sys.argv[1:]
    os.environ.setdefault("TORCH_DISABLE_SHARE_RDZV_TCP_STORE", "1")  # else restarts find ranks that are gone
    terminated = _remember_term()
    restarts = os.environ.get(RESTARTS_VARIABLE, "0")
    torchrun = torchrun_arguments(
        os.environ, port=port, ranks_per_node=ranks_per_node, head=_head_node(), restarts=restarts
    )
    exit_code = run_ranks([*torchrun, "-m", module, *arguments])
    if exit_code == -signal.SIGTERM and terminated():
        exit_code = ExitCode.REQUEUE  # a rank that had not come as far as to listen
    if exit_code in set(ExitCode) - {ExitCode.FINISHED}:
        # Of a refusal that came before the run recorded anything; what it did record stays.
        reason = f"a rank on {os.environ['SLURMD_NODENAME']} ended with exit code {int(exit_code)}; its log says why"
        write_outcome(newest_restart(Path(attempt_dir)), exit_code=exit_code, step=None, reason=reason)
    sys.exit(exit_code if exit_code >= 0 else 128 - exit_code)


def torchrun_arguments(
    environment: Mapping[str, str], *, port: str, ranks_per_node: str, head: str, restarts: str
) -> list[str]:
    """For a task of a step with one task a node.

    Args:
        restarts: how often torchrun starts all ranks again, on the same nodes, when one has failed.
    """
    node = environment["SLURMD_NODENAME"]
    return [
        f"--nnodes={environment['SLURM_NNODES']}",
        f"--nproc-per-node={ranks_per_node}",
        f"--rdzv-id={environment['SLURM_JOB_ID']}.{environment['SLURM_STEP_ID']}",
        "--rdzv-backend=c10d",
        f"--rdzv-endpoint={head}:{port}",
        f"--rdzv-conf=is_host={int(node == head)},join_timeout=600",
        f"--local-addr={node}",
        f"--shutdown-timeout={SHUTDOWN_S}",
        "--signals-to-handle=SIGINT,SIGHUP",
        f"--max-restarts={restarts}",
    ]


def run_ranks(arguments: Sequence[str]) -> int:
    """Runs torchrun in this process; returns 0, or the exit code of the rank that failed first (negative: a signal)."""
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.elastic.rendezvous import RendezvousConnectionError
    from torch.distributed.run import parse_args, run

    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)  # the ranks speak for themselves
    try:
        run(parse_args(arguments))
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        write_line(f"rank {rank} on {os.environ['SLURMD_NODENAME']} ended with {_ending(failure.exitcode)}")
        return failure.exitcode
    except RendezvousConnectionError:
        write_line("the agent of the first node is gone, and with it the rendezvous")
        return 1
    return 0


def _ending(exit_code: int) -> str:
    return f"exit code {exit_code}" if exit_code >= 0 else signal.Signals(-exit_code).name


def _head_node() -> str:
    names = ["scontrol", "show", "hostnames", os.environ["SLURM_STEP_NODELIST"]]
    return subprocess.run(names, check=True, capture_output=True, text=True).stdout.split()[0]


def _remember_term() -> Callable[[], bool]:
    received = []
    signal.signal(signal.SIGTERM, lambda *_: received.append(True))
    return lambda: bool(received)


if __name__ == "__main__":
    main()
