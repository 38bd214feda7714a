"""What ranks that share a sequence tell each other. They hold contiguous parts of it in order, all of one length.

A causal layer that looks back a bounded distance needs the tokens just before its part, from one neighbour or, when
parts are shorter than that distance, from several. A recurrence needs the state at its start. Neither grows with the
length of the sequence.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from sambalm.parallel.groups import ContextParallel


class HaloExchange:
    """The tokens just before this rank's part of a sequence, under way from the ranks before until `wait`.

    Differentiable, and what is computed between making it and `wait` overlaps with the messages in both directions: the
    backward of `wait` posts the gradients' messages, and only the backward of the beginning waits for them.

    Args:
        x: [batch, this rank's tokens, ...], of one shape on all ranks.
        tokens: how many to fetch; near the start of the sequence there are fewer.
    """

    def __init__(self, x: Tensor, tokens: int, *, cp: ContextParallel) -> None:
        self._exchange = _Exchange(tokens, part_tokens=x.shape[1], cp=cp)
        self._pieces = _Post.apply(x, self._exchange)

    def wait(self) -> Tensor:
        """[batch, min(tokens, tokens on the ranks before), ...].

        The loss must depend on it on every rank, also where it is empty: the backward is collective.
        """
        return _Arrive.apply(self._exchange, *self._pieces)


class _Exchange:
    """Messages to the ranks after and from the ranks before, or the other way round."""

    def __init__(self, tokens: int, *, part_tokens: int, cp: ContextParallel) -> None:
        self.group = cp.group
        hops = min(math.ceil(tokens / part_tokens), cp.size - 1)
        portions = {hop: min(part_tokens, tokens - (hop - 1) * part_tokens) for hop in range(1, hops + 1)}
        # Ranks and how many of its last tokens the earlier one of two passes on; in the order of the sequence.
        self.before = [(cp.rank - hop, n) for hop, n in reversed(portions.items()) if hop <= cp.rank]
        self.after = [(cp.rank + hop, n) for hop, n in portions.items() if cp.rank + hop < cp.size]
        self._under_way: list[dist.Work] = []
        self._tensors: tuple[dict[int, Tensor], dict[int, Tensor]] = ({}, {})  # which must live until then

    def post(self, sent: dict[int, Tensor], wanted: dict[int, Tensor]) -> None:
        """Begins to send to ranks and to fill the wanted buffers from ranks."""
        operations = [
            dist.P2POp(operation, tensor, group=self.group, group_peer=rank)
            for operation, tensors in ((dist.isend, sent), (dist.irecv, wanted))
            for rank, tensor in tensors.items()
        ]
        self._tensors = sent, wanted
        self._under_way = dist.batch_isend_irecv(operations) if operations else []

    def wait(self) -> dict[int, Tensor]:
        """What was received, by rank."""
        for request in self._under_way:
            request.wait()
        _, received = self._tensors
        self._under_way, self._tensors = [], ({}, {})
        return received


class _Post(torch.autograd.Function):
    """Sends a rank's last tokens on. The results are empty buffers until `_Arrive`."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, exchange: _Exchange) -> tuple[Tensor, ...]:
        ctx.exchange, ctx.shape = exchange, x.shape
        sent = {rank: x[:, x.shape[1] - n :].contiguous() for rank, n in exchange.after}
        wanted = {rank: x.new_empty(x.shape[0], n, *x.shape[2:]) for rank, n in exchange.before}
        exchange.post(sent, wanted)
        return tuple(wanted.values()) or (torch.empty_like(x[:, :0]),)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor, *_: Tensor) -> tuple[Tensor, None]:
        total = gradient.new_zeros(ctx.shape)
        for part in ctx.exchange.wait().values():
            total[:, ctx.shape[1] - part.shape[1] :] += part
        return total, None


class _Arrive(torch.autograd.Function):
    """Joins what `_Post` asked for. The backward sends the gradients back, for the other ranks' `_Post`."""

    @staticmethod
    def forward(ctx: Any, exchange: _Exchange, *pieces: Tensor) -> Tensor:
        ctx.exchange, ctx.sizes = exchange, [piece.shape[1] for piece in pieces]
        exchange.wait()
        return torch.cat(pieces, dim=1)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        exchange, pieces = ctx.exchange, gradient.split(ctx.sizes, dim=1)
        sent = {rank: piece.contiguous() for (rank, _), piece in zip(exchange.before, pieces, strict=False)}
        wanted = {rank: gradient.new_empty(len(gradient), n, *gradient.shape[2:]) for rank, n in exchange.after}
        exchange.post(sent, wanted)
        return None, *pieces


def scan_of_parts(
    scan: Callable[..., tuple[Tensor, Tensor]],
    *,
    decay: Callable[[], Tensor],
    decay_shape: Sequence[int],
    state_shape: Sequence[int],
    like: Tensor,
    cp: ContextParallel,
) -> Tensor:
    """The scan of this rank's part of the sequence, going on from the states that the ranks before it reach.

    Over its part a rank's state is decay * (state at its start) + (state reached from zero); both factors are found
    locally, gathered, and composed to the state at each rank's start. What is sent does not grow with the sequence. The
    first rank's state is zero, so its scan from zero is the result, and nobody goes on from the last rank's: both scan
    once, the others twice.

    Args:
        scan: a kernel with all its arguments but `initial_state`, which is added where there is one; it returns its
            output and the state after its last token.
        decay: computes what is left of a state after the whole part.
        decay_shape: of what is left, which broadcasts to the state's.
        state_shape: of the state.
        like: a tensor of their dtype and device.

    Returns:
        The scan's output.
    """
    if cp.size == 1:
        return scan()[0]
    zero = like.new_zeros((), requires_grad=True)  # of what nobody reads, so that every rank's backward is collective
    no_decay, no_state = zero.expand(tuple(decay_shape)), zero.expand(tuple(state_shape))
    if cp.rank == 0:
        y, reached = scan()
        return after(y, incoming_state(no_decay, reached, cp=cp))
    own = (no_decay, no_state)
    if cp.rank < cp.size - 1:
        own = (decay(), scan()[1])
    return scan(initial_state=incoming_state(*own, cp=cp))[0]


