"""The tokens of one forward and backward of a rank."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
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
        loss_weights: what each label's loss is multiplied by, fp32 [batch, sequence], where labels and tokens are. The
            loader makes 1 for a label that counts and 0 for one that does not, `weighted` what a step takes. None:
            all count alike.
    """

    tokens: Tensor
    labels: Tensor
    document_starts: Tensor | None = None
    loss_weights: Tensor | None = None

    def on_rank(self, world: World) -> "MicroBatch":
        """Returns this context-parallel rank's part of whole sequences, on its device."""
        part = world.context.part
        return MicroBatch(
            tokens=to_device(part(self.tokens), world.device),
            labels=to_device(part(self.labels), world.device),
            document_starts=None if self.document_starts is None else part(self.document_starts),
            loss_weights=None if self.loss_weights is None else to_device(part(self.loss_weights), world.device),
        )

    def mean(self, losses: Tensor) -> Tensor:
        """Returns the mean over the micro-batch of losses [batch, sequence] by their weights, []."""
        return losses.mean() if self.loss_weights is None else (losses * self.loss_weights).mean()


def weighted(micro_batches: Sequence[MicroBatch], world: World) -> Sequence[MicroBatch]:
    """Scales the loss weights of a rank's micro-batches of a step. Collective where they have some.

    Each counted label then weighs as many tokens as there are in the whole step for each counted one, so that the mean
    over micro-batches and ranks of `MicroBatch.mean` is the mean over all counted labels, wherever these are. In a step
    without any, the loss is not a number, and the optimizer skips it.
    """
    weights = [batch.loss_weights for batch in micro_batches if batch.loss_weights is not None]
    if not weights:
        return micro_batches
    counted = world.sum_over_replicas(torch.stack([one.sum(dtype=torch.float64) for one in weights]).sum())
    scale = (sum(one.numel() for one in weights) * world.replica_size / counted).float()
    return [replace(batch, loss_weights=one * scale) for batch, one in zip(micro_batches, weights, strict=True)]
