"""The gated delta rule in plain PyTorch: with one decay a head it is Gated DeltaNet's, with one a channel Kimi's.

Each head has a matrix as its state. A token decays it, takes from it what it holds under the token's key, and writes
the token's value there (arXiv 2412.06464, equation 10; arXiv 2510.26692, equation 1):

    decayed = exp(g) * state,  state = decayed + beta * k (v - k^T decayed)^T,  y = q^T state / sqrt(K)

Within a chunk the values that are written solve a triangular system (the WY representation, arXiv 2406.06484), so that
everything else is products of matrices. No exponent is ever positive, whatever decays are.

B: batch, L: length, H: heads, K and V: channels of a key and a value, C: tokens of a chunk.
"""

import math
from collections.abc import Iterable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

CHUNK_TOKENS = 64
BLOCK_TOKENS = 16  # within which decays of channels are taken for each pair of tokens
NORM_EPS = 1e-6  # flash-linear-attention's, of the squared length


def gated_delta_rule(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    gate: Tensor,
    beta: Tensor,
    *,
    A_log: Tensor,
    dt_bias: Tensor,
    initial_state: Tensor | None = None,
    resets: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Runs the rule over a sequence, in fp32 (fp64 for fp64).

    Args:
        q, k: [B, L, H, K], which get the length 1 here. v: [B, L, H, V].
        gate: [B, L, H] or [B, L, H, K]; the log of the decay is -exp(A_log) * softplus(gate + dt_bias).
        beta: [B, L, H], before its sigmoid.
        A_log: [H]. dt_bias: of gate's last dimensions, [H] or [H, K].
        initial_state: [B, H, K, V]; zeros when None.
        resets: bool [B, L], True for tokens before which the state is dropped; none when None.

    Returns:
        The output [B, L, H, V] in v's dtype and the final state [B, H, K, V] in fp32.
    """
    work = torch.promote_types(q.dtype, torch.float32)
    if initial_state is None:
        initial_state = q.new_zeros(len(q), *q.shape[2:], v.shape[3], dtype=work)
    inputs = (q, k, v, gate, beta, A_log.to(work), dt_bias.to(work), initial_state.to(work), resets)
    if torch.is_grad_enabled() and not torch.compiler.is_compiling():  # a compiler finds a backward of its own
        return _DeltaRule.apply(*inputs)
    y, state, _ = _rule(*inputs)
    return y, state


class _DeltaRule(torch.autograd.Function):
    """Keeps its inputs and the states between chunks, and computes each chunk again in the backward."""

    @staticmethod
    def forward(ctx: Any, *inputs: Tensor | None) -> tuple[Tensor, Tensor]:
        y, state, states = _rule(*inputs)  # type: ignore[arg-type]
        *given, _, resets = inputs
        ctx.save_for_backward(*given, resets, *states)
        return y, state

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_y: Tensor, grad_state: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, gate, beta, A_log, dt_bias, resets, *states = ctx.saved_tensors  # recomputation unpacks them once
        sequences = (q, k, v, gate, beta)
        grads = [torch.empty_like(t) for t in sequences]
        grad_rates, grad_bias = torch.zeros_like(A_log), torch.zeros_like(dt_bias)
        for state, span in reversed(list(zip(states, _spans(grad_y.shape[1]), strict=True))):
            given = [t.detach().requires_grad_() for t in (*(t[:, span] for t in sequences), A_log, dt_bias, state)]
            with torch.enable_grad():
                rates, bias, before = given[5:]
                results = _chunk(given[:5], rates, bias, before, None if resets is None else resets[:, span])
            found = torch.autograd.grad(results, given, (grad_y[:, span], grad_state))
            *found_sequences, found_rates, found_bias, grad_state = found
            for whole, part in zip(grads, found_sequences, strict=True):
                whole[:, span] = part
            grad_rates += found_rates
            grad_bias += found_bias
        return *grads, grad_rates, grad_bias, grad_state, None


def _rule(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    gate: Tensor,
    beta: Tensor,
    A_log: Tensor,
    dt_bias: Tensor,
    state: Tensor,
    resets: Tensor | None,
) -> tuple[Tensor, Tensor, list[Tensor]]:
    """Returns the output, the state after the last token and the states before each chunk."""
    y, states = torch.empty_like(v), []
    for span in _spans(q.shape[1]):
        states.append(state)
        parts = (t[:, span] for t in (q, k, v, gate, beta))
        y[:, span], state = _chunk(parts, A_log, dt_bias, state, None if resets is None else resets[:, span])
    return y, state, states


def _spans(length: int) -> Iterator[slice]:
    return (slice(start, min(start + CHUNK_TOKENS, length)) for start in range(0, length, CHUNK_TOKENS))


def _chunk(
    sequences: Iterable[Tensor], A_log: Tensor, dt_bias: Tensor, state: Tensor, resets: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Runs the rule over one chunk of q, k, v, gate and beta. Returns output and state."""
    q, k, v, gate, beta = sequences
    dtype, work, per_channel = v.dtype, state.dtype, gate.dim() == 4
    q, k, v, gate, beta = (t.to(work) for t in (q, k, v, gate, beta))
    rates = A_log.exp().unsqueeze(-1) if per_channel else A_log.exp()
    decays_BHCK = (-rates * F.softplus(gate + dt_bias)).transpose(1, 2)
    if not per_channel:
        decays_BHCK = decays_BHCK.unsqueeze(-1)
    q, k, v, beta = (
        t.transpose(1, 2) for t in (_of_length_one(q) / math.sqrt(q.shape[-1]), _of_length_one(k), v, beta)
    )
    beta = beta.sigmoid().unsqueeze(-1)
    # From the chunk's beginning to each token, itself included; fp32 would lose what differs after a strong decay.
    total = decays_BHCK.double().cumsum(2)
    since_start, until_end = (exponents.to(work).exp() for exponents in (total, total[:, :, -1:] - total))
    kept = since_start[:, :, -1].unsqueeze(-1)
    if resets is not None:
        documents = resets.cumsum(1)
        since_start = since_start.masked_fill((documents > 0)[:, None, :, None], 0)
        until_end = until_end.masked_fill((documents < documents[:, -1:])[:, None, :, None], 0)
        kept = kept.masked_fill((documents[:, -1] > 0)[:, None, None, None], 0)
    of_keys, of_queries = (_scores(t, k, total, per_channel=per_channel) for t in (k, q))
    if resets is not None:
        others = (documents.unsqueeze(2) != documents.unsqueeze(1)).unsqueeze(1)
        of_keys, of_queries = (scores.masked_fill(others, 0) for scores in (of_keys, of_queries))
    wanted = beta * (v - (k * since_start) @ state)
    written = torch.linalg.solve_triangular((beta * of_keys).tril(-1), wanted, upper=False, unitriangular=True)
    y = (q * since_start) @ state + of_queries @ written
    state = kept * state + (k * until_end).transpose(2, 3) @ written
    return y.transpose(1, 2).to(dtype), state


def _of_length_one(x: Tensor) -> Tensor:
    return x * torch.rsqrt(x.square().sum(-1, keepdim=True) + NORM_EPS)


def _scores(x: Tensor, k: Tensor, total: Tensor, *, per_channel: bool) -> Tensor:
    """Products [B, H, C, C] of each token's x with the keys up to its own, as they have decayed until then."""
    tokens = x.shape[2]
    if not per_channel:
        return x @ k.transpose(2, 3) * _decay_between(total, total, k.dtype).squeeze(-1)
    rows = []
    for start in range(0, tokens, BLOCK_TOKENS):
        block = slice(start, min(start + BLOCK_TOKENS, tokens))
        x_block, until = x[:, :, block], total[:, :, block]
        pairs = _decay_between(until, until, k.dtype)
        row = [torch.einsum("bhik,bhjk,bhijk->bhij", x_block, k[:, :, block], pairs)]
        if start:  # what decays from a key to the block, and from there to a query, are two factors
            at_block = total[:, :, start - 1 : start]
            earlier = k[:, :, :start] * (at_block - total[:, :, :start]).to(k.dtype).exp()
            row.insert(0, x_block * (until - at_block).to(k.dtype).exp() @ earlier.transpose(2, 3))
        rows.append(F.pad(torch.cat(row, dim=-1), (0, tokens - block.stop)))
    return torch.cat(rows, dim=2)


def _decay_between(later: Tensor, earlier: Tensor, dtype: torch.dtype) -> Tensor:
    """exp(later - earlier) [B, H, C, C, K] of each pair of tokens in order; zero for others."""
    exponents = (later.unsqueeze(3) - earlier.unsqueeze(2)).to(dtype)
    after = torch.ones(exponents.shape[2:4], dtype=torch.bool, device=later.device).triu(1)
    return exponents.masked_fill(after.unsqueeze(-1), -torch.inf).exp()