def incoming_state(decay: Tensor, reached: Tensor, *, cp: ContextParallel) -> Tensor:
    """The state at the start of this rank's part of a sequence, of a recurrence that is linear in its state.

    Over its part a rank's state becomes decay * state + reached. Differentiable, and collective in both directions on
    every rank: the first rank's state is zero and yet it takes part.

    Args:
        decay: what this rank's part leaves of a state, of the dtype of reached and of a shape that broadcasts to its.
        reached: the state that the part comes to from zero, of the same shape on all ranks.

    Returns:
        A tensor of the shape of reached; zeros on the first rank.
    """
    return _IncomingState.apply(decay, reached, cp)


def incoming_matrix_state(transition: Tensor, reached: Tensor, *, cp: ContextParallel) -> Tensor:
    """The state at the start of this rank's part, as `incoming_state`, of a recurrence with a matrix as its state.

    Over its part a rank's state becomes transition @ state + reached.

    Args:
        transition: [..., K, K]. reached: [..., K, V].

    Returns:
        [..., K, V]; zeros on the first rank.
    """
    return _IncomingMatrixState.apply(torch.cat((transition, reached), dim=-1), cp)


def after(result: Tensor, other: Tensor) -> Tensor:
    """The result, with the backward of another tensor run too: a collective one has to be run on every rank."""
    return _After.apply(result, other)


class _After(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, result: Tensor, other: Tensor) -> Tensor:
        ctx.save_for_backward(other)
        return result.view_as(result)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor]:
        (other,) = ctx.saved_tensors
        return gradient, torch.zeros_like(other)


class _IncomingState(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, decay: Tensor, reached: Tensor, cp: ContextParallel) -> Tensor:
        ctx.cp, ctx.shapes = cp, (decay.shape, reached.shape)
        own = torch.cat((decay.flatten(), reached.flatten()))
        gathered = own.new_empty(cp.size, len(own))
        dist.all_gather_into_tensor(gathered.flatten(), own, group=cp.group)
        ctx.save_for_backward(gathered)
        return _states(*_factors(gathered, ctx.shapes), cp.rank)[-1]

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, None]:
        cp, (gathered,) = ctx.cp, ctx.saved_tensors
        decays, reached = _factors(gathered, ctx.shapes)
        states = _states(decays, reached, cp.rank)
        gradients = torch.zeros_like(gathered)
        of_decays, of_reached = _factors(gradients, ctx.shapes)
        for rank in reversed(range(cp.rank)):
            of_decays[rank] = (gradient * states[rank]).sum_to_size(decays[rank].shape)
            of_reached[rank] = gradient
            gradient = gradient * decays[rank]
        own = torch.empty_like(gathered[0])
        dist.reduce_scatter_tensor(own, gradients.flatten(), group=cp.group)
        decay_shape, state_shape = ctx.shapes
        of_decay, of_state = own.split([decay_shape.numel(), state_shape.numel()])
        return of_decay.view(decay_shape), of_state.view(state_shape), None


class _IncomingMatrixState(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, own: Tensor, cp: ContextParallel) -> Tensor:
        ctx.cp = cp
        gathered = own.new_empty(cp.size, *own.shape)
        dist.all_gather_into_tensor(gathered.flatten(0, 1), own.contiguous(), group=cp.group)
        ctx.save_for_backward(gathered)
        return _matrix_states(gathered, cp.rank)[-1]

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        cp, (gathered,) = ctx.cp, ctx.saved_tensors
        states = _matrix_states(gathered, cp.rank)
        gradients = torch.zeros_like(gathered)
        for rank in reversed(range(cp.rank)):
            gradients[rank] = torch.cat((gradient @ states[rank].mT, gradient), dim=-1)
            gradient = gathered[rank, ..., : gathered.shape[-2]].mT @ gradient
        own = torch.empty_like(gathered[0])
        dist.reduce_scatter_tensor(own, gradients.flatten(0, 1), group=cp.group)
        return own, None


def _matrix_states(gathered: Tensor, rank: int) -> list[Tensor]:
    """The states [..., K, V] at the start of each rank's part up to `rank`, from [ranks, ..., K, K + V] of both."""
    transitions, reached = gathered.tensor_split([gathered.shape[-2]], dim=-1)
    states = [torch.zeros_like(reached[0])]
    for number in range(rank):
        states.append(transitions[number] @ states[-1] + reached[number])
    return states


def _factors(gathered: Tensor, shapes: tuple[torch.Size, torch.Size]) -> tuple[Tensor, Tensor]:
    """All ranks' decays and reached states, as views [ranks, ...] of the ranks' numbers side by side."""
    decays, reached = gathered.split([shape.numel() for shape in shapes], dim=1)
    return decays.unflatten(1, shapes[0]), reached.unflatten(1, shapes[1])


def _states(decays: Tensor, reached: Tensor, rank: int) -> list[Tensor]:
    """The states at the start of each rank's part up to `rank`."""
    states = [torch.zeros_like(reached[0])]
    for before in range(rank):
        states.append(decays[before] * states[-1] + reached[before])
    return states
