"""Mamba-1 with its channels cut over tensor-parallel ranks (arXiv 2406.07522, section 2.1).

S: sequence, B: batch, D: channels, N: states.
"""

from functools import partial

import torch
from torch import Tensor, nn

from sambalm.model import initialization as init
from sambalm.model.causal_conv import CausalConv
from sambalm.model.config import ModelConfig
from sambalm.model.mixers.context import SequenceContext
from sambalm.model.ops.registry import Kernels
from sambalm.model.selective_scan import StateProjection, StepProjection, context_parallel_scan
from sambalm.parallel.groups import TensorParallel
from sambalm.parallel.layers.tensor_parallel import ColumnParallelLinear, RowParallelLinear
from sambalm.parallel.shard import shard
from sambalm.parallel.sharding import sharded_parameter


class MambaLayer(nn.Module):
    """Mamba-1 with its channels cut over ranks (arXiv 2312.00752, section 3.4)."""

    def __init__(self, config: ModelConfig, *, tp: TensorParallel, kernels: Kernels) -> None:
        super().__init__()
        width, rank, states = config.hidden_size, config.dt_rank_size, config.d_state
        channels = shard(config.inner_size, tp)
        self.kernels = kernels
        self.state_sizes = [rank, states, states]
        self.in_proj = ColumnParallelLinear(width, {"x": channels, "z": channels}, tp=tp, init=init.linear(width))
        self.conv = CausalConv({"": channels}, config.d_conv, kernels=kernels)
        self.x_proj = StateProjection(channels, rank + 2 * states, tp=tp)
        self.dt_proj = StepProjection(rank, channels, bias_init=init.dt_bias(config))
        self.A_log = sharded_parameter((0, states), {"A_log": channels}, init=init.a_log, weight_decay=False)
        self.D = sharded_parameter((0,), {"D": channels}, init=init.ones)
        self.out_proj = RowParallelLinear(channels, width, tp=tp, init=init.residual_linear(channels.size, config))

    def forward(self, x: Tensor, context: SequenceContext) -> Tensor:
        x_SBD, z_SBD = self.in_proj(x)
        u_SBD = self.conv(x_SBD.transpose(0, 1), context).transpose(0, 1)
        # Projections take the memory's order; of another view they would make a copy.
        u_SBD, projected = self.x_proj(u_SBD)
        dt, B, C = projected.split(self.state_sizes, dim=-1)
        dt, dt_bias = self.dt_proj(dt)
        u_BSD, dt_BSD, B, C, z_BSD = (t.transpose(0, 1) for t in (u_SBD, dt, B, C, z_SBD))
        A, resets = -torch.exp(self.A_log), context.resets
        scan = partial(self.kernels.scan, u_BSD, dt_BSD, A, B, C, D=self.D, z=z_BSD, dt_bias=dt_bias, resets=resets)
        y_BSD = context_parallel_scan(scan, dt=dt_BSD, A=A, dt_bias=dt_bias, resets=resets, cp=context.cp)
        return self.out_proj(y_BSD.transpose(0, 1))
