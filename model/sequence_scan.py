"""The selective scan over a sequence that is cut over context-parallel ranks."""

import torch
import torch.nn.functional as F
from torch import Tensor

from sambalm.model.ops.kernels import ScanKernel
from sambalm.model.ops.selective_scan import selective_scan
from sambalm.parallel.context_parallel import state_at_start
from sambalm.parallel.state import ContextParallel


def context_parallel_scan(
    kernel: ScanKernel,
    u: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    *,
    D: Tensor,
    z: Tensor,
    dt_bias: Tensor,
    cp: ContextParallel,
) -> Tensor:
    """The gated scan of this rank's part of the sequence, going on from the states that the ranks before it reach.

    Shapes and dtypes are those of `gated_selective_scan`. Over its part a rank's state is decay * (state at its start)
    + (state reached from zero); both factors are found locally, gathered, and composed to the state at each rank's
    start. What is sent is two numbers a channel and state, however long the sequence.
    """
    if cp.size == 1:
        return kernel(u, dt, A, B, C, D=D, z=z, dt_bias=dt_bias)[0]
    steps = F.softplus(dt.to(A.dtype) + dt_bias)
    _, reached = selective_scan(u.to(A.dtype), steps, A, B, C)
    decay = torch.exp(steps.sum(1).unsqueeze(-1) * A)  # [batch, channels, d_state]
    initial_state = state_at_start(decay, reached, cp=cp)
    return kernel(u, dt, A, B, C, D=D, z=z, dt_bias=dt_bias, initial_state=initial_state)[0]
