"""The token shift's layer with its channels cut over tensor-parallel ranks."""

import torch
import torch.nn.functional as F
from torch import nn

from sambalm.model import initialization as init
from sambalm.parallel.layers.context_parallel import HaloExchange
from sambalm.parallel.layers.tensor_parallel import ColumnParallelLinear, RowParallelLinear
from sambalm.parallel.shard import shard
from sambalm.parallel.sharding import sharded_parameter
from toy_mixer.ops import token_before


class Mix(nn.Module):
    """Adds each channel's token and the one before it, weighted."""

    def __init__(self, channels) -> None:
        super().__init__()
        self.weight = sharded_parameter((0, 2), {"weight": channels}, init=init.linear(2))

    def forward(self, value_BSC, context):
        before_BSC = self._token_before(value_BSC, context)
        now, before = self.weight.unbind(1)
        return (value_BSC * now + before_BSC * before).to(value_BSC.dtype)

    def _token_before(self, value_BSC, context):
        start = value_BSC.new_zeros(len(value_BSC), 1, value_BSC.shape[2])
        if context.cp.size > 1:
            start = torch.cat((start, HaloExchange(value_BSC, 1, cp=context.cp).wait()), dim=1)[:, -1:]
        before_BSC = token_before(value_BSC, start)
        return before_BSC if context.resets is None else before_BSC.masked_fill(context.resets.unsqueeze(2), 0)


class TokenShiftLayer(nn.Module):
    def __init__(self, config, sizes, *, tp) -> None:
        super().__init__()
        width, channels = config.hidden_size, shard(sizes.channels, tp)
        self.in_proj = ColumnParallelLinear(
            width, {"gate": channels, "value": channels}, tp=tp, init=init.linear(width)
        )
        self.mix = Mix(channels)
        self.out_proj = RowParallelLinear(channels, width, tp=tp, init=init.residual_linear(channels.size, config))

    def forward(self, x, context):
        gate_SBC, value_SBC = self.in_proj(x)
        mixed_SBC = self.mix(value_SBC.transpose(0, 1), context).transpose(0, 1)
        return self.out_proj(F.silu(gate_SBC) * mixed_SBC)
