"""The one place where an operation's implementation is chosen: `KernelConfig.build` gives the `Kernels` of a run."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

from sambalm.model.ops import external as cuda
from sambalm.model.ops.attention.cudnn import cudnn_window
from sambalm.model.ops.attention.flex import flex_window
from sambalm.model.ops.cuda.conv import cuda_causal_conv_silu
from sambalm.model.ops.cuda.scan import cuda_selective_scan
from sambalm.model.ops.reference.causal_conv import causal_conv_silu
from sambalm.model.ops.reference.elementwise import Elementwise
from sambalm.model.ops.reference.rms_norm import add_rms_norm
from sambalm.model.ops.reference.selective_scan import gated_selective_scan
from sambalm.model.ops.reference.window_attention import window_attention
from sambalm.parallel.layers.recompute import recomputed

# Arguments, shapes and dtypes of a kernel are those of its PyTorch reference.
ScanKernel = Callable[..., tuple[Tensor, Tensor]]  # selective_scan.gated_selective_scan
ConvKernel = Callable[..., Tensor]  # causal_conv.causal_conv_silu, without initial_state
AttentionKernel = Callable[..., Tensor]  # window_attention.window_attention; documents: documents.AttentionDocuments
NormKernel = Callable[..., tuple[Tensor, Tensor]]  # rms_norm.add_rms_norm


@dataclass(frozen=True)
class Kernels:
    """The implementations that a model runs."""

    scan: ScanKernel
    conv: ConvKernel
    attention: AttentionKernel
    norm: NormKernel
    elementwise: Elementwise
    names: tuple[str, ...]  # what was chosen, for the log

    def recomputing(self) -> "Kernels":
        """The same with the insides of scan and attention computed again in the backward instead of kept."""
        return replace(self, scan=partial(recomputed, self.scan), attention=partial(recomputed, self.attention))


class KernelConfig(BaseModel):
    """Which implementation of each operation to run; auto takes the fastest that is installed and fits the device."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    scan: Literal["auto", "torch", "cuda", "mamba-ssm"] = Field(
        "auto", description="Selective scan; cuda is this project's own kernel"
    )
    conv: Literal["auto", "torch", "cuda", "causal-conv1d"] = Field(
        "auto", description="Mamba's causal convolution; cuda is this project's own kernel"
    )
    attention: Literal["auto", "torch", "cudnn", "flex", "torch-flash", "flash-attn"] = Field(
        "auto",
        description="Sliding-window attention; cudnn is NVIDIA's, through nvidia-cudnn-frontend, flex PyTorch's "
        "flex_attention, torch-flash the flash kernel inside its CUDA build",
    )
    norm: Literal["auto", "torch", "compiled", "apex"] = Field(
        "auto", description="RMSNorm with the residual sum before it; compiled is PyTorch's, fused by torch.compile"
    )
    elementwise: Literal["auto", "torch", "compiled"] = Field(
        "auto", description="SwiGLU, rotary positions and losses; compiled fuses each by torch.compile"
    )

    def build(
        self,
        *,
        device: torch.device,
        dtype: torch.dtype,
        d_state: int = 16,
        d_conv: int = 4,
        initial_states: bool = False,
        resets: bool = False,
    ) -> Kernels:
        """
        Args:
            d_state: states of a channel that the scan holds.
            d_conv: taps of the convolution.
            initial_states: whether the scan must start from given states.
            resets: whether states must be dropped at the beginnings of documents.

        Raises:
            KernelError: a kernel is asked for that cannot run here.
        """
        where = cuda.KernelRequirements(device, dtype, d_state, d_conv, initial_states, resets)
        chosen = {operation: _choose(operation, getattr(self, operation), where) for operation in _IMPLEMENTATIONS}
        functions = {operation: _function(operation, name) for operation, name in chosen.items()}
        return Kernels(**functions, names=tuple(f"{operation}={name}" for operation, name in chosen.items()))


# For each operation its implementations by name, best first; the pure PyTorch one runs everywhere.
_IMPLEMENTATIONS: dict[str, dict[str, Any]] = {
    "scan": {"cuda": cuda_selective_scan, "mamba-ssm": cuda.mamba_ssm_scan, "torch": gated_selective_scan},
    "conv": {"causal-conv1d": cuda.causal_conv1d_silu, "cuda": cuda_causal_conv_silu, "torch": causal_conv_silu},
    "attention": {
        "cudnn": cudnn_window,
        "flex": flex_window,
        "flash-attn": cuda.flash_attn_window,
        "torch-flash": cuda.torch_flash_window,
        "torch": window_attention,
    },
    "norm": {"compiled": partial(torch.compile, add_rms_norm), "apex": cuda.apex_add_rms_norm, "torch": add_rms_norm},
    "elementwise": {"compiled": Elementwise().compiled, "torch": Elementwise()},
}

TORCH_KERNELS = Kernels(
    scan=gated_selective_scan,
    conv=causal_conv_silu,
    attention=window_attention,
    norm=add_rms_norm,
    elementwise=Elementwise(),
    names=("torch",),
)


def _function(operation: str, name: str) -> Any:
    implementation = _IMPLEMENTATIONS[operation][name]
    return implementation() if name == "compiled" else implementation  # compiled when asked for, not at import


def _choose(operation: str, name: str, where: cuda.KernelRequirements) -> str:
    if name != "auto":
        reason = cuda.why_unavailable(operation, name, where)
        if reason:
            raise cuda.KernelError(
                f"kernels.{operation} is {name!r}, which cannot run here ({reason}): use 'auto' or 'torch'"
            )
        return name
    return next(name for name in _IMPLEMENTATIONS[operation] if not cuda.why_unavailable(operation, name, where))
