"""Mamba's convolution and recurrence for one token a row, on states that are updated in place.

B: rows, D: channels, N: states.
"""

import triton
import triton.language as tl
from torch import Tensor

CONV_CHANNELS = 256
SCAN_CHANNELS = 32


def conv_step(x: Tensor, state: Tensor, weight: Tensor, bias: Tensor, out: Tensor) -> None:
    """Writes SiLU(causal convolution) of a further token of each row, and takes the token into the state.

    Args:
        x: [B, D or more] the token.
        state: [B, taps - 1, D] the tokens before, oldest first.
        weight: [D, taps]; bias: [D].
        out: [B, D or more].
    """
    rows, (channels, taps) = len(x), weight.shape
    _convolve[triton.cdiv(channels, CONV_CHANNELS), rows](
        x,
        state,
        weight,
        bias,
        out,
        channels,
        x.stride(0),
        out.stride(0),
        TAPS=taps,
        CHANNELS=CONV_CHANNELS,
        num_warps=2,
    )


@triton.jit
def _convolve(
    x,
    state,
    weight,
    bias,
    out,
    channels,
    x_stride,
    out_stride,
    TAPS: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    row = tl.program_id(1)
    channel = tl.program_id(0) * CHANNELS + tl.arange(0, CHANNELS)
    inside = channel < channels
    token = tl.load(x + row * x_stride + channel, mask=inside)
    total = tl.load(bias + channel, mask=inside, other=0.0).to(tl.float32)
    total += token.to(tl.float32) * tl.load(weight + channel * TAPS + TAPS - 1, mask=inside, other=0.0).to(tl.float32)
    place = state + row * (TAPS - 1) * channels + channel
    for tap in tl.static_range(TAPS - 1):
        before = tl.load(place + tap * channels, mask=inside, other=0.0)
        total += before.to(tl.float32) * tl.load(weight + channel * TAPS + tap, mask=inside, other=0.0).to(tl.float32)
        if tap > 0:
            tl.store(place + (tap - 1) * channels, before, mask=inside)
    if TAPS > 1:
        tl.store(place + (TAPS - 2) * channels, token, mask=inside)
    tl.store(out + row * out_stride + channel, total * tl.sigmoid(total), mask=inside)


def scan_step(
    u: Tensor,
    z: Tensor,
    projected: Tensor,
    *,
    dt_weight: Tensor,
    dt_bias: Tensor,
    A_log: Tensor,
    D: Tensor,
    state: Tensor,
    out: Tensor,
) -> None:
    """Writes the gated scan's output for a further token of each row; the state goes on by it.

    Args:
        u, z: [B, D or more] the convolution's output and the gate.
        projected: [B, rank + 2 N or more] what x_proj makes of u: the step's factor, then B and C.
        dt_weight: [D, rank]; dt_bias: [D] fp32. The product is rounded to u's dtype, as where it is computed apart.
        A_log: [D, N] fp32; D: [D] fp32.
        state: fp32 [B, D, N].
        out: [B, D or more].
    """
    rows, (channels, rank), states = len(u), dt_weight.shape, A_log.shape[1]
    _scan[triton.cdiv(channels, SCAN_CHANNELS), rows](
        u,
        z,
        projected,
        dt_weight,
        dt_bias,
        A_log,
        D,
        state,
        out,
        channels,
        rank,
        states,
        u.stride(0),
        z.stride(0),
        projected.stride(0),
        out.stride(0),
        RANK=triton.next_power_of_2(rank),
        STATES=triton.next_power_of_2(states),
        CHANNELS=SCAN_CHANNELS,
        num_warps=1,
    )


@triton.jit
def _scan(
    u,
    z,
    projected,
    dt_weight,
    dt_bias,
    A_log,
    D,
    state,
    out,
    channels,
    rank,
    states,
    u_stride,
    z_stride,
    projected_stride,
    out_stride,
    RANK: tl.constexpr,
    STATES: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    row = tl.program_id(1)
    channel = tl.program_id(0) * CHANNELS + tl.arange(0, CHANNELS)
    number, factor = tl.arange(0, STATES), tl.arange(0, RANK)
    inside, is_state, is_factor = channel < channels, number < states, factor < rank
    projected += row * projected_stride
    at = channel[:, None] * rank + factor[None, :]
    weights = tl.load(dt_weight + at, mask=inside[:, None] & is_factor[None, :], other=0.0).to(tl.float32)
    factors = tl.load(projected + factor, mask=is_factor, other=0.0).to(tl.float32)
    dt = tl.sum(weights * factors[None, :], 1).to(u.dtype.element_ty).to(tl.float32)
    dt = _softplus(dt + tl.load(dt_bias + channel, mask=inside, other=0.0))
    at = channel[:, None] * states + number[None, :]
    both = inside[:, None] & is_state[None, :]
    rates = -tl.exp(tl.load(A_log + at, mask=both, other=0.0))
    enters = tl.load(projected + rank + number, mask=is_state, other=0.0).to(tl.float32)
    leaves = tl.load(projected + rank + states + number, mask=is_state, other=0.0).to(tl.float32)
    token = tl.load(u + row * u_stride + channel, mask=inside, other=0.0).to(tl.float32)
    state += row.to(tl.int64) * channels * states
    values = tl.load(state + at, mask=both, other=0.0)
    values = tl.exp(dt[:, None] * rates) * values + (dt * token)[:, None] * enters[None, :]
    tl.store(state + at, values, mask=both)
    total = tl.sum(values * leaves[None, :], 1) + tl.load(D + channel, mask=inside, other=0.0) * token
    gate = tl.load(z + row * z_stride + channel, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + row * out_stride + channel, total * gate * tl.sigmoid(gate), mask=inside)


@triton.jit
def _softplus(x):
    # log(1 + e) loses the digits of a small e, which the factor gives back.
    e = tl.exp(-tl.abs(x))
    sum = 1 + e
    log = tl.where(sum == 1, e, tl.log(sum) * (e / tl.where(sum == 1, 1.0, sum - 1)))
    return tl.maximum(x, 0.0) + log
