"""The selective scan over a sequence that is cut over context-parallel ranks."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from sambalm.parallel.groups import ContextParallel
from sambalm.parallel.layers.context_parallel import scan_of_parts


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
