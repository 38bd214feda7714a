"""DeepSpeed 0.19.8 as this project uses it. No other file imports DeepSpeed.

Besides its public interface, ZeRO-1's own reduction and gather, AdamW's state and the gradient's norm need members that
DeepSpeed keeps private, and some that are replaced. Each function names the file of DeepSpeed that has them.
`tests/parallel/test_deepspeed_contract.py` fails with a sentence that names the member when a version changes one.
"""

import importlib
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

if not torch.cuda.is_available():
    os.environ.setdefault("DS_ACCELERATOR", "cpu")  # unasked, DeepSpeed warns that it found no other

import deepspeed
from deepspeed import DeepSpeedEngine as Engine
from deepspeed.runtime.zero.stage_1_and_2 import GradPartitionBufferGroup
from torch import Tensor, nn
from torch.optim import Optimizer

from sambalm.parallel.compat.megatron_core import parallel_state
from sambalm.parallel.compat.uncompiled import nothing_compiled

with nothing_compiled():
    import deepspeed.runtime.zero.muon.original_muon  # which ZeRO's engine imports to ask whether AdamW is Muon


class MegatronUnit:
    """What DeepSpeed asks of a model-parallel unit, answered by megatron-core's parallel state."""

    get_model_parallel_rank = staticmethod(parallel_state.get_tensor_model_parallel_rank)
    get_model_parallel_world_size = staticmethod(parallel_state.get_tensor_model_parallel_world_size)
    get_model_parallel_group = staticmethod(parallel_state.get_model_parallel_group)
    get_tensor_model_parallel_rank = staticmethod(parallel_state.get_tensor_model_parallel_rank)
    get_tensor_model_parallel_world_size = staticmethod(parallel_state.get_tensor_model_parallel_world_size)
    get_tensor_model_parallel_group = staticmethod(parallel_state.get_tensor_model_parallel_group)
    get_pipeline_model_parallel_world_size = staticmethod(parallel_state.get_pipeline_model_parallel_world_size)

    @staticmethod
    def get_data_parallel_rank() -> int:
        return parallel_state.get_data_parallel_rank(with_context_parallel=True)

    @staticmethod
    def get_data_parallel_world_size() -> int:
        return parallel_state.get_data_parallel_world_size(with_context_parallel=True)

    @staticmethod
    def get_data_parallel_group() -> dist.ProcessGroup:
        return parallel_state.get_data_parallel_group(with_context_parallel=True)


def start_engine(model: nn.Module, optimizer: Optimizer, *, config: Mapping[str, Any], timeout: timedelta) -> Engine:
    """Puts a model, whose weights are set, and its optimizer under DeepSpeed's engine. Collective.

    Args:
        timeout: of collectives in DeepSpeed's own process groups.
    """
    if not torch.cuda.is_available():
        _spare_compilation()
    deepspeed.utils.logger.setLevel("WARNING")
    deepspeed.init_distributed(
        dist_backend=dist.get_backend(), auto_mpi_discovery=False, verbose=False, timeout=timeout
    )
    # The engine keeps slices of the weights. With gradients these would keep autograd's nodes, which belong to the
    # stream where they were made: a backward on another stream, where it is captured, would have to wait for that one.
    with torch.no_grad():
        engine, *_ = deepspeed.initialize(
            model=model, optimizer=optimizer, config=dict(config), mpu=MegatronUnit, dist_init_required=False
        )
    return engine


def _spare_compilation() -> None:
    """Spares DeepSpeed the C++ compilation of a shared-memory all-reduce at its start (comm/torch.py); gloo serves."""
    # By its name, since the package's attribute `torch` is the package torch.
    communication: Any = importlib.import_module("deepspeed.comm.torch")
    communication.build_shm_op = lambda: None


def leave_gradients(engine: Engine) -> None:
    """Has an engine without ZeRO reduce nothing (runtime/engine.py), for which it would join all gradients first."""
    engine.enable_backward_allreduce = False


def report_norm(optimizer: Any, norm: Tensor) -> None:
    """Makes a norm the one that `get_global_grad_norm` returns after the engine's step() (runtime/engine.py).

    Args:
        optimizer: the engine's. Call this from within its step: ZeRO-1's forgets the norm when it begins.
        norm: [].
    """
    optimizer._global_grad_norm = norm


def adamw(engine: Engine) -> Optimizer:
    """Returns the optimizer that steps `stepped_tensors`, which ZeRO wraps."""
    return engine.optimizer if engine.zero_optimization_stage() == 0 else engine.optimizer.optimizer


def stepped_tensors(engine: Engine) -> list[Tensor]:
    """Returns the fp32 tensors that AdamW steps on this rank: whole parameters, or flat shares under ZeRO.

    The latter are in runtime/zero/stage_1_and_2.py.
    """
    if engine.zero_optimization_stage() == 0:
        return list(engine.module.parameters())
    optimizer: Any = engine.optimizer
    return optimizer.single_partition_of_fp32_groups


