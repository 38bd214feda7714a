"""Operations on single elements and rows, in plain PyTorch."""

import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec

import torch
import torch.nn.functional as F
from torch import Tensor

from sambalm.model.ops.reference.window_attention import apply_rotary


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """SiLU(gate) * up, in their dtype and shape."""
    return F.silu(gate) * up


def norm_and_gate(x: Tensor, weight: Tensor, gate: Tensor, *, eps: float, activation: str) -> Tensor:
    """The `rms_norm` of x times an activation of its gate, both of one shape, in fp32 (fp64 for fp64); in x's dtype.

    Args:
        activation: silu or sigmoid.
    """
    work = torch.promote_types(x.dtype, torch.float32)
    opened = F.silu(gate.to(work)) if activation == "silu" else gate.to(work).sigmoid()
    return (F.rms_norm(x.to(work), (x.shape[-1],), weight.to(work), eps) * opened).to(x.dtype)


def gated_norm(y: Tensor, gate: Tensor, weight: Tensor, eps: float) -> Tensor:
    """The root-mean-square norm of y * SiLU(gate) over the last dimension, times the weight; in y's dtype.

    Args:
        y, gate: [..., groups, width], computed with in fp32 (fp64 for fp64).
        weight: fp32 [groups, width].
        eps: added to the mean square.
    """
    work = torch.promote_types(y.dtype, torch.float32)
    gated = y.to(work) * F.silu(gate.to(work))
    return (F.rms_norm(gated, gated.shape[-1:], eps=eps) * weight).to(y.dtype)


def token_losses(logits: Tensor, labels: Tensor, vocabulary: int) -> Tensor:
    """Negative log-likelihood of each label among the first `vocabulary` logits.

    Args:
        logits: [tokens, vocabulary or more] in any dtype.
        labels: int64 [tokens].

    Returns:
        fp32 [tokens].
    """
    return F.cross_entropy(logits[:, :vocabulary].float(), labels, reduction="none")


@dataclass(frozen=True)
class Elementwise:
    """What lies between a model's matrix products, scans and attention, but for the stream's norm."""

    swiglu: Callable[[Tensor, Tensor], Tensor] = swiglu
    rotary: Callable[[Tensor, Tensor, Tensor], Tensor] = apply_rotary
    norm_and_gate: Callable[..., Tensor] = norm_and_gate
    token_losses: Callable[[Tensor, Tensor, int], Tensor] = token_losses
    gated_norm: Callable[[Tensor, Tensor, Tensor, float], Tensor] = gated_norm


def why_not_compiled() -> str | None:
    """Why torch.compile cannot make GPU kernels here; None when it can."""
    if find_spec("triton") is None:
        return "it needs Triton"
    if not any(map(shutil.which, (os.environ.get("CC", "cc"), "gcc", "clang"))):
        return "Triton needs a C compiler"
    return None
