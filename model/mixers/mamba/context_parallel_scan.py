"""The selective scan over a sequence that is cut over context-parallel ranks."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from sambalm.parallel.groups import ContextParallel
from sambalm.parallel.layers.context_parallel import after, incoming_state


def context_parallel_scan(
    scan: Callable[..., tuple[Tensor, Tensor]],
    *,
    dt: Tensor,
    A: Tensor,
    dt_bias: Tensor,
    resets: Tensor | None,
    cp: ContextParallel,
) -> Tensor:
    """The scan of this rank's part of the sequence, going on from the states that the ranks before it reach.

    Over its part a rank's state is decay * (state at its start) + (state reached from zero); both factors are found
    locally, gathered, and composed to the state at each rank's start. What is sent is two numbers a channel and state,
    however long the sequence. The first rank's state is zero, so its scan from zero is the result, and nobody goes on
    from the last rank's: both scan once, the others twice.

    Args:
        scan: a kernel with all its arguments but `initial_state`, which is added where there is one.
        dt, A, dt_bias, resets: of those arguments.
    """
    if cp.size == 1:
        return scan()[0]
    unused = torch.zeros(len(dt), *A.shape, dtype=A.dtype, device=A.device, requires_grad=True)
    if cp.rank == 0:
        y, reached = scan()
        return after(y, incoming_state(unused, reached, cp=cp))
    own = (unused, unused)
    if cp.rank < cp.size - 1:
        own = (decay_over(dt, A, dt_bias, resets), scan()[1])
    return scan(initial_state=incoming_state(*own, cp=cp))[0]


def decay_over(dt: Tensor, A: Tensor, dt_bias: Tensor, resets: Tensor | None) -> Tensor:
    """What is left of a state after the whole part, [batch, channels, d_state]; arguments as the scan's."""
    steps = F.softplus(dt.to(A.dtype) + dt_bias)
    decay = torch.exp(steps.sum(1).unsqueeze(-1) * A)
    return decay if resets is None else decay.masked_fill(resets.any(1)[:, None, None], 0)
