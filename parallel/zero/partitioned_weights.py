"""Weights of which a rank keeps its share alone, and gathers the others' before each use: ZeRO-3 (arXiv 1910.02054).

What only matrix products read is taken apart so. The buckets of layers take two slots of memory in turns: products
compute with one while the next bucket, in the direction of the forward or of the backward, arrives in the other.
Buckets of the same layers, which have different learning rates, are one here. DeepSpeed would gather parameter by
parameter, in fp32, in hooks around each module.
"""

from collections.abc import Sequence
from itertools import chain

import torch.distributed as dist
from torch import Tensor, nn

from sambalm.parallel.zero.compute_weights import below_each_other
from sambalm.parallel.zero.deepspeed_adapter import FlatGroup
from sambalm.parallel.zero.parameter_info import info_of
from sambalm.parallel.zero.slots import SLOTS, in_slots


class PartitionedWeights:
    """The compute weights of parameters that no rank holds whole (`ParameterInfo.compute_weights`).

    A product that asks for its weights waits for their bucket, and has the next one sent. It asks again in the
    backward, because what a forward has seen may have made room. Between micro-batches the slots hold what the backward
    has used last, with which the next forward begins.

    Args:
        groups: those of the same layers together, in the order in which a forward needs them. Their parameters hold no
            numbers from now on.
        shares: this rank's of each, in the products' precision, which the optimizer keeps up to date.
        group: the replicas.
    """

    def __init__(
        self,
        groups: Sequence[Sequence[FlatGroup]],
        shares: Sequence[Sequence[Tensor]],
        *,
        group: dist.ProcessGroup,
    ) -> None:
        self.shares, self.group = shares, group
        sizes = [[share.numel() * group.size() for share in together] for together in shares]
        self.slots, self.buffers = in_slots(sizes, like=shares[0][0])
        self.place_of: dict[Tensor, int] = {}
        self.views: dict[Tensor, Tensor] = {}
        for place, together in enumerate(groups):
            views = zip(together, self.buffers[place], strict=True)
            for parameter, view in chain(*(one.views(buffer) for one, buffer in views)):
                self.place_of[parameter], self.views[parameter] = place, view
                info = info_of(parameter)
                info.compute_weights, info.is_partitioned = self, True
                leave_empty(parameter)
        self.forget()

    @property
    def tensors(self) -> list[Tensor]:
        """What this holds: shares and slots."""
        return [*chain(*self.shares), *self.slots]

    def forget(self) -> None:
        """Drops what the slots hold: weights have changed. Nothing may be under way."""
        self.held: list[int | None] = [None] * len(self.slots)  # the bucket in each slot
        self.arriving: dict[int, list[dist.Work]] = {}
        self.place = -1  # of the bucket that products ask for

    def begin(self) -> None:
        """Has the first bucket sent ahead of a forward, unless that has come to a bucket already. Collective."""
        if self.place < 0:
            self._send(0)

    def of(self, weights: tuple[Tensor, ...], dtype: object) -> Tensor:
        """Returns [out, in] of all weights of a product, one below the other; the device waits for them. Collective."""
        place = self.place_of[weights[0]]
        if place != self.place:
            self._send(place)
            for work in self.arriving.pop(place, ()):
                work.wait()
            self._send(place + (1 if place > self.place else -1))
            self.place = place
        return below_each_other([self.views[weight] for weight in weights])

    def adopted_copy(self, weight: Tensor) -> None:
        """Returns None: no rank has a copy that is there at all times."""

    def to_write(self, weight: Tensor) -> None:
        """Returns None: the optimizer writes this rank's share."""

    def _send(self, place: int) -> None:
        """Gathers a bucket, unless there is none or its slot has it."""
        if not 0 <= place < len(self.buffers) or self.held[place % SLOTS] == place:
            return
        self.held[place % SLOTS] = place
        self.arriving[place] = [
            dist.all_gather_into_tensor(buffer, share, group=self.group, async_op=True)
            for buffer, share in zip(self.buffers[place], self.shares[place], strict=True)
        ]


def leave_empty(parameter: nn.Parameter) -> None:
    """Gives up a parameter's numbers and keeps its shape. It shows wherever something should read it nevertheless."""
    parameter.data = parameter.new_full((), float("nan")).expand(parameter.shape)
