"""What surrounds the selective scan in a layer: projections to its inputs, and a sequence cut over ranks."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sambalm.model import initialization as init
from sambalm.parallel.groups import ContextParallel, TensorParallel
from sambalm.parallel.layers.context_parallel import scan_of_parts
from sambalm.parallel.layers.linear import linear, linear_beside
from sambalm.parallel.layers.tensor_parallel import copy_to_region, reduce_from_region
from sambalm.parallel.shard import Shard
from sambalm.parallel.sharding import sharded_parameter


def context_parallel_scan(
    scan: Callable[..., tuple[Tensor, Tensor]],
    *,
    dt: Tensor,
    A: Tensor,
    dt_bias: Tensor,
    resets: Tensor | None,
    cp: ContextParallel,
) -> Tensor:
    """The output of the scan of this rank's part of the sequence, as `scan_of_parts` makes it.

    What is sent is two numbers a channel and state, however long the sequence.

    Args:
        scan: a kernel with all its arguments but `initial_state`, which is added where there is one.
        dt, A, dt_bias, resets: of those arguments.
    """
    shape = (len(dt), *A.shape)
    return scan_of_parts(
        scan,
        decay=lambda: decay_over(dt, A, dt_bias, resets),
        decay_shape=shape,
        state_shape=shape,
        like=A,
        cp=cp,
    )


def decay_over(dt: Tensor, A: Tensor, dt_bias: Tensor, resets: Tensor | None) -> Tensor:
    """What is left of a state after the whole part, [batch, channels, d_state]; arguments as the scan's."""
    steps = F.softplus(dt.to(A.dtype) + dt_bias)
    decay = torch.exp(steps.sum(1).unsqueeze(-1) * A)
    return decay if resets is None else decay.masked_fill(resets.any(1)[:, None, None], 0)


class StateProjection(nn.Module):
    """The projection to step sizes, B and C: every rank contributes its channels and all need the whole result.

    Not a RowParallelLinear, which would scatter the result under sequence parallelism. The result feeds each rank's own
    channels, so its gradient is a sum over ranks as well.
    """

    def __init__(self, channels: Shard, out_features: int, *, tp: TensorParallel) -> None:
        super().__init__()
        self.tp = tp
        self.weight = sharded_parameter(
            (out_features, 0), {"weight": channels}, init=init.linear(channels.size), dim=1, matmul_only=True
        )

    def forward(self, u: Tensor) -> tuple[Tensor, Tensor]:
        """u for the scan, and its projection."""
        u, partial = linear_beside(u, self.weight)
        return u, copy_to_region(reduce_from_region(partial, self.tp), self.tp)


class StepProjection(nn.Module):
    """The step sizes' way to this rank's channels. The bias stays fp32 and is added by the scan."""

    def __init__(self, rank: int, channels: Shard, *, bias_init: init.Init) -> None:
        super().__init__()
        self.weight = sharded_parameter((0, rank), {"weight": channels}, init=init.linear(rank), matmul_only=True)
        self.bias = sharded_parameter((0,), {"bias": channels}, init=bias_init)

    def forward(self, dt: Tensor) -> tuple[Tensor, Tensor]:
        return linear(dt, self.weight), self.bias
