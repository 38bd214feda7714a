"""The engine around a model, and the whole tensors behind what ZeRO shares out over ranks.

Ranks that hold the only replica of their weights run the engine without ZeRO, whatever the stage.
Parameters are fp32 under every stage (layers convert them at use), so DeepSpeed runs without its own mixed precision:
gradients are accumulated and reduced in fp32, and Mamba's A_log, D and dt bias are never rounded.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from sambalm.parallel.groups import World
from sambalm.parallel.zero import deepspeed_adapter as deepspeed
from sambalm.parallel.zero.deepspeed_adapter import Engine
from sambalm.parallel.zero.parameter_info import info_of

MOMENTS = ("exp_avg", "exp_avg_sq")  # AdamW's state of each parameter, beside the number of steps
MUON_MOMENTS = MOMENTS[:1]
# Contiguous gradients take a hook for each parameter, which only costs time in every backward. Norms are those of
# `clipping`: for DeepSpeed's the host waits, once for each group.
STAGE_1 = {"stage": 1, "contiguous_gradients": False, "compute_grad_norm": False}
WEIGHT = "model"  # what checkpoints call the weight itself beside the moments


def zero_engine(
    chunks: Sequence[nn.Module],
    optimizer: torch.optim.Optimizer,
    *,
    world: World,
    micro_batch_size: int,
) -> Engine:
    """Puts this rank's model chunks, whose weights are already set, under ZeRO. Collective.

    The engine's step() takes the gradients that it finds: `FlatGradients` has reduced those of replicas, and `Clipping`
    shortens them. To the engine ZeRO-2 and ZeRO-3 are stage 1: what else they share out is `FlatGradients`' and
    `FlatWeights`'. Call `create_moments` once these are made, which leave room under ZeRO-3.

    Args:
        optimizer: over all of the chunks' parameters.
    """
    shared = world.replica_size > 1
    config = {
        "train_micro_batch_size_per_gpu": micro_batch_size,
        "gradient_accumulation_steps": 1,
        "managed_gradient_accumulation": False,
        "gradient_clipping": 0.0,
        "zero_optimization": STAGE_1 if shared else {"stage": 0},
        "zero_allow_untested_optimizer": True,
        "steps_per_print": 1 << 62,
        "timers": {"throughput": {"enabled": False}},  # it waits for the device, twice a micro-batch
    }
    for settings in optimizer.param_groups:
        for parameter in settings["params"]:
            info_of(parameter).moments = _moments(settings)
    model = nn.ModuleList(chunks) if world.pipeline.size > 1 else chunks[0]
    engine = deepspeed.start_engine(model, optimizer, config=config, timeout=world.timeout)
    if not shared:
        deepspeed.leave_gradients(engine)
    return engine


def create_moments(engine: Engine, *, done_steps: int) -> None:
    """Makes the state that AdamW would make at its first step, and Muon's, as after done_steps steps with zero moments.

    `held_tensors` are where to fill them.
    """
    optimizer, held = deepspeed.adamw(engine), deepspeed.stepped_tensors(engine)
    keys = {tensor: _moments(settings) for settings in optimizer.param_groups for tensor in settings["params"]}
    for tensor in held:
        step = torch.tensor(float(done_steps), device=tensor.device)
        optimizer.state[tensor] = {"step": step} | {key: torch.zeros_like(tensor) for key in keys[tensor]}
    if engine.zero_optimization_stage() == 0:
        for parameter in held:
            info_of(parameter).optimizer_state = optimizer.state[parameter]
    else:
        deepspeed.link_optimizer_state(engine)


def _moments(settings: dict) -> tuple[str, ...]:
    return MUON_MOMENTS if settings.get("muon") else MOMENTS


def whole_parameter(parameter: nn.Parameter) -> Tensor:
    """Returns a parameter of this tensor-parallel rank, gathered over data-parallel ranks. Collective."""
    if info_of(parameter).optimizer_state is not None:
        return parameter.detach()
    return deepspeed.gathered_weight(parameter)


def whole_moment(parameter: nn.Parameter, key: str) -> Tensor:
    """Returns one of MOMENTS for a parameter of this tensor-parallel rank, gathered likewise. Collective."""
    state = info_of(parameter).optimizer_state
    return deepspeed.gathered_state(parameter, key) if state is None else state[key]


def held_range(parameter: nn.Parameter) -> tuple[int, int]:
    """Returns start and length of the part of a flattened parameter that only this rank of its replicas steps."""
    if info_of(parameter).optimizer_state is not None:
        return 0, parameter.numel()
    return deepspeed.held_range(parameter)


def held_tensors(parameter: nn.Parameter) -> dict[str, Tensor]:
    """Returns the weight and its moments of this rank's `held_range`, fp32 [elements], as the optimizer steps them.

    They are views, of what the next step changes. The weight is named `WEIGHT`.
    """
    _, elements = held_range(parameter)
    if not elements:
        return {}
    state = info_of(parameter).optimizer_state
    if state is not None:
        tensors = {WEIGHT: parameter.detach()} | {key: state[key] for key in info_of(parameter).moments}
    else:
        tensors = {WEIGHT: deepspeed.held_weight(parameter)}
        tensors |= {key: deepspeed.held_state(parameter, key) for key in info_of(parameter).moments}
    return {key: tensor.detach().view(-1)[:elements] for key, tensor in tensors.items()}


def optimizer_is_finite(engine: Engine) -> bool:
    """Says whether all fp32 weights and moments that AdamW steps on this rank are finite. Waits for the device.

    All ranks' together are the whole state. It is read once and not copied.
    """
    optimizer = deepspeed.adamw(engine)
    held = deepspeed.stepped_tensors(engine)
    tensors = [*held, *_moments_of(held, optimizer)]
    largest = torch._foreach_norm([tensor.detach() for tensor in tensors if tensor.numel()], torch.inf)
    return bool(torch.stack(list(largest)).isfinite().all())


def tensors_of_run(engine: Engine) -> list[Tensor]:
    """Returns what this rank holds of weights, gradients and AdamW's state, apart from buffers that others made."""
    parameters = list(engine.module.parameters())
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    held = deepspeed.stepped_tensors(engine)
    return [*parameters, *gradients, *held, *_moments_of(held, deepspeed.adamw(engine))]


def _moments_of(held: Sequence[Tensor], optimizer: torch.optim.Optimizer) -> list[Tensor]:
    return [optimizer.state[tensor][key] for tensor in held for key in MOMENTS if key in optimizer.state[tensor]]


def gradient_norm(engine: Engine) -> Tensor:
    """Returns the norm of the whole model's gradient before clipping, of the step just taken; fp32 [] on any device."""
    return torch.as_tensor(engine.get_global_grad_norm())
