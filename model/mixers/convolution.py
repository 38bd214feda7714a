"""The causal convolution that several mixers have, over a sequence that context-parallel ranks may share."""

import torch
from torch import Tensor

from sambalm.model.mixers.context import SequenceContext
from sambalm.model.ops.registry import ConvKernel
from sambalm.parallel.layers.context_parallel import HaloExchange


def causal_conv(kernel: ConvKernel, x: Tensor, weight: Tensor, bias: Tensor, context: SequenceContext) -> Tensor:
    """Runs a kernel of the depthwise convolution with its SiLU over the rank's part of the sequence.

    Args:
        x: [batch, length, channels]. weight: [channels, taps]. bias: [channels].

    Returns:
        [batch, length, channels], in memory as x of one rank alone: time first.
    """
    if context.cp.size == 1:
        return kernel(x, weight, bias, resets=context.resets)
    reach = weight.shape[1] - 1
    neighbours = HaloExchange(x, reach, cp=context.cp)
    y_BSD = kernel(x, weight, bias, resets=context.resets)
    before = neighbours.wait()
    start = torch.cat((before, x[:, :reach]), dim=1)  # the tokens that see a neighbour's
    resets = context.documents.resets_from(before.shape[1])[:, : start.shape[1]] if context.documents else None
    y_start = kernel(start, weight, bias, resets=resets)
    y_SBD = torch.cat((y_start[:, before.shape[1] :].transpose(0, 1), y_BSD[:, reach:].transpose(0, 1)))
    return y_SBD.transpose(0, 1)  # so that it lies in memory as without neighbours
