"""Gradient buckets: which parameters AdamW steps together, and which gradients ranks therefore reduce together."""

from dataclasses import dataclass

from torch import nn


@dataclass(frozen=True)
class GradientBucket:
    """A parameter group of the optimizer, which under ZeRO-1 is also one message of gradients and one of weights.

    The optimizer and `FlatGradients` receive the same list. Buckets with a `completed_by` come first in it, in the
    order in which a backward completes them.

    Attributes:
        parameters: at least one.
        weight_decay: whether AdamW decays them.
        completed_by: a parameter whose gradient autograd finds after all gradients of this bucket and of those before
            it; None where only the backward's end completes the bucket.
    """

    parameters: tuple[nn.Parameter, ...]
    weight_decay: bool
    completed_by: nn.Parameter | None = None
