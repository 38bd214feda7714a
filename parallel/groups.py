"""Who the other ranks are: `TensorParallel` is what a layer needs to know of them, `World` what the run needs."""

import contextlib
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from datetime import timedelta

import torch
import torch.distributed as dist
from torch.distributed import ProcessGroup

from sambalm.parallel.compat.megatron import parallel_state
from sambalm.parallel.config import ParallelConfig, check_world_size


@dataclass(frozen=True)
class TensorParallel:
    """This rank's place among those that share each layer. The default is a process on its own, without any group."""

    rank: int = 0
    size: int = 1
    sequence: bool = False  # whether activations between the layers' matrix products are cut along the sequence too
    group: ProcessGroup | None = None
    copy_groups: Mapping[int, ProcessGroup] = field(default_factory=dict)

    def copies(self, number: int) -> "TensorParallel":
        """The ranks that hold copies of the same slice, where `number` neighbouring ranks do."""
        if number == 1:
            return TensorParallel()
        return TensorParallel(rank=self.rank % number, size=number, group=self.copy_groups[number])


@dataclass(frozen=True)
class ContextParallel:
    """This rank's place among those that share each sequence, in contiguous parts. The default is the whole of it."""

    rank: int = 0
    size: int = 1
    group: ProcessGroup | None = None

    def part(self, sequences: torch.Tensor) -> torch.Tensor:
        """This rank's part of [batch, sequence, ...]."""
        return sequences.chunk(self.size, dim=1)[self.rank]


@dataclass(frozen=True)
class Pipeline:
    """This rank's place among the stages of the model. The default is the whole model."""

    rank: int = 0
    size: int = 1
    chunks: int = 1  # model chunks a stage (virtual pipeline)


@dataclass(frozen=True)
class World:
    """This process's place in the run, made by `start_world`."""

    rank: int
    size: int
    device: torch.device
    tensor: TensorParallel
    context: ContextParallel
    pipeline: Pipeline
    data_rank: int  # among ranks that read different samples
    data_size: int
    replica_rank: int  # among ranks that hold the same weights: those of the data and the context dimension
    replica_size: int
    replica_group: ProcessGroup

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def sum_over_replicas(self, value: torch.Tensor) -> torch.Tensor:
        """Sum of a tensor over the ranks that hold the same weights."""
        if self.replica_size == 1:
            return value
        value = value.clone()
        dist.all_reduce(value, group=self.replica_group)
        return value

    def largest(self, number: int) -> torch.Tensor:
        """The largest of all ranks' numbers, int64 [] on the device; the host waits only once it reads it."""
        value = torch.full((), number, dtype=torch.int64, device=self.device)
        if self.size > 1:
            dist.all_reduce(value, op=dist.ReduceOp.MAX)
        return value

    def from_last_stage(self, value: torch.Tensor) -> torch.Tensor:
        """The last pipeline stage's value of a tensor, on all stages."""
        if self.pipeline.size == 1:
            return value
        value = value.clone()
        group = parallel_state.get_pipeline_model_parallel_group()
        dist.broadcast(value, group=group, group_src=self.pipeline.size - 1)
        return value


@contextlib.contextmanager
def start_world(config: ParallelConfig, *, copies: int = 1, timeout_s: float = 1800.0) -> Iterator[World]:
    """Makes the process groups of the layout, under torchrun or in a process alone, and ends them on leaving.

    Args:
        copies: how many neighbouring tensor-parallel ranks hold the same kv head.

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
        yield _world(config, device, copies=copies)
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
    from sambalm.parallel.compat.cpu import prepare_cpu

    prepare_cpu()
    return torch.device("cpu")


def _world(config: ParallelConfig, device: torch.device, *, copies: int) -> World:
    tensor_rank, tensor_group = (
        parallel_state.get_tensor_model_parallel_rank(),
        parallel_state.get_tensor_model_parallel_group(),
    )
    return World(
        rank=dist.get_rank(),
        size=dist.get_world_size(),
        device=device,
        tensor=TensorParallel(
            rank=tensor_rank,
            size=config.tensor,
            sequence=config.sequence,
            group=tensor_group,
            copy_groups={copies: _copy_group(copies)} if copies > 1 else {},
        ),
        context=ContextParallel(
            rank=parallel_state.get_context_parallel_rank(),
            size=config.context,
            group=parallel_state.get_context_parallel_group(),
        ),
        pipeline=Pipeline(
            rank=parallel_state.get_pipeline_model_parallel_rank(),
            size=config.pipeline,
            chunks=config.virtual_pipeline,
        ),
        data_rank=parallel_state.get_data_parallel_rank(),
        data_size=parallel_state.get_data_parallel_world_size(),
        replica_rank=parallel_state.get_data_parallel_rank(with_context_parallel=True),
        replica_size=parallel_state.get_data_parallel_world_size(with_context_parallel=True),
        replica_group=parallel_state.get_data_parallel_group(with_context_parallel=True),
    )


def _copy_group(copies: int) -> ProcessGroup:
    """The group of this rank and its neighbours with the same kv head; tensor-parallel ranks are consecutive."""
    starts = range(0, dist.get_world_size(), copies)
    group, _ = dist.new_subgroups_by_enumeration([list(range(start, start + copies)) for start in starts])
    return group
