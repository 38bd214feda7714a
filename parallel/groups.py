"""Every process group of a run: `TensorParallel` is what a layer needs to know of the other ranks, `World` the rest.

No other file asks megatron-core's `parallel_state`, but for DeepSpeed's adapter (`parallel/zero`).
"""

import contextlib
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import timedelta
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist
from torch.distributed import ProcessGroup

from sambalm.parallel.compat.megatron import parallel_state
from sambalm.parallel.config import ParallelConfig, check_world_size
from sambalm.parallel.environment import world_size

T = TypeVar("T")


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
    group: ProcessGroup | None = None
    embedding_group: ProcessGroup | None = None  # the first and the last stage, on these two alone


@dataclass(frozen=True)
class World:
    """This process's place in the run and all groups that it belongs to, made by `start_world`.

    Operations of one group must not be started by two threads at once. `host_group` is a group of its own on every
    device, so that a thread may use it while the main thread communicates over the others.
    """

    rank: int
    size: int
    device: torch.device
    timeout: timedelta  # how long an operation of any group waits for the other ranks
    host_group: ProcessGroup  # all ranks, over the hosts' network (gloo): what hosts agree on, without the device
    save_group: ProcessGroup  # the same for the thread that writes checkpoints, and for nothing else
    model_group: ProcessGroup  # ranks that hold one copy of the weights between them: tensor and pipeline dimension
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

    def device_is_busy(self) -> bool:
        """Whether the device has not done yet all that it was handed; a CPU, which is never behind, always has."""
        return self.device.type == "cuda" and not torch.cuda.current_stream(self.device).query()

    def sum_over_replicas(self, value: torch.Tensor) -> torch.Tensor:
        """Sum of a tensor over the ranks that hold the same weights."""
        if self.replica_size == 1:
            return value
        value = value.clone()
        dist.all_reduce(value, group=self.replica_group)
        return value

    @property
    def of_save_thread(self) -> "World":
        """The same world for the thread that writes checkpoints: its host group is `save_group`."""
        return replace(self, host_group=self.save_group)

    def largest(self, numbers: Sequence[int]) -> torch.Tensor:
        """The largest of all ranks' of each number, int64 [numbers] on the device; the host waits once it reads it."""
        value = torch.tensor(numbers, dtype=torch.int64)
        if self.device.type == "cuda":
            value = value.pin_memory().to(self.device, non_blocking=True)
        if self.size > 1:
            dist.all_reduce(value, op=dist.ReduceOp.MAX)
        return value

    def from_last_stage(self, value: torch.Tensor) -> torch.Tensor:
        """The last pipeline stage's value of a tensor, on all stages."""
        if self.pipeline.size == 1:
            return value
        value = value.clone()
        dist.broadcast(value, group=self.pipeline.group, group_src=self.pipeline.size - 1)
        return value

    def broadcast_object(self, value: Any) -> Any:
        """The main rank's value of something that pickle can send, on every rank. Collective, over the host group."""
        values = [value]
        dist.broadcast_object_list(values, src=0, group=self.host_group)
        return values[0]

    def of_main(self, action: Callable[[], T]) -> T:
        """Runs an action on the main rank alone and returns its result on all. Collective, over the host group.

        Raises:
            Exception: on every rank, what the action raised.
        """
        result: T | None = None
        failure: Exception | None = None
        if self.is_main:
            try:
                result = action()
            except Exception as error:  # whatever it is: the other ranks would wait for this one
                failure = error
        result, failure = self.broadcast_object((result, failure))
        if failure:
            raise failure
        return cast(T, result)

    def all_gather_object(self, value: Any) -> list[Any]:
        """All ranks' values of something that pickle can send, rank 0 first. Collective, over the host group."""
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value, group=self.host_group)
        return values

    def barrier(self) -> None:
        """Waits for the host of every rank to come here. Collective, over the host group."""
        dist.barrier(group=self.host_group)


