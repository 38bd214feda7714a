"""What ranks that share a sequence tell each other. They hold contiguous parts of it in order, all of one length.

A causal layer that looks back a bounded distance needs the tokens just before its part, from one neighbour or, when
parts are shorter than that distance, from several. A recurrence needs the state at its start. Neither grows with the
length of the sequence.
"""

import math

import torch
import torch.distributed as dist
from torch import Tensor

from sambalm.parallel.state import ContextParallel


def tokens_before(x: Tensor, tokens: int, *, cp: ContextParallel) -> Tensor:
    """The tokens just before this rank's part of a sequence; differentiable.

    Args:
        x: [batch, this rank's tokens, ...], of one shape on all ranks.
        tokens: how many to fetch; near the start of the sequence there are fewer.

    Returns:
        [batch, min(tokens, tokens on the ranks before), ...].
    """
    return _TokensBefore.apply(x, tokens, cp)


class _TokensBefore(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, tokens: int, cp: ContextParallel) -> Tensor:
        ctx.cp, ctx.portions = cp, _portions(tokens, part_tokens=x.shape[1], cp=cp)
        ctx.shape = x.shape
        sent = {cp.rank + hop: x[:, x.shape[1] - n :].contiguous() for hop, n in ctx.portions.items()}
        wanted = {cp.rank - hop: x.new_empty(x.shape[0], n, *x.shape[2:]) for hop, n in ctx.portions.items()}
        received = _exchange(sent, wanted, cp=cp)
        # The farthest neighbour's tokens come first in the sequence.
        return torch.cat([received[rank] for rank in sorted(received)] or [x[:, :0]], dim=1)

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, None, None]:
        cp, sources = ctx.cp, {ctx.cp.rank - hop: n for hop, n in ctx.portions.items() if ctx.cp.rank >= hop}
        pieces = gradient.split([sources[rank] for rank in sorted(sources)], dim=1)
        sent = {rank: piece.contiguous() for rank, piece in zip(sorted(sources), pieces, strict=True)}
        wanted = {cp.rank + hop: gradient.new_empty(ctx.shape[0], n, *ctx.shape[2:]) for hop, n in ctx.portions.items()}
        total = gradient.new_zeros(ctx.shape)
        for part in _exchange(sent, wanted, cp=cp).values():
            total[:, ctx.shape[1] - part.shape[1] :] += part
        return total, None, None


def _portions(tokens: int, *, part_tokens: int, cp: ContextParallel) -> dict[int, int]:
    """How many of its last tokens a rank sends to the rank so many hops after it."""
    hops = min(math.ceil(tokens / part_tokens), cp.size - 1)
    return {hop: min(part_tokens, tokens - (hop - 1) * part_tokens) for hop in range(1, hops + 1)}


def _exchange(sent: dict[int, Tensor], wanted: dict[int, Tensor], *, cp: ContextParallel) -> dict[int, Tensor]:
    """Sends to and receives from ranks of the group, those beyond its ends excepted; returns what was received."""
    inside = range(cp.size)
    wanted = {rank: buffer for rank, buffer in wanted.items() if rank in inside}
    operations = [
        dist.P2POp(operation, tensor, group=cp.group, group_peer=rank)
        for operation, tensors in ((dist.isend, sent), (dist.irecv, wanted))
        for rank, tensor in tensors.items()
        if rank in inside
    ]
    for request in dist.batch_isend_irecv(operations) if operations else ():
        request.wait()
    return wanted


def state_at_start(decay: Tensor, reached: Tensor, *, cp: ContextParallel) -> Tensor:
    """The state at the start of this rank's part of a sequence, of a recurrence that is linear in its state.

    Over its part a rank's state becomes decay * state + reached. Differentiable, and collective in both directions on
    every rank: the first rank's state is zero and yet it takes part.

    Args:
        decay, reached: of this rank's part, of one shape on all ranks.

    Returns:
        A tensor of that shape; zeros on the first rank.
    """
    return _StateAtStart.apply(torch.stack((decay, reached)), cp)


class _StateAtStart(torch.autograd.Function):
    @staticmethod
    def forward(ctx, own: Tensor, cp: ContextParallel) -> Tensor:
        ctx.cp = cp
        gathered = own.new_empty(cp.size, *own.shape)
        dist.all_gather_into_tensor(gathered.flatten(0, 1), own.contiguous(), group=cp.group)
        ctx.save_for_backward(gathered)
        return _states(gathered, cp.rank)[-1]

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, None]:
        cp, (gathered,) = ctx.cp, ctx.saved_tensors
        states = _states(gathered, cp.rank)
        gradients = torch.zeros_like(gathered)
        for rank in reversed(range(cp.rank)):
            gradients[rank, 0] = gradient * states[rank]
            gradients[rank, 1] = gradient
            gradient = gradient * gathered[rank, 0]
        own = torch.empty_like(gathered[0])
        dist.reduce_scatter_tensor(own, gradients.flatten(0, 1), group=cp.group)
        return own, None


def _states(gathered: Tensor, rank: int) -> list[Tensor]:
    """The states at the start of each rank's part up to `rank`, from decays and reached states [ranks, 2, ...]."""
    states = [torch.zeros_like(gathered[0, 1])]
    for decay, reached in gathered[:rank]:
        states.append(decay * states[-1] + reached)
    return states
