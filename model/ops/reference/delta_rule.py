"""The gated delta rule in plain PyTorch: with one decay a head it is Gated DeltaNet's, with one a channel Kimi's.

Each head has a matrix as its state. A token decays it, takes from it what it holds under the token's key, and writes
the token's value there (arXiv 2412.06464, equation 10; arXiv 2510.26692, equation 1):

    decayed = exp(g) * state,  state = decayed + beta * k (v - k^T decayed)^T,  y = q^T state / sqrt(K)

Within a chunk the values that are written solve a triangular system (the WY representation, arXiv 2406.06484), so that
everything else is products of matrices. No exponent is ever positive, whatever decays are.

B: batch, L: length, H: heads, K and V: channels of a key and a value, C: tokens of a chunk.
"""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from sambalm.model.ops.reference.chunks import ChunkDecays, run_in_chunks

CHUNK_TOKENS = 64
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
    weights = (A_log.to(work), dt_bias.to(work))
    sequences, state = (q, k, v, gate, beta), initial_state.to(work)
    return run_in_chunks(_chunk, sequences, weights, state, resets, like=v, chunk_tokens=CHUNK_TOKENS)


def _chunk(
    sequences: Sequence[Tensor], weights: Sequence[Tensor], state: Tensor, resets: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Runs the rule over one chunk of q, k, v, gate and beta. Returns output and state."""
    (q, k, v, gate, beta), (A_log, dt_bias) = sequences, weights
    dtype, work, per_channel = v.dtype, state.dtype, gate.dim() == 4
    q, k, v, gate, beta = (t.to(work) for t in (q, k, v, gate, beta))
    rates = A_log.exp().unsqueeze(-1) if per_channel else A_log.exp()
    decays_BHCK = (-rates * F.softplus(gate + dt_bias)).transpose(1, 2)
    decays = ChunkDecays.of(decays_BHCK if per_channel else decays_BHCK.unsqueeze(-1), resets)
    q, k, v, beta = (
        t.transpose(1, 2) for t in (_of_length_one(q) / math.sqrt(q.shape[-1]), _of_length_one(k), v, beta)
    )
    beta = beta.sigmoid().unsqueeze(-1)
    of_keys, of_queries = (decays.scores(t, k) for t in (k, q))
    wanted = beta * (v - (k * decays.since_start) @ state)
    written = torch.linalg.solve_triangular((beta * of_keys).tril(-1), wanted, upper=False, unitriangular=True)
    y = (q * decays.since_start) @ state + of_queries @ written
    state = decays.kept * state + (k * decays.until_end).transpose(2, 3) @ written
    return y.transpose(1, 2).to(dtype), state


def _of_length_one(x: Tensor) -> Tensor:
    return x * torch.rsqrt(x.square().sum(-1, keepdim=True) + NORM_EPS)
