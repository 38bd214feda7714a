"""Which kernels a plan counts with, and what each takes: seconds of a kernel, bytes of what is bound by memory.

Bytes are those that move between a device and its memory for each element of an activation in bf16, forward and
backward, by the list of kernels that PyTorch launches: a cast from bf16 to fp32, say, reads 2 and writes 4.
"""

from dataclasses import dataclass

from sambalm.pretrain.config import RunConfig

KERNEL_ELEMENTS = 4 * 5632 * 4096  # sequences x channels x tokens of the scan's and the convolution's measurements


@dataclass(frozen=True)
class KernelNames:
    """An implementation of each operation, as `kernels.*` names them."""

    scan: str
    conv: str
    attention: str
    norm: str
    elementwise: str
    device: str = "cuda"


TORCH_ON_CPU = KernelNames("torch", "torch", "torch", "torch", "torch", device="cpu")
# What `auto` stands for: nothing that has to be installed besides.
AUTO = {"scan": "cuda", "conv": "cuda", "attention": "torch-flash", "norm": "compiled", "elementwise": "compiled"}


def planned_kernels(config: RunConfig) -> KernelNames:
    """What a run on GPUs computes with."""
    chosen = {operation: name for operation, name in config.kernels.model_dump().items() if name != "auto"}
    return KernelNames(**AUTO | chosen)


@dataclass(frozen=True)
class Seconds:
    """Of a kernel for each channel and token, on an H100."""

    forward: float
    backward: float


@dataclass(frozen=True)
class Traffic:
    """Bytes for each element, and whether the kernels are fused ones or single PyTorch operations."""

    forward: float
    backward: float
    fused: bool = False


def _measured(forward_ms: float, backward_ms: float) -> Seconds:
    return Seconds(forward_ms * 1e-3 / KERNEL_ELEMENTS, backward_ms * 1e-3 / KERNEL_ELEMENTS)


SCAN = {
    "mamba-ssm": _measured(1.598, 6.739),  # mamba-ssm 2.3.2, B4 D5632 L4096, one H100
    "cuda": _measured(0.768, 3.239),  # the forward of a prototype; the backward by mamba-ssm's ratio: assumed
}
# mamba-ssm wants time innermost: u, dt, z and the output are copied, and their gradients back.
SCAN_LAYOUT = {"mamba-ssm": Traffic(16, 16), "cuda": Traffic(0, 0), "torch": Traffic(0, 0)}
CONV = {
    "causal-conv1d": _measured(0.132, 0.289),  # causal-conv1d 1.7.0, B4 D5632 L4096, one H100
    "cuda": _measured(0.132, 0.289),  # assumed to equal it
}
# Padding, four products and sums, SiLU. Backward of each tap: the product, its place among zeros, the sum of these, and
# the weight's product and sum.
CONV_TORCH = Traffic(30, 96)
# Mamba besides: the gradients of x and z joined, and u's from scan and x_proj added.
MAMBA_REST = Traffic(0, 14)

# Casts to fp32 and back around the norm, and in its backward two readings for the weight's gradient.
NORM = {"torch": Traffic(20, 32), "compiled": Traffic(4, 10, fused=True), "apex": Traffic(4, 10, fused=True)}
RESIDUAL = Traffic(6, 6, fused=True)  # a sum forward and one backward
# SiLU and product; backward two products, SiLU's and both gradients joined.
SWIGLU = {"torch": Traffic(10, 26), "compiled": Traffic(6, 10, fused=True)}
# Of a query or key: casts, four products of halves, two sums, joined.
ROTARY = {"torch": Traffic(48, 52), "compiled": Traffic(4, 4, fused=True)}
ATTENTION_LAYOUT = Traffic(8, 12)  # of a query: heads next to tokens and back
# Of a logit: the cast, the softmax's two readings; backward the filling of the gradient, the softmax's and the cast.
LOSS = {"torch": Traffic(18, 26), "compiled": Traffic(4, 4, fused=True)}
EMBEDDING = Traffic(14, 30)  # of a token's width: the lookup in fp32 and its cast; the gradient's and its scattering

# Of a weight and micro-batch: read in fp32 and written in bf16; its gradient cast back to fp32; and added to the sum.
WEIGHT_CAST_BYTES, GRADIENT_CAST_BYTES, ACCUMULATION_BYTES = 6, 6, 12
