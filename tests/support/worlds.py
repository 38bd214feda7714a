"""Real multi-rank gloo worlds for tests, forked from a server that has already imported the slow packages."""

import multiprocessing
import os
import tempfile
import traceback
from collections.abc import Callable
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
    "sambalm.model.mixers.mamba.context_parallel_scan",
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
    context = server_context()
    with tempfile.TemporaryDirectory() as folder:
        queue = context.Queue()
        processes = [
            context.Process(target=_run_rank, args=(function, args, rank, ranks, f"{folder}/store", port, queue))
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
    return [results[rank] for rank in range(ranks)]


def _run_rank(function: Callable, args: tuple, rank: int, ranks: int, store: str, port: int | None, queue: Any) -> None:
    import torch
    import torch.distributed as dist

    os.environ.update(RANK=str(rank), WORLD_SIZE=str(ranks), LOCAL_RANK=str(rank))
    torch.set_num_threads(1)
    try:
        if port is None:
            dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=ranks)
        else:
            os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
        queue.put((rank, function(*args), None))
    except BaseException:
        queue.put((rank, None, f"rank {rank} of {ranks}:\n{traceback.format_exc()}"))
