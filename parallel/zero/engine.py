"""DeepSpeed ZeRO: the engine around a model, and the whole tensors behind its partitions.

Ranks that hold the only replica of their weights run the engine without ZeRO, whatever the stage.
Parameters are fp32 under every stage (layers cast them at use), so DeepSpeed is run without its own mixed precision:
gradients are accumulated and reduced in fp32, and Mamba's A_log, D and dt bias are never rounded.
"""

import os
from collections.abc import Callable, Sequence

import torch
import torch.distributed as dist

if not torch.cuda.is_available():
    os.environ.setdefault("DS_ACCELERATOR", "cpu")  # unasked, DeepSpeed warns that it found no other

import deepspeed
from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state
from megatron.core import parallel_state
from torch import Tensor, nn

from sambalm.parallel.groups import World

Engine = deepspeed.DeepSpeedEngine
MOMENTS = ("exp_avg", "exp_avg_sq")  # AdamW's state of each parameter, beside the number of steps


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


def zero_engine(
    parts: Sequence[nn.Module],
    make_optimizer: Callable[[nn.Module], torch.optim.Optimizer],
    *,
    world: World,
    zero_stage: int,
    micro_batch_size: int,
    clip_norm: float,
    done_steps: int = 0,
) -> Engine:
    """Puts this rank's parts of the model, whose weights are already set, under ZeRO.

    The optimizer is as after done_steps steps, with zero moments; `set_moment` fills them. Where ranks keep weights and
    gradients whole (stage 1, or a single replica), the engine's step() takes the gradients that it finds;
    `flat_gradients` reduces those of stage 1, and `clipping` shortens them. Elsewhere
    (`engine.managed_gradient_accumulation()`), call `set_accumulation` for each step, and the engine, its backward()
    and step() for each micro-batch.

    Args:
        clip_norm: of the gradients that DeepSpeed clips.
    """
    deepspeed.utils.logger.setLevel("WARNING")
    deepspeed.init_distributed(
        dist_backend=dist.get_backend(), auto_mpi_discovery=False, verbose=False, timeout=world.timeout
    )
    pipelined, shared = world.pipeline.size > 1, world.replica_size > 1
    partitioned = shared and zero_stage > 1
    config = {
        "train_micro_batch_size_per_gpu": micro_batch_size,
        "gradient_accumulation_steps": 1,
        "managed_gradient_accumulation": partitioned,
        "gradient_clipping": clip_norm if partitioned else 0.0,
        "zero_optimization": _zero_settings(zero_stage if shared else 0),
        "zero_allow_untested_optimizer": True,
        "steps_per_print": 1 << 62,
        "timers": {"throughput": {"enabled": False}},  # it waits for the device, twice a micro-batch
    }
    model = nn.ModuleList(parts) if pipelined else parts[0]
    optimizer = make_optimizer(model)
    # Stages 1 and 2 keep slices of the weights. With gradients these would keep autograd's nodes, which belong to the
    # stream where they were made: a backward on another stream, where it is captured, would have to wait for that one.
    with torch.no_grad():
        engine, *_ = deepspeed.initialize(
            model=model, optimizer=optimizer, config=config, mpu=MegatronUnit, dist_init_required=False
        )
    if not shared:
        engine.enable_backward_allreduce = False  # it would join all gradients into one buffer first
    _create_moments(engine, optimizer, done_steps=done_steps)
    return engine


def _zero_settings(stage: int) -> dict[str, int | bool]:
    if stage != 1:
        return {"stage": stage}
    # Contiguous gradients take a hook for each parameter, which under stage 1 only costs time in every backward. Norms
    # are those of `clipping`: for DeepSpeed's the host waits, once for each group.
    return {"stage": stage, "contiguous_gradients": False, "compute_grad_norm": False}


def set_accumulation(engine: Engine, micro_batches: int) -> None:
    """Says how many micro-batches of each rank the next step has; gradients are means over them."""
    engine.set_train_batch_size(micro_batches * engine.train_micro_batch_size_per_gpu() * engine.dp_world_size)


def _create_moments(engine: Engine, optimizer: torch.optim.Optimizer, *, done_steps: int) -> None:
    """Makes the state that AdamW would make at its first step.

    Stages 1 and 2 would link parameters to that state after the first parameter group's first step, when the other
    groups have none yet; here it is all there.
    """
    stage, zero = engine.zero_optimization_stage(), engine.optimizer
    if stage == 0:
        held = list(engine.module.parameters())
    else:
        held = zero.fp32_partitioned_groups_flat if stage == 3 else zero.single_partition_of_fp32_groups
    for tensor in held:
        step = torch.tensor(float(done_steps), device=tensor.device)
        optimizer.state[tensor] = {"step": step} | {key: torch.zeros_like(tensor) for key in MOMENTS}
    if stage == 0:
        for parameter in held:
            parameter.moments = optimizer.state[parameter]
    elif stage < 3:
        zero._lazy_init_hp_params_optimizer_state()


def whole_parameter(parameter: nn.Parameter) -> Tensor:
    """A parameter of this tensor-parallel rank, gathered over data-parallel ranks. Collective."""
    if _is_whole(parameter):
        return parameter.detach()
    return safe_get_full_fp32_param(parameter)


def whole_moment(parameter: nn.Parameter, key: str) -> Tensor:
    """One of MOMENTS for a parameter of this tensor-parallel rank, gathered over data-parallel ranks. Collective."""
    if _is_whole(parameter):
        return parameter.moments[key]
    return safe_get_full_optimizer_state(parameter, key)


def set_moment(parameter: nn.Parameter, key: str, value: Tensor) -> None:
    """Stores this rank's share of a whole moment (the shape of the rank's parameter)."""
    if _is_whole(parameter):
        parameter.moments[key].copy_(value)
    elif hasattr(parameter, "ds_id"):
        share = _stage3_share(parameter, value)
        deepspeed.utils.safe_set_local_optimizer_state(parameter, share, key)
    else:
        deepspeed.utils.safe_set_full_optimizer_state(parameter, value, key)


def _is_whole(parameter: nn.Parameter) -> bool:
    """Whether this rank holds the only replica of a parameter."""
    return hasattr(parameter, "moments")


def _stage3_share(parameter: nn.Parameter, value: Tensor) -> Tensor:
    """This data-parallel rank's piece of a flattened tensor, padded as ZeRO-3 pads it."""
    length = parameter.ds_tensor.ds_numel
    padded = value.new_zeros(length * MegatronUnit.get_data_parallel_world_size())
    padded[: value.numel()] = value.flatten()
    start = MegatronUnit.get_data_parallel_rank() * length
    return padded[start : start + length]


def gradient_norm(engine: Engine) -> Tensor:
    """Norm of the whole model's gradient before clipping, of the step just taken; [], anywhere."""
    return torch.as_tensor(engine.get_global_grad_norm())