@contextlib.contextmanager
def start_world(config: ParallelConfig, *, copies: int = 1) -> Iterator[World]:
    """Makes the process groups of the layout, under torchrun or in a process alone, and ends them on leaving.

    Every group has the timeout `parallel.timeout_s`, but for a default group that the caller has already made.

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
    device, timeout = _device(), timedelta(seconds=config.timeout_s)
    if not dist.is_initialized():
        backend = "nccl" if device.type == "cuda" else "gloo"
        dist.init_process_group(backend, store=_store(size, timeout), rank=rank, world_size=size, timeout=timeout)
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=config.tensor,
        pipeline_model_parallel_size=config.pipeline,
        virtual_pipeline_model_parallel_size=config.virtual_pipeline if config.virtual_pipeline > 1 else None,
        context_parallel_size=config.context,
        distributed_timeout_minutes=timeout / timedelta(minutes=1),
        create_gloo_process_groups=False,  # nothing uses them, and megatron-core gives some of them no timeout
    )
    try:
        yield _world(config, device, copies=copies, timeout=timeout)
    finally:
        parallel_state.destroy_model_parallel()
        dist.destroy_process_group()


def _store(size: int, timeout: timedelta) -> dist.Store | None:
    """Where ranks find each other; None: where torchrun's environment says.

    torchrun's agent keeps its store over restarts, and with it the addresses of ranks that are gone. The agents of
    several nodes may count restarts differently; with TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 they make a store each time.
    """
    if size == 1:
        return dist.HashStore()
    variables = os.environ
    restarts, is_agents = variables.get("TORCHELASTIC_RESTART_COUNT", "0"), "TORCHELASTIC_USE_AGENT_STORE"
    if restarts == "0" or variables.get(is_agents) != "True" or variables.get("LOCAL_WORLD_SIZE") != str(size):
        return None
    address, port = variables["MASTER_ADDR"], int(variables["MASTER_PORT"])
    store = dist.TCPStore(address, port, world_size=size, is_master=False, timeout=timeout)
    return dist.PrefixStore(f"restart_{restarts}", store)


def _device() -> torch.device:
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
        return torch.device("cuda", torch.cuda.current_device())
    from sambalm.parallel.compat.cpu import prepare_cpu

    prepare_cpu()
    return torch.device("cpu")


def _world(config: ParallelConfig, device: torch.device, *, copies: int, timeout: timedelta) -> World:
    tensor_rank, tensor_group = (
        parallel_state.get_tensor_model_parallel_rank(),
        parallel_state.get_tensor_model_parallel_group(),
    )
    return World(
        rank=dist.get_rank(),
        size=dist.get_world_size(),
        device=device,
        timeout=timeout,
        host_group=dist.new_group(backend="gloo", timeout=timeout, group_desc="HOST_GROUP"),
        save_group=dist.new_group(backend="gloo", timeout=timeout, group_desc="SAVE_GROUP"),
        model_group=parallel_state.get_model_parallel_group(),
        tensor=TensorParallel(
            rank=tensor_rank,
            size=config.tensor,
            sequence=config.sequence,
            group=tensor_group,
            copy_groups={copies: _copy_group(copies, timeout=timeout)} if copies > 1 else {},
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
            group=parallel_state.get_pipeline_model_parallel_group(),
            embedding_group=parallel_state.get_embedding_group(check_initialized=False),
        ),
        data_rank=parallel_state.get_data_parallel_rank(),
        data_size=parallel_state.get_data_parallel_world_size(),
        replica_rank=parallel_state.get_data_parallel_rank(with_context_parallel=True),
        replica_size=parallel_state.get_data_parallel_world_size(with_context_parallel=True),
        replica_group=parallel_state.get_data_parallel_group(with_context_parallel=True),
    )


def _copy_group(copies: int, *, timeout: timedelta) -> ProcessGroup:
    """The group of this rank and its neighbours with the same kv head; tensor-parallel ranks are consecutive."""
    starts = range(0, dist.get_world_size(), copies)
    ranks = [list(range(start, start + copies)) for start in starts]
    group, _ = dist.new_subgroups_by_enumeration(ranks, timeout=timeout)
    return group
