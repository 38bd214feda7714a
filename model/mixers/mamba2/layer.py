"""Mamba-2 with its groups of heads cut over tensor-parallel ranks (arXiv 2405.21060, section 8).

A group's heads share B, C and the norm, so whole groups on a rank need no message between the layer's input and output.
S: sequence, B: batch, H: heads, G: groups, P: channels of a head, N: states.
"""

from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sambalm.model import initialization as init
from sambalm.model.causal_conv import CausalConv
from sambalm.model.config import ModelConfig
from sambalm.model.mixers.context import SequenceContext
from sambalm.model.mixers.mamba2.sizes import HeadShare, Mamba2Sizes, share_heads
from sambalm.model.ops.registry import Kernels
from sambalm.parallel.groups import TensorParallel
from sambalm.parallel.layers.context_parallel import scan_of_parts
from sambalm.parallel.layers.linear import linear_parts
from sambalm.parallel.layers.tensor_parallel import ColumnParallelLinear, RowParallelLinear
from sambalm.parallel.sharding import sharded_parameter


class InputProjection(nn.Module):
    """The gate z, what the convolution takes (x, B and C side by side) and step sizes, in one matrix product."""

    def __init__(self, width: int, share: HeadShare, *, tp: TensorParallel) -> None:
        super().__init__()
        self.tp = tp
        self.local_sizes = [[share.inner.length, share.mixed, share.heads.length]]
        parts = {"z": share.inner, "x": share.inner, "B": share.states, "C": share.states, "dt": share.heads}
        self.weight = sharded_parameter(
            (0, width),
            {f"{name}.weight": part for name, part in parts.items()},
            init=init.linear(width),
            matmul_only=True,
            takes_fp8=True,
        )

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        return linear_parts(x, self.weight, sizes=self.local_sizes, tp=self.tp)


class GatedNorm(nn.Module):
    """The norm of the gated output, each group's channels on their own."""

    def __init__(self, share: HeadShare, *, eps: float, kernels: Kernels) -> None:
        super().__init__()
        self.groups, self.eps, self.kernel = share.groups, eps, kernels.elementwise.gated_norm
        self.weight = sharded_parameter((0,), {"weight": share.inner}, init=init.ones)

    def forward(self, y: Tensor, gate: Tensor) -> Tensor:
        """Maps y and gate [S, B, channels] to the same."""
        y, gate = (t.unflatten(2, (self.groups, -1)) for t in (y, gate))
        return self.kernel(y, gate, self.weight.view(self.groups, -1), self.eps).flatten(2)


class Mamba2Layer(nn.Module):
    """Mamba-2 with its heads cut over ranks."""

    def __init__(self, config: ModelConfig, sizes: Mamba2Sizes, *, tp: TensorParallel, kernels: Kernels) -> None:
        super().__init__()
        width = config.hidden_size
        self.share, self.kernel = share_heads(sizes, width, tp), kernels.ssd
        inner, states, heads = self.share.inner, self.share.states, self.share.heads
        self.state_shape = (heads.length, sizes.head_dim, sizes.d_state)
        self.in_proj = InputProjection(width, self.share, tp=tp)
        self.conv = CausalConv({"x.": inner, "B.": states, "C.": states}, sizes.d_conv, kernels=kernels)
        self.dt_bias = sharded_parameter((0,), {"dt_bias": heads}, init=init.dt_bias(sizes))
        self.A_log = sharded_parameter((0,), {"A_log": heads}, init=init.head_a_log)
        self.D = sharded_parameter((0,), {"D": heads}, init=init.ones)
        self.norm = GatedNorm(self.share, eps=config.norm_eps, kernels=kernels)
        self.out_proj = RowParallelLinear(inner, width, tp=tp, init=init.residual_linear(inner.size, config))

    def forward(self, x: Tensor, context: SequenceContext) -> tuple[Tensor, Tensor]:
        """What is added to the stream, and the scan's output [S, B, channels], before its gate."""
        z_SBD, mixed_SBD, dt_SBH = self.in_proj(x)
        y_BSHP = self._scan(self.conv(mixed_SBD.transpose(0, 1), context), dt_SBH.transpose(0, 1), context)
        y_SBD = y_BSHP.flatten(2).transpose(0, 1)
        return self.out_proj(self.norm(y_SBD, z_SBD)), y_SBD

    def _scan(self, mixed_BSD: Tensor, dt_BSH: Tensor, context: SequenceContext) -> Tensor:
        inner, states = self.share.inner.length, self.share.states.length
        heads, head_dim, d_state = self.state_shape
        x, B, C = mixed_BSD.split([inner, states, states], dim=2)
        x_BSHP = x.unflatten(2, (heads, head_dim))
        B_BSGN, C_BSGN = (t.unflatten(2, (-1, d_state)) for t in (B, C))
        A, resets = -torch.exp(self.A_log), context.resets
        weights = {"D": self.D, "dt_bias": self.dt_bias}
        return scan_of_parts(
            partial(self.kernel, x_BSHP, dt_BSH, A, B_BSGN, C_BSGN, **weights, resets=resets),
            decay=lambda: decay_over(dt_BSH, A, self.dt_bias, resets),
            decay_shape=(len(x), heads, 1, 1),
            state_shape=(len(x), *self.state_shape),
            like=A,
            cp=context.cp,
        )


class GatedMemoryUnit(nn.Module):
    """A gate over the scan's output of a layer before, in the place of a scan of its own (arXiv 2507.06607, section 2).

    It gates and norms that output as the layer that wrote it does, and mixes no tokens.
    """

    def __init__(
        self, config: ModelConfig, sizes: Mamba2Sizes, *, memory: str, tp: TensorParallel, kernels: Kernels
    ) -> None:
        super().__init__()
        width, share, self.memory = config.hidden_size, share_heads(sizes, config.hidden_size, tp), memory
        self.in_proj = ColumnParallelLinear(width, {"gate": share.inner}, tp=tp, init=init.linear(width))
        self.norm = GatedNorm(share, eps=config.norm_eps, kernels=kernels)
        self.out_proj = RowParallelLinear(
            share.inner, width, tp=tp, init=init.residual_linear(share.inner.size, config)
        )

    def forward(self, x: Tensor, context: SequenceContext) -> Tensor:
        (gate_SBD,) = self.in_proj(x)
        return self.out_proj(self.norm(context.memories[self.memory], gate_SBD))


def decay_over(dt: Tensor, A: Tensor, dt_bias: Tensor, resets: Tensor | None) -> Tensor:
    """What is left of a state after the whole part, [batch, heads, 1, 1]; arguments as the scan's."""
    decay = torch.exp(F.softplus(dt.to(A.dtype) + dt_bias).sum(1) * A)
    return (decay if resets is None else decay.masked_fill(resets.any(1, keepdim=True), 0))[..., None, None]
