"""Gradients under ZeRO stage 1, in one buffer for each group of parameters.

DeepSpeed would copy gradients into buckets, all-reduce these, though a rank needs its share alone, and copy them back.
Here they are accumulated where one reduce-scatter finds them (arXiv 1910.02054, section 7.2.1; megatron-core's
distributed optimizer likewise), which sends half as much and needs no other memory.
"""

import torch
import torch.distributed as dist

from sambalm.parallel.state import World
from sambalm.parallel.zero import Engine


class FlatGradients:
    """Takes the reduction over from DeepSpeed (0.19.8, runtime/zero/stage_1_and_2.py), whose order and padding it has.

    Call `clear` before each step's first micro-batch; the engine's step() reduces. Stays allocated between steps.
    """

    def __init__(self, engine: Engine, world: World) -> None:
        optimizer = engine.optimizer
        self.optimizer, self.world = optimizer, world
        self.buffers = [torch.zeros_like(weights) for weights in optimizer.bit16_groups_flat]
        self.views = [
            (parameter, buffer[offset : offset + parameter.numel()].view_as(parameter))
            for buffer, parameters, offsets in zip(
                self.buffers, optimizer.round_robin_bit16_groups, optimizer.round_robin_bit16_offsets, strict=True
            )
            for parameter, offset in zip(parameters, offsets, strict=True)
        ]
        optimizer.reduce_gradients = self._reduce

    def clear(self) -> None:
        """Sets all gradients to zero, where they are reduced from: DeepSpeed's step leaves parameters without."""
        for buffer in self.buffers:
            buffer.zero_()
        for parameter, view in self.views:
            parameter.grad = view

    def _reduce(self, *, pipeline_parallel: bool) -> None:
        """What DeepSpeed's method does: leaves the means of this rank's share for the step."""
        rank, size = self.world.replica_rank, self.world.replica_size
        for buffer in self.buffers:
            share = buffer.chunk(size)[rank]
            dist.reduce_scatter_tensor(share, buffer, group=self.world.replica_group)
            share /= size
        self.optimizer.overlapping_partition_gradients_reduce_epilogue()
