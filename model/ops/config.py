"""The section `kernels` of a run's configuration; `registry.build_kernels` reads it. Needs no torch."""

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field


class KernelConfig(BaseModel):
    """Which implementation of each operation to run; auto takes the fastest that is installed and fits the device."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    scan: Literal["auto", "torch", "cuda", "mamba-ssm"] = Field(
        "auto", description="Selective scan; cuda is this project's own kernel"
    )
    conv: Literal["auto", "torch", "cuda", "causal-conv1d"] = Field(
        "auto", description="Causal convolution of Mamba and Mamba-2; cuda is this project's own kernel"
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
        "auto",
        description="SwiGLU, rotary positions, norms with a gate, and losses; compiled fuses each by torch.compile",
    )
    delta_rule: Literal["auto", "torch", "fla"] = Field(
        "auto", description="Delta rule of Gated DeltaNet and Kimi Delta Attention; fla is flash-linear-attention's"
    )
    linear_attention: Literal["auto", "torch", "fla"] = Field(
        "auto", description="Linear attention of GLA and RetNet; fla is flash-linear-attention's"
    )
    ssd: Literal["auto", "torch", "mamba-ssm"] = Field("auto", description="Mamba-2's scan")
