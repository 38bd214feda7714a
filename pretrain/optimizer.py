"""AdamW, Muon and their learning-rate schedule. A config is read without torch."""

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal

from pydantic import BaseModel, ConfigDict, Field

if TYPE_CHECKING:
    import torch

    from sambalm.parallel.zero.buckets import GradientBucket

# A bucket of layers, whose gradients ranks reduce together and whose weights they gather together, has so many elements
# at most, and no more than a share of all. No backward hides the last bucket's reduction, and no forward the first
# one's gather. But each is an AdamW of its own in DeepSpeed's step, and short messages do not fill a network. 3.8B has
# 16 buckets of 0.9 GB.
BUCKET_ELEMENTS = 300_000_000
BUCKET_SHARE = 1 / 8


class OptimizerConfig(BaseModel):
    """AdamW, or Muon for the matrices of layers, with a warm-up and a decay."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    kind: Literal["adamw", "muon"] = Field(
        "adamw",
        description="adamw; or muon for the matrices of layers, in steps as large as AdamW's, and AdamW for embedding, "
        "head, vectors and convolutions",
    )
    momentum: float = Field(0.95, ge=0, lt=1, description="Muon's momentum")
    peak_lr: float = Field(gt=0, description="Learning rate after the warm-up")
    final_lr_ratio: float = Field(0.1, ge=0, le=1, description="Learning rate at the last step over peak_lr")
    schedule: Literal["cosine", "wsd"] = Field(
        "cosine",
        description="After the warm-up: cosine, or stable and then linear over decay_fraction (wsd)",
    )
    warmup_fraction: float = Field(0.01, ge=0, le=1, description="Share of train.steps with a linear warm-up")
    decay_fraction: float = Field(0.2, gt=0, le=1, description="Share of train.steps in which wsd decays")
    beta1: float = Field(0.9, ge=0, lt=1, description="Decay of AdamW's first moment")
    beta2: float = Field(0.95, ge=0, lt=1, description="Decay of AdamW's second moment")
    eps: float = Field(1e-8, gt=0, description="AdamW's epsilon")
    weight_decay: float = Field(0.1, ge=0, description="Weight decay of matrices; norms, biases, A_log and D have none")
    clip_norm: float = Field(1.0, gt=0, description="Largest norm of the whole gradient; longer ones are scaled to it")

    def build(
        self, buckets: "Sequence[GradientBucket]", *, adamw: "type[torch.optim.AdamW]"
    ) -> "torch.optim.Optimizer":
        """Makes the optimizer over buckets, one parameter group each, whose learning rates `set_learning_rate` sets.

        Args:
            buckets: their parameters are fp32, on the device where they are trained.
            adamw: the implementation, `Kernels.optimizer`.
        """
        groups = [
            {
                "params": list(bucket.parameters),
                "lr": self.peak_lr * bucket.lr_scale,
                # AdamW multiplies it by the learning rate; how fast weights decay depends on no width.
                "weight_decay": self.weight_decay / bucket.lr_scale if bucket.weight_decay else 0.0,
                "lr_scale": bucket.lr_scale,
                "muon": bucket.muon,
            }
            for bucket in buckets
        ]
        optimizer = adamw(groups, betas=(self.beta1, self.beta2), eps=self.eps, fused=True)
        if self.kind == "adamw":
            return optimizer
        from sambalm.parallel.zero.muon import Muon

        return Muon(optimizer, momentum=self.momentum)

    def learning_rate(self, step: int, *, steps: int) -> float:
        """Returns the learning rate of a step, counted from 1, in a run of `steps`."""
        warmup_steps = _share(self.warmup_fraction, steps)
        if step <= warmup_steps:
            return self.peak_lr * step / warmup_steps
        if self.schedule == "cosine":
            progress = (step - warmup_steps) / max(1, steps - warmup_steps)
            remaining = 0.5 * (1.0 + math.cos(math.pi * progress))
        else:
            remaining = min(1.0, (steps - step) / max(1, _share(self.decay_fraction, steps)))
        return self.peak_lr * (self.final_lr_ratio + (1.0 - self.final_lr_ratio) * remaining)


def set_learning_rate(optimizer: "torch.optim.Optimizer", lr: float) -> None:
    """Sets the learning rate of a step, in each parameter group multiplied by the `lr_scale` of its bucket."""
    for group in optimizer.param_groups:
        group["lr"] = lr * group["lr_scale"]


def bucket_ranges(sizes: Sequence[int], *, max_elements: int) -> list[range]:
    """Cuts consecutive layers into buckets of up to so many elements each, and up to BUCKET_SHARE of all.

    Args:
        sizes: elements of each layer, in the order in which a backward goes through them.

    Returns:
        Layers of each bucket. A layer that is larger than a bucket may be has one of its own.
    """
    max_elements = min(max_elements, math.ceil(sum(sizes) * BUCKET_SHARE))
    starts: list[int] = []
    elements = 0
    for layer, added in enumerate(sizes):
        if not starts or elements + added > max_elements:
            starts.append(layer)
            elements = 0
        elements += added
    return [range(start, end) for start, end in zip(starts, [*starts[1:], len(sizes)], strict=True)]


def _share(fraction: float, steps: int) -> int:
    """Rounds a share of the steps up, but not for a rounding error: 0.07 * 100 is 7.000000000000001."""
    return math.ceil(fraction * steps - 1e-6)
