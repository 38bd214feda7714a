"""The groups of a world on two GPUs: NCCL's time out as configured, and the hosts' stands beside them."""

import os
import socket
import time

import pytest
import torch
import torch.distributed as dist

from sambalm.parallel.config import ParallelConfig
from sambalm.parallel.groups import start_world
from tests.parallel.test_groups import TIMEOUT_S, agree_in_a_thread, timeouts_of_all_groups

RANKS = 2
pytestmark = pytest.mark.skipif(torch.cuda.device_count() < RANKS, reason=f"needs {RANKS} CUDA devices")
SHORT_TIMEOUT_S = 10.0


def on_rank(rank, port, function, arguments):
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(RANKS))
    os.environ.update(MASTER_ADDR="localhost", MASTER_PORT=port)
    function(rank, *arguments)


def on_two_gpus(function, *arguments):
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = str(free.getsockname()[1])
    torch.multiprocessing.spawn(on_rank, (port, function, arguments), nprocs=RANKS)


def ask_for_timeouts(rank, layout):
    with start_world(ParallelConfig(timeout_s=TIMEOUT_S, **layout), copies=2 if "tensor" in layout else 1):
        found = {name: timeout.total_seconds() for name, timeout in timeouts_of_all_groups().items()}
        assert len(found) > 10
        assert set(found.values()) == {TIMEOUT_S}, found


@pytest.mark.parametrize("layout", [{"zero_stage": 1}, {"tensor": 2, "sequence": True}, {"pipeline": 2}], ids=str)
def test_every_group_has_the_configured_timeout(layout):
    on_two_gpus(ask_for_timeouts, layout)


def gather_and_add(rank):
    rounds = 50
    gathered, sums = agree_in_a_thread(rounds)
    assert gathered == [[(0, number), (1, number)] for number in range(rounds)]
    assert sums == [2.0 * number for number in range(rounds)]


def test_a_thread_agrees_over_the_host_group_while_nccl_communicates():
    on_two_gpus(gather_and_add)


def wait_for_a_rank_that_does_not_come(rank):
    with start_world(ParallelConfig(timeout_s=SHORT_TIMEOUT_S)) as world:
        value = torch.ones((), device=world.device)
        dist.all_reduce(value, group=world.replica_group)
        assert value.item() == RANKS
        if rank == 0:
            dist.all_reduce(value, group=world.replica_group)
            value.item()
        time.sleep(20 * SHORT_TIMEOUT_S)  # far past what the test allows


def test_a_rank_that_waits_in_vain_ends_after_the_timeout():
    start_s = time.monotonic()
    with pytest.raises((torch.multiprocessing.ProcessExitedException, torch.multiprocessing.ProcessRaisedException)):
        on_two_gpus(wait_for_a_rank_that_does_not_come)
    assert SHORT_TIMEOUT_S < time.monotonic() - start_s < 10 * SHORT_TIMEOUT_S


def wait_for_a_host_that_does_not_come(rank):
    with start_world(ParallelConfig(timeout_s=SHORT_TIMEOUT_S)) as world:
        world.barrier()
        if rank == 0:
            world.barrier()
        time.sleep(20 * SHORT_TIMEOUT_S)


def test_a_host_that_waits_in_vain_is_told_after_the_timeout():
    start_s = time.monotonic()
    with pytest.raises(torch.multiprocessing.ProcessRaisedException, match=r"[Tt]imed out|[Tt]imeout"):
        on_two_gpus(wait_for_a_host_that_does_not_come)
    assert SHORT_TIMEOUT_S < time.monotonic() - start_s < 10 * SHORT_TIMEOUT_S
