"""Real multi-rank gloo worlds for tests, forked from a server that has already imported the slow packages."""

import multiprocessing
import os
import tempfile
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from multiprocessing.context import ForkServerContext
from typing import Any

# All that most ranks import. Each rank is a fork of one process that has it already; what is not there is left out.
PRELOAD = [
    "pytest",
    "torch._dynamo",  # which torch.optim imports with the first optimizer
    "sambalm.pretrain.trainer",
    "sambalm.pretrain.check_layout",
    "sambalm.pretrain.checkpointing.to_hf",
    "sambalm.parallel.compat.cpu",
    "sambalm.parallel.layers.context_parallel",
    "sambalm.model.mixers.attention.layer",
    "sambalm.model.selective_scan",
    "sambalm.model.mixers.mamba.layer",
    "sambalm.model.mixers.mlp.layer",
    "deepspeed.module_inject.auto_ep_layer",
    "megatron.core.models.backends",
    "megatron.core.transformer.multi_token_prediction",
    "megatron.core.transformer.transformer_block",
    "sambalm.pretrain.cli.app",
    "tests.support.frozen",  # the last
]


def server_context() -> ForkServerContext:
    """Makes processes that are forks of a server with all of PRELOAD, which is started with the first."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOAD)
    return context


def run_world(
    function: Callable[..., Any], *args: Any, ranks: int, timeout_s: float = 120.0, port: int | None = None
) -> list[Any]:
    """Runs function(*args) on every rank of a new world and returns the ranks' results, rank 0 first.

    The function must be importable (a module's top level) and the results picklable. A rank's failure fails the call
    with that rank's traceback.

    Args:
        port: where the function, instead of this one, lets the ranks meet: it makes the default process group itself.
    """
    (results,) = run_calls([Call(function, args, ranks=ranks)], timeout_s=timeout_s, port=port)
    return results


@dataclass(frozen=True, eq=False)
class Call:
    """A function for every rank of a world, with its arguments."""

    function: Callable[..., Any]
    args: tuple
    ranks: int


class SharedWorlds:
    """Runs a module's calls that have as many ranks in one world, when a result of one of them is first asked for.

    A call in a world of its own takes a process a rank to start and to import what no server has, which is as long as
    a step of a small model. Others than the given calls run alone, such as those of tests that are seldom run.
    """

    def __init__(self, *calls: Call) -> None:
        self._calls = calls
        self._results: dict[Call, list[Any]] = {}

    def __getitem__(self, call: Call) -> list[Any]:
        """The results of the call's ranks, rank 0 first."""
        if call not in self._results:
            together = [each for each in self._calls if each.ranks == call.ranks] if call in self._calls else [call]
            self._results.update(zip(together, run_calls(together), strict=True))
        return self._results[call]


def run_calls(calls: Sequence[Call], *, timeout_s: float = 120.0, port: int | None = None) -> list[list[Any]]:
    """Runs calls of as many ranks one after the other in one world, each with a process group of its own.

    Returns of each call the ranks' results. Otherwise as `run_world`.
    """
    context, ranks = server_context(), calls[0].ranks
    work = [(call.function, call.args) for call in calls]
    with tempfile.TemporaryDirectory() as folder:
        queue = context.Queue()
        processes = [
            context.Process(target=_run_rank, args=(work, rank, ranks, f"{folder}/store", port, queue))
            for rank in range(ranks)
        ]
        for process in processes:
            process.start()
        results, failure = {}, None
        try:
            while len(results) < ranks and failure is None:
                rank, result, failure = queue.get(timeout=timeout_s)
                results[rank] = result
        finally:
            for process in processes:
                if failure is not None:
                    process.terminate()
                process.join(timeout=10)
                if process.is_alive():
                    process.kill()
    assert failure is None, failure
    return [[results[rank][number] for rank in range(ranks)] for number in range(len(calls))]


def _run_rank(
    work: Sequence[tuple[Callable, tuple]], rank: int, ranks: int, store: str, port: int | None, queue: Any
) -> None:
    import torch
    import torch.distributed as dist

    os.environ.update(RANK=str(rank), WORLD_SIZE=str(ranks), LOCAL_RANK=str(rank))
    torch.set_num_threads(1)
    if port is not None:
        os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    results = []
    try:
        for number, (function, args) in enumerate(work):
            if port is None:
                dist.init_process_group("gloo", init_method=f"file://{store}{number}", rank=rank, world_size=ranks)
            results.append(function(*args))
            if len(results) < len(work) and dist.is_initialized():
                dist.destroy_process_group()
        queue.put((rank, results, None))
    except BaseException:
        queue.put((rank, None, f"rank {rank} of {ranks}:\n{traceback.format_exc()}"))
