"""Gradients under ZeRO stage 1, in one buffer for each group of parameters.

DeepSpeed would copy gradients into buckets, all-reduce these, though a rank needs its share alone, and copy them back.
Here they are accumulated where one reduce-scatter finds them (arXiv 1910.02054, section 7.2.1; megatron-core's
distributed optimizer likewise), which sends half as much and needs no other memory.

A buffer may be reduced while a step's last backward still fills others, as with megatron-core's --overlap-grad-reduce:
where the optimizer's group has a "completed_by", the parameter whose gradient comes after all of the group's.
"""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import partial

import torch
import torch.distributed as dist
from deepspeed.runtime.zero.stage_1_and_2 import GradPartitionBufferGroup
from torch import Tensor, nn

from sambalm.parallel.groups import World
from sambalm.parallel.layers.linear import overwriting
from sambalm.parallel.zero.clipping import Clipping
from sambalm.parallel.zero.engine import Engine


class FlatGradients:
    """Takes the reduction over from DeepSpeed (0.19.8, runtime/zero/stage_1_and_2.py), whose order and padding it has.

    Call `clear` before each step's first micro-batch and run its backward inside `overwritten`. Run the last backward
    inside `overlapped`, or call `reduce` after it, before the engine's step(). Stays allocated between steps.

    Groups with a "completed_by" come first in the optimizer, in the order in which a backward completes them.

    Args:
        engine: whose parameters `fuse_gradient_accumulation` has been told of.
    """

    def __init__(self, engine: Engine, world: World, *, clip_norm: float) -> None:
        self.optimizer = optimizer = engine.optimizer
        self.group, self.size = world.replica_group, world.replica_size
        self.buffers = [torch.zeros_like(weights) for weights in optimizer.bit16_groups_flat]
        self.shares = [buffer.chunk(self.size)[world.replica_rank] for buffer in self.buffers]
        self.views: list[tuple[nn.Parameter, Tensor]] = []
        self.owned: list[Tensor] = []  # of the shares, what counts in the norm
        for buffer, parameters, offsets in zip(
            self.buffers, optimizer.round_robin_bit16_groups, optimizer.round_robin_bit16_offsets, strict=True
        ):
            length = buffer.numel() // self.size
            first, last = world.replica_rank * length, (world.replica_rank + 1) * length
            for parameter, offset in zip(parameters, offsets, strict=True):
                end = offset + parameter.numel()
                self.views.append((parameter, buffer[offset:end].view_as(parameter)))
                if parameter.owned and max(offset, first) < min(end, last):
                    self.owned.append(buffer[max(offset, first) : min(end, last)])
        self.overlapping = False
        self.under_way: list[dist.Work] = []  # of the first buffers
        for number, settings in enumerate(optimizer.param_groups, start=1):
            if "completed_by" in settings:
                settings["completed_by"].register_post_accumulate_grad_hook(partial(self._completed, number))
        groups = [world.replica_group, world.model_group]
        self.clipping = Clipping(optimizer.optimizer, max_norm=clip_norm, groups=groups)
        optimizer.optimizer.register_step_pre_hook(self._tell_norm)
        optimizer.reduce_gradients = self._hand_over

    def clear(self) -> None:
        """Gives all parameters gradients, where they are reduced from: DeepSpeed's step leaves them without.

        They are zero but for those that `overwritten` is about.
        """
        torch._foreach_zero_([view for parameter, view in self.views if not parameter.has_product])
        for parameter, view in self.views:
            parameter.grad = view

    def overwritten(self) -> AbstractContextManager[None]:
        """Around a step's first backward, or all of them: gradients that products find need no zeroes to add to."""
        return overwriting([parameter for parameter, _ in self.views if parameter.has_product])

    @contextmanager
    def overlapped(self) -> Iterator[None]:
        """Around a step's last backward: reduces each buffer once that has completed it, and all by its end."""
        self.overlapping = True
        yield
        self.overlapping = False
        self.reduce()

    def reduce(self) -> None:
        """Leaves this rank's share of each buffer as the mean over all ranks. The device waits, the host need not."""
        self._start(len(self.buffers))
        for work, share in zip(self.under_way, self.shares, strict=True):
            work.wait()
            share /= self.size
        self.under_way.clear()

    def _completed(self, number: int, parameter: nn.Parameter) -> None:
        """Autograd's hook on the parameter that completes the first `number` buffers."""
        if self.overlapping:
            self._start(number)

    def _start(self, number: int) -> None:
        """Sends what has not been sent of the first `number` buffers: in the same order on all ranks."""
        started = slice(len(self.under_way), number)
        for share, buffer in zip(self.shares[started], self.buffers[started], strict=True):
            self.under_way.append(dist.reduce_scatter_tensor(share, buffer, group=self.group, async_op=True))

    def _hand_over(self, *, pipeline_parallel: bool) -> None:
        """What is left of DeepSpeed's method: the step takes this rank's shares as they lie."""
        for number, share in enumerate(self.shares):
            self.optimizer.averaged_gradients[number] = GradPartitionBufferGroup([], share)
        self.norm = self.clipping.prepare(self.owned)

    def _tell_norm(self, *_) -> None:
        """In the step, which begins without: where DeepSpeed's engine looks for it."""
        self.optimizer._global_grad_norm = self.norm
