"""Weights under ZeRO stage 1, which ranks gather from each other's shares when they next need them.

DeepSpeed's step would gather them at its end and wait. Here the next step's first forward does, which computes with the
first layers while the weights of others are on their way, as with megatron-core's --overlap-param-gather.

What only matrix products read is gathered rounded to their precision, and whole in no other: half as much is sent and
kept. The optimizer steps its share in fp32.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from itertools import chain

import torch
import torch.distributed as dist
from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer
from torch import Tensor, nn

from sambalm.parallel.groups import World
from sambalm.parallel.zero.compute_weights import ComputeWeights
from sambalm.parallel.zero.engine import Engine


class FlatWeights:
    """Takes the gather over from DeepSpeed (0.19.8, runtime/zero/stage_1_and_2.py), whose flat buffers it has.

    After the engine's step() a rank has new weights in its own share alone. Run the next forward inside `arriving`, or
    call `gather` before; both round what has arrived.

    Args:
        parts: that hold the weights. Every module's forward reads the parameters that are its own, and no others but
            those of modules that it calls. Those that are gathered rounded hold no numbers from now on.
        dtype: of matrix products.
        rounded: the weights' copies.
    """

    def __init__(
        self,
        engine: Engine,
        parts: Sequence[nn.Module],
        *,
        world: World,
        dtype: torch.dtype,
        rounded: ComputeWeights,
    ) -> None:
        optimizer = engine.optimizer
        self.group, self.rounded, self.stale = world.replica_group, rounded, False
        self.buffers = optimizer.bit16_groups_flat
        for number, parameters in enumerate(optimizer.round_robin_bit16_groups):
            if dtype != torch.float32 and all(parameter.matmul_only for parameter in parameters):
                self.buffers[number] = _rounded_flat(optimizer, number, dtype=dtype, rounded=rounded)
                # Where the step copies this rank's new weights to.
                optimizer.parallel_partitioned_bit16_groups[number] = self.buffers[number].chunk(world.replica_size)
        self.shares = [buffer.chunk(world.replica_size)[world.replica_rank] for buffer in self.buffers]
        self.parameters: list[list[nn.Parameter]] = optimizer.round_robin_bit16_groups  # of each buffer
        self.order = self._hook(parts)  # of the buffers
        self.arrived = len(self.order)
        optimizer.optimizer.register_step_post_hook(self._changed)
        # The step has nothing to gather, and need not make parameters views of the buffers again.
        optimizer.bit16_groups_flat = []
        optimizer._update_model_bit16_weights = lambda group_index: None

    @contextmanager
    def arriving(self) -> Iterator[None]:
        """Around a forward, whose modules wait for the buffers with their parameters. The host need not."""
        self.stale, self.arrived = False, 0
        self._send()
        yield
        self._wait(len(self.order))

    def gather(self) -> None:
        """Brings all weights up to date. Collective."""
        if self.stale:
            with self.arriving():
                pass

    def _hook(self, parts: Sequence[nn.Module]) -> list[int]:
        """Lets modules wait; returns the buffers in the order in which a forward needs them."""
        buffer_of = {p: number for number, parameters in enumerate(self.parameters) for p in parameters}
        needed = {
            module: [buffer_of[parameter] for parameter in module.parameters(recurse=False)]
            for part in parts
            for module in part.modules()
        }
        order = list(dict.fromkeys(chain(*needed.values())))
        for module, buffers in needed.items():
            if buffers:
                count = 1 + max(order.index(number) for number in buffers)
                module.register_forward_pre_hook(partial(self._before_forward, count))
        return order

    def _changed(self, *_) -> None:
        self.stale = True

    def _before_forward(self, count: int, *_) -> None:
        if self.stale:
            raise RuntimeError("weights of other ranks are those of a step before: gather them first")
        self._wait(count)

    def _wait(self, count: int) -> None:
        """The device waits for the first buffers.

        One is sent at a time: kernels share a queue (CUDA_DEVICE_MAX_CONNECTIONS), where a message that waits for
        another would keep what comes after it waiting as well.
        """
        while self.arrived < count:
            self.work.wait()
            number = self.order[self.arrived]
            self.arrived += 1
            self._send()
            self.rounded.update(self.parameters[number])

    def _send(self) -> None:
        """Sends the next buffer."""
        if self.arrived < len(self.order):
            number = self.order[self.arrived]
            buffer, share = self.buffers[number], self.shares[number]
            self.work = dist.all_gather_into_tensor(buffer, share, group=self.group, async_op=True)


def _rounded_flat(
    optimizer: DeepSpeedZeroOptimizer, number: int, *, dtype: torch.dtype, rounded: ComputeWeights
) -> Tensor:
    """A group's flat weights in another precision, in place of the parameters' own."""
    buffer = optimizer.bit16_groups_flat[number].to(dtype)
    places = zip(optimizer.round_robin_bit16_groups[number], optimizer.round_robin_bit16_offsets[number], strict=True)
    for parameter, offset in places:
        rounded.adopt(parameter, buffer[offset : offset + parameter.numel()].view_as(parameter))
        # The shape alone, with what shows wherever it should be read nevertheless.
        parameter.data = parameter.new_full((), torch.nan).expand(parameter.shape)
        if parameter._hp_mapping is not None:
            parameter._hp_mapping.lp_fragment = None
    return buffer
