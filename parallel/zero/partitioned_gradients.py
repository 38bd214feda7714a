"""Gradients of which a rank keeps its share alone: ZeRO-2 and ZeRO-3 (arXiv 1910.02054, section 5.2).

The buckets of layers take two slots of memory in turns: a backward fills one while ranks reduce the other. Buckets that
it completes together, which have different learning rates, share a slot. DeepSpeed would copy each gradient into a
bucket of its own, reduce that and copy the share out.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import chain

import torch
import torch.distributed as dist
from torch import Tensor, nn

from sambalm.parallel.layers.linear import overwriting
from sambalm.parallel.zero.buckets import GradientBucket, completed_together
from sambalm.parallel.zero.gradients import FlatGradients
from sambalm.parallel.zero.parameter_info import info_of
from sambalm.parallel.zero.slots import in_slots


class PartitionedGradients(FlatGradients):
    """Reduces the buckets of layers in every micro-batch, and adds this rank's shares up.

    Buckets that only the backward's end completes (embedding, vectors) stay whole and are reduced once a step, as under
    ZeRO-1. A backward begins with a bucket once the one before is complete: autograd runs the hook of `completed_by`
    before it goes on to the layer below.
    """

    def _allocate(
        self, flat_weights: Sequence[Tensor], buckets: Sequence[GradientBucket]
    ) -> tuple[list[Tensor], list[Tensor]]:
        self.turns = completed_together(buckets)
        self.layers = self.turns[-1].stop  # the first buckets
        sizes = [weights.numel() for weights in flat_weights[: self.layers]]
        _, buffers = in_slots([sizes[turn.start : turn.stop] for turn in self.turns], like=flat_weights[0])
        sums = [flat_weights[0].new_zeros(size // self.size) for size in sizes]
        whole, own = super()._allocate(flat_weights[self.layers :], buckets[self.layers :])
        return [*chain(*buffers), *whole], [*sums, *own]

    @contextmanager
    def accumulating(self, *, is_first: bool, is_last: bool) -> Iterator[None]:
        self.is_first, self.completed = is_first, 0
        self.sent: tuple[int, dist.Work] | None = None  # the last bucket that was sent, unless it is settled
        self._take_slot(0)
        in_layers = [parameter for views in self.views_of[: self.layers] for parameter, _ in views]
        again = [parameter for parameter in in_layers if info_of(parameter).has_product]
        with self.overwritten() if is_first else overwriting(again):
            yield
        self._complete(self.layers)
        self._settle()
        if is_last:
            self.reduce()

    def reduce(self) -> None:
        """Leaves this rank's share of each whole bucket as the mean over all ranks."""
        works = [self._send(number) for number in range(self.layers, len(self.buffers))]
        for work, share in zip(works, self.shares[self.layers :], strict=True):
            work.wait()
            share /= self.size

    def _completed(self, count: int, parameter: nn.Parameter) -> None:
        self._complete(count)

    def _complete(self, count: int) -> None:
        """Sends what has not been sent of the first `count` buckets: one at a time, in the same order on all ranks."""
        for number in range(self.completed, count):
            self._settle()
            self.sent = number, self._send(number)
            for turn, numbers in enumerate(self.turns[1:], start=1):
                if number + 1 == numbers.start:
                    self._take_slot(turn)  # which the buckets before this turn's have left
        self.completed = max(self.completed, count)

    def _take_slot(self, turn: int) -> None:
        """Makes a slot ready for gradients; products write over what other buckets have left there."""
        taken = chain(*(self.views_of[number] for number in self.turns[turn]))
        if summed := [view for weight, view in taken if not info_of(weight).has_product]:
            torch._foreach_zero_(summed)

    def _settle(self) -> None:
        """Adds this rank's share of the bucket that was sent last to those of earlier micro-batches."""
        if self.sent is None:
            return
        number, work = self.sent
        work.wait()
        found, share = self._own(self.buffers[number]), self.shares[number]
        if self.is_first:
            torch.div(found, self.size, out=share)
        else:
            share.add_(found, alpha=1 / self.size)
        self.sent = None
