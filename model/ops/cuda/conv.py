"""Mamba's causal convolution with its SiLU in CUDA C++ (source/conv.cu), without atomics."""

import math

import torch
from torch import Tensor

from sambalm.model.ops.cuda.conv_sizes import STEPS, WARP_CHANNELS, WARPS
from sambalm.model.ops.cuda.memory import EIGHT, INPUTS, aligned, filled_up, sequence_first, strides
from sambalm.model.ops.cuda.nvrtc import Kernel, kernel


def cuda_causal_conv_silu(x: Tensor, weight: Tensor, bias: Tensor, *, resets: Tensor | None = None) -> Tensor:
    """`causal_conv.causal_conv_silu` on a GPU, from zero: the same arguments and result; sums are fp32."""
    more = -x.shape[2] % EIGHT
    flags = None if resets is None else resets.to(torch.uint8).contiguous()
    weight, bias = filled_up(weight.float(), 0, more).contiguous(), filled_up(bias.float(), more).contiguous()
    return _Conv.apply(aligned(filled_up(x, more)), weight, bias, flags)[..., : x.shape[2]]


def _kernel(name: str, x: Tensor, weight: Tensor) -> Kernel:
    defines = {"INPUT": INPUTS[x.dtype], "TAPS": weight.shape[1], "STEPS": STEPS, "WARPS": WARPS}
    return kernel(name, "elements.cuh", "conv.cu", defines=defines)


def _grid(x: Tensor) -> tuple[int, int, int]:
    batch, length, channels = x.shape
    return math.ceil(channels / WARP_CHANNELS), batch, math.ceil(length / (STEPS * WARPS))


class _Conv(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias, resets):
        ctx.save_for_backward(x, weight, bias, resets)
        out = sequence_first(x)
        _kernel("conv_forward", x, weight)(
            _grid(x), 32 * WARPS, x, weight, bias, resets, out, x.shape[1], x.shape[2], *strides(x, out)
        )
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        x, weight, bias, resets = ctx.saved_tensors
        grad, grad_x, grid = aligned(grad), sequence_first(x), _grid(x)
        (batch, length, channels), taps = x.shape, weight.shape[1]
        sums = weight.new_empty(batch * grid[2], taps + 1, channels)
        _kernel("conv_backward", x, weight)(
            grid, 32 * WARPS, x, weight, bias, resets, grad, grad_x, sums, length, channels, *strides(x, grad, grad_x)
        )
        *grad_weight, grad_bias = sums.sum(0)
        return grad_x, torch.stack(grad_weight, dim=1), grad_bias, None
