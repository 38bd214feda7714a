"""Weights under ZeRO, which ranks gather from each other's shares when they next need them.

DeepSpeed's step would gather them at its end and wait. Here the next step's first forward does, which computes with the
first layers while the weights of others are on their way, as with megatron-core's --overlap-param-gather.

What only matrix products read is gathered as compute weights, in the products' precision, and is whole in no other:
ranks send and keep half as much. The optimizer steps its share in fp32. Under ZeRO-3 the layers' share of that is not
gathered here, but before each use (partitioned_weights.py).
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from itertools import chain
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from sambalm.parallel.groups import World
from sambalm.parallel.zero.compute_weights import ComputeWeights
from sambalm.parallel.zero.deepspeed_adapter import Engine, FlatGroup, ShardedOptimizer
from sambalm.parallel.zero.parameter_info import info_of
from sambalm.parallel.zero.partitioned_weights import PartitionedWeights, leave_empty


class FlatWeights:
    """Gathers weights in place of DeepSpeed, in its flat buffers.

    After the engine's step() a rank has new weights in its own share alone. Run the next forward inside `arriving`, or
    call `gather` before; both bring the compute weights of what has arrived up to date.

    Args:
        chunks: that hold the weights. Every module's forward reads the parameters that are its own, and no others but
            those of modules that it calls. Those that are gathered as compute weights hold no numbers from now on.
        dtype: of matrix products.
        compute_weights: of the chunks.
        partitioned: the numbers of the optimizer's groups, the first ones, that ZeRO-3 takes apart, those of the same
            layers as one range; none under the other stages.
    """

    def __init__(
        self,
        engine: Engine,
        chunks: Sequence[nn.Module],
        *,
        world: World,
        dtype: torch.dtype,
        compute_weights: ComputeWeights,
        partitioned: Sequence[range],
    ) -> None:
        optimizer = ShardedOptimizer(engine)
        self.group, self.compute_weights, self.stale = world.replica_group, compute_weights, False
        flat = optimizer.flat_weights()
        optimizer.leave_gather()
        self.partitioned = None
        if partitioned:
            own = [weights.chunk(world.replica_size)[world.replica_rank].to(dtype, copy=True) for weights in flat]
            for number in chain(*partitioned):
                optimizer.replace_weights(number, [own[number]] * world.replica_size)
            groups = [optimizer.groups[numbers.start : numbers.stop] for numbers in reversed(partitioned)]
            shares = [own[numbers.start : numbers.stop] for numbers in reversed(partitioned)]
            self.partitioned = PartitionedWeights(groups, shares, group=world.replica_group)
        taken = partitioned[-1].stop if partitioned else 0
        self.buffers = flat[taken:]
        whole = optimizer.groups[taken:]
        for number, group in enumerate(whole):
            if dtype != torch.float32 and all(info_of(parameter).matmul_only for parameter in group.parameters):
                self.buffers[number] = self.buffers[number].to(dtype)
                optimizer.replace_weights(taken + number, self.buffers[number].chunk(world.replica_size))
                _adopt_all(group, self.buffers[number], compute_weights)
        self.shares = [buffer.chunk(world.replica_size)[world.replica_rank] for buffer in self.buffers]
        self.parameters = [group.parameters for group in whole]  # of each buffer
        self.order = self._hook(chunks)  # of the buffers
        self.arrived = len(self.order)
        optimizer.adamw.register_step_post_hook(self._changed)

    @contextmanager
    def arriving(self) -> Iterator[None]:
        """Goes around a forward, whose modules wait for the buffers with their parameters. The host need not."""
        self.stale, self.arrived = False, 0
        if self.partitioned:
            self.partitioned.forget()
        self._send()
        yield
        self._wait(len(self.order))

    def gather(self) -> None:
        """Brings all weights up to date. Collective."""
        if self.stale:
            with self.arriving():
                pass

    def _hook(self, chunks: Sequence[nn.Module]) -> list[int]:
        """Lets modules wait; returns the buffers in the order in which a forward needs them."""
        buffer_of = {p: number for number, parameters in enumerate(self.parameters) for p in parameters}
        needed = {
            module: [buffer_of[parameter] for parameter in module.parameters(recurse=False) if parameter in buffer_of]
            for chunk in chunks
            for module in chunk.modules()
        }
        order = list(dict.fromkeys(chain(*needed.values())))
        for module, buffers in needed.items():
            if buffers:
                count = 1 + max(order.index(number) for number in buffers)
                module.register_forward_pre_hook(partial(self._before_forward, count))
        return order

    def _changed(self, *_: Any) -> None:
        self.stale = True

    def _before_forward(self, count: int, *_: Any) -> None:
        if self.stale:
            raise RuntimeError("weights of other ranks are those of a step before: gather them first")
        self._wait(count)

    def _wait(self, count: int) -> None:
        """Has the device wait for the first `count` buffers.

        One is sent at a time: kernels share a queue (CUDA_DEVICE_MAX_CONNECTIONS), where a message that waits for
        another would keep what comes after it waiting as well.
        """
        while self.arrived < count:
            self.work.wait()
            number = self.order[self.arrived]
            self.arrived += 1
            self._send()
            self.compute_weights.update(self.parameters[number])

    def _send(self) -> None:
        """Sends the next buffer."""
        if self.arrived < len(self.order):
            number = self.order[self.arrived]
            buffer, share = self.buffers[number], self.shares[number]
            self.work = dist.all_gather_into_tensor(buffer, share, group=self.group, async_op=True)
        elif self.partitioned:
            self.partitioned.begin()


def _adopt_all(group: FlatGroup, buffer: Tensor, compute_weights: ComputeWeights) -> None:
    """Makes a buffer the compute weights of a group, whose parameters keep their shapes and lose their numbers."""
    for parameter, view in group.views(buffer):
        compute_weights.adopt(parameter, view)
        leave_empty(parameter)
