"""A micro-batch, from the loader to the stage that computes with it."""

from typing import NamedTuple

from torch import Tensor

from sambalm.parallel.groups import World
from sambalm.parallel.transfer import to_device


class MicroBatch(NamedTuple):
    """Each int64 [batch, this rank's part of the sequence]; document_starts on the CPU, the others on the device."""

    tokens: Tensor
    labels: Tensor
    document_starts: Tensor | None = None  # where documents run as if alone; see the model

    def on_rank(self, world: World) -> "MicroBatch":
        """This rank's part of a micro-batch of whole sequences that are all on the CPU."""
        tokens, labels, starts = (None if t is None else world.context.part(t) for t in self)
        return MicroBatch(to_device(tokens, world.device), to_device(labels, world.device), starts)
