"""Root-mean-square normalisation of the residual stream in plain PyTorch."""

import torch
import torch.nn.functional as F
from torch import Tensor


def add_rms_norm(x: Tensor, branch: Tensor | None, weight: Tensor, *, eps: float) -> tuple[Tensor, Tensor]:
    """x + branch (x itself for None) and its `rms_norm`: both in x's dtype and shape."""
    if branch is not None:
        x = x + branch
    return x, rms_norm(x, weight, eps=eps)


def rms_norm(x: Tensor, weight: Tensor, *, eps: float) -> Tensor:
    """x / sqrt(mean(x^2) + eps) * weight over the last dimension, computed in fp32 (fp64 for fp64), in x's dtype."""
    work = torch.promote_types(x.dtype, torch.float32)
    return F.rms_norm(x.to(work), (x.shape[-1],), weight.to(work), eps).to(x.dtype)
