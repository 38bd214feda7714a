"""The scan of Mamba-2 (state space duality, arXiv 2405.21060, section 6) in plain PyTorch.

    h_t = exp(dt_t * A) * h_{t-1} + dt_t * x_t B_t^T        y_t = h_t C_t + D * x_t

A is one number a head, so that within a chunk of tokens outputs are products of matrices: of each token with those
before it, weighted by the decays between them. Chunks pass states on. The backward keeps the states at the chunk
borders and computes the rest again, so memory is bounded by a few chunks whatever the length.

b: batch, t, s: tokens of a chunk, g: groups of heads, h: heads of a group, p: a head's channels, n: states.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from sambalm.model.ops.reference.chunks import run_in_chunks

CHUNK_TOKENS = 64


def ssd_scan(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    *,
    D: Tensor,
    dt_bias: Tensor,
    initial_state: Tensor | None = None,
    resets: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Runs the recurrence over a whole sequence, differentiably in every argument and in both results.

    Args:
        x: input, [batch, length, heads, head_dim].
        dt: step sizes before their bias and softplus, [batch, length, heads].
        A: decay rates, negative, [heads], fp32.
        B, C: input and output projections of the state, [batch, length, groups, d_state]. Neighbouring heads share a
            group.
        D, dt_bias: the skip and the bias of the step sizes, [heads], fp32.
        initial_state: the state before the first token, [batch, heads, head_dim, d_state]; zeros when None.
        resets: bool [batch, length], True for tokens before which the state is dropped; none when None.

    Returns:
        y [batch, length, heads, head_dim] in x's dtype, and the state after the last token in fp32 (fp64 when x is),
        in which all is computed whatever x's dtype.
    """
    if initial_state is None:
        work = torch.promote_types(x.dtype, torch.float32)
        initial_state = x.new_zeros(x.shape[0], *x.shape[2:], B.shape[3], dtype=work)
    sequences, weights = (x, dt, B, C), (A, D, dt_bias)
    return run_in_chunks(_chunk, sequences, weights, initial_state, resets, like=x, chunk_tokens=CHUNK_TOKENS)


def _chunk(
    tokens: Sequence[Tensor], weights: Sequence[Tensor], state: Tensor, resets: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Returns the output of a chunk's tokens and the state after them.

    Args:
        tokens: x, dt, B and C. weights: A, D and dt_bias.
    """
    (x, dt, B, C), (A, D, dt_bias) = tokens, weights
    groups, dtype, work = B.shape[2], x.dtype, state.dtype
    steps = F.softplus(dt.to(work) + dt_bias)
    x, B, C = (t.to(work) for t in (x, B, C))
    within, from_start = _decays(steps * A, resets)  # [b, heads, t, s], [b, heads, t]
    within, from_start = within.unflatten(1, (groups, -1)), from_start.unflatten(1, (groups, -1))
    inputs = (x * steps.unsqueeze(-1)).unflatten(2, (groups, -1))
    state = state.unflatten(1, (groups, -1))
    seen = torch.einsum("btgn,bsgn->bgts", C, B).unsqueeze(2) * within
    y = torch.einsum("bghts,bsghp->btghp", seen, inputs)
    y = y + torch.einsum("btgn,bghpn,bght->btghp", C, state, from_start)
    kept = state * from_start[..., -1, None, None]
    state = kept + torch.einsum("bsgn,bsghp,bghs->bghpn", B, inputs, within[..., -1, :])
    return (y.flatten(2, 3) + D.unsqueeze(-1) * x).to(dtype), state.flatten(1, 2)


def _decays(exponents: Tensor, resets: Tensor | None) -> tuple[Tensor, Tensor]:
    """Returns what is left at each token t of another's contribution and of the state before the chunk.

    Exponents are summed between each two tokens, for differences of sums from the start would lose digits.

    Args:
        exponents: [b, t, heads].

    Returns:
        [b, heads, t, s], zeros for a later s, and [b, heads, t].
    """
    exponents = exponents.transpose(1, 2)
    length = exponents.shape[-1]
    is_later = torch.ones(length, length, dtype=torch.bool, device=exponents.device).tril(-1)
    sums = exponents.unsqueeze(-1).expand(*exponents.shape, length).masked_fill(~is_later, 0).cumsum(-2)
    unseen, forgotten = ~is_later.logical_or(torch.eye(length, dtype=torch.bool, device=sums.device)), None
    if resets is not None:
        document = resets.cumsum(1)
        unseen = (unseen | (document.unsqueeze(2) != document.unsqueeze(1))).unsqueeze(1)
        forgotten = (document > 0).unsqueeze(1)
    within = sums.masked_fill(unseen, -torch.inf).exp()
    from_start = exponents.cumsum(-1).exp()
    return within, from_start if forgotten is None else from_start.masked_fill(forgotten, 0)
