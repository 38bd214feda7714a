"""The optimizer's step of ranks that hold the only replica of their weights, where ZeRO has nothing to share out.

DeepSpeed's ZeRO would still join, copy and scale flat buffers of all gradients and weights in every step. Its engine
without ZeRO leaves parameters, gradients and moments where they are.
"""

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from torch import Tensor


def clip_before_steps(optimizer: torch.optim.Optimizer, *, max_norm: float) -> None:
    """Lets a fused optimizer's every step shorten gradients to max_norm, counted over all model-parallel ranks.

    The norm before clipping, fp32 [], is then the optimizer's `_global_grad_norm`, where DeepSpeed's engine looks for
    it. The device does not wait for the host, and the optimizer's own kernel scales the gradients that it reads.
    """
    group = parallel_state.get_model_parallel_group()

    def clip(optimizer: torch.optim.Optimizer, args: tuple, kwargs: dict) -> None:
        norm = _gradient_norm(optimizer, group)
        optimizer._global_grad_norm = norm
        # What GradScaler sets, too: fused optimizers divide gradients by it.
        optimizer.grad_scale = ((norm + 1e-6) / max_norm).clamp(min=1.0)

    optimizer.register_step_pre_hook(clip)


def _gradient_norm(optimizer: torch.optim.Optimizer, group: dist.ProcessGroup) -> Tensor:
    parameters = [parameter for settings in optimizer.param_groups for parameter in settings["params"]]
    counted = [parameter.grad for parameter in parameters if parameter.counted and parameter.grad is not None]
    squares = torch.nn.utils.get_total_norm(counted, foreach=True).square()
    if group.size() > 1:
        dist.all_reduce(squares, group=group)
    return squares.sqrt()
