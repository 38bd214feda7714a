"""The groups of a world: each has the configured timeout, and the hosts' group is one that a thread may use."""

import socket
import threading
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist
from torch.distributed import distributed_c10d

from tests.support.whole_runs import changed
from tests.support.worlds import run_world

TIMEOUT_S = 97.5  # neither a default of torch's nor whole minutes, in which megatron-core counts


def timeouts_of_all_groups() -> dict[str, timedelta]:
    """By name and description, of the groups that this process belongs to: all that torch.distributed knows."""
    return {
        f"{distributed_c10d._world.pg_names[group]} {group.group_desc} {device}": group._get_backend(
            device
        ).options._timeout
        for group in distributed_c10d._world.pg_map
        for device in group._device_types
    }


def train_on_rank(values: dict) -> dict[str, timedelta]:
    """Trains in a world that the product makes by itself; returns the timeouts as they are at the end of the run."""
    from sambalm.pretrain.config_file import parse_config
    from sambalm.pretrain.lifecycle.run_folder import RunFolder
    from sambalm.pretrain.trainer import train

    found = {}
    end = RunFolder.end

    def end_and_look(*args, **named):
        found.update(timeouts_of_all_groups())
        end(*args, **named)

    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(RunFolder, "end", end_and_look)
        train(parse_config(values, source="test"))
    return found


@pytest.mark.parametrize(
    "parallel",
    [
        {"zero_stage": 1},
        {"tensor": 2, "sequence": True},
        {"pipeline": 2, "virtual_pipeline": 2},
        pytest.param({"context": 2, "zero_stage": 3}, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_every_group_of_a_run_has_the_configured_timeout(parallel, run_values):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    values = changed(
        run_values,
        model={"num_kv_heads": 1},  # which two tensor-parallel ranks hold copies of, with a group of their own
        parallel=parallel | {"timeout_s": TIMEOUT_S},
        train={"steps": 2},
        checkpoint={"every_steps": 1},
    )
    for found in run_world(train_on_rank, values, ranks=2, port=port):
        assert len(found) > 10
        assert {name: timeout for name, timeout in found.items() if timeout != timedelta(seconds=TIMEOUT_S)} == {}


def agree_in_a_thread(rounds: int) -> tuple[list, list[float]]:
    """What a thread gathers over the hosts' group while the main thread adds numbers up over the default group."""
    from sambalm.parallel.config import ParallelConfig
    from sambalm.parallel.groups import start_world

    with start_world(ParallelConfig()) as world:
        assert len({world.host_group, world.replica_group, world.model_group, dist.group.WORLD}) == 4
        gathered: list = []

        def gather() -> None:
            gathered.extend(world.all_gather_object((world.rank, number)) for number in range(rounds))

        thread = threading.Thread(target=gather)
        if world.rank == 0:
            thread.start()
        sums = []
        for number in range(rounds):
            value = torch.tensor(float(number), device=world.device)
            dist.all_reduce(value)
            sums.append(value.item())
        if world.rank != 0:  # this one's thread comes later: the main threads must not have waited for it
            thread.start()
        thread.join()
        world.barrier()
        assert world.broadcast_object(f"of rank {world.rank}") == "of rank 0"
        assert world.largest(1).item() == 1  # two ranks that are asked to save are not asked to leave
        assert world.largest(world.rank).item() == 1
    return gathered, sums


def test_a_thread_agrees_over_the_host_group_while_the_main_thread_communicates():
    rounds = 50
    for gathered, sums in run_world(agree_in_a_thread, rounds, ranks=2):
        assert gathered == [[(0, number), (1, number)] for number in range(rounds)]
        assert sums == [2.0 * number for number in range(rounds)]
