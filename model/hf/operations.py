"""What the layers compute beside their products with weights: in PyTorch, or by kernels of the device."""

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from sambalm.model.ops.reference.causal_conv import causal_conv_silu
from sambalm.model.ops.reference.elementwise import swiglu
from sambalm.model.ops.reference.rms_norm import rms_norm
from sambalm.model.ops.reference.selective_scan import gated_selective_scan
from sambalm.model.ops.reference.window_attention import apply_rotary, window_attention


@dataclass(frozen=True)
class Operations:
    """One implementation of each; arguments, shapes and dtypes are those of the PyTorch functions given here."""

    rms_norm: Callable[..., Tensor] = rms_norm
    causal_conv_silu: Callable[..., Tensor] = causal_conv_silu
    gated_selective_scan: Callable[..., tuple[Tensor, Tensor]] = gated_selective_scan
    window_attention: Callable[..., Tensor] = window_attention
    rotary: Callable[[Tensor, Tensor, Tensor], Tensor] = apply_rotary
    swiglu: Callable[[Tensor, Tensor], Tensor] = swiglu
    delta_rule: Callable[..., tuple[Tensor, Tensor]] | None = None  # None: what the layer has with it, in PyTorch
    linear_attention: Callable[..., tuple[Tensor, Tensor]] | None = None


IN_TORCH = Operations()
