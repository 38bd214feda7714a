"""The tokens of one forward and backward of a rank."""

from dataclasses import dataclass

from torch import Tensor

from sambalm.parallel.groups import World
from sambalm.parallel.transfer import to_device


@dataclass(frozen=True)
class MicroBatch:
    """A micro-batch, from the loader to the stage that computes with it.

    Attributes:
        tokens, labels: int64 [batch, sequence], on the CPU as the loader makes them, on the device after `on_rank`.
        document_starts: for each token the position in its row of its document's first token, int64 [batch, sequence],
            on the CPU, and on the device in a CUDA graph: each document is then run as if it were alone. None: a row is
            one stream.
    """

    tokens: Tensor
    labels: Tensor
    document_starts: Tensor | None = None

    def on_rank(self, world: World) -> "MicroBatch":
        """Returns this context-parallel rank's part of whole sequences, on its device."""
        part = world.context.part
        return MicroBatch(
            tokens=to_device(part(self.tokens), world.device),
            labels=to_device(part(self.labels), world.device),
            document_starts=None if self.document_starts is None else part(self.document_starts),
        )
