"""AdamW and its learning-rate schedule."""

import math
from typing import Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import nn

from sambalm.model.samba import Samba

# Of layers whose gradients ranks reduce together, and whose weights they gather together: so many elements at most, and
# no more than a share of all. No backward hides the last bucket's reduction, and no forward the first one's gather; but
# each is an AdamW of its own in DeepSpeed's step, and short messages do not fill a network. 3.8B has 16, of 0.9 GB.
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

    def build(
        self, model: nn.Module, *, adamw: type[torch.optim.AdamW], bucket_elements: int | None = None
    ) -> torch.optim.AdamW:
        """
        Args:
            model: its weights are fp32, on the device where it trains.
            adamw: the implementation, `Kernels.optimizer`.
            bucket_elements: see `parameter_groups`.
        """
        groups = self.parameter_groups(model, bucket_elements=bucket_elements)
        return adamw(groups, lr=self.peak_lr, betas=(self.beta1, self.beta2), eps=self.eps, fused=True)

    def parameter_groups(self, model: nn.Module, *, bucket_elements: int | None = None) -> list[dict[str, Any]]:
        """Weights of matrix products and other parameters with weight decay, and those without.

        Args:
            bucket_elements: makes several groups of the weights of products, for `FlatGradients`: of consecutive layers
                with up to so many elements, and up to BUCKET_SHARE of all, from the last of a whole Samba to its first.
        """
        groups = self._buckets(model, max_elements=bucket_elements) if bucket_elements else []
        bucketed = {parameter for group in groups for parameter in group["params"]}
        by_use: dict[tuple[bool, bool], list[nn.Parameter]] = {(True, True): [], (True, False): [], (False, False): []}
        for name, parameter in model.named_parameters():
            if parameter not in bucketed:
                by_use[decays(name, parameter), parameter.matmul_only].append(parameter)
        groups += [
            {"params": parameters, "weight_decay": self.weight_decay if decayed else 0.0}
            for (decayed, _), parameters in by_use.items()
            if parameters
        ]
        return groups

    def _buckets(self, model: Samba, *, max_elements: int) -> list[dict[str, Any]]:
        layers = [
            ([parameter for parameter in module.parameters() if parameter.matmul_only], last)
            for module, last in model.backward_order()
        ]
        # Of an even share of whole tensors, so that tensor-parallel ranks, whose shares differ, send in one order.
        sizes = [
            sum(math.prod(piece.shape) for matrix in matrices for piece in matrix.canonical_slices) // model.tp.size
            for matrices, _ in layers
        ]
        max_elements = min(max_elements, math.ceil(sum(sizes) * BUCKET_SHARE))
        groups: list[dict[str, Any]] = []
        elements = 0
        for (matrices, last), added in zip(layers, sizes, strict=True):
            if not groups or elements + added > max_elements:
                groups.append({"params": [], "weight_decay": self.weight_decay})
                elements = 0
            groups[-1]["params"] += matrices
            groups[-1]["completed_by"] = last
            elements += added
        return groups

    def learning_rate(self, step: int, *, steps: int) -> float:
        """Of a step, counted from 1, in a run of `steps`."""
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
    """Rounded up, but not for a rounding error: 0.07 * 100 is 7.000000000000001."""
    return math.ceil(fraction * steps - 1e-6)


def decays(name: str, parameter: nn.Parameter) -> bool:
    """Whether weight decay applies: to matrices, not to vectors nor to Mamba's A_log (a rate, not a projection)."""
    return parameter.dim() > 1 and not name.endswith(".A_log")
