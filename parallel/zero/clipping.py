"""Clipping that the host does not wait for: the norm stays on the device, and AdamW's kernel divides the gradients.

Fused optimizers read two attributes that GradScaler (torch.amp) sets: `grad_scale`, by which they divide gradients, and
`found_inf`, which is 1.0 where they skip the step. `Clipping` sets both instead; `StepGuard` decides the second.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.optim import Optimizer

from sambalm.parallel.zero.deepspeed_adapter import report_norm
from sambalm.parallel.zero.parameter_info import info_of
from sambalm.parallel.zero.step_guard import StepGuard


class Clipping:
    """Shortens gradients to max_norm within a fused optimizer's step, which skips those that the guard does not pass.

    A skipped step counts as one, as it does for a run that is resumed.

    Args:
        guard: has the step's loss before `prepare` is called.
        groups: over whose ranks the squares of gradients add up.
    """

    def __init__(
        self, optimizer: Optimizer, *, max_norm: float, groups: Sequence[dist.ProcessGroup], guard: StepGuard
    ) -> None:
        self.optimizer: Any = optimizer
        self.max_norm, self.guard = max_norm, guard
        self.groups = [group for group in groups if group.size() > 1]
        optimizer.register_step_post_hook(_count_skipped)

    def prepare(self, gradients: Sequence[Tensor]) -> Tensor:
        """Prepares the optimizer's next step. Collective.

        Args:
            gradients: those that this rank owns (`ParameterInfo.owned`), at least one.

        Returns:
            The norm of all ranks' gradients before clipping, fp32 [].
        """
        squares = torch.nn.utils.get_total_norm(gradients, foreach=True).square()
        for group in self.groups:
            dist.all_reduce(squares, group=group)
        norm = squares.sqrt()
        self.optimizer.grad_scale = ((norm + 1e-6) / self.max_norm).clamp(min=1.0)
        self.optimizer.found_inf = self.guard.skips(norm)
        return norm


def _count_skipped(optimizer: Any, args: tuple, kwargs: dict) -> None:
    """Counts a skipped step in AdamW's state. A fused optimizer's step leaves the count as it was."""
    parameters = [parameter for settings in optimizer.param_groups for parameter in settings["params"]]
    steps = [optimizer.state[parameter]["step"] for parameter in parameters]
    torch._foreach_add_(steps, [optimizer.found_inf] * len(steps))  # the host would read a tensor for all, and wait


def clip_before_steps(optimizer: Optimizer, *, max_norm: float, group: dist.ProcessGroup, guard: StepGuard) -> None:
    """Clips in every step of an optimizer without ZeRO, over the group of all model-parallel ranks.

    DeepSpeed itself would join, copy and scale a flat buffer of all gradients.
    """
    clipping = Clipping(optimizer, max_norm=max_norm, groups=[group], guard=guard)

    def clip(optimizer: Optimizer, args: tuple, kwargs: dict) -> None:
        parameters = [parameter for settings in optimizer.param_groups for parameter in settings["params"]]
        owned = [p.grad for p in parameters if info_of(p).owned and p.grad is not None]
        report_norm(optimizer, clipping.prepare(owned))

    optimizer.register_step_pre_hook(clip)
