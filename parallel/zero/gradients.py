"""Gradients where ranks share out the optimizer, in one buffer for each bucket.

DeepSpeed would copy gradients into buckets, all-reduce these, though a rank needs its share alone, and copy them back.
Here they are accumulated where one reduce-scatter finds them (arXiv 1910.02054, section 7.2.1; megatron-core's
distributed optimizer likewise), which sends half as much and needs no other memory.

A buffer may be reduced while a step's last backward still fills others, as with megatron-core's --overlap-grad-reduce:
`GradientBucket.completed_by` says when.
"""

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from itertools import chain

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
    """Reduces gradients in place of DeepSpeed, in the order and with the padding of its flat weights (ZeRO-1).

    Call `clear` before each step's first micro-batch, and run each backward inside `accumulating`. A pipeline, whose
    backwards are not its own to order, runs all of them inside `overwritten`, and calls `reduce` after the last, before
    the engine's step(). Buffers stay allocated between steps.

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
        self.group, self.size, self.rank = world.replica_group, world.replica_size, world.replica_rank
        self.buffers, self.shares = self._allocate(optimizer.flat_weights(), buckets)
        self.views_of: list[list[tuple[nn.Parameter, Tensor]]] = []  # each bucket's parameters, where they lie
        self.owned: list[Tensor] = []  # pieces of the shares, which count in the norm
        for buffer, share, group in zip(self.buffers, self.shares, optimizer.groups, strict=True):
            first = self.rank * share.numel()
            self.views_of.append(list(group.views(buffer)))
            for parameter, offset in zip(group.parameters, group.offsets, strict=True):
                start, end = max(offset - first, 0), min(offset + parameter.numel() - first, share.numel())
                if info_of(parameter).owned and start < end:
                    self.owned.append(share[start:end])
        self.overlapping = False
        self.under_way: list[dist.Work] = []  # reductions of the first buffers
        for count, bucket in enumerate(buckets, start=1):
            if bucket.completed_by is not None:
                bucket.completed_by.register_post_accumulate_grad_hook(partial(self._completed, count))
        groups = [world.replica_group, world.model_group]
        self.clipping = Clipping(optimizer.adamw, max_norm=clip_norm, groups=groups, guard=guard)
        optimizer.replace_reduction(self._reduced)

    def _allocate(
        self, flat_weights: Sequence[Tensor], buckets: Sequence[GradientBucket]
    ) -> tuple[list[Tensor], list[Tensor]]:
        """Returns each bucket's buffer, and in it this rank's share."""
        buffers = [torch.zeros_like(weights) for weights in flat_weights]
        return buffers, [self._own(buffer) for buffer in buffers]

    def _own(self, buffer: Tensor) -> Tensor:
        return buffer.chunk(self.size)[self.rank]

    def clear(self, *, everything: bool = False) -> None:
        """Gives all parameters gradients, where they are reduced from: DeepSpeed's step leaves them without.

        Args:
            everything: also sets those to zero that `overwritten` is about.
        """
        views = list(chain(*self.views_of))
        torch._foreach_zero_([view for parameter, view in views if everything or not info_of(parameter).has_product])
        for parameter, view in views:
            parameter.grad = view

    def overwritten(self) -> AbstractContextManager[None]:
        """Goes around a step's first backward, or all of them: products need no zeroes to add their gradients to."""
        return overwriting([parameter for parameter, _ in chain(*self.views_of) if info_of(parameter).has_product])

    @contextmanager
    def accumulating(self, *, is_first: bool, is_last: bool) -> Iterator[None]:
        """Goes around a micro-batch's backward. The last of a step reduces: each buffer once it has completed it."""
        with self.overwritten() if is_first else nullcontext():
            self.overlapping = is_last
            yield
            self.overlapping = False
        if is_last:
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
        for number in range(len(self.under_way), count):
            self.under_way.append(self._send(number))

    def _send(self, number: int) -> dist.Work:
        """Has ranks add up a buffer, each its own share of it, in place."""
        buffer = self.buffers[number]
        return dist.reduce_scatter_tensor(self._own(buffer), buffer, group=self.group, async_op=True)

    def _reduced(self) -> tuple[list[Tensor], Tensor]:
        """Returns what the engine's step() takes: this rank's shares, and the norm before clipping."""
        return self.shares, self.clipping.prepare(self.owned)
