"""Gradient buckets: which parameters AdamW steps together, and which gradients ranks therefore reduce together."""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

from torch import nn


@dataclass(frozen=True)
class GradientBucket:
    """A parameter group of the optimizer, which under ZeRO is also one message of gradients and one of weights.

    The optimizer and `FlatGradients` receive the same list. Buckets with a `completed_by` come first in it, in the
    order in which a backward completes them; those of one `completed_by` follow each other.

    Attributes:
        parameters: at least one.
        weight_decay: whether AdamW decays them.
        lr_scale: their `ParameterInfo.lr_scale`.
        muon: whether Muon steps them instead of AdamW.
        completed_by: a parameter whose gradient autograd finds after all gradients of this bucket and of those before
            it; None where only the backward's end completes the bucket.
    """

    parameters: tuple[nn.Parameter, ...]
    weight_decay: bool
    completed_by: nn.Parameter | None = None
    lr_scale: float = 1.0
    muon: bool = False


def completed_together(buckets: Sequence[GradientBucket]) -> list[range]:
    """Returns the numbers of the buckets with a `completed_by`, in a range those that a backward completes together."""
    completed = [bucket.completed_by for bucket in buckets if bucket.completed_by is not None]
    lengths = [len(list(equal)) for _, equal in itertools.groupby(completed, key=id)]
    ends = list(itertools.accumulate(lengths))
    return [range(start, end) for start, end in itertools.pairwise((0, *ends))]
