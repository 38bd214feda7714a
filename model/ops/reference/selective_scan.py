"""The selective scan of Mamba-1 (arXiv 2312.00752, section 3.3) in plain PyTorch, for CPU, tests and the HF model.

    h_t = exp(dt_t * A) * h_{t-1} + dt_t * B_t * u_t        y_t = C_t . h_t

Time is cut into chunks. Within a chunk everything but the recurrence itself is one vectorised operation over all its
tokens, and the recurrence is one fused multiply-add a token on contiguous memory. The backward keeps only the states
at the chunk borders and recomputes the rest, so memory is bounded by a few chunks whatever the length.
"""

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
    y, state = _SelectiveScan.apply(*(t.to(work) for t in (u, dt, A, B, C, initial_state)), resets)
    return y.to(u.dtype), state


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
        length = u.shape[1]
        chunk_tokens = _chunk_tokens(u, d_state=A.shape[1])
        decay_rates = A.t().contiguous()
        state = initial_state.transpose(1, 2).contiguous()
        y = torch.empty_like(u, memory_format=torch.contiguous_format)
        border_states = []
        for start in range(0, length, chunk_tokens):
            border_states.append(state)
            span = slice(start, start + chunk_tokens)
            u_c, dt_c, B_c, C_c = (_time_first(t[:, span]) for t in (u, dt, B, C))
            _, states = _chunk_states(state, u_c, dt_c, decay_rates, B_c, resets=_of_chunk(resets, span))
            y[:, span] = torch.matmul(C_c.unsqueeze(-2), states).squeeze(-2).transpose(0, 1)
            state = states[-1].clone()  # a view would keep the whole chunk alive
        ctx.save_for_backward(u, dt, A, B, C, resets, *border_states)
        ctx.chunk_tokens = chunk_tokens
        return y, state.transpose(1, 2).contiguous()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_y: Tensor, grad_final_state: Tensor) -> tuple[Tensor | None, ...]:
        u, dt, A, B, C, resets, *border_states = ctx.saved_tensors
        decay_rates = A.t().contiguous()
        grad_u, grad_dt, grad_B, grad_C = (
            torch.empty_like(t, memory_format=torch.contiguous_format) for t in (u, dt, B, C)
        )
        grad_decay_rates = torch.zeros_like(decay_rates)
        # The gradient that reaches the last state of a chunk from everything after that chunk.
        grad_state = grad_final_state.transpose(1, 2).contiguous()
        for chunk in reversed(range(len(border_states))):
            span = slice(chunk * ctx.chunk_tokens, (chunk + 1) * ctx.chunk_tokens)
            u_c, dt_c, B_c, C_c, grad_y_c = (_time_first(t[:, span]) for t in (u, dt, B, C, grad_y))
            chunk_resets = _of_chunk(resets, span)
            decay, states = _chunk_states(border_states[chunk], u_c, dt_c, decay_rates, B_c, resets=chunk_resets)
            grad_C[:, span] = _over_channels(states, grad_y_c)

            grads = C_c.unsqueeze(-1) * grad_y_c.unsqueeze(-2)  # [time, batch, d_state, channels]
            grads[-1] += grad_state
            for t in range(len(grads) - 2, -1, -1):
                grads[t].addcmul_(decay[t + 1], grads[t + 1])
            grad_state = decay[0] * grads[0]

            grad_B[:, span] = _over_channels(grads, dt_c * u_c)
            grad_input = torch.matmul(B_c.unsqueeze(-2), grads).squeeze(-2)  # of dt * u
            grad_u[:, span] = (grad_input * dt_c).transpose(0, 1)

            grads *= decay  # now the gradient of dt * A, once multiplied by the state before
            grads[1:] *= states[:-1]
            grads[0] *= border_states[chunk]
            # Products and sums, not einsum: its batched matrix products of width one are 15 times slower here.
            grad_decay_rates += (grads * dt_c.unsqueeze(-2)).sum((0, 1))
            grad_dt[:, span] = (grad_input * u_c + (grads * decay_rates).sum(-2)).transpose(0, 1)
        return grad_u, grad_dt, grad_decay_rates.t(), grad_B, grad_C, grad_state.transpose(1, 2), None


def _chunk_tokens(u: Tensor, *, d_state: int) -> int:
    elements_per_token = u.shape[0] * u.shape[2] * d_state
    return max(1, min(MAX_CHUNK_TOKENS, CHUNK_ELEMENTS[u.device.type] // elements_per_token))


def _time_first(x: Tensor) -> Tensor:
    return x.transpose(0, 1).contiguous()


def _of_chunk(resets: Tensor | None, span: slice) -> Tensor | None:
    return None if resets is None else _time_first(resets[:, span])


def _chunk_states(
    state: Tensor, u: Tensor, dt: Tensor, decay_rates: Tensor, B: Tensor, *, resets: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Decays and states of one chunk, both [time, batch, d_state, channels], from the state before it."""
    decay = torch.exp_(dt.unsqueeze(-2) * decay_rates)
    if resets is not None:  # a decay of 0, and so no gradient through it either
        decay.masked_fill_(resets[:, :, None, None], 0)
    states = B.unsqueeze(-1) * (dt * u).unsqueeze(-2)
    for t in range(len(states)):
        states[t].addcmul_(decay[t], state)
        state = states[t]
    return decay, states


def _over_channels(states: Tensor, x: Tensor) -> Tensor:
    """Sum over channels of [time, batch, d_state, channels] times [time, batch, channels], batch first."""
    return torch.matmul(states, x.unsqueeze(-1)).squeeze(-1).transpose(0, 1)


def gated_selective_scan(
    u: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    *,
    D: Tensor,
    z: Tensor,
    dt_bias: Tensor,
    initial_state: Tensor | None = None,
    resets: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The scan with what surrounds it in Mamba-1: softplus(dt + dt_bias), the skip D * u and the gate SiLU(z).

    Args:
        u, dt, z: [batch, length, channels]; dt is before its bias and softplus.
        A: [channels, d_state], fp32. B, C: [batch, length, d_state].
        D, dt_bias: [channels], fp32.
        initial_state: [batch, channels, d_state]; zeros when None.
        resets: bool [batch, length], True for tokens before which the state is dropped; none when None.

    Returns:
        The gated output [batch, length, channels] in u's dtype and the final state [batch, channels, d_state] in fp32.
    """
    work = torch.promote_types(u.dtype, torch.float32)
    u_work = u.to(work)
    steps = F.softplus(dt.to(work) + dt_bias)
    y, state = selective_scan(u_work, steps, A, B, C, initial_state, resets=resets)
    return ((y + D * u_work) * F.silu(z.to(work))).to(u.dtype), state
