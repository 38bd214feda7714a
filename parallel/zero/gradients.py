"""Gradients under ZeRO-1, in one buffer for each bucket.

DeepSpeed would copy gradients into buckets, all-reduce these, though a rank needs its share alone, and copy them back.
Here they are accumulated where one reduce-scatter finds them (arXiv 1910.02054, section 7.2.1; megatron-core's
distributed optimizer likewise), which sends half as much and needs no other memory.

A buffer may be reduced while a step's last backward still fills others, as with megatron-core's --overlap-grad-reduce:
`GradientBucket.completed_by` says when.
"""

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from functools import partial

import torch
import torch.distributed as dist
from torch import Tensor, nn

from sambalm.parallel.groups import World
from sambalm.parallel.layers.linear import overwriting
from sambalm.parallel.zero.buckets import GradientBucket
from sambalm.parallel.zero.clipping import Clipping
from sambalm.parallel.zero.deepspeed_adapter import Engine, ShardedOptimizer
from sambalm.parallel.zero.parameter_info import info_of
from sambalm.parallel.zero.step_guard import StepGuard


class FlatGradients:
    """Reduces gradients in place of DeepSpeed, in the order and with the padding of its flat weights.

    Call `clear` before each step's first micro-batch and run its backward inside `overwritten`. Run the last backward
    inside `overlapped`, or call `reduce` after it, before the engine's step(). Buffers stay allocated between steps.

    Args:
        engine: whose parameters `fuse_gradient_accumulation` has been told of.
        buckets: those of the engine's optimizer.
    """

    def __init__(
        self,
        engine: Engine,
        world: World,
        *,
        buckets: Sequence[GradientBucket],
        clip_norm: float,
        guard: StepGuard,
    ) -> None:
        optimizer = ShardedOptimizer(engine)
        self.group, self.size = world.replica_group, world.replica_size
        self.buffers = [torch.zeros_like(weights) for weights in optimizer.flat_weights()]
        self.shares = [buffer.chunk(self.size)[world.replica_rank] for buffer in self.buffers]
        self.views: list[tuple[nn.Parameter, Tensor]] = []
        self.owned: list[Tensor] = []  # pieces of the shares, which count in the norm
        for buffer, group in zip(self.buffers, optimizer.groups, strict=True):
            length = buffer.numel() // self.size
            first, last = world.replica_rank * length, (world.replica_rank + 1) * length
            self.views += group.views(buffer)
            for parameter, offset in zip(group.parameters, group.offsets, strict=True):
                start, end = max(offset, first), min(offset + parameter.numel(), last)
                if info_of(parameter).owned and start < end:
                    self.owned.append(buffer[start:end])
        self.overlapping = False
        self.under_way: list[dist.Work] = []  # reductions of the first buffers
        for count, bucket in enumerate(buckets, start=1):
            if bucket.completed_by is not None:
                bucket.completed_by.register_post_accumulate_grad_hook(partial(self._completed, count))
        groups = [world.replica_group, world.model_group]
        self.clipping = Clipping(optimizer.adamw, max_norm=clip_norm, groups=groups, guard=guard)
        optimizer.replace_reduction(self._reduced)

    def clear(self) -> None:
        """Gives all parameters gradients, where they are reduced from: DeepSpeed's step leaves them without.

        They are zero but for those that `overwritten` is about.
        """
        torch._foreach_zero_([view for parameter, view in self.views if not info_of(parameter).has_product])
        for parameter, view in self.views:
            parameter.grad = view

    def overwritten(self) -> AbstractContextManager[None]:
        """Goes around a step's first backward, or all of them: products need no zeroes to add their gradients to."""
        return overwriting([parameter for parameter, _ in self.views if info_of(parameter).has_product])

    @contextmanager
    def overlapped(self) -> Iterator[None]:
        """Goes around a step's last backward: reduces each buffer once that has completed it, and all by its end."""
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

    def _completed(self, count: int, parameter: nn.Parameter) -> None:
        """Runs as autograd's hook on the parameter that completes the first `count` buffers."""
        if self.overlapping:
            self._start(count)

    def _start(self, count: int) -> None:
        """Sends what has not been sent of the first `count` buffers: in the same order on all ranks."""
        started = slice(len(self.under_way), count)
        for share, buffer in zip(self.shares[started], self.buffers[started], strict=True):
            self.under_way.append(dist.reduce_scatter_tensor(share, buffer, group=self.group, async_op=True))

    def _reduced(self) -> tuple[list[Tensor], Tensor]:
        """Returns what the engine's step() takes: this rank's shares, and the norm before clipping."""
        return self.shares, self.clipping.prepare(self.owned)
