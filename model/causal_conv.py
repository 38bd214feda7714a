"""The short convolution that state space layers begin with, over any part of the sequence.

S: sequence, B: batch, D: channels.
"""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from sambalm.model import initialization as init
from sambalm.model.mixers.context import SequenceContext
from sambalm.model.ops.registry import Kernels
from sambalm.parallel.layers.context_parallel import HaloExchange
from sambalm.parallel.shard import Shard
from sambalm.parallel.sharding import sharded_parameter


class CausalConv(nn.Module):
    """A depthwise causal convolution and SiLU over this rank's channels; documents and context parallelism included.

    Args:
        channels: this rank's shares of the channels, side by side, by the beginnings of their canonical names: "x."
            has x.weight and x.bias, and "" is for one share without a name of its own.
        taps: inputs that an output sees, its own included.
    """

    def __init__(self, channels: Mapping[str, Shard], taps: int, *, kernels: Kernels) -> None:
        super().__init__()
        self.kernel, self.taps = kernels.conv, taps
        weights, biases = ({f"{name}{kind}": part for name, part in channels.items()} for kind in ("weight", "bias"))
        self.weight = sharded_parameter((0, taps), weights, init=init.linear(taps))
        self.bias = sharded_parameter((0,), biases, init=init.linear(taps))

    def forward(self, x_BSD: Tensor, context: SequenceContext) -> Tensor:
        if context.cp.size == 1:
            return self.kernel(x_BSD, self.weight, self.bias, resets=context.resets)
        reach = self.taps - 1
        neighbours = HaloExchange(x_BSD, reach, cp=context.cp)
        y_BSD = self.kernel(x_BSD, self.weight, self.bias, resets=context.resets)
        before = neighbours.wait()
        start = torch.cat((before, x_BSD[:, :reach]), dim=1)  # the tokens that see a neighbour's
        resets = context.documents.resets_from(before.shape[1])[:, : start.shape[1]] if context.documents else None
        y_start = self.kernel(start, self.weight, self.bias, resets=resets)
        y_SBD = torch.cat((y_start[:, before.shape[1] :].transpose(0, 1), y_BSD[:, reach:].transpose(0, 1)))
        return y_SBD.transpose(0, 1)  # so that it lies in memory as without neighbours
