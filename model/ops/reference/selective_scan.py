"""The selective scan of Mamba-1 (arXiv 2312.00752, section 3.3) in plain PyTorch, for CPU, tests and the HF model.

    h_t = exp(dt_t * A) * h_{t-1} + dt_t * B_t * u_t        y_t = C_t . h_t

Time is cut into chunks. Within a chunk everything but the recurrence itself is one vectorised operation over all its
tokens, and the recurrence is one fused multiply-add a token on contiguous memory. The backward keeps only the states
at the chunk borders and recomputes the rest, so memory is bounded by a few chunks whatever the length.
"""

import math
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

# A chunk's [tokens, batch, d_state, channels] buffers hold about this many elements, by device: large enough that a
# PyTorch call costs little beside its work; on a CPU small enough that the three live buffers stay near the cache.
CHUNK_ELEMENTS = {"cpu": 1 << 18, "cuda": 1 << 25}
MAX_CHUNK_TOKENS = 128


def selective_scan(
    u: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    initial_state: Tensor | None = None,
    *,
    resets: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Runs the recurrence over a whole sequence, differentiably in every argument and in both results.

    Args:
        u: input, [batch, length, channels].
        dt: step sizes after the softplus, positive, [batch, length, channels].
        A: state decay rates, negative, [channels, d_state].
        B, C: input and output projections of the state, [batch, length, d_state].
        initial_state: the state before the first token, [batch, channels, d_state]; zeros when None.
        resets: bool [batch, length], True for tokens before which the state is dropped; none when None.

    Returns:
        y [batch, length, channels] in u's dtype, and the state after the last token [batch, channels, d_state] in fp32
        (fp64 when the inputs are). The state is computed in that dtype whatever the inputs' dtype.
    """
    batch, _, channels = u.shape
    if initial_state is None:
        initial_state = u.new_zeros(batch, channels, A.shape[1])
    work = torch.promote_types(u.dtype, torch.float32)
    inputs = [t.to(work) for t in (u, dt, A, B, C, initial_state)]
    if u.shape[1] == 1 and resets is None:
        y, state = _step(*inputs)
    else:
        y, state = _SelectiveScan.apply(*inputs, resets)
    return y.to(u.dtype), state


def _step(u: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
    """The scan of a single token, in a handful of operations that torch.compile fuses into one."""
    dt_BD1 = dt.transpose(1, 2)
    state = torch.addcmul(B * (dt * u).transpose(1, 2), torch.exp2(dt_BD1 * (A * math.log2(math.e))), state)
    return (state * C).sum(-1).unsqueeze(1), state


class _SelectiveScan(torch.autograd.Function):
    """Inside, time comes first and channels last ([time, batch, d_state, channels]): the innermost loop is long."""

    @staticmethod
    def forward(
        ctx: Any,
        u: Tensor,
        dt: Tensor,
        A: Tensor,
        B: Tensor,
        C: Tensor,
        initial_state: Tensor,
        resets: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        ctx.chunk_tokens = _chunk_tokens(u, d_state=A.shape[1])
        inputs = (u, dt, B, C, resets)
        u, dt, B, C, resets = map(_time_first, inputs)
        chunks = _Chunks(u, A, tokens=ctx.chunk_tokens)
        state = initial_state.transpose(1, 2).contiguous()
        y = torch.empty_like(u)
        border_states = []
        for span in chunks.spans():
            border_states.append(state)
            _, states = chunks.states(state, u[span], dt[span], B[span], resets=_part(resets, span))
            torch.matmul(C[span].unsqueeze(-2), states, out=y[span].unsqueeze(-2))
            state = states[-1].clone()  # the next chunk overwrites it
        ctx.save_for_backward(*inputs, A, *border_states)
        return y.transpose(0, 1), state.transpose(1, 2).contiguous()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_y: Tensor, grad_final_state: Tensor) -> tuple[Tensor | None, ...]:
        u, dt, B, C, resets, A, *border_states = ctx.saved_tensors  # once: recomputation unpacks them a single time
        u, dt, B, C, resets, grad_y = map(_time_first, (u, dt, B, C, resets, grad_y))
        decay_rates = A.t().contiguous()
        chunks = _Chunks(u, A, tokens=ctx.chunk_tokens)
        grads_buffer = chunks.buffer()
        grad_u, grad_dt, grad_B, grad_C = (torch.empty_like(t) for t in (u, dt, B, C))
        grad_decay_rates = torch.zeros_like(decay_rates)
        # The gradient that reaches the last state of a chunk from everything after that chunk.
        grad_state = grad_final_state.transpose(1, 2).contiguous()
        for number, span in reversed(list(enumerate(chunks.spans()))):
            u_c, dt_c, B_c, grad_y_c, border_state = u[span], dt[span], B[span], grad_y[span], border_states[number]
            decay, states = chunks.states(border_state, u_c, dt_c, B_c, resets=_part(resets, span))
            _sum_over_channels(states, grad_y_c, out=grad_C[span])

            grads = torch.mul(C[span].unsqueeze(-1), grad_y_c.unsqueeze(-2), out=grads_buffer[: len(u_c)])
            # Decays turn into what reaches the state before each token, which is the gradient at that token's decay.
            before = decay
            for grad, before_token in zip(reversed(grads.unbind()), reversed(before.unbind()), strict=True):
                grad_state = before_token.mul_(grad.add_(grad_state))
            grad_state = grad_state.clone()  # the next lines overwrite it

            dt_u = dt_c * u_c
            _sum_over_channels(grads, dt_u, out=grad_B[span])
            grad_input = torch.matmul(B_c.unsqueeze(-2), grads).squeeze(-2)  # of dt * u
            torch.mul(grad_input, dt_c, out=grad_u[span])

            before[0].mul_(border_state)  # and now into the gradient of dt * A
            before[1:].mul_(states[:-1])
            # Products and sums, not einsum: its batched matrix products of width one are 15 times slower here.
            grad_decay_rates += torch.mul(before, dt_c.unsqueeze(-2), out=grads).sum((0, 1))
            before.mul_(decay_rates)
            torch.sum(before, -2, out=grad_dt[span]).addcmul_(grad_input, u_c)
        grads_batch_first = (t.transpose(0, 1) for t in (grad_u, grad_dt))
        return (
            *grads_batch_first,
            grad_decay_rates.t(),
            grad_B.transpose(0, 1),
            grad_C.transpose(0, 1),
            grad_state.transpose(1, 2),
            None,
        )


class _Chunks:
    """The sequence in chunks, and the buffers in which their states are computed, which every chunk overwrites."""

    def __init__(self, u: Tensor, A: Tensor, *, tokens: int) -> None:
        """
        Args:
            u: the input, [time, batch, channels]. A: [channels, d_state].
        """
        self.length, self.tokens = len(u), min(tokens, len(u))
        self.like, self.shape = u, (self.tokens, u.shape[1], A.shape[1], u.shape[2])
        self.decay_exponents = A.t().contiguous() * math.log2(math.e)  # exp2 takes half of exp's time on a CPU
        self.decay, self.inputs = self.buffer(), self.buffer()

    def buffer(self) -> Tensor:
        """One for [time, batch, d_state, channels] of a chunk."""
        return self.like.new_empty(self.shape)

    def spans(self) -> Iterator[slice]:
        return (slice(start, start + self.tokens) for start in range(0, self.length, self.tokens))

    def states(
        self, state: Tensor, u: Tensor, dt: Tensor, B: Tensor, *, resets: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Decays and states of one chunk, both [time, batch, d_state, channels], from the state before it."""
        decay = torch.mul(dt.unsqueeze(-2), self.decay_exponents, out=self.decay[: len(u)]).exp2_()
        if resets is not None:  # a decay of 0, and so no gradient through it either
            decay.masked_fill_(resets[:, :, None, None], 0)
        states = torch.mul(B.unsqueeze(-1), (dt * u).unsqueeze(-2), out=self.inputs[: len(u)])
        for inputs, decay_at_token in zip(states.unbind(), decay.unbind(), strict=True):
            state = inputs.addcmul_(decay_at_token, state)
        return decay, states


def _chunk_tokens(u: Tensor, *, d_state: int) -> int:
    elements_per_token = u.shape[0] * u.shape[2] * d_state
    return max(1, min(MAX_CHUNK_TOKENS, CHUNK_ELEMENTS[u.device.type] // elements_per_token))


def _time_first(x: Any) -> Any:
    return None if x is None else x.transpose(0, 1).contiguous()


def _part(resets: Tensor | None, span: slice) -> Tensor | None:
    return None if resets is None else resets[span]


def _sum_over_channels(states: Tensor, x: Tensor, *, out: Tensor) -> None:
    """Sum over channels of [time, batch, d_state, channels] times [time, batch, channels]."""
    # In this order: with x as the right matrix, of one column, the product takes eight times as long on a CPU.
    torch.matmul(x.unsqueeze(-2), states.transpose(-1, -2), out=out.unsqueeze(-2))


def gated_selective_scan(
    u: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    *,
    D: Tensor,
    z: Tensor | None,
    dt_bias: Tensor | None,
    initial_state: Tensor | None = None,
    resets: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The scan with what surrounds it in Mamba-1: softplus(dt + dt_bias), the skip D * u and the gate SiLU(z).

    Args:
        u, dt, z: [batch, length, channels]; dt is before its bias and softplus. Without z the output has no gate.
        A: [channels, d_state], fp32. B, C: [batch, length, d_state].
        D, dt_bias: [channels], fp32. dt_bias is None where dt has it already.
        initial_state: [batch, channels, d_state]; zeros when None.
        resets: bool [batch, length], True for tokens before which the state is dropped; none when None.

    Returns:
        The output [batch, length, channels] in u's dtype and the final state [batch, channels, d_state] in fp32.
    """
    work = torch.promote_types(u.dtype, torch.float32)
    u_work = u.to(work)
    steps = F.softplus(dt.to(work) if dt_bias is None else dt.to(work) + dt_bias)
    y, state = selective_scan(u_work, steps, A, B, C, initial_state, resets=resets)
    y = y + D * u_work
    return (y if z is None else y * F.silu(z.to(work))).to(u.dtype), state
