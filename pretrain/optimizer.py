"""AdamW, its learning-rate schedule and its parameter groups."""

import math
from collections.abc import Sequence
from typing import Literal

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import nn

from sambalm.model.ops.cuda.adamw import CudaAdamW
from sambalm.model.ops.external import KernelRequirements, why_unavailable
from sambalm.model.samba import Samba
from sambalm.parallel.zero.buckets import GradientBucket
from sambalm.parallel.zero.parameter_info import info_of

# A bucket of layers, whose gradients ranks reduce together and whose weights they gather together, has so many elements
# at most, and no more than a share of all. No backward hides the last bucket's reduction, and no forward the first
# one's gather. But each is an AdamW of its own in DeepSpeed's step, and short messages do not fill a network. 3.8B has
# 16 buckets of 0.9 GB.
BUCKET_ELEMENTS = 300_000_000
BUCKET_SHARE = 1 / 8


class OptimizerConfig(BaseModel):
    """AdamW with a warm-up and a decay."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

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

    def build(self, buckets: Sequence[GradientBucket]) -> torch.optim.AdamW:
        """Makes AdamW over buckets, one parameter group each.

        Args:
            buckets: their parameters are fp32, on the device where they are trained.
        """
        where = KernelRequirements(buckets[0].parameters[0].device, torch.float32)
        adamw = torch.optim.AdamW if why_unavailable("optimizer", "cuda", where) else CudaAdamW
        groups = [
            {"params": list(bucket.parameters), "weight_decay": self.weight_decay if bucket.weight_decay else 0.0}
            for bucket in buckets
        ]
        return adamw(groups, lr=self.peak_lr, betas=(self.beta1, self.beta2), eps=self.eps, fused=True)

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


def _share(fraction: float, steps: int) -> int:
    """Rounds a share of the steps up, but not for a rounding error: 0.07 * 100 is 7.000000000000001."""
    return math.ceil(fraction * steps - 1e-6)


def gradient_buckets(chunks: Sequence[nn.Module], *, max_elements: int | None = None) -> list[GradientBucket]:
    """Sorts parameters into those that AdamW steps together and whose gradients ranks reduce together.

    There is one bucket of weights of matrix products, one of other parameters with weight decay, and one of those
    without; empty ones are left out.

    Args:
        chunks: of the model on this rank. Their parameters have a `ParameterInfo`.
        max_elements: makes several buckets of a whole Samba's weights of products, which a backward completes one after
            the other: of consecutive layers with up to so many elements, and up to BUCKET_SHARE of all, from the last
            layer to the first. None: one bucket, of any model.
    """
    buckets: list[GradientBucket] = []
    if max_elements:
        (model,) = chunks
        buckets = _layer_buckets(model, max_elements=max_elements)
    sorted_already = {parameter for bucket in buckets for parameter in bucket.parameters}
    by_use: dict[tuple[bool, bool], list[nn.Parameter]] = {(True, True): [], (True, False): [], (False, False): []}
    for parameter in nn.ModuleList(chunks).parameters():
        if parameter not in sorted_already:
            info = info_of(parameter)
            by_use[info.weight_decay, info.matmul_only].append(parameter)
    used = [(decays, tuple(parameters)) for (decays, _), parameters in by_use.items() if parameters]
    return buckets + [GradientBucket(parameters, weight_decay=decays) for decays, parameters in used]


def _layer_buckets(model: Samba, *, max_elements: int) -> list[GradientBucket]:
    layers = [
        ([parameter for parameter in module.parameters() if info_of(parameter).matmul_only], last)
        for module, last in model.backward_order()
    ]
    # An even share of whole tensors, so that tensor-parallel ranks, whose shares differ, send in one order.
    sizes = [
        sum(math.prod(piece.shape) for matrix in matrices for piece in info_of(matrix).slices) // model.tp.size
        for matrices, _ in layers
    ]
    max_elements = min(max_elements, math.ceil(sum(sizes) * BUCKET_SHARE))
    buckets: list[GradientBucket] = []
    elements = 0
    for (matrices, last), added in zip(layers, sizes, strict=True):
        if not buckets or elements + added > max_elements:
            buckets.append(GradientBucket((), weight_decay=True))
            elements = 0
        together = (*buckets[-1].parameters, *matrices)
        buckets[-1] = GradientBucket(together, weight_decay=True, completed_by=last)
        elements += added
    return buckets
