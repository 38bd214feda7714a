"""The selective scan over a sequence that is cut over context-parallel ranks."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from sambalm.parallel.context_parallel import state_at_start
from sambalm.parallel.state import ContextParallel


def context_parallel_scan(
    scan: Callable[..., tuple[Tensor, Tensor]], *, decay: Callable[[], Tensor], cp: ContextParallel
) -> Tensor:
    """The scan of this rank's part of the sequence, going on from the states that the ranks before it reach.

    Over its part a rank's state is decay * (state at its start) + (state reached from zero); both factors are found
    locally, gathered, and composed to the state at each rank's start. What is sent is two numbers a channel and state,
    however long the sequence.

    Args:
        scan: a kernel with this rank's part; called with initial_state=[batch, channels, d_state] or without, it
            returns the output and the final state.
        decay: see `decay_over`.
    """
    if cp.size == 1:
        return scan()[0]
    _, reached = scan()
    return scan(initial_state=state_at_start(decay(), reached, cp=cp))[0]


def decay_over(dt: Tensor, A: Tensor, dt_bias: Tensor, resets: Tensor | None) -> Tensor:
    """What is left of a state after a whole part, [batch, channels, d_state] in A's dtype; arguments as of the scan."""
    steps = F.softplus(dt.to(A.dtype) + dt_bias)
    decay = torch.exp(steps.sum(1).unsqueeze(-1) * A)
    return decay if resets is None else decay.masked_fill(resets.any(1)[:, None, None], 0)
