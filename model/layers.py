"""The three sublayers of Samba and their norm, cut over tensor-parallel ranks (arXiv 2406.07522, section 2.1).

Activations are [sequence, batch, width] between sublayers and [batch, sequence, ...] inside the mixers' kernels; both
are views of the same memory. S: sequence, B: batch, D: Mamba's channels, N: its states, H: heads.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sambalm.model import initialization as init
from sambalm.model.config import ModelConfig
from sambalm.model.ops.kernels import Kernels
from sambalm.model.ops.window_attention import apply_rotary
from sambalm.parallel.sharding import sharded_parameter
from sambalm.parallel.state import TensorParallel
from sambalm.parallel.tensor_parallel import (
    ColumnParallelLinear,
    RowParallelLinear,
    copy_to_region,
    reduce_from_region,
    replicated_weight,
)


@dataclass(frozen=True)
class SequenceContext:
    """What the sublayers need to know of the batch besides its activations."""

    rotary: tuple[Tensor, Tensor]  # cosines and sines of the positions, fp32 [sequence, head dim / 2]


class RMSNorm(nn.Module):
    """Root-mean-square norm of the residual stream before each sublayer and the head."""

    def __init__(self, config: ModelConfig, *, tp: TensorParallel, kernels: Kernels) -> None:
        super().__init__()
        self.tp, self.eps, self.kernel = tp, config.norm_eps, kernels.norm
        self.weight = sharded_parameter((config.hidden_size,), init=init.ones, tp=tp)

    def forward(self, x: Tensor) -> Tensor:
        return self.kernel(x, replicated_weight(self.weight, self.tp), eps=self.eps)


class MambaMixer(nn.Module):
    """Mamba-1 with its channels cut over ranks (arXiv 2312.00752, section 3.4)."""

    def __init__(self, config: ModelConfig, *, tp: TensorParallel, kernels: Kernels) -> None:
        super().__init__()
        width, inner, rank, states = config.hidden_size, config.inner_size, config.dt_rank_size, config.d_state
        self.tp, self.kernels = tp, kernels
        self.state_sizes = [rank, states, states]
        self.in_proj = ColumnParallelLinear(width, {"x": inner, "z": inner}, tp=tp, init=init.linear(width))
        self.conv = CausalConv(inner, config.d_conv, tp=tp, kernels=kernels)
        self.x_proj = StateProjection(inner, rank + 2 * states, tp=tp)
        self.dt_proj = StepProjection(rank, inner, tp=tp, bias_init=init.dt_bias(config))
        self.A_log = sharded_parameter((inner, states), init=init.a_log, tp=tp, dim=0)
        self.D = sharded_parameter((inner,), init=init.ones, tp=tp, dim=0)
        self.out_proj = RowParallelLinear(inner, width, tp=tp, init=init.residual_linear(inner, config))

    def forward(self, x: Tensor, context: SequenceContext) -> Tensor:
        x_SBD, z_SBD = self.in_proj(x)
        u_BSD = self.conv(x_SBD.transpose(0, 1))
        dt, B, C = self.x_proj(u_BSD).split(self.state_sizes, dim=-1)
        dt_BSD, dt_bias = self.dt_proj(dt)
        y_BSD, _ = self.kernels.scan(
            u_BSD, dt_BSD, -torch.exp(self.A_log), B, C, D=self.D, z=z_SBD.transpose(0, 1), dt_bias=dt_bias
        )
        return self.out_proj(y_BSD.transpose(0, 1))


class CausalConv(nn.Module):
    """Mamba's depthwise convolution and SiLU over this rank's channels."""

    def __init__(self, channels: int, taps: int, *, tp: TensorParallel, kernels: Kernels) -> None:
        super().__init__()
        self.kernel = kernels.conv
        self.weight = sharded_parameter((channels, taps), init=init.linear(taps), tp=tp, dim=0)
        self.bias = sharded_parameter((channels,), init=init.linear(taps), tp=tp, dim=0)

    def forward(self, x_BSD: Tensor) -> Tensor:
        return self.kernel(x_BSD, self.weight, self.bias)[0]


class StateProjection(nn.Module):
    """Mamba's x_proj: every rank contributes its channels and all need the whole result.

    Not a RowParallelLinear, which would scatter the result under sequence parallelism. The result feeds each rank's own
    channels, so its gradient is a sum over ranks as well.
    """

    def __init__(self, in_features: int, out_features: int, *, tp: TensorParallel) -> None:
        super().__init__()
        self.tp = tp
        self.weight = sharded_parameter((out_features, in_features), init=init.linear(in_features), tp=tp, dim=1)

    def forward(self, u_BSD: Tensor) -> Tensor:
        partial = F.linear(u_BSD, self.weight.to(u_BSD.dtype))
        return copy_to_region(reduce_from_region(partial, self.tp), self.tp)


class StepProjection(nn.Module):
    """Mamba's dt_proj to this rank's channels. The bias stays fp32 and is added by the scan."""

    def __init__(self, rank: int, channels: int, *, tp: TensorParallel, bias_init: init.Init) -> None:
        super().__init__()
        self.weight = sharded_parameter((channels, rank), init=init.linear(rank), tp=tp, dim=0)
        self.bias = sharded_parameter((channels,), init=bias_init, tp=tp, dim=0)

    def forward(self, dt: Tensor) -> tuple[Tensor, Tensor]:
        return F.linear(dt, self.weight.to(dt.dtype)), self.bias


class WindowAttention(nn.Module):
    """Causal sliding-window attention with rotary positions and grouped queries; heads are cut over ranks."""

    def __init__(self, config: ModelConfig, *, tp: TensorParallel, kernels: Kernels) -> None:
        super().__init__()
        width = config.hidden_size
        self.head_dim, self.window, self.kernel = config.head_dim, config.window, kernels.attention
        parts = {"q": width, "k": config.kv_size, "v": config.kv_size}
        self.qkv_proj = ColumnParallelLinear(width, parts, tp=tp, init=init.linear(width))
        self.o_proj = RowParallelLinear(width, width, tp=tp, init=init.residual_linear(width, config))

    def forward(self, x: Tensor, context: SequenceContext) -> Tensor:
        q_BHSd, k_BHSd, v_BHSd = (t.unflatten(-1, (-1, self.head_dim)).permute(1, 2, 0, 3) for t in self.qkv_proj(x))
        q_BHSd, k_BHSd = (apply_rotary(t, *context.rotary) for t in (q_BHSd, k_BHSd))
        y_BHSd = self.kernel(q_BHSd, k_BHSd, v_BHSd, window=self.window)
        return self.o_proj(y_BHSd.permute(2, 0, 1, 3).flatten(2))


class SwiGLU(nn.Module):
    """down(SiLU(gate(x)) * up(x)); the inner width is cut over ranks."""

    def __init__(self, config: ModelConfig, *, tp: TensorParallel, kernels: Kernels) -> None:
        super().__init__()
        width, inner = config.hidden_size, config.mlp_size
        self.gate_up_proj = ColumnParallelLinear(width, {"gate": inner, "up": inner}, tp=tp, init=init.linear(width))
        self.down_proj = RowParallelLinear(inner, width, tp=tp, init=init.residual_linear(inner, config))

    def forward(self, x: Tensor, context: SequenceContext) -> Tensor:
        gate, up = self.gate_up_proj(x)
        return self.down_proj(F.silu(gate) * up)
