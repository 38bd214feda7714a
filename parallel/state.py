"""Who the other ranks are: `TensorParallel` is what a layer needs to know of them, `World` what the run needs."""

import contextlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from torch.distributed import ProcessGroup

from sambalm.parallel.config import ParallelConfig, check_world_size


@dataclass(frozen=True)
class TensorParallel:
    """This rank's place among those that share each layer. The default is a process on its own, without any group."""

    rank: int = 0
    size: int = 1
    sequence: bool = False  # whether activations between the layers' matrix products are cut along the sequence too
    group: ProcessGroup | None = None


@dataclass(frozen=True)
class World:
    """This process's place in the run, made by `start_world`."""

    rank: int
    size: int
    device: torch.device
    tensor: TensorParallel
    data_rank: int
    data_size: int
    data_group: ProcessGroup

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def mean_over_data(self, value: torch.Tensor) -> torch.Tensor:
        """Mean of a tensor over data-parallel ranks."""
        value = value.clone()
        dist.all_reduce(value, group=self.data_group)
        return value / self.data_size

    def sum_over_data(self, value: torch.Tensor) -> torch.Tensor:
        """Sum of a tensor over data-parallel ranks."""
        value = value.clone()
        dist.all_reduce(value, group=self.data_group)
        return value


@contextlib.contextmanager
def start_world(config: ParallelConfig, *, timeout_s: float = 1800.0) -> Iterator[World]:
    """Makes the process groups of the layout, under torchrun or in a process alone, and ends them on leaving.

    Raises:
        ParallelError: the number of processes does not fit the layout.
    """
    size, rank = world_size(), int(os.environ.get("RANK", 0))
    os.environ.setdefault("LOCAL_RANK", "0")  # DeepSpeed asks for it in a process alone too
    # One queue of kernels, so that a collective starts before the matrix product that it overlaps with.
    os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")
    check_world_size(config, world_size=size)
    device = _device()
    if not dist.is_initialized():
        backend, timeout = ("nccl" if device.type == "cuda" else "gloo"), timedelta(seconds=timeout_s)
        store = dist.HashStore() if size == 1 else None  # torchrun's environment names the store of several
        dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=timeout)
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=config.tensor,
        pipeline_model_parallel_size=config.pipeline,
        virtual_pipeline_model_parallel_size=config.virtual_pipeline if config.virtual_pipeline > 1 else None,
        context_parallel_size=config.context,
    )
    try:
        yield _world(config, device)
    finally:
        parallel_state.destroy_model_parallel()
        dist.destroy_process_group()


def world_size() -> int:
    """Processes of the run: torchrun's, or one."""
    return int(os.environ.get("WORLD_SIZE", 1))


def is_main_process() -> bool:
    """Whether this is the first process of the run; known before any process group."""
    return os.environ.get("RANK", "0") == "0"


def _device() -> torch.device:
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
        return torch.device("cuda", torch.cuda.current_device())
    from sambalm.parallel.cpu import prepare_cpu

    prepare_cpu()
    return torch.device("cpu")


def _world(config: ParallelConfig, device: torch.device) -> World:
    return World(
        rank=dist.get_rank(),
        size=dist.get_world_size(),
        device=device,
        tensor=TensorParallel(
            rank=parallel_state.get_tensor_model_parallel_rank(),
            size=config.tensor,
            sequence=config.sequence,
            group=parallel_state.get_tensor_model_parallel_group(),
        ),
        data_rank=parallel_state.get_data_parallel_rank(with_context_parallel=True),
        data_size=parallel_state.get_data_parallel_world_size(with_context_parallel=True),
        data_group=parallel_state.get_data_parallel_group(with_context_parallel=True),
    )