def link_optimizer_state(engine: Engine) -> None:
    """Links parameters to AdamW's state, which must be there for all of `stepped_tensors`.

    ZeRO (runtime/zero/stage_1_and_2.py) would do so after the first parameter group's first step, when the other groups
    have no state yet.
    """
    engine.optimizer._lazy_init_hp_params_optimizer_state()


def gathered_weight(parameter: nn.Parameter) -> Tensor:
    """Returns a whole fp32 parameter, gathered over the ranks that share its optimizer. Collective."""
    return deepspeed.utils.safe_get_full_fp32_param(parameter)


def gathered_state(parameter: nn.Parameter, key: str) -> Tensor:
    """Returns a whole entry of AdamW's state, gathered over the ranks that share the optimizer. Collective."""
    return deepspeed.utils.safe_get_full_optimizer_state(parameter, key)


def held_range(parameter: nn.Parameter) -> tuple[int, int]:
    """Returns where this rank's share of a flattened parameter begins and its elements, without the padding.

    There is none of a parameter that this rank steps nothing of (utils/tensor_fragment.py).
    """
    sharded: Any = parameter
    mapping = sharded._hp_mapping
    return (mapping.lp_fragment_address.start, mapping.lp_fragment_address.numel) if mapping else (0, 0)


def held_weight(parameter: nn.Parameter) -> Tensor:
    """Returns this rank's share of an fp32 parameter as AdamW steps it, [at least the elements of `held_range`]."""
    mapped: Any = parameter
    return mapped._hp_mapping.get_hp_fragment()


def held_state(parameter: nn.Parameter, key: str) -> Tensor:
    """Returns this rank's share of an entry of AdamW's state, as `held_weight` does."""
    mapped: Any = parameter
    return mapped._hp_mapping.get_hp_fragment(key)


@dataclass(frozen=True)
class FlatGroup:
    """How ZeRO lays a parameter group out: one parameter after the other in a flat buffer, padded to equal shares.

    Attributes:
        parameters: in their order in the buffer.
        offsets: where each parameter begins.
    """

    parameters: Sequence[nn.Parameter]
    offsets: Sequence[int]

    def views(self, buffer: Tensor) -> Iterator[tuple[nn.Parameter, Tensor]]:
        """Yields each parameter with its place in a buffer of this layout, in the parameter's shape."""
        for parameter, offset in zip(self.parameters, self.offsets, strict=True):
            yield parameter, buffer[offset : offset + parameter.numel()].view_as(parameter)


class ShardedOptimizer:
    """DeepSpeed's optimizer of stage 1, whose reduction and gather can be replaced.

    All members that it touches are of DeepSpeedZeroOptimizer in runtime/zero/stage_1_and_2.py; runtime/engine.py calls
    that class.

    Attributes:
        adamw: steps this rank's share of each group, one group after the other.
        groups: in the optimizer's order.
    """

    def __init__(self, engine: Engine) -> None:
        self._zero: Any = engine.optimizer
        self._norm: Tensor
        self.adamw: Optimizer = self._zero.optimizer
        layout = self._zero.round_robin_bit16_groups, self._zero.round_robin_bit16_offsets
        self.groups = [FlatGroup(*group) for group in zip(*layout, strict=True)]

    def flat_weights(self) -> list[Tensor]:
        """Returns each group's buffer of weights, [elements], which all parameters of the group are views of."""
        return list(self._zero.bit16_groups_flat)

    def replace_reduction(self, reduced: Callable[[], tuple[Sequence[Tensor], Tensor]]) -> None:
        """Has the engine's step() take gradients from a function, where it would reduce the parameters' own.

        Args:
            reduced: called once a step; returns this rank's share of each group's mean gradient, which AdamW takes as
                it lies, and the norm that the engine reports.
        """

        def take(*, pipeline_parallel: bool) -> None:
            shares, self._norm = reduced()
            for number, share in enumerate(shares):
                self._zero.averaged_gradients[number] = GradPartitionBufferGroup([], share)

        self._zero.reduce_gradients = take
        self.adamw.register_step_pre_hook(lambda *_: report_norm(self._zero, self._norm))

    def replace_weights(self, number: int, shares: Sequence[Tensor]) -> None:
        """Has the step write a group's new weights to other tensors, of any precision, instead of the group's buffer.

        After `leave_gather` the buffer's memory is free once the group's parameters are no views of it any more.

        Args:
            shares: of each rank.
        """
        self._zero.parallel_partitioned_bit16_groups[number] = shares
        parameter: Any
        for parameter in self.groups[number].parameters:
            if parameter._hp_mapping is not None:  # as it is where this rank steps none of the parameter
                parameter._hp_mapping.lp_fragment = None

    def leave_gather(self) -> None:
        """Has the step end with new weights in this rank's shares alone, and leave parameters as they are."""
        self._zero.bit16_groups_flat = []
        self._zero._update_model_bit16_weights = lambda group_index: None
